"""The command tune where something outside of it is wrong: one line, exit code 2, and nothing lost."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "autotune" / "toy_command.py"


def tune(folder, *more, before=(), limit=None):
    """`mhc-tune tune` on the toy kernel, in a process of its own."""
    command = [*before, sys.executable, str(SCRIPT), "tune", "--trials", "100", "--cache", str(folder), *more]
    limited = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=200, preexec_fn=limited)


def one_line(done):
    """The error's line, of a command that ended as bad input does."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.splitlines()[-1:] == lines
    return lines[0]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////nowhere/at/all/trials.db", "unable to open database file"),
        pytest.param("nonsense", "storage must be an SQLAlchemy URL of a database", marks=pytest.mark.slow),
        pytest.param("nosuch://host/db", "(Can't load plugin: sqlalchemy.dialects:nosuch)", marks=pytest.mark.slow),
    ],
)
def test_a_storage_that_cannot_be_opened(tmp_path, url, said):
    found = one_line(tune(tmp_path, "--storage", url))
    assert said in found
    assert f"got {url} " in found


def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o555)
    # Root may write anywhere, unless that very privilege is taken away.
    before = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    if before and not shutil.which("setpriv"):
        pytest.skip("root may write anywhere, and there is no setpriv to give that up")
    said = one_line(tune(tmp_path / "cache", before=before))
    tmp_path.chmod(0o755)
    assert said.startswith(f"error: studies must be in a folder that can be written, got {tmp_path}/cache")
    assert "(Permission denied): choose another cache" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_while_trials_are_written(tmp_path):
    said = one_line(tune(tmp_path, limit=20_000))
    assert said.startswith(f"error: trials must be written to {tmp_path}/studies/")
    assert said.endswith("what was finished is kept; make room or mend it, then run the same command again")
    (journal,) = tmp_path.glob("studies/*.journal")
    written = journal.read_bytes()
    assert 15_000 < len(written) <= 20_000
    done = tune(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7.50x the default" in done.stderr
    whole_lines = written[: written.rfind(b"\n") + 1]
    assert journal.read_bytes().startswith(whole_lines)


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_winner_is_written(tmp_path):
    """A file system of 8 kB: a binary fits, what describes it does not; the default's, which is kept, comes first."""
    cache, storage = tmp_path / "cache", f"sqlite:///{tmp_path / 'trials.db'}"
    cache.mkdir()
    mount = 'mount -t tmpfs -o size=8k tmpfs "$0" && '
    if subprocess.run(["unshare", "-m", "sh", "-c", mount + "true", str(cache)], check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    inside = ("unshare", "-m", "sh", "-c", mount + 'exec "$@"', str(cache))
    said = one_line(tune(cache, "--storage", storage, before=inside))
    folder = cache / "defaults"
    assert said == (
        f"error: the cache folder must be writable, got {folder} (No space left on device): choose another folder"
    )
    done = tune(cache, "--storage", storage)
    assert done.returncode == 0, done.stderr
    assert "7.50x the default" in done.stderr
