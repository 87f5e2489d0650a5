"""Tokens and prompts as text that is safe to show: they are data and may hold anything."""

_JOINERS = "\u200c\u200d"
"""Format characters that join letters and emoji, and can do nothing else."""


def printable(text: str) -> str:
    """Returns text with every control, format and unprintable character escaped but joiners.

    Args:
        text: a token, a prompt or a message that quotes one.

    Returns:
        Text that cannot steer a terminal.
    """
    return "".join(c if c.isprintable() or c in _JOINERS else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def token_text(token: str) -> str:
    """Returns a token with its leading space made visible, as in `␣the`."""
    return printable("␣" + token[1:] if token.startswith(" ") else token)
