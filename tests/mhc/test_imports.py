"""A process that trains needs no TileLang, no tuner, no command line, no compiler."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import mhc
from mhc import functional
from tiles.cache.cache import KernelCache, default_folder
from tiles.pack.pack import write_pack

HEAVY = ("tilelang", "tvm", "optuna", "rich", "typer", "matplotlib", "tensorboard", "transformers")
FIND_HEAVY = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"

TRAIN = """
import torch, mhc
mhc.load_kernels(PACK)
x = torch.randn(5, 4, 16).requires_grad_()
layer = mhc.HyperConnection(16, 4, torch.nn.Identity())
layer(x).square().sum().backward()
assert x.grad.isfinite().all()
assert mhc.functional.sinkhorn(torch.zeros(5, 4, 4)).sum() == 20
print(*sorted({row.runs for row in mhc.kernel_report()}))
"""


def python(code, **environment):
    """Run code in a fresh process with nothing on PATH; its printed lines."""
    root = str(Path(mhc.__file__).parents[1])
    kept = {name: os.environ.get(name, "/") for name in ("HOME", "MHC_TUNE_KEYS")}
    variables = {"PATH": "", "PYTHONPATH": root, **kept, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_mhc_brings_nothing_heavy():
    """Dynamo takes longer than all else of torch."""
    assert python(f"import mhc\n{FIND_HEAVY}\nprint('torch._dynamo' in sys.modules)") == ["[]", "False"]


def test_a_fresh_process_trains_from_a_pack_without_compiler(on_compiled, tmp_path):
    x = torch.randn(5, 4, 16).requires_grad_()
    mhc.HyperConnection(16, 4, torch.nn.Identity())(x).sum().backward()
    functional.sinkhorn(torch.zeros(5, 4, 4, requires_grad=True)).sum().backward()
    pack = tmp_path / "kernels.mhcpack"
    write_pack(KernelCache(default_folder() / "defaults"), pack)
    train = TRAIN.replace("PACK", repr(str(pack)))
    assert python(f"{train}\n{FIND_HEAVY}", MHC_TUNE_CACHE=str(tmp_path / "none")) == ["tuned", "[]"]
