"""Runs the command line; whatever goes wrong ends as one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType
from typing import Any

import typer

from elm_lanczos.cli.app import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USAGE, app
from elm_lanczos.cli.launcher import is_first
from elm_lanczos.errors import ElmLanczosError, PeerError, UsageError


class _Signalled(BaseException):
    """SIGINT or SIGTERM arrived."""


def _raise(number: int, _frame: FrameType | None) -> None:
    raise _Signalled(number)


def main() -> None:
    """Runs the command line; every error is one line and an exit code."""
    for number in _SIGNALS:
        signal.signal(number, _raise)
    try:
        code = app(standalone_mode=False)
    except _CommandLineError as error:
        code = _fail(error.format_message(), EXIT_USAGE, quiet=not is_first())
    except UsageError as error:
        code = _fail(str(error), EXIT_USAGE, quiet=not is_first())
    except PeerError:
        code = EXIT_ERROR
    except ElmLanczosError as error:
        code = _fail(str(error), EXIT_ERROR)
    except _Signalled as error:
        warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that nobody awaits any more
        word, code = _SIGNALS[error.args[0]]
        line = f"{word}; finished rows are kept: go on with --resume --out STORE"
        _fail(line, code, quiet=not is_first())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_ERROR
    except MemoryError as error:
        code = _fail(f"out of memory ({error}): try a smaller --batch or --k", EXIT_ERROR)
    except OSError as error:
        code = _fail(f"{error.strerror or error}: {error.filename or 'output'}", EXIT_ERROR)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except RuntimeError as error:
        from elm_lanczos.chain import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        code = _fail("out of memory: try a smaller --batch or --k", EXIT_ERROR)
    sys.exit(code or 0)


_SIGNALS = {
    signal.SIGINT: ("interrupted", EXIT_INTERRUPTED),
    signal.SIGTERM: ("terminated", EXIT_TERMINATED),
}
_CommandLineError: Any = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)
"""What Typer raises for options it cannot parse (the class itself is not public)."""


def _fail(message: str, code: int, *, quiet: bool = False) -> int:
    from elm_lanczos.report.text import printable

    if not quiet:
        typer.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    return code
