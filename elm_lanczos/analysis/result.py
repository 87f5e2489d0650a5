"""What every analysis gives back: an object that tabulates, draws, shows and saves itself.

One table holds everything that is found, with plain columns; words are lists of token texts. What a
terminal, a notebook or a file shows is made from it by `report`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from elm_lanczos.certificate import Certificate

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Progress = Callable[[int, int], None]
"""Told how much of how much is done."""


@dataclass(frozen=True, kw_only=True)
class Analysis(ABC):
    """What an analysis has found.

    Attributes:
        model: name of the model.
        prompt: the input, as text.
        certificate: how exactly the linear system reproduces the model; None where several systems
            are analysed, whose worst figures are then in `doubts`.
    """

    kind: ClassVar[str]
    """The verb that makes it."""

    model: str
    prompt: str
    certificate: Certificate | None = None

    @property
    def title(self) -> str:
        """What this is, in one line."""
        return f"{self.kind}: {self.prompt}"

    @property
    @abstractmethod
    def facts(self) -> list[str]:
        """What is to be said beside the table, a line each: sums, errors, how it was computed."""

    @property
    def doubts(self) -> list[str]:
        """What is not certain, a line each; empty if all is."""
        if self.certificate is None or not self.certificate.failures:
            return []
        return [f"not exact within the bounds of: {', '.join(self.certificate.failures)}"]

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """Returns all that is found as one flat table; words are lists of token texts."""

    def tables(self) -> list[pd.DataFrame]:
        """Returns what a terminal or a notebook shows of it; all of it, if not said otherwise."""
        return [self.to_dataframe()]

    @abstractmethod
    def plot(self) -> Figure:
        """Draws it.

        Returns:
            A matplotlib figure; `figure.savefig(path)` writes it.
        """

    def facts_to_dict(self) -> dict[str, Any]:
        """Returns the figures that belong to the whole and not to a row, by name."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data that strict JSON can hold."""
        from elm_lanczos.store.attributes import to_json

        certificate = None if self.certificate is None else self.certificate.to_dict()
        whole = {"kind": self.kind, "model": self.model, "prompt": self.prompt}
        rows = self.to_dataframe().to_dict(orient="records")
        plain: Any = to_json(
            whole
            | self.facts_to_dict()
            | {"rows": rows, "certificate": certificate, "doubts": self.doubts}
        )
        return dict(plain)

    def to_xarray(self) -> xr.Dataset:
        """Returns the table as a Dataset with one dimension, `row`; words joined by spaces."""
        table = self.to_dataframe().rename_axis("row")
        for name in table.columns:
            if table[name].map(lambda value: isinstance(value, list)).any():
                table[name] = table[name].map(" ".join)
        facts = {"title": self.title, "kind": self.kind, "model": self.model, "prompt": self.prompt}
        return table.to_xarray().assign_attrs(facts)

    def save(self, path: str | Path) -> None:
        """Writes it to a file.

        Args:
            path: .json, .csv, .png, .svg, .pdf, .html or .zarr decides what is written.

        Raises:
            UsageError: if the name ends otherwise.
        """
        from elm_lanczos.report.saving import save

        save(self, Path(path))

    def __rich__(self) -> RenderableType:
        """Shows it in a terminal."""
        from elm_lanczos.report.analysis import render

        return render(self)

    def _repr_html_(self) -> str:
        """Shows it in a notebook."""
        from elm_lanczos.report.analysis import to_html

        return to_html(self)
