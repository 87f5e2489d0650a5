"""`elm-lanczos show`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from elm_lanczos.cli.app import app, silence_libraries
from elm_lanczos.errors import UsageError

if TYPE_CHECKING:
    from elm_lanczos.report.record import Words
    from elm_lanczos.store import Results


@app.command(epilog="Example:  elm-lanczos show runs/demo.zarr --prompt 2")
def show(
    store: Annotated[str, typer.Argument(help="A result store: its folder or URL.")],
    prompt: Annotated[
        list[int] | None, typer.Option(help="Number of a prompt, from 1; may be repeated.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prediction.")
    ] = False,
) -> None:
    """Print stored results again."""
    from elm_lanczos.report.json_lines import JsonLines
    from elm_lanczos.report.terminal import Terminal
    from elm_lanczos.store import open_results

    silence_libraries()
    results = open_results(store)
    numbers = chosen_prompts(results, prompt)
    words = words_of(results.attrs)
    with JsonLines() if json else Terminal() as observer:
        observer.opened(results.path, words)
        for number in numbers:
            result = results[number - 1]
            for prediction in (result, *result.positions.values()):
                observer.started(number - 1, len(results), prediction.text)
                observer.finished(prediction)


def chosen_prompts(results: Results, prompt: list[int] | None) -> list[int]:
    """Returns the numbers of prompts given, or all, from 1.

    Args:
        results: the store.
        prompt: the numbers given.

    Returns:
        Numbers of prompts that the store has.

    Raises:
        UsageError: if it has not one of them.
    """
    numbers = range(1, len(results) + 1)
    for number in prompt or ():
        if number not in numbers:
            raise UsageError(f"--prompt {number}: {results.path} has prompts 1 to {len(results)}")
    return list(prompt or numbers)


def words_of(attrs: Any) -> Words:
    """Returns the texts of token ids by the tokenizer of a store's model, if it can be found."""
    from elm_lanczos.model import load_tokenizer, token_strings

    config = attrs.get("config") or {}
    tokenizer = load_tokenizer(config.get("model"), revision=config.get("revision"))
    return lambda ids: token_strings(tokenizer, ids)
