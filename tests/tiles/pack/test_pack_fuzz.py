"""Mutated packs: each is refused in one line, or holds right entries only; 512 MB suffice, nothing escapes."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from mutations import MUTATIONS

import tiles
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.pack import write_pack
from tiles.target import Device

SEED = 0
DEVICE = Device("cpu", "A CPU", "x86-64")
ROOT = Path(tiles.__file__).parent.parent


@pytest.fixture
def packs(tmp_path):
    """A signed pack, another one, and one without signature; small, so that every part of them is hit."""
    paths = []
    for number, (op, signed) in enumerate((("merge", True), ("aggregate", True), ("merge", False))):
        cache = KernelCache(tmp_path / f"cache{number}")
        for direction in ("forward", "backward"):
            problem = Problem(op, direction, 4, 64 * (number + 1), "float32", 128)
            schedule = asdict(kernel_spec(op, direction).default(problem, DEVICE.target))
            binary = random.Random(f"{number} {direction}").randbytes(300)
            measured = {"tuned_ms": 1.5, "ratio": 1.2}
            cache.put(Key.of(problem, DEVICE), schedule, binary, f"// {number} {direction}", measured, {"host": "a"})
        paths.append(tmp_path / f"{number}.mhcpack")
        write_pack(cache, paths[-1], signed=signed)
    return paths


@pytest.mark.parametrize(
    ("mutants", "processes"), [(160, 1), pytest.param(10_000, 4, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_mutated_packs_are_refused_or_right(packs, tmp_path, mutants, processes):
    sys.stdout.write(f"seed {SEED}\n")
    children = []
    for number in range(processes):
        folder = tmp_path / f"child{number}" / "inner"
        folder.mkdir(parents=True)
        child = Path(__file__).parent / "fuzz_child.py"
        command = [sys.executable, str(child), str(SEED + number), str(mutants // processes)]
        paths = [str(path) for path in (folder, *packs)]
        variables = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
        children.append(
            subprocess.Popen(
                command + paths, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    said = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0] * processes, "\n".join(error[-3000:] for _, error in said)
    counts = Counter()
    for number, (out, _) in enumerate(said):
        printed = json.loads(out)
        counts += Counter(printed["counts"])
        assert printed["kilobytes"] < 512 * 1024
        assert [path.name for path in (tmp_path / f"child{number}").iterdir()] == ["inner"]
        assert list((tmp_path / f"child{number}" / "inner").iterdir()) == []
    assert sum(counts.values()) == mutants
    # The mutants are not all of one sort: every way to make them was taken, and each end was reached.
    assert {name.split()[0] for name in counts} == {make.__name__ for make in MUTATIONS}
    for end in (
        "forged refused",
        "forged untrusted",
        "values refused",
        "values untrusted",
        "repacked right",
        "flip refused",
    ):
        assert counts[end] > mutants // 1000, counts
    assert not any(counts[f"{name} right"] for name in ("forged", "huge_json", "noise"))
