"""Metadata of a study: understood by a reader with nothing but Optuna."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import toy

from autotune import tuner
from autotune.search.trials import REASON, RESULT
from autotune.study.heartbeat import HEARTBEAT, OWNER
from autotune.study.metadata import CONCLUSION, METADATA
from autotune.tuner import tune
from tiles.cache.cache import KernelCache, Key

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


def test_attributes_have_the_names_under_which_stored_studies_hold_them():
    names = METADATA, CONCLUSION, RESULT, REASON, OWNER, HEARTBEAT
    assert names == ("about", "concluded", "found", "reason", "owner", "beat")
