"""Our wheel where kernels are only run: torch beside it, no TileLang, no tuner, no command line, no compiler."""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

from tiles.cache.cache import KernelCache, Key
from tiles.compiler.compile import compile_kernel
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem
from tiles.pack.pack import write_pack
from tiles.target import detect_device

ROOT = Path(__file__).parents[1]
STREAMS, WIDTH, TOKENS = 2, 64, 96

WARNINGS = ("-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning")
"""NumPy is no requirement of torch, but torch warns where it is missing."""

TRAIN = """
import importlib.util, json, shutil, sys
import torch, mhc

STREAMS, WIDTH, TOKENS = 2, 64, 96
absent = ("tilelang", "tvm", "optuna", "rich", "typer", "platformdirs", "cryptography")
assert not [name for name in absent if importlib.util.find_spec(name)]
assert not [name for name in ("g++", "gcc", "cc", "c++", "clang", "clang++", "nvcc") if shutil.which(name)]
assert mhc.__file__.startswith(sys.prefix), mhc.__file__

torch.manual_seed(0)
layer = mhc.HyperConnection(WIDTH, STREAMS, torch.nn.Linear(WIDTH, WIDTH))
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
x = torch.randn(TOKENS, STREAMS, WIDTH)
upstream = torch.randn_like(x)


def values():
    given = x.clone().requires_grad_()
    out = layer(given)
    return [out.detach(), *torch.autograd.grad(out, [given, *layer.parameters()], upstream)]


mhc.load_kernels(sys.argv[1], trust_binaries=True)
ours, ran = values(), sorted((row.op, row.direction, row.runs) for row in mhc.kernel_report())
mhc.functional.aggregate(torch.randn(3, 2, 8), torch.rand(3, 2))  # the pack has no kernel for it
(other,) = [row for row in mhc.kernel_report() if row.op == "aggregate"]
with mhc.using(mhc.Kernels.reference()):
    wanted = values()
errors = [float((got - want).norm() / want.norm()) for got, want in zip(ours, wanted, strict=True)]
print(json.dumps({"ran": ran, "errors": errors, "other": [other.runs, other.why]}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All that one layer needs, with default schedules, as a pack and as a cache folder."""
    folder = tmp_path_factory.mktemp("kernels")
    cache, device = KernelCache(folder / "cache"), detect_device("cpu")
    directions: tuple[Direction, ...] = ("forward", "backward")
    for op in ("pre", "merge"):
        for direction in directions:
            spec = kernel_spec(op, direction)
            problem = spec.canonical(Problem(op, direction, STREAMS, WIDTH, "float32", TOKENS))
            schedule = spec.default(problem, device.target)
            built = compile_kernel(problem, schedule, device.target)
            cache.put(Key.of(problem, device), asdict(schedule), built.binary, built.source, {}, {})
    write_pack(cache, folder / "kernels.mhcpack")
    return {"pack": folder / "kernels.mhcpack", "folder": cache.folder}


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with our wheel and torch, whose packages are linked, not copied."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    made = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(made), *install], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for needed in with_requirements("torch"):
        link(needed, packages)
    return made


def with_requirements(name: str, seen: set[str] | None = None) -> Iterator[Distribution]:
    """An installed distribution and all that it requires, as far as that is installed."""
    seen = set() if seen is None else seen
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in seen:
        return
    seen.add(name)
    try:
        found = distribution(name)
    except ImportError:  # required on other systems only
        return
    yield found
    for line in found.requires or ():
        if "extra ==" not in line and (match := re.match(r"[A-Za-z0-9._-]+", line)):
            yield from with_requirements(match[0], seen)


def link(needed: Distribution, packages: Path) -> None:
    """Link the top-level files and folders of a distribution into another environment."""
    assert needed.files
    for top in {file.parts[0] for file in needed.files} - {"..", "__pycache__"}:
        if not (packages / top).exists():  # folders such as `nvidia` are shared
            (packages / top).symlink_to(Path(str(needed.locate_file(top))).resolve())


def test_the_wheel_holds_the_packages_the_shipped_schedules_and_the_known_models(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tiles", "autotune", "mhc", "cli"}
    assert {"tiles/cache/shipped.json", "cli/ui/known_models.json"} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".mhcpack", ".pyc"))]


@pytest.mark.parametrize("form", ["pack", pytest.param("folder", marks=pytest.mark.slow)])
def test_a_layer_trains_on_torch_alone(python: Path, kernels: dict[str, Path], form: str, tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {"PATH": str(empty), "HOME": str(tmp_path)}
    command = [str(python), "-I", *WARNINGS, "-c", TRAIN, str(kernels[form])]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ran"] == [[op, way, "tuned"] for op in ("merge", "pre") for way in ("backward", "forward")]
    assert max(found["errors"]) < 1e-5
    runs, why = found["other"]
    assert runs == "reference"
    assert "tilelang is not installed" in why
    assert "tilelang is not installed" in done.stderr, "the fallback is said"
