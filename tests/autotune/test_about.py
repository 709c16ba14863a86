"""What a study says of itself: a reader that has nothing but the study understands it; and the kinds of failure."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import toy

from autotune import tuner
from autotune.about import standings
from autotune.final import provenance
from autotune.pool import enumerate_pool
from autotune.reasons import by_kind, kind_of
from autotune.tuner import tune
from tiles.cache import KernelCache, Key

PLAIN_OPTUNA = """
import json, sys
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

study = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(sys.argv[1])))
ours = [name for name in sys.modules if name.split(".")[0] in ("tiles", "autotune", "mhc", "cli")]
trials = [[trial.state.name, trial.params, trial.value, trial.user_attrs] for trial in study.trials]
best = study.best_trial
print(json.dumps({"ours": ours, "trials": trials, "best": best.params, "attributes": study.user_attrs}))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "kernel_spec", lambda op, direction: toy.SPEC)
    monkeypatch.setattr(Key, "of", toy.key_of)
    return KernelCache(tmp_path)


def search(cache, workers=None, **options):
    return tune(toy.PROBLEM, toy.DEVICE, cache, workers=workers or toy.ToyWorkers(), **options)


def with_plain_optuna(cache):
    """What Optuna alone reads from the journal, in a process that imports nothing of ours."""
    (journal,) = (cache.folder / "studies").glob("*.journal")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_OPTUNA, str(journal)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cache.folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_plain_optuna_reads_trials_parameters_and_values(cache):
    workers = toy.ToyWorkers()
    workers.not_compiling = {toy.ToySchedule(1, 1, False)}
    result = search(cache, workers, trials=100)
    read = with_plain_optuna(cache)
    assert read["ours"] == []
    assert read["best"] == asdict(toy.BEST) == result.record.schedule
    complete = [trial for trial in read["trials"] if trial[0] == "COMPLETE"]
    assert len(complete) + 1 == len(read["trials"]) == result.trials
    for _, params, value, attributes in complete:
        assert set(params) == set(toy.SPACE)
        assert value == pytest.approx(1 / attributes["found"]["ratio"])
    (failed,) = (trial for trial in read["trials"] if trial[0] == "FAIL")
    assert failed[1] == {"block": 1, "unroll": 1, "packed": False}
    assert failed[3]["reason"] == "CompileError: no"


def test_the_study_says_what_is_tuned_where_and_how_it_ended(cache):
    record = search(cache, trials=100).record
    attributes = with_plain_optuna(cache)["attributes"]
    about, ending = attributes["about"], attributes["concluded"]
    assert about["problem"] == asdict(toy.PROBLEM)
    assert about["device"] == toy.DEVICE.as_dict()
    assert about["default"] == asdict(toy.DEFAULT_SCHEDULE)
    assert (about["bytes"], about["flops"], about["threads"]) == (2 * 10**6, 10**6, 2)
    assert about["limit_ms"] == record.measurement["limit_ms"]
    assert {"tilelang", "torch", "date", "host", "command"} <= set(about)
    assert (ending["schedule"], ending["measurement"]) == (record.schedule, record.measurement)
    (winner,) = (row for row in ending["finalists"] if row["schedule"] == record.schedule)
    assert winner["ratio"] == record.measurement["ratio"]
    assert winner["low"] <= winner["ratio"] <= winner["high"]
    assert [row["schedule"] for row in ending["finalists"] if row["default"]] == [asdict(toy.DEFAULT_SCHEDULE)]


def test_standings_of_few_rounds_have_no_bounds():
    pool = enumerate_pool(toy.SPEC, toy.PROBLEM, toy.DEVICE.target)
    other = 0 if pool.default else 1
    rows = standings(pool, {str(pool.default): [2.0] * 6, str(other): [1.0] * 6})
    assert [(row["default"], row["ratio"], row["low"], row["high"]) for row in rows] == [
        (True, 1.0, None, None),
        (False, 2.0, None, None),
    ]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("CompileError: merge forward: g++ failed: error: no", "does not compile"),
        ("compile_kernel ended its process: SIGSEGV", "does not compile"),
        ("WrongResult: y at 131 tokens in 3 slices: wrote outside of the result", "wrong result"),
        ("assess ended its process: SIGSEGV", "crashed"),
        ("assess closed its connection and was killed", "crashed"),
        ("assess took longer than 60 s and was killed", "took too long"),
        ("assess did not start within 300 s and was killed", "took too long"),
        ("out of memory: assess ended its process: SIGABRT - bad_alloc", "out of memory"),
        ("MemoryError: ", "out of memory"),
        ("LoadError: x.so does not load: undefined symbol", "other errors"),
    ],
)
def test_reasons_have_kinds(reason, kind):
    assert kind_of(reason) == kind


def test_kinds_are_counted_most_frequent_first():
    reasons = ["WrongResult: y", "assess ended its process: SIGSEGV", "assess ended its process: SIGABRT"]
    assert list(by_kind(reasons).items()) == [("crashed", 2), ("wrong result", 1)]


def test_passwords_are_not_kept(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mhc-tune", "tune", "--storage", "postgresql+psycopg://me:secret@host/db"])
    assert provenance()["command"] == "mhc-tune tune --storage postgresql+psycopg://me:***@host/db"
