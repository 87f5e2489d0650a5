"""A store of objects below a URL, and the lock that keeps two runs on it apart.

Putting an object is atomic and durable, and an upload in parts that is interrupted leaves nothing
that can be seen: what was put first is there first, as in a folder whose files are synced. Requests
that fail are repeated by obstore; endpoint and credentials come from the environment.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from elm_lanczos.errors import StoreError
from elm_lanczos.store.place import URL, Place, in_use

try:
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
    from obstore.store import from_url
except ImportError as error:
    raise StoreError(
        'a store at a URL needs obstore: pip install "elm-lanczos[object-store]"'
    ) from error

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import RetryConfig

RETRY: RetryConfig = {"max_retries": 6, "retry_timeout": timedelta(seconds=20)}
"""How obstore repeats a request that fails: for some seconds, with growing pauses."""

BEAT, PATIENCE = 5.0, 20.0
"""Seconds between a lock's renewals, and those after which one that was not renewed is taken over;
for the last half of these its holder writes nothing without renewing it first."""

_FAILURES = (BaseError, OSError)
"""What obstore raises; an object or bucket that does not exist is a FileNotFoundError."""


class Bucket(Place):
    """Objects below a URL that obstore knows, such as `s3://bucket/run.zarr`.

    Args:
        url: The URL; credentials in it are refused, because it is shown and stored.
        read_only: Whether its Zarr store is for reading alone.

    Raises:
        StoreError: The URL cannot be used.
    """

    path: URL

    def __init__(self, url: str, *, read_only: bool) -> None:
        parts = urlsplit(url)
        container = parts.username if parts.scheme in ("abfs", "abfss") else None
        if parts.query or parts.fragment or parts.password or parts.username != container:
            raise StoreError(
                "the URL of a store has no user, password, query or fragment: credentials come "
                "from the environment, such as AWS_ACCESS_KEY_ID"
            )
        self.path = URL(url.rstrip("/"))
        self._objects = self._connected(self.path)
        prefix = getattr(self._objects, "prefix", None)
        if not prefix:
            raise StoreError(
                f"{self.path} names no folder inside a bucket: give one, as s3://bucket/run.zarr"
            )
        self.own_name = str(prefix).rstrip("/").rpartition("/")[2]
        self.beside = self._connected(URL(str(self.path).rpartition("/")[0]))
        self.held: BucketLock | None = None
        self.there: set[str] = set()  # objects that need not be created once more
        self.zarr = _Objects(self._objects, read_only=read_only, bucket=self)

    def _connected(self, url: URL) -> Any:
        try:
            return from_url(str(url), retry_config=RETRY)
        except (*_FAILURES, ValueError) as error:
            raise StoreError(f"{self.path} cannot be used: {_reason(error)}") from error

    def read(self, name: str) -> bytes | None:
        """Read an object; see `Place.read`."""
        with self.asking("read"):
            try:
                return bytes(self._objects.get(name).bytes())
            except FileNotFoundError:
                return None

    def is_file(self, name: str) -> bool:
        """Tell whether there is an object of this name."""
        objects, key = (self._objects, name) if name else (self.beside, self.own_name)
        with self.asking("read"):
            try:
                objects.head(key)
            except FileNotFoundError:
                return False
        return True

    def is_folder(self, name: str) -> bool:
        """Tell whether there are objects below this name."""
        return bool(self.names(name))

    def names(self, name: str) -> list[str]:
        """List what lies directly below a name; see `Place.names`."""
        with self.asking("read"):
            found = self._objects.list_with_delimiter(name or None)
        keys = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return [key.rstrip("/").rpartition("/")[2] for key in keys]

    def remove(self, name: str) -> None:
        """Remove an object, and all below its name."""
        self.check_lock()
        self.there.clear()
        own = [name] if name and self.is_file(name) else []
        with self.asking("write"):
            pages = [[entry["path"] for entry in page] for page in self._objects.list(name or None)]
            for keys in [own, *pages]:
                self.check_lock()
                if keys:
                    self._objects.delete(keys)

    def prepare(self) -> None:
        """Nothing is to be made, and killed uploads are not there."""

    def lock(self, rank: int, note: Callable[[str], None]) -> BucketLock:
        """Take the exclusive right to run on the store; see `Place.lock`."""
        self.held = BucketLock(self, rank, note)
        return self.held

    def check_lock(self) -> None:
        """Refuse to go on if the lock that this place held has been taken over.

        Raises:
            StoreError: It has.
        """
        if self.held is not None:
            self.held.check()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Nothing is to be turned into a StoreError: every request does so by itself."""
        yield

    @contextmanager
    def asking(self, action: Literal["read", "write"]) -> Iterator[None]:
        """Turn what a request fails with into one clear line.

        Args:
            action: What it is for.

        Raises:
            StoreError: It failed.
        """
        try:
            yield
        except _FAILURES as error:
            raise StoreError(f"cannot {action} {self.path}: {_reason(error)}") from error


class _Objects(ObjectStore[Any]):
    """Zarr's view: requests that fail are StoreErrors, and nothing is written without the lock.

    A failure is then never taken for damage, nor for an object that does not exist.
    """

    def __init__(self, store: Any, *, read_only: bool, bucket: Bucket) -> None:
        super().__init__(store, read_only=read_only)
        self._bucket = bucket

    def with_read_only(self, read_only: bool = False) -> _Objects:
        """Give the same store for reading alone, or for writing too."""
        return _Objects(self.store, read_only=read_only, bucket=self._bucket)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object or a part of it."""
        with self._bucket.asking("read"):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Read parts of objects."""
        with self._bucket.asking("read"):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        """Tell whether there is an object."""
        with self._bucket.asking("read"):
            return await super().exists(key)

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """List what lies directly below a prefix."""
        with self._bucket.asking("read"):
            async for name in super().list_dir(prefix):
                yield name

    async def set(self, key: str, value: Buffer) -> None:
        """Put an object."""
        await asyncio.to_thread(self._bucket.check_lock)
        with self._bucket.asking("write"):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Put an object unless there is one; Zarr does so for all parents of every array."""
        if key not in self._bucket.there:
            await asyncio.to_thread(self._bucket.check_lock)
            with self._bucket.asking("write"):
                await super().set_if_not_exists(key, value)
            self._bucket.there.add(key)

    async def delete(self, key: str) -> None:
        """Remove an object."""
        await asyncio.to_thread(self._bucket.check_lock)
        with self._bucket.asking("write"):
            await super().delete(key)


class BucketLock:
    """The exclusive right to run on a store of objects, held through an object beside it.

    The object `URL.lock` names its holder by host, process and a random token. It is created only
    if there is none, renewed every `BEAT` seconds, and replaced only in the version last seen. Who
    meets one watches it for `PATIENCE` seconds of its own monotonic clock: if it changes, its
    holder lives; if not, it was left by a run that was killed, and is taken over. No two clocks are
    ever compared. A holder that has been taken over writes nothing more, but for a request that was
    under way already.

    Args:
        bucket: The place of the store.
        rank: The number of the process in its run.
        note: Told that a lock is watched.

    Raises:
        StoreError: Another process holds the lock, or the server refuses a request.
    """

    def __init__(self, bucket: Bucket, rank: int, note: Callable[[str], None]) -> None:
        self._bucket = bucket
        main = f"{bucket.own_name}.lock"
        self._key = f"{main}.{rank}" if rank else main
        self._token = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._renewals = 0
        self._mutex, self._ended, self._lost = threading.Lock(), threading.Event(), False
        left = self._left(main)
        if left:
            note(
                f"{bucket.path} is in use, or was when its run was killed: its lock is watched for "
                f"{PATIENCE:.0f} s"
            )
            self._watch(left)
        begun = _now()
        try:
            self._version = self._put(left.get(self._key, "create"))
        except _TakenError:
            raise in_use(bucket.path) from None
        self._renewed = begun
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            with bucket.asking("write"):
                for key in left.keys() - {self._key}:
                    bucket.beside.delete(key)
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """Refuse to go on without the lock, renewing it first if that is overdue.

        Raises:
            StoreError: Another run has taken it over, or it cannot be renewed.
        """
        if self._ended.is_set():
            return
        if _now() - self._renewed > PATIENCE / 2:
            self._renew()
        if self._lost:
            raise StoreError(
                f"{self._bucket.path} was taken over by another run while this one gave no sign of "
                "life: nothing more is written; continue with --resume when that run has ended"
            )

    def release(self) -> None:
        """Give the right back and remove the object; a second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        with self._mutex, suppress(*_FAILURES):  # one that stays behind is taken over
            if not self._lost and self._holder()[0] == self._token:
                self._bucket.beside.delete(self._key)

    def _left(self, main: str) -> dict[str, UpdateVersion]:
        """The versions of the locks that keep this process out, by their names."""
        numbered = re.compile(rf"{re.escape(main)}\.\d+")
        left: dict[str, UpdateVersion] = {}
        with self._bucket.asking("read"):
            entries = self._bucket.beside.list_with_delimiter()["objects"]
            names = [entry["path"].rpartition("/")[2] for entry in entries]
            others = [name for name in names if self._key == main and numbered.fullmatch(name)]
            for key in (self._key, *others):  # a listing tells no versions
                with suppress(FileNotFoundError):
                    left[key] = _version(self._bucket.beside.head(key))
        return left

    def _watch(self, left: dict[str, UpdateVersion]) -> None:
        """Wait until it is sure that nobody holds these locks; those given back are taken out."""
        until = _now() + PATIENCE
        while left and _now() < until:
            time.sleep(BEAT / 5)
            for key, version in list(left.items()):
                with self._bucket.asking("read"):
                    try:
                        changed = _version(self._bucket.beside.head(key)) != version
                    except FileNotFoundError:
                        del left[key]
                        continue
                if changed:
                    raise in_use(self._bucket.path)

    def _put(self, mode: UpdateVersion | Literal["create"]) -> UpdateVersion:
        """Put the object on a condition; returns its version."""
        self._renewals += 1
        body = f"{self._token} {self._renewals}".encode()  # never twice the same version
        with self._bucket.asking("write"):
            try:
                return _version(self._bucket.beside.put(self._key, body, mode=mode))
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                # a request that was repeated may have met its own first success
                token, version = self._holder()
                if token != self._token or version is None:
                    raise _TakenError from None
                return version

    def _holder(self) -> tuple[str | None, UpdateVersion | None]:
        """The token of the process that holds the lock, and the version that says so."""
        try:
            found = self._bucket.beside.get(self._key)
        except FileNotFoundError:
            return None, None
        body = bytes(found.bytes())
        return body.decode(errors="replace").rpartition(" ")[0], _version(found.meta)

    def _renew(self) -> None:
        with self._mutex:
            begun = _now()
            if not (self._lost or self._ended.is_set()):
                try:
                    self._version = self._put(self._version)
                    self._renewed = begun
                except _TakenError:
                    self._lost = True

    def _beat(self) -> None:
        while not (self._lost or self._ended.wait(BEAT)):
            with suppress(StoreError):  # the next beat, or the next write, tries again
                self._renew()


class _TakenError(Exception):
    """Another process holds the lock."""


_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def _now() -> float:
    """Seconds of this machine's own clock, which goes on while it sleeps where that is counted."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)


def _version(entry: Any) -> UpdateVersion:
    """What tells this version of an object from any other, as far as the server says it."""
    found: Any = {key: entry[key] for key in ("e_tag", "version") if entry[key] is not None}
    version: UpdateVersion = found
    return version


def _reason(error: Exception) -> str:
    """Say why a request failed and what to do, without anything secret that its text may hold."""
    said = str(error).partition("\nDebug source")[0]
    status = re.search(r"status code: (\d{3}[A-Za-z -]*)", said)
    code = re.search(r"<Code>(\w+)</Code>", said)
    answer = ", ".join(found[1].strip() for found in (status, code) if found)
    if "169.254.169.254" in said or "metadata.google" in said:
        return "no credentials in the environment: set them, such as AWS_ACCESS_KEY_ID"
    if answer.startswith(("401", "403")):
        return (
            f"access is denied ({answer}): check the credentials in the environment, such as "
            "AWS_ACCESS_KEY_ID, and what they permit"
        )
    if answer.startswith("404"):
        return f"the bucket does not exist ({answer}): create it or choose another --out"
    if answer:
        return f"the server answers {answer}: rows committed so far are kept, continue by --resume"
    if "builder error" in said:
        return "the endpoint cannot be used: if it begins with http://, set AWS_ALLOW_HTTP=true"
    if "HTTP error" in said:
        return (
            "the server does not answer: check the endpoint in the environment, such as "
            "AWS_ENDPOINT_URL, and the network; rows committed so far are kept, continue by "
            "--resume"
        )
    words = " ".join(said.split())
    return re.sub(r"(://)[^\s/]*@|\?\S*", r"\1", words)[:200]
