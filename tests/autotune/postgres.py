"""A PostgreSQL server of its own, from the system's packages, in a temporary folder."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path

PASSWORD = "as-secret-as-it-gets"
ATTEMPTS = 5


def binaries() -> Path | None:
    """Where initdb and postgres lie: Debian keeps them off the PATH, a folder a version."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def why_not() -> str | None:
    """Why no server can be started here, or None."""
    if binaries() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if os.geteuid() == 0 and _user() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres or nobody"
    return None


def _user() -> str | None:
    """Whom to run the server as: initdb refuses root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


class Server:
    """A server on a free port of this machine; user tuner with `PASSWORD`, database tuner."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._process = folder, None
        self._bin, self._as = binaries(), {"user": _user()} if _user() else {}
        folder.mkdir()
        if self._as:
            shutil.chown(folder, _user())
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        who = ("-U", "tuner", "--auth=scram-sha-256", "--pwfile=password")
        self._run("initdb", "-D", "data", *who, "--encoding=UTF8", "--no-sync")
        for attempt in range(ATTEMPTS):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
            try:
                self.start()
                break
            except RuntimeError:  # another process, a test beside this one say, took the port in between
                if attempt == ATTEMPTS - 1:
                    raise
        try:
            self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tuner", "tuner")
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg://tuner:{PASSWORD}@127.0.0.1:{self.port}/tuner"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        log = (self.folder / "log").open("ab")
        options = ["-D", "data", "-p", str(self.port), "-h", "127.0.0.1", "-k", "", "-F"]
        command = [str(self._bin / "postgres"), *options]
        self._process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, **self._as)
        log.close()
        deadline = time.monotonic() + 120
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.stop()
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.1)

    def _answers(self) -> bool:
        """Whether this very server is ready; on the port may be another one."""
        try:
            lines = (self.folder / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready"

    def stop(self) -> None:
        """Cut all connections, as a machine that is switched off does."""
        self._process.send_signal(3)  # SIGQUIT: at once, without good-byes
        self._process.wait(60)

    def _run(self, program: str, *options: str) -> None:
        environment = {**os.environ, "PGPASSWORD": PASSWORD, "LC_ALL": "C"}
        subprocess.run(
            [str(self._bin / program), *options],
            cwd=self.folder,
            check=True,
            capture_output=True,
            env=environment,
            timeout=120,
            **self._as,
        )
