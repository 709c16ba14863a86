"""The command record."""

from dataclasses import replace

import pytest
from cli_helpers import NoWorkers
from typer.testing import CliRunner

from autotune.processes.worker import TaskFailed
from autotune.recorded.spaces import RecordedSpace
from autotune.search.pool import Pool
from cli.commands import record as record_command
from cli.main import app
from tiles.errors import BadInput
from tiles.kernels.spec import Problem


def line() -> RecordedSpace:
    """30 members in a row, the best at 21."""
    pool = Pool({"block": tuple(range(1, 31))}, tuple((at,) for at in range(30)), 3)
    return RecordedSpace("a [red]line", pool, tuple(1 + abs(at - 20) / 10 for at in range(30)), {}, has_default=True)


def recording(monkeypatch, tmp_path, outcome, *more):
    calls = []

    def sweep(problem, device, out, workers, *, on_member):
        calls.append((problem, out))
        on_member(1, 0, 30)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(record_command, "sweep", sweep)
    monkeypatch.setattr(record_command, "Workers", lambda **_: NoWorkers())
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
        (KeyboardInterrupt(), 130, "run the same command to continue"),
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
