"""The command line. It reads options and prints; everything else happens elsewhere.

Each verb is a module; they are imported in the order in which `--help` lists them. Heavy imports
stay inside the verbs, so that `--help` answers at once.
"""

from elm_lanczos.cli import run, plan, show, report, verify, check, attribute  # noqa: F401, I001
from elm_lanczos.cli.entry import main

__all__ = ["main"]
