"""Two ranks (gloo): both run the kernels that rank 0 chose, and neither waits for ever for the other."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import mhc
from tiles.cache.cache import KernelCache, Key
from tiles.compiler.compile import compile_kernel
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import detect_device

PROBLEM = Problem("project", "forward", streams=2, width=256, tokens=16)

# Rank 0's folder sums in blocks of 64, rank 1's in one of 256: they round differently.
RANK = """
import json, logging, sys
import torch, torch.distributed as dist
import mhc, mhc.dispatch.ranks

rank, folder, meeting = int(sys.argv[1]), sys.argv[2], sys.argv[3]
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("mhc").addHandler(handler)
torch.set_num_threads(1)

def outcome():
    torch.manual_seed(0)
    results = mhc.functional.project(torch.randn(16, 2, 256), torch.randn(8, 512))
    (row,) = mhc.kernel_report()
    (chosen,) = mhc.active()._resolved.values()
    heard, said[:] = list(said), []
    return {
        "bits": [result.view(torch.int32).flatten().tolist() for result in results],
        "runs": row.runs, "why": row.why, "schedule": chosen.schedule, "said": heard,
    }

def refused(path):
    try:
        mhc.load_kernels(path)
    except mhc.BadInput as error:
        return str(error)

def report(**values):
    print(json.dumps(values))

mhc.load_kernels(folder)
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
before = outcome()
mhc.load_kernels(folder)
agreed = outcome()
errors = [refused("/nowhere/at/all" if rank == bad else folder) for bad in (0, 1)]
def fail(resolver):
    raise RuntimeError("odd")

choice, mhc.dispatch.ranks._choice = mhc.dispatch.ranks._choice, fail
errors.append(refused(folder))
mhc.dispatch.ranks._choice = choice
mhc.load_kernels(folder)
report(before=before, agreed=agreed, errors=errors, after_errors=outcome())
dist.destroy_process_group()
"""


def put(folder: Path, block_width: int) -> None:
    here = detect_device("cpu")
    schedule = replace(kernel_spec("project", "forward").default(PROBLEM, here.target), block_width=block_width)
    built = compile_kernel(PROBLEM, schedule, here.target)
    KernelCache(folder).put(Key.of(PROBLEM, here), asdict(schedule), built.binary, built.source, {}, {})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank reports."""
    folder = tmp_path_factory.mktemp("ranks")
    put(folder / "rank 0", 64)
    put(folder / "rank 1", 256)
    meeting = f"file://{folder / 'meeting'}"
    variables = os.environ | {
        "PYTHONPATH": str(Path(mhc.__file__).parents[1]),
        "MHC_TUNE_CACHE": str(folder / "default"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder / f"rank {rank}"), meeting],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], [stderr for _, stderr in outputs]
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


def test_ranks_that_load_after_init_run_what_rank_0_chose(ranks):
    zero, one = (rank["agreed"] for rank in ranks)
    assert zero["schedule"] == one["schedule"]
    assert zero["schedule"]["block_width"] == 64
    assert zero["bits"] == one["bits"]
    assert (zero["runs"], one["runs"]) == ("tuned", "tuned")
    assert "compiled by this process" in one["why"], "rank 1 has no such code and compiles rank 0's schedule"
    assert zero["said"] == []


def test_ranks_that_load_before_init_choose_by_themselves_and_are_told(ranks):
    zero, one = (rank["before"] for rank in ranks)
    assert zero["schedule"]["block_width"] == 64
    assert one["schedule"]["block_width"] == 256
    assert zero["bits"] != one["bits"], "the test would prove nothing otherwise"
    for rank in (zero, one):
        assert [text for text in rank["said"] if "call mhc.load_kernels after init_process_group" in text] != []


def test_what_one_rank_cannot_load_is_refused_on_all(ranks):
    for bad in (0, 1):
        heard = [rank["errors"][bad] for rank in ranks]
        assert heard[0] == heard[1]
        assert heard[0].startswith(f"rank {bad}: ")
        assert "/nowhere/at/all" in heard[0]
    assert {rank["errors"][2] for rank in ranks} == {"rank 0: RuntimeError: odd"}
    assert ranks[0]["after_errors"]["bits"] == ranks[1]["after_errors"]["bits"], "the ranks still agree afterwards"
