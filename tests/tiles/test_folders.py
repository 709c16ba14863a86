"""The user's folders, and ops in the containers that users have: no HOME, a read-only one, any umask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiles import folders
from tiles.errors import BadInput
from tiles.folders import default_folder, keys_folder

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An environment without HOME, of a user whom the system does not know."""
    for name in ("MHC_TUNE_CACHE", "MHC_TUNE_KEYS", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for cached in (folders._temporary, folders._chosen):
        cached.cache_clear()
    yield tmp_path
    for cached in (folders._temporary, folders._chosen):
        cached.cache_clear()


@pytest.fixture(params=[True, False], ids=["platformdirs", "torch alone"])
def _with_and_without_platformdirs(request, monkeypatch):
    if not request.param:
        monkeypatch.setitem(sys.modules, "platformdirs", None)


@pytest.mark.usefixtures("_with_and_without_platformdirs")
def test_the_environment_then_the_home_folder(bare, monkeypatch):
    monkeypatch.setenv("HOME", str(bare / "home"))
    assert default_folder() == bare / "home" / ".cache" / "mhc-tune"
    assert keys_folder() == bare / "home" / ".config" / "mhc-tune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / "xdg"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(bare / "config"))
    assert default_folder() == bare / "xdg" / "mhc-tune"
    assert keys_folder() == bare / "config" / "mhc-tune"
    monkeypatch.delenv("HOME")
    assert default_folder() == bare / "xdg" / "mhc-tune"
    monkeypatch.setenv("MHC_TUNE_CACHE", str(bare / "chosen"))
    monkeypatch.setenv("MHC_TUNE_KEYS", str(bare / "keys"))
    assert default_folder() == bare / "chosen"
    assert keys_folder() == bare / "keys"
    assert list(bare.iterdir()) == []


@pytest.mark.usefixtures("_with_and_without_platformdirs")
@pytest.mark.parametrize("home", [None, "", "relative", "/"])
def test_without_a_home_folder_kernels_go_to_one_of_this_user_alone(bare, monkeypatch, home):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    folder = default_folder()
    assert folder == bare / f"mhc-tune-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert keys_folder() is None
    assert default_folder() == folder


@pytest.mark.parametrize("trap", ["link", "open", "file"])
def test_a_folder_that_somebody_else_prepared_is_not_used(bare, trap):
    prepared = bare / f"mhc-tune-{os.getuid()}"
    if trap == "link":
        (bare / "theirs").mkdir()
        prepared.symlink_to(bare / "theirs")
    elif trap == "open":
        prepared.mkdir()
        prepared.chmod(0o777)
    else:
        prepared.write_text("")
    folder = default_folder()
    assert folder != prepared
    assert folder.parent == bare
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_home_folder_where_nothing_can_be_made(bare, monkeypatch):
    (bare / "file").write_text("no folder")
    monkeypatch.setenv("HOME", str(bare / "file"))
    assert default_folder() == bare / f"mhc-tune-{os.getuid()}"
    made = bare / "image" / ".cache" / "mhc-tune"
    made.mkdir(parents=True)
    made.parent.chmod(0o555)
    monkeypatch.setenv("HOME", str(bare / "image"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert default_folder() == made  # it may hold kernels, and be read


def test_a_setting_that_names_no_folder_is_one_line(bare, monkeypatch):
    monkeypatch.setenv("MHC_TUNE_CACHE", "~/kernels")
    with pytest.raises(BadInput, match=r"MHC_TUNE_CACHE must name a folder, got ~/kernels .*: give an absolute path"):
        default_folder()


def test_a_relative_setting_stays_where_it_was_when_the_working_folder_changes(bare, monkeypatch):
    monkeypatch.setenv("MHC_TUNE_CACHE", "kernels")
    for place in ("first", "second"):
        (bare / place).mkdir()
        monkeypatch.chdir(bare / place)
        assert default_folder() == bare / "first" / "kernels"


RUN = """
import json, os, pwd, sys, tempfile
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
os.umask({umask})
import torch, mhc
x = torch.randn(8, 4, 16, requires_grad=True)
mhc.functional.aggregate(x, torch.rand(8, 4)).sum().backward()
print(json.dumps([[row.op, row.direction, row.runs, row.why] for row in mhc.kernel_report()]))
"""


def ours(folder):
    """Names in a folder, without those that are torch's."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torch")]


def ran(tmp_path, umask, *options, **environment):
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, *options, "-c", RUN.format(umask=umask)],
        env=kept | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ops_run_compiled_without_home_and_the_next_process_finds_the_kernels(tmp_path):
    """With umask 0, under which a folder is everybody's unless its maker sees to it, and with warnings as errors."""
    first = ran(tmp_path, 0, "-W", "error")
    assert [row[2] for row in first] == ["default", "default"]
    assert all("by this process" in row[3] for row in first)
    assert ours(tmp_path) == [f"mhc-tune-{os.getuid()}"]
    assert all("compiled earlier" in row[3] for row in ran(tmp_path, 0))


def test_nothing_but_kernels_goes_to_the_home_folder(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    for folder in (home, temporary):
        folder.mkdir()
    assert [row[2] for row in ran(temporary, 0o22, HOME=str(home))] == ["default", "default"]
    assert [str(path.relative_to(home)) for path in home.iterdir()] == [".cache"]
    assert [path.name for path in (home / ".cache").iterdir()] == ["mhc-tune"]
    assert ours(temporary) == []


def test_a_home_folder_that_is_closed_to_this_user(bare, monkeypatch):
    """As root's is, where a container keeps HOME=/root for another user."""
    closed = bare / "closed"
    stat = os.stat

    def refuses(path, *args, **kwargs):
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    closed.mkdir()
    monkeypatch.setenv("HOME", str(closed))
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed)
    monkeypatch.setattr(os, "stat", refuses)
    assert default_folder() == bare / f"mhc-tune-{os.getuid()}"
