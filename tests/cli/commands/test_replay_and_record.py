"""The commands replay and record, and the figure of a replay."""

import gzip
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from autotune.processes.worker import TaskFailed
from autotune.recorded.spaces import RecordedSpace, write_space
from autotune.search.pool import Pool
from cli.commands import record as record_command
from cli.main import app
from cli.maintain import plot_results as figures
from tiles.errors import BadInput
from tiles.kernels.spec import Problem


def line() -> RecordedSpace:
    """30 members in a row, the best at 21."""
    pool = Pool({"block": tuple(range(1, 31))}, tuple((at,) for at in range(30)), 3)
    return RecordedSpace("a [red]line", pool, tuple(1 + abs(at - 20) / 10 for at in range(30)), {}, has_default=True)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_space(line(), tmp_path / "line.json.gz")
    return tmp_path / "line.json.gz"


def test_replay_prints_a_table(file):
    said = CliRunner().invoke(app, ["replay", str(file), "--trials", "12", "--seeds", "2"])
    assert said.exit_code == 0, said.output
    rows = [row.split() for row in said.stdout.splitlines() if "[red]line" in row]
    assert [row[2] for row in rows] == ["ours", "tpe", "random", "local"]
    assert all(row[3:5] == ["30", "12"] for row in rows)


def test_replay_prints_one_json_object_that_the_figure_draws(file, tmp_path):
    command = [
        "replay",
        str(file),
        "--sampler",
        "random",
        "--sampler",
        "ours",
        "--trials",
        "8",
        "--seeds",
        "2",
        "--json",
    ]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    printed = json.loads(said.stdout)
    assert (printed["trials"], printed["seeds"]) == (8, 2)
    assert [row["sampler"] for row in printed["results"]] == ["random", "ours"]
    data, picture = tmp_path / "replay.json", tmp_path / "replay.png"
    data.write_text(said.stdout)
    assert CliRunner().invoke(figures.app, ["replay", str(data), str(picture)]).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": [{}]}', '{"results": []}'])
def test_a_figure_of_something_else_gets_one_line(tmp_path, content):
    data = tmp_path / "replay.json"
    data.write_text(content)
    said = CliRunner().invoke(figures.app, ["replay", str(data), str(tmp_path / "out.png")])
    assert said.exit_code == 2
    assert "mhc-tune replay --json" in said.output
    assert len(said.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.json"], "No such file"),
        (["FILE", "--sampler", "best"], "sampler must be one of ours, tpe, random, local, gp, got best"),
        (["FILE", "--trials", "0"], "--trials"),
        (["FILE", "--seeds", "0"], "--seeds"),
        ([], "FILE"),
    ],
)
def test_bad_input_to_replay_gets_one_line(file, arguments, said):
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    result = CliRunner().invoke(app, ["replay", *given])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_replay_of_a_damaged_file_gets_one_line(tmp_path):
    bad = tmp_path / "bad.json.gz"
    bad.write_bytes(gzip.compress(b'{"results": 3}'))
    result = CliRunner().invoke(app, ["replay", str(bad)])
    assert result.exit_code == 2
    assert "a recorded space must be" in result.stderr


class FakeWorkers:
    def __enter__(self) -> "FakeWorkers":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def recording(monkeypatch, tmp_path, outcome, *more):
    calls = []

    def sweep(problem, device, out, workers, *, on_member):
        calls.append((problem, out))
        on_member(1, 0, 30)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(record_command, "sweep", sweep)
    monkeypatch.setattr(record_command, "Workers", lambda **_: FakeWorkers())
    arguments = ["record", "--op", "merge", "--direction", "backward", "--streams", "2", "--width", "64"]
    out = tmp_path / "out.json.gz"
    return CliRunner().invoke(app, [*arguments, "--tokens", "32", "-o", str(out), *more]), calls, out


def test_record_says_what_it_found(monkeypatch, tmp_path):
    space = replace(line(), ms=(None, *line().ms[1:]), reasons={0: "no"})
    result, calls, out = recording(monkeypatch, tmp_path, space)
    assert result.exit_code == 0, result.stderr
    assert calls == [(Problem("merge", "backward", 2, 64, "float32", 32), out)]
    assert "30 schedules, 1 failed; best 1 ms, default 2.7 ms, worst 2.9 ms" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (TaskFailed("WrongResult: y"), 1, "the default schedule fails: WrongResult: y"),
        (KeyboardInterrupt(), 130, "run the same command to go on"),
        (BadInput("a recorded space must go to a new file, got this: choose another"), 2, "must go to a new file"),
    ],
)
def test_record_ends_with_a_line_and_a_code(monkeypatch, tmp_path, outcome, code, said):
    result, _, _ = recording(monkeypatch, tmp_path, outcome)
    assert result.exit_code == code
    assert said in result.stderr


def test_record_refuses_unknown_kernels_and_shapes(monkeypatch, tmp_path):
    for arguments, said in (
        (["--op", "attention"], "op must be one of"),
        (["--streams", "99"], "streams must be in 1..16, got 99"),
        (["--direction", "sideways"], "sideways"),
        (["--target", "abacus"], "abacus"),
    ):
        result, calls, _ = recording(monkeypatch, tmp_path, line(), *arguments)
        assert result.exit_code == 2
        assert said in result.stderr
        assert calls == []
