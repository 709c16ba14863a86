"""Where trials are kept: a journal file per study, or a database that several machines share."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timedelta
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from tiles.errors import BadInput

OWNER = "owner"
"""Trial attribute: [host, process id] of the process at work on it."""

ABANDONED_AFTER = timedelta(hours=1)
"""A running trial that is older belongs to nobody: trials take seconds."""


def open_study(name: str, folder: Path, url: str | None, sampler: BaseSampler) -> Study:
    """The study of this name, created or resumed; trials that a killed process left running are marked failed.

    Kept in the journal `folder`/`name`.journal, or in the database at `url`, an SQLAlchemy URL that may serve several
    machines. Raises `BadInput` for a storage that does not open.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = _journal(folder, name) if url is None else _database(url)
    study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _abandoned(trial):
            study.tell(trial.number, state=TrialState.FAIL)
    return study


def claim(trial: Trial) -> None:
    """Note on a trial that this process is at work on it."""
    trial.set_user_attr(OWNER, [platform.node(), os.getpid()])


def _abandoned(trial: FrozenTrial) -> bool:
    if trial.datetime_start is None or datetime.now() - trial.datetime_start > ABANDONED_AFTER:
        return True
    host, process = trial.user_attrs.get(OWNER, (None, 0))
    return host == platform.node() and (process == os.getpid() or not Path(f"/proc/{process}").exists())


def _journal(folder: Path, name: str) -> BaseStorage:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Absolute: the lock is a symbolic link to this path.
        path = folder.resolve() / f"{name}.journal"
        repair(path)
        return JournalStorage(JournalFileBackend(str(path)))
    except OSError as error:
        raise BadInput(
            f"studies must be in a folder that can be written, got {folder} ({error.strerror}): choose another cache"
        ) from error


def _database(url: str) -> BaseStorage:
    try:
        return RDBStorage(url)
    except Exception as error:  # the driver's own exception types, and ImportError for a driver that is missing
        said = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise BadInput(
            f"storage must be an SQLAlchemy URL of a database that answers, got {url} ({said[0]}): "
            "leave it out to use a journal file"
        ) from error


def repair(path: Path) -> None:
    """Cut off what a killed process left of the last line of a journal; raises `BadInput` for damage before that."""
    if not path.exists():
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        bad = next((number for number, line in enumerate(lines) if not _complete(line)), len(lines))
        if bad < len(lines) - 1:
            raise BadInput(
                f"a journal must hold one JSON object a line, {path} does not in line {bad + 1}: "
                "move the file away to search anew"
            )
        if bad < len(lines):
            os.truncate(path, sum(len(line) for line in lines[:bad]))
    finally:
        lock.release()


def _complete(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
