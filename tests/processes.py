"""The command line in processes of its own that need not import everything anew.

They are forked from a server that has imported what a run needs and done nothing else. Each is a
process like any other: it can be killed, and it has its own environment.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_NEEDED = ["elm_lanczos.cli", "elm_lanczos.run", "elm_lanczos.distributed", "tests.processes"]
_NEEDED += ["elm_lanczos.report.terminal", "transformers.models.llama.modeling_llama"]


def begun(
    *arguments: object, errors: Path | None = None, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Begins a command of `elm-lanczos`; what it complains of goes to the file `errors`."""
    _CONTEXT.set_forkserver_preload(_NEEDED)
    given = (list(map(str, arguments)), errors, dict(environment or {}))
    process = _CONTEXT.Process(target=_main, args=given)
    process.start()
    return process


def ended(process: BaseProcess, timeout: float = 300) -> int | None:
    """Waits for the end of a process; returns its exit code, negative for a signal."""
    process.join(timeout)
    return process.exitcode


def _main(arguments: list[str], errors: Path | None, environment: Mapping[str, str]) -> None:
    from elm_lanczos import cli

    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(environment)
    sys.argv = ["elm-lanczos", *arguments]
    cli.main()
