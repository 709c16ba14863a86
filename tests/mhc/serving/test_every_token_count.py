"""A pack of three buckets serves every token count: in a process without a compiler, after warm-up, no call finds,
loads or compiles a kernel, and none runs the reference."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import mhc
from tiles.cache.cache import KernelCache
from tiles.cache.compiled_here import compile_and_store, find_compiled
from tiles.cache.record import Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import IDENTITY, Problem
from tiles.pack.pack import write_pack
from tiles.target import detect_device

MOST = 10_000
BUCKETS = (1, 64, 4096)
EDGES = sorted({count for k in range(14) for count in (2**k - 1, 2**k, 2**k + 1) if 1 <= count <= MOST} | {MOST})

STEP, SINGLE_PASS = ("pre", "step", "merge"), ("project", "coefficients", "aggregate", "single_pass", "merge")

WALK = """
import json, sys, time
import torch
import mhc
from tiles.compiler.compile import why_no_compiler
from tiles.target import detect_device

pack, counts, *shape = json.loads(sys.argv[1])
streams, width, dtype, manifold, single_pass = shape
print(why_no_compiler(detect_device("cpu").target))
mhc.load_kernels(pack)
blocks = [mhc.HyperConnection(width, streams, torch.nn.Identity(), manifold=manifold) for _ in range(2)]
model = mhc.HyperConnectionStack(blocks, single_pass=single_pass).eval()
x = torch.randn(max(counts), streams, width).to(getattr(torch, dtype))
report = mhc.warm_up(model, [2**k for k in range(max(counts).bit_length() + 1)], dtype=x.dtype)
slowest = 0.0, 0
with torch.inference_mode():
    for count in counts:
        start = time.perf_counter()
        model(x[:count])
        slowest = max(slowest, (1000 * (time.perf_counter() - start), count))
assert mhc.kernel_report() == report, mhc.kernel_report()
print(report)
print("the longest call: %.1f ms, at %d tokens" % slowest)
"""


def make_pack(folder, streams, width, dtype, manifold, single_pass):
    """Default schedules under the keys of tuned ones."""
    cache, device = KernelCache(folder / "cache"), detect_device("cpu")
    for op in SINGLE_PASS if single_pass else STEP:
        named = op + IDENTITY if manifold == "identity" and op not in ("project", "coefficients", "aggregate") else op
        spec = kernel_spec(named, "forward")
        problem = Problem(named, "forward", streams, width, dtype, 64)
        schedule = asdict(spec.default(problem, device.target))
        given = (problem, schedule, device, "defaults")
        made = find_compiled(*given) or compile_and_store(*given, torch.__version__)
        for tokens in BUCKETS:
            key = Key.of(Problem(named, "forward", streams, width, dtype, tokens), device)
            cache.put(key, schedule, made.path.read_bytes(), "", {"tuned_ms": 1.0}, {})
    write_pack(cache, folder / "kernels.mhcpack")
    return str(folder / "kernels.mhcpack")


def walk(folder, counts, *shape):
    """Walk the token counts in a process with nothing on PATH; what it printed."""
    given = json.dumps([make_pack(folder, *shape), list(counts), *shape])
    kept = {name: os.environ.get(name, "/") for name in ("HOME", "MHC_TUNE_KEYS")}
    root = str(Path(mhc.__file__).parents[1])
    variables = {"PATH": "", "PYTHONPATH": root, "MHC_TUNE_CACHE": str(folder / "none"), "OMP_NUM_THREADS": "1", **kept}
    command = [sys.executable, "-c", WALK, given]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SHAPES = [
    (4, 16, "float32", "sinkhorn", False),
    pytest.param((4, 16, "float32", "sinkhorn", True), marks=pytest.mark.slow),
    pytest.param((2, 8, "float16", "identity", False), marks=pytest.mark.slow),
    pytest.param((8, 8, "bfloat16", "identity", True), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_every_edge_of_a_bucket_is_served(shape, tmp_path, request):
    compiler, *_, summary, longest = walk(tmp_path, EDGES, *shape)
    assert compiler == "no C++ compiler is on PATH: install g++ or set CXX"
    assert summary.startswith("all ")
    assert summary.endswith(" kernels are tuned and loaded")
    request.node.user_properties.append(("longest", longest))


@pytest.mark.slow
def test_every_count_up_to_ten_thousand_is_served(tmp_path, request):
    *_, summary, longest = walk(tmp_path, range(1, MOST + 1), 2, 8, "float32", "sinkhorn", False)
    assert summary == f"all {3 * 15} kernels are tuned and loaded"
    request.node.user_properties.append(("longest", longest))
