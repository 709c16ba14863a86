"""Several workers that share a study on a real PostgreSQL server, and a server that goes away.

Each worker is a process of its own, so all but two of them at once is slow; test_storage.py and test_kills.py do the
like on SQLite."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna
import postgres
import pytest
import toy
from optuna.trial import TrialState
from sqlalchemy.pool import NullPool

from autotune.search.trials import evaluated
from autotune.study.database import open_database
from tiles.cache.cache import KernelCache
from tiles.errors import BadInput

pytest.importorskip("psycopg", reason="the driver psycopg is not installed: pip install 'psycopg[binary]'")
pytestmark = pytest.mark.skipif(postgres.why_not() is not None, reason=str(postgres.why_not()))

SCRIPT = Path(__file__).parents[1] / "toy_command.py"
MEMBERS = 34


@pytest.fixture(scope="module")
def running_server():
    with tempfile.TemporaryDirectory(prefix="mhc-tune-postgres-") as folder:
        Path(folder).chmod(0o755)
        server = postgres.Server(Path(folder) / "server")
        yield server
        server.stop()


@pytest.fixture
def server(running_server):
    """Without studies of other tests."""
    yield running_server
    forget(running_server)


def database(server):
    """Optuna's own storage, which leaves no connection open."""
    return optuna.storages.RDBStorage(server.url, engine_kwargs={"poolclass": NullPool})


def studies(server):
    return optuna.get_all_study_names(database(server))


def forget(server):
    for name in studies(server):
        optuna.delete_study(study_name=name, storage=database(server))


def start(server, folder, *more, seconds=0.0, patience=60.0, gate=""):
    """A worker: the command `mhc-tune tune`, on the toy kernel."""
    command = [sys.executable, str(SCRIPT), "tune", "--trials", "100", "--cache", str(folder), "--storage", server.url]
    environment = {**os.environ, "TOY_SECONDS": str(seconds), "TOY_PATIENCE": str(patience), "TOY_GATE": str(gate)}
    return subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def ended(*workers):
    """(exit code, stdout, stderr) of each."""
    outputs = [worker.communicate(timeout=400) for worker in workers]
    return [(worker.returncode, *output) for worker, output in zip(workers, outputs, strict=True)]


def trials_of(server):
    (name,) = studies(server)
    return optuna.load_study(study_name=name, storage=database(server)).trials


def check_that_each_member_was_evaluated_once(trials):
    done = Counter(json.dumps(trial.params) for trial in trials if evaluated(trial))
    assert len(done) == MEMBERS
    assert set(done.values()) == {1}
    assert not [trial for trial in trials if trial.state == TrialState.RUNNING]


def record(folder):
    return KernelCache(folder).get(toy.key_of(toy.PROBLEM, toy.DEVICE))


@pytest.mark.slow
def test_two_workers_share_the_work_and_do_nothing_twice(server, tmp_path):
    gate = tmp_path / "gate"
    workers = [start(server, tmp_path / name, seconds=0.5, gate=gate) for name in ("first", "second")]
    wait_for(lambda: len(list(tmp_path.glob("gate.*"))) == 2)  # importing loads the machine, which measuring does not
    gate.touch()
    results = ended(*workers)
    assert [code for code, _, _ in results] == [0, 0], results
    two = trials_of(server)
    check_that_each_member_was_evaluated_once(two)
    shares = Counter(str(trial.user_attrs["owner"]["process"]) for trial in two if evaluated(trial))
    assert len(shares) == 2
    assert min(shares.values()) > max(shares.values()) / 3  # how long it took depends on what else the machine does
    assert record(tmp_path / "first").schedule == record(tmp_path / "second").schedule == toy_best()


def toy_best():
    return {"block": toy.BEST.block, "unroll": toy.BEST.unroll, "packed": toy.BEST.packed}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_workers_that_start_at_once_make_the_tables_once_and_share_the_trials(server, tmp_path, count):
    drop_tables(server)
    results = ended(*(start(server, tmp_path / str(worker), "--seed", str(worker)) for worker in range(count)))
    assert [code for code, _, _ in results] == [0] * count, results
    check_that_each_member_was_evaluated_once(trials_of(server))
    assert all(record(tmp_path / str(worker)).schedule == toy_best() for worker in range(count))
    # The command is kept with a record, and shipped in packs.
    assert ":***@" in record(tmp_path / "0").provenance["command"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and postgres.PASSWORD in path.read_text()]


def drop_tables(server):
    import psycopg

    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


@pytest.mark.slow
def test_what_a_killed_worker_was_at_is_done_by_the_other(server, tmp_path):
    dies, lives = (start(server, tmp_path / name, seconds=0.2) for name in ("dies", "lives"))
    wait_for(lambda: studies(server) and owners(server) >= {dies.pid, lives.pid})
    dies.kill()
    dies.communicate()
    ((code, _, said),) = ended(lives)
    assert code == 0, said
    check_that_each_member_was_evaluated_once(trials_of(server))
    assert record(tmp_path / "lives").schedule == toy_best()


def owners(server):
    return {trial.user_attrs["owner"]["process"] for trial in trials_of(server) if trial.state == TrialState.COMPLETE}


def wait_for(condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_that_is_restarted_is_waited_for(server, tmp_path):
    worker = start(server, tmp_path / "cache", seconds=0.1)
    wait_for(lambda: studies(server) and len(trials_of(server)) > 4)
    server.stop()
    time.sleep(1)
    server.start()
    ((code, _, said),) = ended(worker)
    assert code == 0, said
    check_that_each_member_was_evaluated_once(trials_of(server))
    assert record(tmp_path / "cache").schedule == toy_best()


@pytest.mark.slow
def test_a_server_that_stays_away_is_one_line_and_the_same_command_goes_on(server, tmp_path):
    worker = start(server, tmp_path / "cache", seconds=0.1, patience=2)
    wait_for(lambda: studies(server) and len(trials_of(server)) > 6)
    server.stop()
    ((code, _, said),) = ended(worker)
    server.start()
    assert code == 2
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the database must answer, got ")
    assert last.endswith("what was finished is kept there; run the same command again when it does")
    assert postgres.PASSWORD not in said
    before = [trial for trial in trials_of(server) if evaluated(trial)]
    assert len(before) > 3
    ((code, _, said),) = ended(start(server, tmp_path / "cache"))
    assert code == 0, said
    after = trials_of(server)
    check_that_each_member_was_evaluated_once(after)
    assert [after[trial.number].values for trial in before] == [trial.values for trial in before]


@pytest.mark.parametrize(
    ("part", "other", "said"),
    [
        ("tuner:", "tuner:not-", "password authentication failed"),
        ("/tuner", "/nosuchdb", 'database "nosuchdb" does not exist'),
        (":{port}", ":9", "onnection refused"),
    ],
    ids=["wrong password", "no such database", "nobody listens"],
)
def test_a_database_that_lets_nobody_in_is_one_line(server, part, other, said):
    url = other.join(server.url.rsplit(part.format(port=server.port), 1))
    with pytest.raises(
        BadInput, match=r"^storage must be an SQLAlchemy URL of a database that answers, got postgresql"
    ) as caught:
        open_database(url)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert postgres.PASSWORD not in str(caught.value)
