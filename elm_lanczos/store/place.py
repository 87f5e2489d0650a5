"""Where a store lies: a folder, or objects below a URL.

Zarr reads and writes arrays in either. What else the store has to do there (read metadata, list and
remove nodes, keep two runs apart) are the few operations of a `Place`; nodes are addressed by the
place and a name relative to it, such as `prompts/000000/U`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from zarr.abc.store import Store

from elm_lanczos.errors import StoreError


@dataclass(frozen=True)
class URL:
    """The address of a store, or of something in it, that is no path of this machine.

    Attributes:
        text: The URL, without a slash at its end.
    """

    text: str

    def __str__(self) -> str:
        """Give the URL."""
        return self.text

    def __truediv__(self, name: str) -> URL:
        """Address what lies below."""
        return URL(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.text.rpartition("/")[2]


Address = Path | URL


class Lock(Protocol):
    """The exclusive right to run on a store."""

    def release(self) -> None:
        """Give the right back; a second call does nothing."""


class Place(ABC):
    """Where a store lies.

    Names are relative to it, with slashes; "" is the place itself.

    Attributes:
        path: Its address, for messages and users.
        zarr: The store as Zarr sees it; each write is durable and atomic when it returns.
    """

    path: Address
    zarr: Store

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Read a file.

        Args:
            name: Its name.

        Returns:
            Its bytes; None if there is no file.

        Raises:
            StoreError: It cannot be read; a DamagedError if it, and not a server, is to blame.
        """

    @abstractmethod
    def is_file(self, name: str) -> bool:
        """Tell whether there is a file of this name."""

    @abstractmethod
    def is_folder(self, name: str) -> bool:
        """Tell whether there is a folder of this name, or anything below it."""

    @abstractmethod
    def names(self, name: str) -> list[str]:
        """List a folder.

        Args:
            name: Its name.

        Returns:
            The names of what lies directly in it, without what killed writes have left; none if
            there is no folder.

        Raises:
            StoreError: It cannot be read.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens if there is none."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the place itself, and remove what killed writes have left in it."""

    @abstractmethod
    def lock(self, rank: int, note: Callable[[str], None]) -> Lock:
        """Take the exclusive right to run on the store.

        It is held through `PATH.lock` beside the store. A run's further processes each hold
        `PATH.lock.1`, `PATH.lock.2`, …: a new run has to wait for them too. A process that was
        killed leaves nothing that keeps a later run out.

        Args:
            rank: The number of the process in its run; 0 is the one that coordinates.
            note: Told what the user should know while this takes its time.

        Returns:
            The right, until it is released.

        Raises:
            StoreError: Another process holds it, or it cannot be taken.
        """

    @abstractmethod
    def writing(self) -> AbstractContextManager[None]:
        """Turn a refusal to write inside the `with` block into a StoreError of one clear line."""

    def exists(self, name: str) -> bool:
        """Tell whether there is a file or a folder of this name."""
        return self.is_file(name) or self.is_folder(name)


def in_use(path: Address) -> StoreError:
    """The error of a store that another run holds."""
    return StoreError(
        f"{path} is in use by another run: wait for it to end or choose another --out"
    )


def place_at(path: str | Address, *, read_only: bool = True) -> Place:
    """Find the place that a path or a URL names; nothing is read or written yet.

    Args:
        path: A folder; or a URL that obstore knows, such as `s3://bucket/run.zarr`.
        read_only: Whether its Zarr store is for reading alone.

    Returns:
        The place, whether or not a store is there.

    Raises:
        StoreError: The URL cannot be used.
    """
    # imported here: both build on this module, and few need the second
    from elm_lanczos.store.folder import Folder

    if isinstance(path, Path) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)):
        return Folder(Path(str(path)), read_only=read_only)
    try:
        url = urlsplit(str(path))
    except ValueError as error:
        raise StoreError(f"--out is no URL that can be used: {error}") from error
    if url.scheme == "file":
        return Folder(Path(unquote(url.path)), read_only=read_only)
    from elm_lanczos.store.bucket import Bucket

    return Bucket(str(path), read_only=read_only)
