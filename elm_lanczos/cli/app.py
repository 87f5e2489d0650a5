"""The command `elm-lanczos` itself: what it is called, and what its exit codes mean."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

EXIT_ERROR, EXIT_USAGE, EXIT_NOT_CERTAIN, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143

app = typer.Typer(
    name="elm-lanczos",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="See a language model's computation as linear algebra.",
)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """See a language model's computation as linear algebra.

    For one input a decoder is rewritten exactly as y = Σ J_i x_i + c; the leading singular triplets
    of each token's Jacobian J_i say in words what the model reads and what it writes.
    """
    if version:
        from elm_lanczos import __version__

        typer.echo(f"elm-lanczos {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def silence_libraries() -> None:
    """Keeps the libraries below from printing: their messages are not for this command's user."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # writes that a signal interrupts
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
