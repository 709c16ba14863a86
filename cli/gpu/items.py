"""Runners of the items of `mhc-tune gpu`, one per kind: each works in child processes, which may crash or hang.

Every runner takes (item, target, folder of the results, seconds, its result of an earlier call) and returns the result
to store: `status` (done, partial, failed, skipped), `why` if it is not done, and the measurements.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

from cli.gpu import process
from cli.gpu.plan import DTYPE, Item, Kind
from cli.gpu.process import ROOT, python

WORK = "work"
"""Folder of the kernel cache, the log and temporary files, ignored by git."""

LOG = "gpu.log"
TRIALS = 16
"""Trials per kernel: two rounds of parallel compilation on a large host; each takes seconds."""

Result = dict[str, Any]

PACKAGES = ("torch", "triton", "tilelang", "tile-kernels", "liger-kernel", "optuna")


def versions() -> dict[str, str]:
    """Versions of the measured packages, Python and the platform."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


RESULT_KEYS = {"rows", "errors"}
"""An op that has one of these is done."""


def run_measurements(item: Item, target: str, folder: Path, seconds: float, earlier: Mapping[str, Any]) -> Result:
    """Measure op by op in `cli.gpu.child`. An op that ends its process has failed; the others continue."""
    deadline = time.monotonic() + seconds
    ops = {name: found for name, found in earlier.get("ops", {}).items() if RESULT_KEYS & set(found)}
    without: dict[str, str] = dict(earlier.get("without", {}))
    roofline: Any = earlier.get("roofline")
    wanted = [timing.op for timing in item.timings] or list(item.ops) or [item.kind]
    why = ""
    while (missing := [op for op in wanted if op not in ops]) and not why:
        out, spec = _work(folder) / "child.json", _work(folder) / "task.json"
        out.unlink(missing_ok=True)
        timings = [asdict(timing) for timing in item.timings if timing.op in missing]
        task = {"kind": item.kind, "target": target, "shape": item.shape, "ops": missing, "timings": timings}
        task["impl"] = item.impl
        spec.write_text(json.dumps(task | {"cache": str(_cache(folder)), "out": str(out), "without": without}))
        given = max(1.0, deadline - time.monotonic())
        code = process.run(python("-m", "cli.gpu.child", str(spec)), given, _log(folder), _environment(folder))
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        progress = {**found.get("ops", {}), **found.get("without", {})}
        ops |= found.get("ops", {})
        without |= found.get("without", {})
        roofline = found.get("roofline") or roofline
        doing = found.get("doing")
        if code is None:
            why = f"{doing or 'starting'} took longer than its {seconds:.0f} s"
        elif code != 0 and doing and not found["without"]:
            ops[doing] = {"failed": f"the process ended with exit code {code}, see {LOG}"}
        elif code == 0 or not progress:
            why = f"the process ended with exit code {code}, see {LOG}"
    return _item_status(item, ops, wanted, why, seconds) | {"ops": ops, "without": without, "roofline": roofline}


def _item_status(item: Item, ops: Mapping[str, Any], wanted: list[str], why: str, seconds: float) -> Result:
    """Status of an item from its ops. An op that an item's full time is not enough for has failed."""
    failed = [f"{op}: {ops[op]['failed']}" for op in wanted if "failed" in ops.get(op, {})]
    failed += [f"{op}: beyond its limits" for op in wanted if not ops.get(op, {}).get("within", True)]
    failed += [f"{op}: does not repeat bit for bit" for op in wanted if not ops.get(op, {}).get("repeats", True)]
    skipped = [
        line for op in wanted if not RESULT_KEYS & set(ops.get(op, {})) for line in ops.get(op, {}).get("skipped", [])
    ]
    if all(op in ops for op in wanted) and not skipped:
        return {"status": "failed", "why": "; ".join(failed)} if failed else {"status": "done"}
    if skipped and not failed:
        return {"status": "partial", "why": "; ".join(skipped)}
    status = "failed" if failed or seconds >= item.max_seconds else "partial"
    return {"status": status, "why": "; ".join([*failed, why])}


def run_tune(item: Item, target: str, folder: Path, seconds: float, earlier: Mapping[str, Any]) -> Result:
    """Run `mhc-tune tune` at one shape; a later call continues its studies."""
    streams, width, tokens = item.shape
    shape = ["--streams", str(streams), "--width", str(width), "--tokens", str(tokens), "--dtype", DTYPE]
    ops = [word for op in item.ops for word in ("--op", op)]
    effort = ["--trials", str(TRIALS), "--seconds", str(max(1.0, seconds - process.GRACE)), "--json"]
    command = python(
        "-m", "cli.main", "tune", "--target", target, *shape, *ops, *effort, "--cache", str(_cache(folder))
    )
    out = _work(folder) / "tune.json"
    code = process.run(command, seconds, _log(folder), _environment(folder), out)
    try:
        said = json.loads(out.read_text(encoding="utf-8"))
    except ValueError:
        return {"status": "failed", "why": f"tune ended with exit code {code} and no results, see {LOG}"}
    kernels = [_kernel(found) for found in said["results"] if found["record"]]
    failed = "; ".join(f"{name}: {why}" for name, why in said["failed"].items())
    missing = len(said["results"]) < 2 * len(item.ops) and not failed
    status = "failed" if failed else "partial" if missing or said["interrupted"] else "done"
    why = {"why": failed or "the time was up"} if status != "done" else {}
    return {"status": status, "kernels": kernels, **why}


def _kernel(found: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a tuned kernel that are stored."""
    names = ("op", "direction", "stopped", "failed_trials")
    return {name: found[name] for name in names} | {name: found["record"][name] for name in ("schedule", "measurement")}


TEST_OUTCOME = re.compile(r"^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", re.MULTILINE)


def run_tests(item: Item, target: str, folder: Path, seconds: float, earlier: Mapping[str, Any]) -> Result:
    """Run the tests that need a GPU, except those that passed in an earlier call."""
    if util.find_spec("pytest") is None:
        return {"status": "skipped", "why": "pytest is not installed: pip install pytest"}
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^(pytestmark = |@)pytest\.mark\.gpu$", path.read_text(encoding="utf-8"), re.MULTILINE)
    )
    passed = [name for name, outcome in earlier.get("tests", {}).items() if outcome == "PASSED"]
    known = [word for name in passed for word in ("--deselect", name)]
    # A machine without a package registry may have other versions of the test dependencies, or lack some.
    lenient = ["-W", "default", "--continue-on-collection-errors", "-o", "addopts=--import-mode=importlib"]
    plugins = [*lenient, "-p", "no:cacheprovider", "-m", "gpu", "-v", "--color=no"]
    out = _work(folder) / "tests.txt"
    command = python("-m", "pytest", *plugins, *files, *known)
    code = process.run(command, seconds, _log(folder), {"MHC_TUNE_CACHE": str(_work(folder) / "tests-cache")}, out)
    said = out.read_text(encoding="utf-8", errors="replace")
    tests = dict.fromkeys(passed, "PASSED") | dict(TEST_OUTCOME.findall(said))
    bad = [name for name, outcome in tests.items() if outcome in ("FAILED", "ERROR")]
    kept: Result = {"tests": tests, "counts": {name: [*tests.values()].count(name) for name in set(tests.values())}}
    if bad:
        return kept | {"status": "failed", "why": f"{len(bad)} tests fail: {', '.join(bad[:3])}", "said": said[-3000:]}
    if code is None:
        return kept | {"status": "partial", "why": "the time was up"}
    if code != 0 and not (code == 5 and passed):
        return kept | {"status": "failed", "why": f"pytest ended with exit code {code}", "said": said[-3000:]}
    return kept | {"status": "done"}


def run_sanitizer(item: Item, target: str, folder: Path, seconds: float, earlier: Mapping[str, Any]) -> Result:
    """Run `mhc-tune verify` on the tuned kernels under NVIDIA's memory checker, if that is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"status": "skipped", "why": "compute-sanitizer is not installed: it comes with the CUDA toolkit"}
    if not any(_cache(folder).glob("*.json")):
        return {"status": "skipped", "why": "nothing is tuned yet"}
    checks = ["--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9"]
    command = [tool, *checks, *python("-m", "cli.main", "verify", str(_cache(folder)), "--json")]
    out = _work(folder) / "sanitizer.txt"
    code = process.run(command, seconds, _log(folder), _environment(folder), out)
    said = out.read_text(encoding="utf-8", errors="replace")
    errors = sum(map(int, re.findall(r"ERROR SUMMARY: (\d+) error", said)))
    if code is None:
        status = "failed" if errors else "skipped"
        return {"status": status, "why": f"took longer than {seconds:.0f} s", "errors": errors}
    if code != 0 or errors:
        return {"status": "failed", "why": f"exit code {code}, {errors} errors", "errors": errors, "said": said[-3000:]}
    return {"status": "done", "errors": 0}


RUNNERS: Mapping[Kind, Callable[[Item, str, Path, float, Mapping[str, Any]], Result]] = {
    "numerics": run_measurements,
    "bench": run_measurements,
    "block": run_measurements,
    "tune": run_tune,
    "tests": run_tests,
    "sanitizer": run_sanitizer,
}

PACK = "kernels.mhcpack"


def save_kernels(folder: Path) -> None:
    """Export the tuned kernels to one file beside the results."""
    if any(_cache(folder).glob("*.json")):
        command = python("-m", "cli.main", "export", str(folder / PACK), "--cache", str(_cache(folder)))
        process.run(command, 60, _log(folder), _environment(folder))


def restore_kernels(folder: Path) -> None:
    """Import the kernels of an earlier call from its pack if there is no cache, as on a fresh machine.

    Code without a trusted signature is not run: its schedules are compiled (see `mhc-tune import`).
    """
    if (folder / PACK).exists() and not any(_cache(folder).glob("*.json")):
        command = python("-m", "cli.main", "import", str(folder / PACK), "--cache", str(_cache(folder)))
        process.run(command, 120, _log(folder), _environment(folder))


def _work(folder: Path) -> Path:
    made = folder / WORK
    if not made.exists():
        made.mkdir(parents=True)
        (made / ".gitignore").write_text("*\n", encoding="utf-8")
    return made


def _cache(folder: Path) -> Path:
    return _work(folder) / "cache"


def _log(folder: Path) -> Path:
    return _work(folder) / LOG


def _environment(folder: Path) -> dict[str, str]:
    """Environment of child processes: compiled default schedules go to the same cache as the tuned ones."""
    return {"MHC_TUNE_CACHE": str(_cache(folder))}
