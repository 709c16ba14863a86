"""Studies on disk: resumed, repaired, and safe from writers that were killed or found the disk full."""

import json
import resource
import select
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from autotune.study import database
from autotune.study.journal import repair
from autotune.study.redact import without_password
from autotune.study.storage import open_study
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


def sound(journal):
    return all(json.loads(line) for line in journal.read_text().splitlines())


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
    assert sound(journal)


def test_a_line_torn_while_the_study_is_open_does_not_spoil_the_next(tmp_path):
    """Another worker was killed, or met a full disk, in the middle of a line."""
    study, journal = opened(tmp_path), tmp_path / "merge.forward-1.journal"
    finish_one(study)
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "worker')
    assert states(study) == [TrialState.COMPLETE]
    finish_one(study, 0.5)
    assert states(opened(tmp_path)) == [TrialState.COMPLETE] * 2
    assert sound(journal)


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


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    journal = tmp_path / "some.journal"
    journal.write_bytes(b"")
    hold = (
        "import sys, time; from pathlib import Path; from autotune.study.journal import AppendLock; "
        "lock = AppendLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    first, second = (
        subprocess.Popen([sys.executable, "-c", hold, str(journal)], stdout=subprocess.PIPE) for _ in range(2)
    )
    try:
        ready, _, _ = select.select([first.stdout, second.stdout], [], [], 60)
        holder, waiting = (first, second) if first.stdout in ready else (second, first)
        assert select.select([waiting.stdout], [], [], 0.5)[0] == []
        holder.kill()
        assert select.select([waiting.stdout], [], [], 20)[0] == [waiting.stdout]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_optunas_own_lock_file_left_by_a_killed_process_blocks_nobody(tmp_path):
    finish_one(opened(tmp_path))
    (tmp_path / "merge.forward-1.journal.lock").symlink_to(tmp_path / "merge.forward-1.journal")
    start = time.monotonic()
    finish_one(opened(tmp_path))
    assert time.monotonic() - start < 20


def test_a_full_disk_is_one_line_and_what_was_finished_is_kept(tmp_path):
    study, journal = opened(tmp_path), tmp_path / "merge.forward-1.journal"
    finish_one(study)
    before, limits = journal.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    # A line is written in part, then no byte more: what a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(BadInput, match=r"trials must be written to .*File too large.*run the same command again"):
            finish_one(study)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert journal.read_bytes()[:-10] == before
    finish_one(study, 0.5)
    assert opened(tmp_path).best_value == 0.5
    assert sound(journal)


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


def test_a_missing_driver_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(BadInput, match=r"needs its driver.* no module psycopg.*pip install 'psycopg\[binary\]'$") as e:
        opened(tmp_path, "postgresql+psycopg://user:secret@host/db")
    assert "secret" not in str(e.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://user:secret@host/db", "postgresql://user:***@host/db"),
        ("postgresql://user:se/cr@et@host:5432/db", "postgresql://user:***@host:5432/db"),
        ("postgresql+psycopg://user@host:5432/db", "postgresql+psycopg://user@host:5432/db"),
        ("tune --storage postgresql://u:secret@host/db --json", "tune --storage postgresql://u:***@host/db --json"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_passwords_are_not_shown(url, shown):
    assert without_password(url) == shown


def test_a_database_that_goes_away_is_waited_for_and_then_said(tmp_path, monkeypatch):
    """SQLite is locked by another writer, which is an operational error as a lost connection is."""
    path = tmp_path / "trials.db"
    study = opened(tmp_path, f"sqlite:///{path}?timeout=0.1")
    finish_one(study)
    monkeypatch.setattr(database, "RETRY_PAUSE", 0.05)
    monkeypatch.setattr(database, "RETRY_SECONDS", 0.5)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BadInput, match=r"the database must answer, got .*locked.* for 0.5 s: .* run the same command"):
        study.set_user_attr("a", 1)
    monkeypatch.setattr(database, "RETRY_SECONDS", 60)
    threading.Timer(1.0, lambda: Path(tmp_path / "free").touch()).start()

    def pause(seconds):
        if (tmp_path / "free").exists() and blocker.in_transaction:
            blocker.execute("ROLLBACK")

    monkeypatch.setattr(database.time, "sleep", pause)
    study.set_user_attr("a", 2)
    blocker.close()
    assert opened(tmp_path, f"sqlite:///{path}").user_attrs == {"a": 2}
    assert states(study) == [TrialState.COMPLETE]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"choose another cache"):
        opened(tmp_path / "file" / "studies")
