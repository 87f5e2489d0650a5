"""Tokens and prompts as text that is safe to show: they are data and may hold anything."""


def printable(text: str) -> str:
    """Returns text with every control, format and unprintable character escaped.

    Args:
        text: a token, a prompt or a message that quotes one.

    Returns:
        Text that cannot steer a terminal.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )


def token_text(token: str) -> str:
    """Returns a token with its leading space made visible, as in `␣the`."""
    return printable("␣" + token[1:] if token.startswith(" ") else token)
