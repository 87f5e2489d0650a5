"""Whatever a file holds: a result, or one of the package's own errors in one line.

Some 11 000 inputs from seeded generators: prompt files, configurations, `--tokens`, `--length`, and
the metadata of a store. Nothing here may raise anything but an `ElmLanczosError`.
"""

from __future__ import annotations

import ast
import json
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import elm_lanczos
from elm_lanczos.config import PlanConfig, RunConfig, run_config, select_tokens
from elm_lanczos.errors import ElmLanczosError, StoreError, UsageError
from elm_lanczos.planning import _requests
from elm_lanczos.prompts import read_prompts
from elm_lanczos.report.text import printable, token_text
from elm_lanczos.report.verification import verification_lines
from elm_lanczos.store import PromptHeader, ResultStore, open_results
from elm_lanczos.verify import verify
from tests.store_cases import ATTRS, FINGERPRINT, make_rows, write_outputs

PACKAGE = Path(elm_lanczos.__file__).parent

NASTY = [
    "\x1b[2J\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "../../etc/passwd",
    "/etc/shadow",
    "..",
    "a/b\\c",
    "con\r\nforged: line",
    "\u202eright to left",
    "\u2028",
    "\x00",
    "\x7f",
    "\ud800",
    "☃" * 50,
    "",
    " ",
    "0" * 5000,
    "-1",
    "1e999",
    "NaN",
    "!!python/object/apply:os.system ['touch /tmp/owned']",
    "&a [*a]",
    "{{{{",
    "%TAG ! tag:x,2000:",
]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**6, 2**31, 2**63, 10**30, -0.0, 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "NaN", [], {}, [[]], {"a": {"b": []}}, *NASTY,
]  # fmt: skip


def one_line(error: ElmLanczosError) -> None:
    """What the command line prints of an error is one line without control characters."""
    shown = printable(" ".join(str(error).split()))
    assert shown and not any(unicodedata.category(c).startswith("C") for c in shown), shown


def value(rng: random.Random, depth: int = 3) -> Any:
    """Plain data, mostly what nobody expects."""
    kind = rng.randrange(8)
    if kind == 0 and depth:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 1 and depth:
        return {str(value(rng, 0)): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 2:
        return "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(12)))
    return rng.choice(VALUES)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The same bytes, a few of them changed, cut, repeated or replaced."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0 if changed:
                changed[place % len(changed)] = rng.randrange(256)
            case 1:
                del changed[place : place + rng.randrange(1, 30)]
            case 2:
                changed[place:place] = rng.choice(NASTY).encode("utf-8", "surrogatepass")
            case _:
                changed[place:place] = changed[place : place + rng.randrange(1, 30)]
    return bytes(changed)


def test_prompt_files(tmp_path: Path) -> None:
    rng, read, refused = random.Random(0), 0, 0
    for number in range(3500):
        lines = [
            json.dumps({"text": rng.choice([*NASTY, "a prompt"]), "id": rng.choice(NASTY)}),
            json.dumps(value(rng)),
            rng.choice(["peace and freedom", *NASTY]),
            json.dumps({"text": f"prompt {number}"}),
        ]
        text = "\n".join(rng.sample(lines, rng.randrange(1, 5)))
        data = text.encode("utf-8", "surrogatepass")
        data = mutated(rng, data) if number % 2 else data
        data = rng.randbytes(rng.randrange(40)) if number % 10 == 0 else data
        file = tmp_path / ("p.jsonl" if number % 3 else "p.txt")
        file.write_bytes(data)
        try:
            prompts = read_prompts(file)
        except UsageError as error:
            one_line(error)
            refused += 1
        else:
            assert prompts and all(p.text.strip() and p.text.encode() for p in prompts)
            assert len({p.id for p in prompts}) == len(prompts)
            read += 1
    assert read > 300 and refused > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.jsonl", "p.txt"]


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 200_000,
        b'{"text": ' * 50_000,
        b'{"text": "a", "id": ' + b"9" * 5000 + b"}",
        b'{"text": "' + b"x" * 2_000_000 + b'", "id": [1]}',
        b'{"text": "a", "id": "\\ud800"}',
        b'{"text": "a", "text": 3}',
        b'{"text": "a", "n": 1e999, "m": NaN, "id": true}',
    ],
    ids=["brackets", "objects", "number", "long", "surrogate", "twice", "infinite"],
)
def test_huge_and_nested_json(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.jsonl").write_bytes(data)
    try:
        assert read_prompts(tmp_path / "p.jsonl")[0].id.encode()
    except UsageError as error:
        one_line(error)


def test_configurations(tmp_path: Path) -> None:
    rng, taken, refused = random.Random(1), 0, 0
    file = tmp_path / "c.yaml"
    keys = [*PlanConfig.model_fields, "sed", "seq-file"]
    usual = {"k": 4, "text": "peace", "method": "auto", "memory": "8GiB", "tokens": "last:2"}
    for number in range(1500):
        options = dict(rng.sample(sorted(usual.items()), rng.randrange(5)))
        for _ in range(rng.randrange(3)):
            options[rng.choice(keys)] = value(rng, 2)
        data = yaml.safe_dump(options, allow_unicode=True).encode("utf-8", "surrogatepass")
        data = mutated(rng, data) if number % 2 else data
        data = rng.choice(NASTY).encode("utf-8", "surrogatepass") if number % 20 == 0 else data
        file.write_bytes(data)
        try:
            config = run_config(file, {}, rng.choice([RunConfig, PlanConfig]))
        except UsageError as error:
            one_line(error)
            refused += 1
        else:
            assert config.k >= 1
            taken += 1
    assert taken > 50 and refused > 300
    assert not Path("/tmp/owned").exists()


def test_bombs_of_yaml_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for data in (
        "[" * 5000,
        "a: &a [x]\nk: [*a, *a]\n",
        "? {a: b}\n: c\n",
        "k: !!binary a\n",
        "k: 2024-99-99\n",
        "k: 0x" + "f" * 10_000,
        "k: !!python/name:os.system\n",
        "1: 2\n",
        "<<: 3\n",
    ):
        file.write_text(data)
        with pytest.raises(UsageError) as caught:
            run_config(file, {}, RunConfig)
        one_line(caught.value)


def test_token_selections_and_lengths() -> None:
    rng, taken, refused = random.Random(2), 0, 0
    pieces = ["all", "last:", "first:", "0", "-1", "7", ":", ",", "::", "-", "9" * 5000, "1_0", "٣"]
    pieces += [" ", "e", *NASTY]
    for _ in range(4000):
        spec = "".join(
            rng.choices(pieces[:8] if rng.random() < 0.5 else pieces, k=rng.randrange(5))
        )
        try:
            chosen = select_tokens(spec, length := rng.randrange(1, 9))
            assert chosen == sorted(set(chosen)) and 0 <= chosen[0] <= chosen[-1] < length
            taken += 1
        except UsageError as error:
            one_line(error)
            refused += 1
    for _ in range(2000):
        spec = "".join(rng.choices(pieces, k=rng.randrange(5)))
        try:
            requests = _requests(PlanConfig(length=spec), None)  # type: ignore[arg-type]
            assert all(0 < length < 2**31 for _, length in requests)
            taken += 1
        except UsageError as error:
            one_line(error)
            refused += 1
    assert taken > 300 and refused > 300


# ------------------------------------------------------------------------------------ stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy store whose ids and texts are hostile."""
    path = tmp_path_factory.mktemp("hostile") / "run.zarr"
    plan = {"svd": {"method": "dense"}, "chain": {"block": 1, "keep": True, "narrow": True}}
    with ResultStore.create(path, attrs=ATTRS, fingerprint=FINGERPRINT) as created:
        for number in range(2):
            header = PromptHeader(
                id=NASTY[number] + NASTY[3], text=NASTY[7], token_ids=[1, 2],
                token_strings=[NASTY[0], NASTY[2]], m=7, d=5, k=3, top=2, plan=plan,
            )  # fmt: skip
            group = created.create_prompt(header, number)
            group.write_rows(0, make_rows(group, 0))
            group.commit(0)
            write_outputs(group)
        created.write_summary()
    return path


def use(path: Path) -> None:
    """Read a store in every way there is; raises what they raise."""
    results = open_results(path)
    repr(results)
    for result in results:
        for name in ("id", "text", "position", "plan", "certificate", "positions", "tokens", "S"):
            getattr(result, name)


def resume(path: Path) -> None:
    with ResultStore.open(path, "r+") as opened:
        opened.resume(FINGERPRINT)
        for group in opened.prompts:
            group.forget_damaged()
            group.pending()
            repr(group)


def look(path: Path) -> None:
    """Verify, without and with the (failing) wish for a model; all that is printed is harmless."""
    found = verify(path, load=None)
    json.dumps(found.to_dict())
    for line in verification_lines(found):
        assert not any(unicodedata.category(c).startswith("C") for c in line), line


def changed_json(rng: random.Random, text: str) -> str:
    """The same JSON with one value or key replaced, somewhere."""
    root = json.loads(text)
    node: Any = root
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        match rng.randrange(3):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[str(value(rng, 0))] = node.pop(key)
            case _:
                node[key] = value(rng, 2)
        return json.dumps(root)


@pytest.mark.parametrize("access", [use, resume, look])
def test_metadata_of_stores(store: Path, tmp_path: Path, access: Callable[[Path], None]) -> None:
    rng, refused = random.Random(access.__name__), 0
    path = Path(shutil.copytree(store, tmp_path / "run.zarr"))
    nodes = [path / "zarr.json", path / "prompts/zarr.json"] * 4
    nodes += [path / "prompts/000000/zarr.json", path / "prompts/000001/zarr.json"] * 8
    nodes += [*sorted((path / "prompts").glob("*/*/zarr.json")), path / "summary/zarr.json"]
    for number in range(40):
        file = rng.choice(nodes)
        content = file.read_bytes()
        if number % 4:
            changed = changed_json(rng, content.decode()).encode("utf-8", "surrogatepass")
        else:
            changed = mutated(rng, content)
        file.write_bytes(changed)
        try:
            access(path)
        except ElmLanczosError as error:
            assert isinstance(error, StoreError)
            one_line(error)
            refused += 1
        if access is resume:  # what it mends it changes
            shutil.rmtree(path)
            shutil.copytree(store, path)
        else:
            file.write_bytes(content)
    assert refused > 5 or access is look
    assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]


def test_ids_never_become_paths(store: Path) -> None:
    assert {p.name for p in (store / "prompts").iterdir()} == {"zarr.json", "000000", "000001"}
    assert open_results(store)[0].id == NASTY[0] + NASTY[3]


def test_nothing_printed_steers_a_terminal() -> None:
    rng = random.Random(3)
    for _ in range(1000):
        text = rng.choice(NASTY) + "".join(chr(rng.randrange(0x110000)) for _ in range(8))
        for shown in (printable(text), token_text(text)):
            assert all(c.isprintable() for c in shown)
            assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in shown)


def test_no_source_loads_what_can_run_code() -> None:
    calls = 0
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & set(names), file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                calls += 1
                assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), file
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called != "torch.load" or given.get("weights_only") == "True", file
                assert given.get("allow_pickle", "False") == "False" or called != "np.load", file
    assert calls > 1000
