"""The command replay, and the plot of its output."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from autotune.recorded.spaces import RecordedSpace, write_space
from autotune.search.pool import Pool
from cli.main import app
from cli.maintain import plot_results


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
    assert CliRunner().invoke(plot_results.app, ["replay", str(data), str(picture)]).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.json"], "No such file"),
        (["FILE", "--sampler", "best"], "sampler must be one of ours, tpe, random, local, gp, gp-pool, got best"),
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
