"""What reading a whole store came to, in a terminal."""

from __future__ import annotations

from elm_lanczos.report.text import printable
from elm_lanczos.verify import Verification


def verification_lines(found: Verification) -> list[str]:
    """Returns one line per problem and per unfinished group of a layer, and a last one with counts.

    Args:
        found: what was found.

    Returns:
        Lines without control characters.
    """
    lines = [printable(str(fault)) for fault in found.faults]
    lines += [
        printable(f"{name}: is not finished, and is made again by `layers --store`")
        for name in found.unfinished
    ]
    counts = [_counted(found.predictions, "prediction"), f"{_counted(found.done, 'row')} done"]
    if found.pending:
        counts.append(f"{found.pending} pending")
    if found.not_converged:
        counts.append(f"{found.not_converged} not converged")
    counts.append(f"{found.recomputed} computed again")
    verdict = _counted(len(found.faults), "problem") if found.faults else "all is well"
    if not found.complete:
        verdict += ", but the run is not complete (go on with --resume)"
    return [*lines, printable(f"{found.path}: {verdict}: {', '.join(counts)}")]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
