"""Recorded spaces: our files, those of other tools, and refused ones."""

import gzip
import json
import lzma

import pytest
import toy_space

from autotune.recorded import foreign
from autotune.recorded.foreign import read_space
from autotune.recorded.spaces import write_space
from tiles.errors import BadInput


def test_our_own_format_comes_back_whole(tmp_path):
    space = toy_space.bowl()
    spread = tuple((0.9, 1.1) if ms else None for ms in space.ms)
    sources = tuple(f"{member % 7:064x}" if ms else None for member, ms in enumerate(space.ms))
    space = type(space)(**{**vars(space), "spread": spread, "sources": sources, "about": {"threads": 2}})
    write_space(space, tmp_path / "one.json.gz")
    write_space(space, tmp_path / "two.json.gz")
    back = read_space(tmp_path / "one.json.gz")
    assert back == space
    assert back.pool.digest == space.pool.digest
    assert (tmp_path / "one.json.gz").read_bytes() == (tmp_path / "two.json.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json.gz", "two.json.gz"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_kernel_tuner_caches_are_recognised_by_content(tmp_path, pack):
    path = tmp_path / "no-suffix"
    path.write_bytes(pack(toy_space.text(toy_space.kernel_tuner())))
    space = read_space(path)
    assert space.pool.space == {"bx": (8, 16, 32), "by": (1, 2), "order": ("row", "col")}
    assert [space.pool.values(member)["bx"] for member in range(4)] == [16, 32, 32, 8]
    assert space.ms == (2.5, 1.25, None, None)
    assert space.reasons == {2: "CompilationFailedConfig", 3: "the time 1e+20"}
    assert not space.has_default
    assert (space.optimum, space.worst) == (1.25, 2.5)


def test_a_kernel_tuner_cache_whose_run_was_stopped_is_read(tmp_path):
    whole = toy_space.text(toy_space.kernel_tuner())
    path = tmp_path / "cache.json"
    path.write_bytes(whole.removesuffix(b"}}") + b",\n")
    assert read_space(path).ms == (2.5, 1.25, None, None)


def test_t4_files_give_their_objective_or_the_median_of_the_runs(tmp_path):
    path = tmp_path / "t4.json"
    path.write_bytes(toy_space.text(toy_space.t4()))
    space = read_space(path)
    assert space.pool.space == {"bx": (8, 16, 32, 64), "fast": (False, True)}
    assert space.ms == (2.0, 3.0, None, None)
    assert space.reasons == {2: "runtime", 3: "CompilationFailedConfig"}


def own(**changed):
    data = {
        "format": "mhc-tune space",
        "version": 1,
        "name": "x",
        "about": {},
        "tunables": {"a": [1, 2]},
        "default": 0,
        "members": [[0], [1]],
        "ms": [1.0, 2.0],
        "spread": [],
        "sources": [],
        "failed": {},
    }
    return json.dumps({**data, **changed}).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"[]", "a JSON list"),
        (b"{}", "JSON of another kind"),
        (b"\xff\xfe", "utf-8"),
        (b'{"cache":' + b"[" * 100_000, "recursion"),
        (gzip.compress(own())[:-12], "damaged compression"),
        (gzip.compress(own())[:20] + b"\0" * 40, "damaged compression"),
        (lzma.compress(own())[:-20], "damaged compression"),
        (toy_space.text({"tune_params_keys": ["bx"], "cache": {"1": {"time": 1}}}), "no 'bx'"),
        (toy_space.text({"tune_params_keys": 3, "cache": {}}), "not iterable"),
        (toy_space.text({"tune_params_keys": ["bx"], "cache": []}), "no attribute"),
        (toy_space.text({"tune_params_keys": ["bx"], "cache": {"1": {"bx": [1], "time": 1}}}), "unhashable"),
        (toy_space.text(toy_space.kernel_tuner({})), "no time"),
        (toy_space.text({"results": [{"configuration": {"a": 1}, "times": {}}]}), "no time"),
        (toy_space.text({"results": [7]}), "int"),
        (own(version=2), "version 2"),
        (own(members=[[0], [2]]), "outside of the tunables"),
        (own(members=[[0], [-1]]), "outside of the tunables"),
        (own(members=[[0], [1, 0]]), "outside of the tunables"),
        (own(default=2), "the default 2"),
        (own(ms=[1.0]), "columns"),
        (own(ms=[1.0, -1.0]), "the time -1.0"),
        (own(ms=[1.0, "fast"]), "the time 'fast'"),
        (own(ms=[1.0, True]), "the time True"),
        (own(ms=[1.0, float("nan")]), "the time nan"),
        (own(failed={"first": "x"}), "first"),
        (own(ms=[None, None], failed={"0": "x", "1": "y"}), "no time"),
        (b'{"format": "mhc-tune space", "version": ' + b"9" * 10_000 + b"}", "digits"),
    ],
)
def test_damaged_and_hostile_files_get_one_line(tmp_path, content, said):
    path = tmp_path / "space.json"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_space(path)
    message = str(caught.value)
    assert said in message
    assert str(path) in message
    assert len(message.splitlines()) == 1


def test_a_file_that_is_not_there_or_is_a_folder_gets_one_line(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        read_space(tmp_path / "none.json")
    with pytest.raises(BadInput, match="Is a directory"):
        read_space(tmp_path)


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "MOST_BYTES", 2**20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * 2**21 + own()))
    with pytest.raises(BadInput, match="more than 1 MiB of JSON"):
        read_space(path)
