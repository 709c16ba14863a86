"""The user's folders: where kernels are cached and keys are kept, also without a home folder that can be written.

A container may run as a user whom the system does not know, without HOME, or with one that is read-only. Kernels are
then cached in a folder of the system's temporary one that this user alone may change, for they are code that will run.
"""

from __future__ import annotations

import os
import stat
import tempfile
from functools import cache
from pathlib import Path

from tiles.errors import BadInput


def default_folder() -> Path:
    """The kernel cache's folder, which need not exist: `$MHC_TUNE_CACHE` where it is set, else the platform's user
    cache folder; where that cannot be made, one of this user's in the temporary folder.

    Raises `BadInput` for a bad setting.
    """
    if chosen := os.environ.get("MHC_TUNE_CACHE"):
        return _chosen("MHC_TUNE_CACHE", chosen)
    folder = _platforms("cache")
    if folder is not None and (_exists(folder) or _can_be_made(folder)):
        return folder
    return _temporary(Path(tempfile.gettempdir()) / f"mhc-tune-{os.getuid()}")


def keys_folder() -> Path | None:
    """The folder of the user's keys, which need not exist: `$MHC_TUNE_KEYS` where it is set, else the platform's user
    configuration folder; None without a home folder.

    Raises `BadInput` for a bad setting.
    """
    if chosen := os.environ.get("MHC_TUNE_KEYS"):
        return _chosen("MHC_TUNE_KEYS", chosen)
    return _platforms("config")


@cache
def _chosen(name: str, value: str) -> Path:
    """A folder that the environment names; one relative to the working folder stays where it was when first used."""
    try:
        return Path(value).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no home folder, no working folder
        raise BadInput(f"{name} must name a folder, got {value} ({error}): give an absolute path") from error


def _platforms(kind: str) -> Path | None:
    """The platform's folder of a kind, or None where that would be in no folder of the user's."""
    if not _home() and not Path(os.environ.get(f"XDG_{kind.upper()}_HOME", "")).is_absolute():
        return None
    try:
        import platformdirs
    except ImportError:  # a machine that only runs kernels may have no more than torch; these are Linux's folders
        named = Path(os.environ.get(f"XDG_{kind.upper()}_HOME", ""))
        return (named if named.is_absolute() else Path(_home() or "/") / f".{kind}") / "mhc-tune"
    find = platformdirs.user_cache_path if kind == "cache" else platformdirs.user_config_path
    found = find("mhc-tune", appauthor=False)
    return found if found.is_absolute() else None


def _home() -> str | None:
    """The home folder; None for a user who has none."""
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home raises where there is none)
    return home if Path(home).is_absolute() and home != "/" else None


def _exists(folder: Path) -> bool:
    """Whether it can be seen; `Path.exists` raises where a folder above it is closed to this user."""
    return os.path.exists(folder)  # noqa: PTH110


def _can_be_made(folder: Path) -> bool:
    nearest = next(parent for parent in folder.parents if _exists(parent))
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


@cache
def _temporary(folder: Path) -> Path:
    """`folder`, made for this user alone; a new one of this process where somebody else has made it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="mhc-tune-"))
