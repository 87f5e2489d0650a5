"""A store in a local folder: writes that survive a crash, and the lock that keeps two runs apart.

Zarr's own LocalStore writes a temporary file and renames it, but leaves both to the page cache:
after a power cut the rename may be there without the data. Here the file is synced before the
rename and its folder after it, so that what was written first is on the disk first. The commit
record of a shard can then never outlive its shard.
"""

from __future__ import annotations

import asyncio
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from elm_lanczos.errors import DamagedError, StoreError
from elm_lanczos.store.place import Place, in_use

_PARTIAL = ".partial"


class DurableStore(LocalStore):
    """A Zarr store in a local folder whose every write is on the disk when it returns."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write one key; a reader sees the old bytes or the new ones, never a mixture."""
        self._check_writable()
        await asyncio.to_thread(_write, self.root / key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write one key unless it is there already."""
        self._check_writable()
        await asyncio.to_thread(_write, self.root / key, value, exclusive=True)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write one key from synchronous code."""
        self._check_writable()
        _write(self.root / key, value)


class Folder(Place):
    """A folder of this machine.

    Args:
        path: The folder.
        read_only: Whether its Zarr store is for reading alone.
    """

    path: Path

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        self.zarr = DurableStore(path, read_only=read_only)

    def read(self, name: str) -> bytes | None:
        """Read a file; see `Place.read`."""
        path = self.path / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedError(f"cannot read {path}: {error.strerror or error}") from error

    def is_file(self, name: str) -> bool:
        """Tell whether there is a file of this name."""
        return (self.path / name).is_file()

    def is_folder(self, name: str) -> bool:
        """Tell whether there is a folder of this name."""
        return (self.path / name).is_dir()

    def names(self, name: str) -> list[str]:
        """List a folder; see `Place.names`."""
        folder = self.path / name
        if not folder.is_dir():
            return []
        try:
            return [entry.name for entry in folder.iterdir() if entry.suffix != _PARTIAL]
        except OSError as error:
            raise DamagedError(f"cannot read {folder}: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Make the folder, and remove the temporary files of killed writes."""
        make_folder(self.path)
        for path in self.path.rglob(f"*{_PARTIAL}"):
            path.unlink()

    def lock(self, rank: int, note: Callable[[str], None]) -> FolderLock:
        """Take the exclusive right to run on the store; see `Place.lock`."""
        with self.writing():
            return FolderLock(self.path, rank)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an operating system's refusal to write into one clear line.

        Raises:
            StoreError: The disk is full, or the folder cannot be written.
        """
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"no space left to write {self.path}: the rows committed so far are safe; "
                    "free some space and continue with --resume"
                ) from error
            raise StoreError(f"cannot write {self.path}: {error.strerror or error}") from error


class FolderLock:
    """The exclusive right to run on a store in a folder, through locks on files beside it.

    The kernel drops a lock with the process, however it ends. The files lie outside the store
    because whatever lies inside is taken for a node of the Zarr hierarchy.

    Args:
        path: The folder of the store.
        rank: The number of the process in its run.

    Raises:
        StoreError: Another process holds the lock.
    """

    def __init__(self, path: Path, rank: int) -> None:
        folder = path.resolve()  # a store reached through a link has the same lock
        main = folder.with_name(f"{folder.name}.lock")
        file = main.with_name(f"{main.name}.{rank}") if rank else main
        self._lock = filelock.FileLock(file, timeout=0)
        make_folder(folder.parent)
        try:
            self._lock.acquire()
            if rank == 0:
                for other in folder.parent.glob(f"{glob.escape(main.name)}.*"):
                    number = other.name.removeprefix(f"{main.name}.")
                    if number.isdecimal() and other.is_file():
                        with filelock.FileLock(other, timeout=0):
                            other.unlink()
        except filelock.Timeout:
            self.release()
            raise in_use(path) from None

    def release(self) -> None:
        """Give the right back and remove the file; a second call does nothing."""
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, so that they are still there after a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _write(path: Path, value: Buffer, *, exclusive: bool = False) -> None:
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(value.as_buffer_like())
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(partial, path)
        else:
            partial.replace(path)
    except FileExistsError:
        if not exclusive:
            raise
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
