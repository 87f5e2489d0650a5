"""Stores at a URL: the same as in a folder, on a server that fails, beside runs that are killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from elm_lanczos.errors import StoreError
from elm_lanczos.run import run
from elm_lanczos.store import ResultStore, open_results
from elm_lanczos.store.bucket import Bucket
from elm_lanczos.store.place import place_at
from elm_lanczos.verify import verify
from tests.object_server import PATIENCE, ROOT, disturbed, environment, hurry, served
from tests.store_cases import (
    ATTRS,
    FINGERPRINT,
    make_header,
    make_rows,
    start_or_resume,
    write_outputs,
)
from tests.store_cases import run as write_toy
from tests.test_cli import command  # noqa: F401
from tests.test_faults import data_files
from tests.test_run import Listener, options
from tests.test_store import check_done_rows, files_of

KILLS = 3
_URLS = (f"s3://bucket/a folder/{os.getpid()}-{n}.zarr" for n in itertools.count())


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    with served() as port:
        yield port


@pytest.fixture(autouse=True)
def user(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user of the server, with short waits."""
    hurry(monkeypatch)
    for name, value in environment(port).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def url() -> str:
    return next(_URLS)


def create(url: str | Path, **given: bool) -> ResultStore:
    return ResultStore.create(url, attrs=ATTRS, fingerprint=FINGERPRINT, **given)


def bucket(url: str) -> Bucket:
    place = place_at(url)
    assert isinstance(place, Bucket)
    return place


def objects_of(url: str) -> dict[str, bytes]:
    """Every object of a store."""
    store = bucket(url)._objects
    keys = [entry["path"] for page in store.list() for entry in page]
    return {key: bytes(store.get(key).bytes()) for key in keys}


def locks_of(url: str) -> list[str]:
    place = bucket(url)
    found = place.beside.list_with_delimiter()["objects"]
    names = [entry["path"].rpartition("/")[2] for entry in found]
    return [name for name in names if name.startswith(f"{place.own_name}.lock")]


def put(url: str, name: str, content: bytes) -> None:
    bucket(url)._objects.put(name, content)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the run of `store_cases` leaves in a folder."""
    path = tmp_path_factory.mktemp("toy") / "run.zarr"
    write_toy(path)
    return files_of(path)


@pytest.fixture(scope="module")
def given(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options of a small run, finished in the folder `whole`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.txt").write_text("the Soviet Union and the\n")
    given = {"seq_file": str(folder / "prompts.txt"), "k": 2, "tokens": "last:2", "generate": 2}
    run(options(tiny_folder, folder / "whole.zarr", **given), Listener())
    return given


@pytest.fixture
def whole(given: dict[str, object]) -> Path:
    return Path(str(given["seq_file"])).with_name("whole.zarr")


def assert_same_data(url: str, whole: Path) -> None:
    """The same objects as files; the metadata of root and groups hold the URL and seconds."""
    there, here = objects_of(url), files_of(whole)
    assert there.keys() == here.keys()
    for name in data_files(whole).keys() - {"zarr.json"}:
        assert there[name] == here[name], name


# ---------------------------------------------------------------- what a user does


def test_run_into_a_bucket_has_the_bits_of_a_folder(
    command,  # noqa: F811
    tiny_folder: Path,
    given: dict[str, object],
    whole: Path,
    url: str,
) -> None:
    line = ["run", "--model", tiny_folder, "--top", 3, "--out", url]
    for name, value in given.items():
        line += [f"--{name.replace('_', '-')}", value]
    code, shown, complaints = command(*line)
    assert (code, complaints) == (0, "") and f"results in {url}" in shown
    assert_same_data(url, whole)
    assert locks_of(url) == []
    assert command(*line)[0] == 1
    assert command(*line, "--resume")[0] == 0
    assert_same_data(url, whole)
    table = command("show", url)[1]
    assert url in table and table in shown
    code, lines, _ = command("show", url, "--json")
    assert json.loads(lines.splitlines()[0])["store"] == f"{url}/prompts/000000"
    assert command("verify", url, "--sample", 1)[:2] == (
        0, f"{url}: all is well: 2 predictions, 4 rows done, 2 computed again\n",
    )  # fmt: skip
    results, local = open_results(url), open_results(whole)
    assert results.complete and results.path.name == url.rpartition("/")[2]
    assert results.summary.equals(local.summary.compute())
    assert results[0].to_xarray().equals(local[0].to_xarray())
    assert results[0].positions.keys() == local[0].positions.keys()
    assert "a-secret-of-theirs" not in str(objects_of(url)) + shown + table


def test_overwrite_replaces_a_store_and_leaves_what_lies_beside_it(url: str) -> None:
    with create(url) as store:
        store.create_prompt(make_header(6), 0)
    put(f"{url}-too", "zarr.json", b"{}")
    with pytest.raises(StoreError, match=r"--resume.*--overwrite"):
        create(url)
    with create(url, overwrite=True) as store:
        assert len(store) == 0
    assert objects_of(url).keys() == {"zarr.json", "prompts/zarr.json"}
    assert objects_of(f"{url}-too") == {"zarr.json": b"{}"}
    with pytest.raises(StoreError, match="not a result store"):
        create(f"{url}-too", overwrite=True)
    put(url.rpartition("/")[0], "plain", b"")
    with pytest.raises(StoreError, match="is a file"):
        create(url.rpartition("/")[0] + "/plain", overwrite=True)
    for name, says in (("nothing", "does not exist"), ("plain", "is a file")):
        with pytest.raises(StoreError, match=says):
            open_results(url.rpartition("/")[0] + f"/{name}")


def test_several_processes_share_a_store(
    tiny_folder: Path, given: dict[str, object], whole: Path, url: str
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line = ["--nproc-per-node", "2", "-m", "elm_lanczos", "run", "--model", str(tiny_folder)]
    for name, value in given.items():
        line += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        [*launcher, *line, "--top", "3", "--out", url],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_data(url, whole)
    assert locks_of(url) == []


class Stopper(Listener):
    """Stops the run when its first prediction is finished."""

    def finished(self, result) -> None:
        super().finished(result)
        raise KeyboardInterrupt


def test_stopped_run_goes_on_and_mends_what_is_damaged(
    tiny_folder: Path, given: dict[str, object], whole: Path, url: str
) -> None:
    config = options(tiny_folder, Path("x"), **given).model_copy(update={"out": url})
    with pytest.raises(KeyboardInterrupt):
        run(config, Stopper())
    assert locks_of(url) == [] and not open_results(url).complete
    name, lost = "prompts/000000/U/c.0.0.0", "prompts/000000/S/c.0.0"
    content = bytearray(objects_of(url)[name])
    content[len(content) // 2] ^= 1
    put(url, name, bytes(content))
    bucket(url)._objects.delete(lost)
    found = verify(url, load=None)
    assert [str(fault.file) for fault in found.faults] == [f"{url}/{name}", f"{url}/{lost}"]
    listener = Listener()
    run(config, listener, resume=True)
    assert [note.split(": ")[1] for note in listener.notes] == [f"{url}/{name}", f"{url}/{lost}"]
    assert_same_data(url, whole)
    assert verify(url, load=None).faults == ()


# ---------------------------------------------------------------- killed, cut off, refused


def test_killed_during_uploads_the_run_ends_with_the_same_bits(
    url: str, toy: dict[str, bytes]
) -> None:
    rng, kills, most = random.Random(0), 0, 0
    while kills < KILLS:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.object_server", "run", url],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(rng.randrange(1, 5)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        _, complaints = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        done = check_done_rows(url)
        assert done >= most  # no committed row is lost
        most = done
        if process.returncode != -signal.SIGKILL:  # it ended before the signal: begin a new one
            assert process.returncode == 0, complaints
            assert objects_of(url) == toy
            bucket(url).remove("")
            most = 0
    assert locks_of(url)
    write_toy(url)
    assert objects_of(url) == toy
    assert locks_of(url) == []


@pytest.mark.parametrize("how", ["cut", 503])
def test_server_that_fails_in_the_middle_stops_the_run_with_one_line(
    port: int, monkeypatch: pytest.MonkeyPatch, url: str, how: str | int
) -> None:
    failing = False

    def fault(method: str, path: str) -> str | int | None:
        nonlocal failing
        failing = failing or (method == "PUT" and "/V/c.1.0.0" in path)
        return how if failing else None

    with disturbed(port, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy)["AWS_ENDPOINT_URL"])
        with create(url) as store:
            group = store.create_prompt(make_header(150), 0)
            group.write_rows(0, make_rows(group, 0))
            group.commit(0)
            with pytest.raises(StoreError, match=f"cannot write {url}: .*--resume$") as caught:
                group.write_rows(1, make_rows(group, 1))
            assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
            # what cannot be read now is not damaged
            with pytest.raises(StoreError, match="cannot read"):
                group.forget_damaged()
            with pytest.raises(StoreError, match="cannot read"):
                verify(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", environment(port)["AWS_ENDPOINT_URL"])
    assert open_results(url)[0].done.tolist() == [True] * 64 + [False] * 86
    check_done_rows_of_one(url)
    with start_or_resume(url) as store:
        group = store.prompts[0]
        assert group.forget_damaged() == [] and group.pending() == [1, 2]
        for owner in group.pending():
            group.write_rows(owner, make_rows(group, owner))
            group.commit(owner)
    check_done_rows_of_one(url)


def test_upload_in_parts_that_is_cut_leaves_nothing(
    port: int, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    first, working = threading.Event(), False

    def fault(method: str, path: str) -> str | None:
        if method == "PUT" and "partNumber=1" in path:
            first.set()
        elif method == "PUT" and "partNumber=2" in path and not working:
            assert first.wait(60)
            return "cut"
        return None

    with disturbed(port, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy)["AWS_ENDPOINT_URL"])
        with create(url) as store:  # U has 6.3 MB; obstore cuts at 5
            group = store.create_prompt(make_header(128, m=4096), 0)
            rows = make_rows(group, 0)
            with pytest.raises(StoreError, match="does not answer"):
                group.write_rows(0, rows)
            assert not any("/U/c" in name for name in objects_of(url))
            assert group.pending() == [0]
            working = True
            group.write_rows(0, rows)
            group.commit(0)
            assert (rows["U"] == open_results(url)[0].U).all()


def check_done_rows_of_one(url: str) -> None:
    result = open_results(url)[0]
    group = ResultStore.open(url).prompts[0]
    wanted = np.concatenate([make_rows(group, owner)["U"] for owner in range(3)])
    assert (result.U[result.done] == wanted[result.done]).all()


def write_one(path: str | Path) -> None:
    with create(path) as store:
        group = store.create_prompt(make_header(6), 0)
        group.write_rows(0, make_rows(group, 0))
        group.commit(0)
        write_outputs(group)
        store.write_summary()


def test_passing_failures_are_not_noticed(
    port: int, monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path
) -> None:
    """Every seventh request fails in another way, once; conditional ones after they succeeded."""
    requests, faults = itertools.count(), itertools.cycle(["cut", 503, "close", "lose"])
    locks = []

    def fault(method: str, path: str) -> str | int | None:
        if path.endswith(".lock") and method == "PUT":
            locks.append(path)
            return "lose" if len(locks) % 2 else None
        # a request without effect or one that may be repeated: obstore does so
        return next(faults) if next(requests) % 7 == 3 and method in ("GET", "PUT") else None

    with disturbed(port, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", environment(proxy)["AWS_ENDPOINT_URL"])
        write_one(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", environment(port)["AWS_ENDPOINT_URL"])
    write_one(tmp_path / "run.zarr")
    assert len(locks) > 2 and next(requests) > 7 * 4
    assert objects_of(url) == files_of(tmp_path / "run.zarr")
    assert locks_of(url) == []


# ---------------------------------------------------------------- locks


def test_two_runs_on_one_store_are_refused(url: str) -> None:
    notes: list[str] = []
    with create(url) as store:
        begun = time.monotonic()
        with pytest.raises(StoreError, match=f"{url} is in use by another run: wait for it"):
            ResultStore.open(url, "r+").resume(FINGERPRINT, notes.append)
        assert time.monotonic() - begun < PATIENCE  # a living holder is soon known
        assert len(notes) == 1 and "watched" in notes[0]
        with ResultStore.open(url, "r+") as other:
            other.join(1)
            assert len(locks_of(url)) == 2
        store.set_attrs({"title": "still its own"})
    with ResultStore.open(url, "r+") as store:
        store.resume(FINGERPRINT, notes.append)
    assert len(notes) == 1 and locks_of(url) == []


def test_lock_of_a_further_process_is_waited_for(url: str) -> None:
    create(url).close()
    with ResultStore.open(url, "r+") as other:
        other.join(3)
        with pytest.raises(StoreError, match="in use by another run"):
            create(url, overwrite=True)
    create(url, overwrite=True).close()


@pytest.mark.parametrize("kind", ["bucket", "versioned"])
def test_stale_locks_are_taken_over_by_one_clock_alone(
    url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url.replace("bucket", kind)
    create(url).close()
    place = bucket(url)
    for suffix in (".lock", ".lock.1"):
        place.beside.put(place.own_name + suffix, b"host 1 token 7")
    (listed, *_) = place.beside.list_with_delimiter()["objects"]
    known = place.beside.head(listed["path"])["version"]
    assert listed["version"] is None and (known is not None) == (kind == "versioned")
    monkeypatch.setattr(time, "time", lambda: -1e9)
    notes: list[str] = []
    begun = time.monotonic()
    with ResultStore.open(url, "r+") as store:
        store.resume(FINGERPRINT, notes.append)
        assert time.monotonic() - begun > PATIENCE and len(notes) == 1
        assert locks_of(url) == [f"{place.own_name}.lock"]
        store.set_attrs({"title": "taken over"})
    assert locks_of(url) == []


def test_run_that_lost_its_lock_writes_nothing_more(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = create(url)
    assert isinstance(first._place, Bucket) and first._place.held is not None
    with monkeypatch.context() as asleep:  # as a process that is stopped for a while
        asleep.setattr(first._place.held, "_renew", lambda: None)
        group = first.create_prompt(make_header(6), 0)
        with ResultStore.open(url, "r+") as second:
            second.resume(FINGERPRINT)
            before = objects_of(url)
            asleep.undo()
            for write in (
                lambda: group.write_rows(0, make_rows(group, 0)),
                lambda: group.commit(0),
                lambda: first.set_attrs({"title": "mine"}),
                first.write_summary,
                lambda: first._place.remove("prompts"),
            ):
                with pytest.raises(StoreError, match="taken over by another run"):
                    write()
            first.close()
            assert objects_of(url) == before
            assert len(locks_of(url)) == 1  # the second run's, which the first has left alone
            second.set_attrs({"title": "theirs"})


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("s3://nowhere/r.zarr", "bucket does not exist"),
        ("s3://bucket", "names no folder"),
        ("s3://someone:a-secret-of-theirs@bucket/r.zarr", "credentials come from the environment"),
        ("s3://bucket/r.zarr?sig=a-secret-of-theirs", "credentials come from the environment"),
        ("foo://bucket/r.zarr", "cannot be used"),
        ("memory:///r.zarr", "names no folder"),
        ("s3://[bucket/r.zarr", "no URL that can be used"),
        ("s3://bucket:99999/r.zarr", "cannot be used"),
    ],
)
def test_urls_that_cannot_be_used_get_one_line(command, out: str, says: str) -> None:  # noqa: F811
    for line in (["run", "--text", "a", "--out", out], ["show", out], ["verify", out]):
        code, shown, complaints = command(*line)
        assert (code, shown, complaints.count("\n")) == (1, "", 1), complaints
        assert says in complaints and "secret" not in complaints


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer: check the endpoint"),
        ({"AWS_ALLOW_HTTP": "false"}, "set AWS_ALLOW_HTTP"),
        ({"AWS_ENDPOINT_URL": "forbidden"}, r"access is denied \(403.*\): check the credentials"),
    ],
)
def test_servers_that_refuse_get_one_line(
    command,  # noqa: F811
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    setting: dict[str, str],
    says: str,
) -> None:
    with disturbed(port, lambda *_: 403) as proxy:
        for name, value in setting.items():
            forbidden = environment(proxy)["AWS_ENDPOINT_URL"]
            monkeypatch.setenv(name, forbidden if value == "forbidden" else value)
        code, shown, complaints = command("verify", url)
        assert (code, shown, complaints.count("\n")) == (1, "", 1), complaints
        assert re.search(says, complaints) and "secret" not in complaints
        with pytest.raises(StoreError, match=says):
            create(url)


def test_missing_obstore_is_one_line(command, monkeypatch: pytest.MonkeyPatch, url: str) -> None:  # noqa: F811
    monkeypatch.delitem(sys.modules, "elm_lanczos.store.bucket")
    for name in [n for n in sys.modules if n.partition(".")[0] == "obstore"]:
        monkeypatch.setitem(sys.modules, name, None)
    code, _, complaints = command("show", url)
    assert (code, complaints.count("\n")) == (1, 1), complaints
    assert 'pip install "elm-lanczos[object-store]"' in complaints


def test_url_of_a_file_is_a_folder(tmp_path: Path) -> None:
    write_one(f"file://{tmp_path}/a%20b.zarr")
    assert (tmp_path / "a b.zarr/summary/zarr.json").exists()
    assert open_results(f"file://{tmp_path}/a%20b.zarr").path == tmp_path / "a b.zarr"
