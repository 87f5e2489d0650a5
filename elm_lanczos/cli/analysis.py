"""What the verbs of analysis share: the options of a model and an input, and how results appear."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elm_lanczos.cli.app import EXIT_NOT_CERTAIN, silence_libraries
from elm_lanczos.cli.options import (
    ComputeDtypeOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    GateOption,
    MemoryOption,
    PickleOption,
    PrecisionOption,
    RevisionOption,
    TrustOption,
)

if TYPE_CHECKING:
    from elm_lanczos.analysis.result import Analysis, Progress
    from elm_lanczos.config import AnalysisConfig
    from elm_lanczos.linearization import Linearization
    from elm_lanczos.model import DetachedModel

PromptArgument = Annotated[str, typer.Argument(help="The input; - reads it from standard input.")]

_OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str | None, typer.Option(help="Hugging Face id or folder (default: bundled model)")
    ],
    "position": Annotated[
        int | None, typer.Option(help="Output position; -1 is the last (default: -1)")
    ],
    "memory": MemoryOption,
    "revision": RevisionOption,
    "dtype": DtypeOption,
    "compute_dtype": ComputeDtypeOption,
    "gate": GateOption,
    "precision": PrecisionOption,
    "device": DeviceOption,
    "device_map": DeviceMapOption,
    "trust_remote_code": TrustOption,
    "allow_pickle": PickleOption,
}

_OUTPUT: dict[str, Any] = {
    "out": Annotated[
        list[Path] | None,
        typer.Option(
            help="Write the result here too: .json, .csv, .png, .svg, .pdf, .html or .zarr; "
            "may be repeated."
        ),
    ],
    "json": Annotated[bool, typer.Option("--json", help="Print one JSON object.")],
}


@dataclass(frozen=True)
class Request:
    """What a verb of analysis was asked for, apart from its own options.

    Attributes:
        config: the model, the output position and the memory.
        out: files to write the result to.
        json: print JSON in place of a table.
    """

    config: AnalysisConfig
    out: tuple[Path, ...]
    json: bool

    def model(self, name: str | None = None) -> DetachedModel:
        """Loads the model.

        Args:
            name: another one than that of the options.

        Returns:
            It.
        """
        from elm_lanczos.run import load_model

        with self._status("loading the model …"):
            return load_model(
                self.config if name is None else self.config.model_copy(update={"model": name})
            )

    def linearize(self, prompt: str) -> Linearization:
        """Rewrites the model as a linear system at a prompt.

        Args:
            prompt: the text, or - for standard input.

        Returns:
            The system at the output position of the options.
        """
        text, model = self.text(prompt), self.model()
        with self._status("rewriting the model as a linear system …"):
            return model.linearize(text, self.config.position, memory=self.config.memory)

    def text(self, prompt: str) -> str:
        """Returns a prompt given as an argument, or standard input for -."""
        return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt

    @contextmanager
    def progress(self, what: str) -> Iterator[Progress]:
        """Shows how far a computation is, on standard error, if that is a terminal.

        Args:
            what: what is computed.

        Yields:
            A function to tell how much of how much is done.
        """
        from elm_lanczos.report.progress import progress_bar

        with progress_bar(what) as tell:
            yield tell

    def finish(self, result: Analysis) -> None:
        """Prints a result, writes the files asked for, and ends with what its certificate says.

        Args:
            result: what was found.

        Raises:
            Exit: if it is not exact within the bounds.
        """
        self.show(result)
        if result.doubts:
            raise typer.Exit(EXIT_NOT_CERTAIN)

    def show(self, result: Analysis) -> None:
        """Prints a result and writes the files asked for.

        Args:
            result: what was found.
        """
        from elm_lanczos.report.analysis import render
        from elm_lanczos.report.saving import save

        for path in self.out:
            save(result, path)
        if self.json:
            typer.echo(dumps(result.to_dict(), ensure_ascii=False, allow_nan=False))
        else:
            from rich.console import Console

            console = Console(highlight=False)
            console.print(render(result, console.width))
            for path in self.out:
                typer.echo(f"written: {path}")
        if result.doubts:
            typer.echo(f"warning: {'; '.join(result.doubts)}", err=True)

    @contextmanager
    def _status(self, what: str) -> Iterator[None]:
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield


def analysis(verb: Callable[..., None]) -> Callable[..., None]:
    """Gives a verb the options of a model and of output.

    Args:
        verb: takes a `Request` first, then its own options.

    Returns:
        The command: takes the verb's own options and the shared ones.
    """
    own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
    taken = {parameter.name for parameter in own}
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == "json" else None,
            annotation=annotation,
        )
        for name, annotation in (_OPTIONS | _OUTPUT).items()
        if name not in taken
    ]

    @wraps(verb)
    def command(**values: Any) -> None:
        from elm_lanczos.config import AnalysisConfig, validated

        given = {name: values.pop(name, None) for name in _OPTIONS if name not in taken}
        out = tuple(values.pop("out", None) or ())
        json = values.pop("json")
        options = {name: value for name, value in given.items() if value is not None}
        config = validated(AnalysisConfig, options)
        silence_libraries()
        from elm_lanczos.report.saving import check_suffix

        for path in out:
            check_suffix(path)
        verb(Request(config, out, json), **values)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
