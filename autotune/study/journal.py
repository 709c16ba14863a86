"""Optuna's journal file, safe against kill -9: one JSON object a line, under a lock that ends with its process."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock

from tiles.errors import BadInput


def open_journal(folder: Path, name: str) -> BaseStorage:
    """Open `folder`/`name`.journal, made or repaired; raises `BadInput` where it cannot be read or written."""
    path = folder.absolute() / f"{name}.journal"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        repair(path)
        return JournalStorage(_Journal(path))
    except OSError as error:
        raise BadInput(
            f"studies must be in a folder that can be written, got {folder} ({error.strerror}): choose another cache"
        ) from error


def repair(path: Path) -> None:
    """Cut off a partial last line, which a killed process leaves; raises `BadInput` for damage before that.

    Dropping a line in the middle would renumber every later trial.
    """
    if not path.exists():
        return
    lock = AppendLock(path)
    lock.acquire()
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        bad = next((number for number, line in enumerate(lines) if not _is_whole(line)), len(lines))
        if bad < len(lines) - 1:
            raise BadInput(
                f"a journal must hold one JSON object a line, {path} does not in line {bad + 1}: "
                "move the file away to search anew"
            )
        if bad < len(lines):
            os.truncate(path, sum(len(line) for line in lines[:bad]))
    finally:
        lock.release()


class AppendLock(BaseJournalFileLock):
    """An exclusive lock to append to a journal, after whole lines only.

    The system releases it when its holder dies; Optuna's lock files stay, and block others for half a minute. A holder
    that was killed, or whose disk was full, leaves a partial line: the next one cuts it off, because two lines run
    together would both be lost.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        file = self._path.open("rb+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            _truncate_partial_line(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Release the lock."""
        assert self._file
        self._file.close()
        self._file = None


class _Journal(JournalFileBackend):
    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(str(path), AppendLock(path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append under the lock; raises `BadInput` where the disk is full or the journal can no longer be written."""
        try:
            super().append_logs(logs)
        except OSError as error:
            raise BadInput(
                f"trials must be written to {self._path}, got {error.strerror}: what was finished is kept; "
                "make room or mend it, then run the same command again"
            ) from error


def _truncate_partial_line(file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _is_whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
