"""The command line. It reads options and prints; everything else happens elsewhere.

Each verb is a module; they are imported in the order in which `--help` lists them. Heavy imports
stay inside the verbs, so that `--help` answers at once.
"""

from elm_lanczos.cli import (  # noqa: I001
    run,  # noqa: F401
    plan,  # noqa: F401
    show,  # noqa: F401
    report,  # noqa: F401
    verify,  # noqa: F401
    check,  # noqa: F401
    attribute,  # noqa: F401
    ordinary,  # noqa: F401
    layers,  # noqa: F401
    components,  # noqa: F401
    steer,  # noqa: F401
    compare,  # noqa: F401
    export,  # noqa: F401
)
from elm_lanczos.cli.entry import main

__all__ = ["main"]
