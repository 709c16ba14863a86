"""A compiler's stand-in that runs it once for the same work: `compile_once.py FOLDER COMPILER ARGUMENT...`

FOLDER belongs to one run of the tests. What `-o` names is kept there under a digest of the compiler, its arguments, and
every file that lies beside its inputs; the folders of inputs and outputs, which are temporary, do not count. Work that
fails, has no `-o` or takes inputs from a crowded folder goes to the compiler as it is.
"""

import os
import sys
from hashlib import sha256
from pathlib import Path
from time import monotonic

INPUTS = (".c", ".cpp", ".cu", ".o", ".a", ".so")
MOST_BESIDE = 50
"""Files beside an input; in a folder with more, any may be a header of somebody else's."""


def main(folder: Path, compiler: str, arguments: list[str]) -> int:
    started = monotonic()
    digest = digest_of(compiler, arguments)
    if digest is None:
        os.execv(compiler, [compiler, *arguments])
    output = Path(arguments[arguments.index("-o") + 1])
    kept = folder / digest
    import fcntl

    with (folder / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the same work in two processes is done once; the second waits for it
        found = kept.is_dir()
        if not found and (status := compile_and_keep(compiler, arguments, output, kept)):
            return status
    if found:
        output.unlink(missing_ok=True)
        output.write_bytes((kept / "output").read_bytes())
        output.chmod((kept / "output").stat().st_mode)
    sys.stdout.buffer.write((kept / "stdout").read_bytes())
    sys.stderr.buffer.write((kept / "stderr").read_bytes())
    took = float((kept / "seconds").read_text())
    with (folder / "log").open("a") as log:
        log.write(f"{'found' if found else 'compiled'} {took:.2f} {monotonic() - started:.2f}\n")
    return 0


def digest_of(compiler: str, arguments: list[str]) -> str | None:
    """A digest of all that decides the output, or None for work that is not kept."""
    if arguments.count("-o") != 1 or {"-E", "-M", "-MD", "-MMD", "-I", "-L", "-I.", "-L."} & set(arguments):
        return None
    output = arguments[arguments.index("-o") + 1]
    inputs = [name for name in arguments if name.endswith(INPUTS) and name != output and Path(name).is_file()]
    beside = [file for place in {Path(name).absolute().parent for name in inputs} for file in place.iterdir()]
    beside = sorted(file for file in beside if file.is_file() and file.name != Path(output).name)
    if not inputs or len(beside) > MOST_BESIDE:
        return None
    digest = sha256(compiler.encode())
    for argument in arguments:
        digest.update(b"\0" + (Path(argument).name if argument in (*inputs, output) else argument).encode())
    for file in beside:
        digest.update(b"\0" + file.name.encode() + b"\0" + sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def compile_and_keep(compiler: str, arguments: list[str], output: Path, kept: Path) -> int:
    """Run the compiler; its exit status. Where that is 0 all that it made is kept."""
    import subprocess

    started = monotonic()
    done = subprocess.run([compiler, *arguments], capture_output=True, check=False)
    if done.returncode:
        sys.stdout.buffer.write(done.stdout)
        sys.stderr.buffer.write(done.stderr)
        return done.returncode
    made = kept.with_suffix(f".{os.getpid()}")
    made.mkdir()
    (made / "output").write_bytes(output.read_bytes())
    (made / "output").chmod(output.stat().st_mode)
    (made / "stdout").write_bytes(done.stdout)
    (made / "stderr").write_bytes(done.stderr)
    (made / "seconds").write_text(f"{monotonic() - started}")
    made.rename(kept)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
