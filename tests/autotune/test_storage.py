"""Studies on disk: resumed, repaired, and freed of what killed processes left."""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from autotune import storage
from autotune.storage import OWNER, claim, open_study, repair
from tiles.errors import BadInput

DISTRIBUTIONS = {"block": optuna.distributions.CategoricalDistribution((1, 2, 4))}


def opened(folder, url=None):
    return open_study("merge.forward-1", folder, url, RandomSampler(seed=0))


def finish_one(study, value=1.0):
    trial = study.ask(DISTRIBUTIONS)
    trial.set_user_attr("ms", 2.5)
    study.tell(trial, value)


def states(study):
    return [trial.state for trial in study.trials]


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_study_is_resumed_with_its_trials(tmp_path):
    finish_one(opened(tmp_path / "studies"))
    again = opened(tmp_path / "studies")
    assert again.best_value == 1.0
    assert again.best_trial.user_attrs["ms"] == 2.5
    assert (tmp_path / "studies" / "merge.forward-1.journal").is_file()


@pytest.mark.parametrize("torn", [b'{"op_code": 4, "worker', b'{"op_code"\n', b"\x00\x00\x00", b"\xff\xfe\n"])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    finish_one(opened(tmp_path))
    journal = tmp_path / "merge.forward-1.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    again = opened(tmp_path)
    assert states(again) == [TrialState.COMPLETE]
    finish_one(again, 0.5)
    assert opened(tmp_path).best_value == 0.5
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_damage_in_the_middle_is_said_and_nothing_is_thrown_away(tmp_path):
    finish_one(opened(tmp_path))
    journal = tmp_path / "merge.forward-1.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b"nonsense\n", *lines[2:]]))
    before = journal.read_bytes()
    with pytest.raises(BadInput, match=r"does not in line 2: move the file away"):
        opened(tmp_path)
    assert journal.read_bytes() == before


def test_repair_leaves_sound_and_missing_journals_alone(tmp_path):
    repair(tmp_path / "none.journal")
    assert list(tmp_path.iterdir()) == []
    journal = tmp_path / "sound.journal"
    journal.write_bytes(b'{"a":1}\n{"b":2}\n')
    repair(journal)
    assert journal.read_bytes() == b'{"a":1}\n{"b":2}\n'


@pytest.mark.parametrize(
    ("owner", "age", "expected"),
    [
        ([platform.node(), ended_process()], timedelta(0), TrialState.FAIL),
        ([platform.node(), os.getpid()], timedelta(0), TrialState.FAIL),
        ([platform.node(), os.getppid()], timedelta(0), TrialState.RUNNING),
        (["another host", 1], timedelta(0), TrialState.RUNNING),
        (["another host", 1], timedelta(hours=2), TrialState.FAIL),
        (None, timedelta(0), TrialState.RUNNING),
    ],
    ids=["process ended", "this process", "process lives", "elsewhere", "elsewhere, long ago", "just created"],
)
def test_running_trials_that_nobody_works_on_are_freed(tmp_path, monkeypatch, owner, age, expected):
    trial = opened(tmp_path).ask(DISTRIBUTIONS)
    if owner:
        trial.set_user_attr(OWNER, owner)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + age

    monkeypatch.setattr(storage, "datetime", Later)
    assert states(opened(tmp_path)) == [expected]


def test_claim_names_this_process(tmp_path):
    study = opened(tmp_path)
    claim(study.ask(DISTRIBUTIONS))
    assert study.trials[0].user_attrs[OWNER] == [platform.node(), os.getpid()]


def test_a_url_is_a_database(tmp_path):
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    finish_one(opened(tmp_path / "studies", url))
    assert opened(tmp_path / "studies", url).best_value == 1.0
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize("url", ["nonsense", "nosuchdb://host/db", "sqlite:////nowhere/at/all/trials.db"])
def test_a_bad_url_is_one_line(tmp_path, url):
    with pytest.raises(BadInput, match=r"storage must be an SQLAlchemy URL") as caught:
        opened(tmp_path, url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"choose another cache"):
        opened(tmp_path / "file" / "studies")
