"""Trust in a kernel cache's folder: decided by who may write to it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

ROOT = 0


def why_folder_untrusted(folder: Path) -> str | None:
    """Why code in a kernel cache may not run unasked, or None.

    A folder that the user names is trusted, unless everybody may write to it or to a file in it, or a group may and
    the owner is somebody else: any of these could have put the code there.
    """
    try:
        with os.scandir(folder) as entries:
            paths = [folder, *(Path(entry) for entry in entries)]
    except OSError:
        return None  # there is nothing to run
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:  # another process has replaced it
            continue
        if path != folder and stat.S_ISDIR(status.st_mode):
            continue
        if status.st_mode & stat.S_IWOTH:
            return f"everybody may change {path}: chmod o-w {path}"
        if status.st_mode & stat.S_IWGRP and status.st_uid not in (os.getuid(), ROOT):
            return f"{path} is another user's and a group may change it: chmod g-w {path}"
    return None
