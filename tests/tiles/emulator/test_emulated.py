"""Generated CUDA kernels, run thread by thread against the float64 reference: barriers, asynchronous copies, operand
layouts of matrix instructions, sums across threads, and the launcher with its chunks, splits and workspace.

Every kernel is run with its default schedule at a shape that is quick to lower, which takes most of the time. More
shapes and schedules are slow, and so is a sample of all stream counts, dtypes, architectures and schedules, another one
when the sources of the kernels change. MHC_TUNE_SAMPLE, any whole number, names one.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from building import sample_of_sources
from count_traffic import row
from emulated import Emulated, generate
from emulation import Found, Way

from autotune.measuring.verify import without_updated
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.project.tensor_core_schedule import TiledSchedule
from tiles.kernels.reference_inputs import in_float64
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import DTYPE_BYTES, TOKENS, Problem
from tiles.target import Target

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH: the emulator cannot be compiled")

ON_CUDA = [kernel for kernel, spec in kernel_specs().items() if "cuda" in spec.targets]
COUNTS = (0, 1, 37)
SAMPLE_SIZE = 6
SAMPLE = int(os.environ.get("MHC_TUNE_SAMPLE") or sample_of_sources())


@dataclass(frozen=True)
class Case:
    """A kernel to run. Without a schedule it is the default; `split_tokens` and `chunk_tokens` make few tokens many
    splits and chunks, where they are given."""

    problem: Problem
    arch: str
    schedule: Any = None
    split_tokens: int = 0
    chunk_tokens: int = 0

    @property
    def updates(self) -> bool:
        """Whether the kernel adds to what it is given."""
        arguments = kernel_specs()[self.problem.op, self.problem.direction].arguments(self.problem)
        return any(argument.role == "updated" for argument in arguments)

    def __str__(self) -> str:
        p = self.problem
        return f"{p.op}.{p.direction}-n{p.streams}-C{p.width}-{p.dtype}-{self.arch}"


def case(op: str, direction: str, n: int, width: int, dtype: str, arch: str, *more: Any) -> Case:
    return Case(
        kernel_specs()[op, direction].canonical(Problem(op, direction, n, width, dtype, tokens=64)), arch, *more
    )


# The kernels without matrices have the same text for all architectures.
DEFAULTS = [
    case("aggregate", "forward", 4, 128, "bfloat16", "sm_80"),
    case("aggregate", "backward", 8, 256, "float16", "sm_80", None, 16),
    case("merge", "forward", 2, 136, "float32", "sm_100a"),
    case("merge", "forward", 9, 8, "bfloat16", "sm_90a"),
    case("merge", "backward", 4, 64, "bfloat16", "sm_90a", None, 16),
    case("coefficients", "forward", 4, 64, "float32", "sm_100a"),
    case("coefficients", "backward", 2, 64, "bfloat16", "sm_80", None, 32),
    case("sinkhorn", "forward", 3, 8, "float32", "sm_80"),
    case("sinkhorn", "backward", 2, 8, "float32", "sm_100a"),
    case("project", "forward", 4, 128, "bfloat16", "sm_80"),
    case("project", "backward", 4, 128, "bfloat16", "sm_90a", None, 16),
    case("pre", "forward", 2, 64, "float16", "sm_90a"),
    case("pre", "backward", 2, 64, "bfloat16", "sm_90a", None, 16),
    case("single_pass", "forward", 2, 64, "bfloat16", "sm_90a"),
    case("merge_identity", "backward", 4, 64, "bfloat16", "sm_90a", None, 16),
]
SINKHORN, FORWARD, BACKWARD, PRE_BACKWARD = DEFAULTS[7:9], DEFAULTS[9], DEFAULTS[10], DEFAULTS[12]

MORE_DEFAULTS = [
    case("step", "backward", 2, 64, "bfloat16", "sm_100a", None, 16, 32),
    case("single_pass_identity", "backward", 2, 64, "bfloat16", "sm_90a", None, 16, 32),
    case("merge", "backward", 9, 8, "bfloat16", "sm_90a", None, 16),
    case("project", "forward", 2, 72, "float16", "sm_90a"),
    case("project", "backward", 2, 72, "float32", "sm_80", None, 16),
    case("step", "forward", 2, 64, "bfloat16", "sm_90a"),
    case("step", "forward", 2, 128, "bfloat16", "sm_80"),
    case("step", "forward", 4, 64, "bfloat16", "sm_90a"),
    case("step", "backward", 1, 72, "bfloat16", "sm_90a"),
    case("step", "backward", 4, 72, "bfloat16", "sm_90a", None, 16),
    case("step", "backward", 2, 128, "bfloat16", "sm_80", None, 32),
    case("step", "backward", 11, 16, "bfloat16", "sm_80"),
    case("single_pass", "forward", 4, 72, "float16", "sm_80"),
    case("single_pass", "backward", 2, 64, "bfloat16", "sm_90a", None, 16, 32),
    case("single_pass", "forward", 9, 16, "bfloat16", "sm_90a"),
    case("single_pass", "backward", 4, 64, "bfloat16", "sm_90a", None, 16),
    case("single_pass", "backward", 3, 72, "float32", "sm_80", None, 16),
    case("single_pass", "backward", 9, 16, "bfloat16", "sm_100a", None, 16),
    case("merge_identity", "forward", 9, 8, "bfloat16", "sm_80"),
    case("pre_identity", "forward", 4, 64, "bfloat16", "sm_90a"),
    case("pre_identity", "backward", 3, 72, "float32", "sm_80", None, 16),
    case("step_identity", "forward", 4, 72, "bfloat16", "sm_90a"),
    case("step_identity", "forward", 9, 16, "float16", "sm_80"),
    case("step_identity", "backward", 4, 64, "bfloat16", "sm_90a", None, 16, 32),
    case("step_identity", "backward", 9, 16, "bfloat16", "sm_80", None, 16),
    case("single_pass_identity", "forward", 4, 72, "float16", "sm_80"),
    case("single_pass_identity", "forward", 9, 16, "bfloat16", "sm_90a"),
    case("single_pass_identity", "backward", 9, 16, "bfloat16", "sm_100a", None, 16),
    case("merge", "forward", 8, 128, "bfloat16", "sm_90a"),
    case("merge", "backward", 8, 72, "float16", "sm_80", None, 16),
    case("single_pass", "forward", 1, 72, "bfloat16", "sm_90a"),
]

TILED = (
    [
        case("project", "forward", 1, 64, "bfloat16", arch, schedule)
        for arch, schedule in (
            ("sm_80", TiledSchedule(16, 32, 2, 2, 1, 64)),
            ("sm_90a", TiledSchedule(64, 16, 4, 1, 1, 128)),
            ("sm_90a", TiledSchedule(128, 32, 3, 2, 1, 256, use_pdl=1)),
        )
    ]
    + [
        case("project", "forward", n, 72, dtype, arch, TiledSchedule(*tiles, presplit_phi=1))
        for n, dtype, arch, tiles in (
            (2, "bfloat16", "sm_90a", (64, 64, 3, 1, 1, 128, 1)),
            (3, "float16", "sm_80", (16, 32, 2, 2, 1, 64, 0)),
        )
    ]
    + [
        case("project", "backward", 3, 40, "bfloat16", arch, schedule, 16)
        for arch, schedule in (
            ("sm_80", TiledSchedule(16, 32, 2, 2, 2, 64)),
            ("sm_90a", TiledSchedule(64, 64, 2, 4, 1, 128, use_pdl=1)),
        )
    ]
)

CHAINED = [
    case("pre", "forward", 2, 40, "bfloat16", "sm_90a", ChainSchedule(16, 32, 2, 2, 1, 64, 16, 8, 32, 7, 0, 1), 0, 32),
    case("step", "backward", 2, 40, "float32", "sm_90a", ChainSchedule(16, 32, 1, 4, 1, 32, 8, 8, 32, 7, 0, 1), 8, 16),
    case("step", "forward", 3, 40, "bfloat16", "sm_90a", ChainSchedule(16, 32, 2, 2, 1, 64, 16, 8, 32, 7, 0, 1), 0, 32),
    case("pre", "forward", 4, 40, "bfloat16", "sm_90a", ChainSchedule(64, 32, 2, 2, 1, 128, 16, 8, 32, 0, 0, 1, 0, 1)),
    case("pre", "backward", 2, 128, "bfloat16", "sm_90a", ChainSchedule(64, 64, 2, 2, 1, 128, 8, 8, 32, 0, 0), 32),
    case("pre", "backward", 3, 40, "float16", "sm_80", ChainSchedule(16, 32, 3, 2, 1, 32, 8, 8, 32, 0, 0), 8, 32),
    case(
        "pre", "backward", 4, 128, "bfloat16", "sm_80", ChainSchedule(16, 128, 2, 16, 2, 128, 8, 128, 128, 0, 0), 8, 32
    ),
    case("pre", "forward", 2, 40, "float32", "sm_80", ChainSchedule(16, 32, 2, 4, 1, 32, 3, 8, 64, 0, 0, 0, 0, 0, 1)),
    case(
        "step", "forward", 8, 72, "bfloat16", "sm_90a", ChainSchedule(16, 32, 2, 2, 1, 64, 5, 8, 64, 0, 0, 1, 0, 0, 1)
    ),
]

MERGED = [
    case(op, direction, n, width, dtype, arch, ChainSchedule(*tiles, 8, 8, 32, 7, 0, *modes), *cuts)
    for op in ("step", "single_pass")
    for direction, n, width, dtype, arch, tiles, modes, cuts in (
        ("forward", 2, 40, "float16", "sm_90a", (64, 32, 3, 2, 1, 128), (1, 1, 0), (0, 32)),
        ("forward", 4, 72, "bfloat16", "sm_90a", (64, 64, 2, 2, 1, 128), (1, 1, 1), (0, 32)),
        ("forward", 4, 136, "bfloat16", "sm_90a", (64, 128, 2, 2, 2, 128), (0, 1, 0), (0, 32)),
        ("backward", 2, 40, "float32", "sm_80", (16, 32, 2, 4, 1, 32), (0, 1, 0), (8, 16)),
        ("backward", 4, 64, "bfloat16", "sm_90a", (64, 64, 3, 4, 1, 128), (1, 1, 0), (32,)),
        ("backward", 4, 64, "bfloat16", "sm_90a", (32, 256, 3, 4, 1, 512), (0, 1, 0), (32,)),
        ("backward", 8, 72, "bfloat16", "sm_90a", (16, 128, 1, 2, 1, 64), (0, 1, 0), (16,)),
    )
]

EARLY, MERGED_BACKWARD = CHAINED[0], MORE_DEFAULTS[14]
FAST = set(DEFAULTS)
"""Each kernel once, of step and single_pass, which share their tiles, one pass."""

FIXED = [*DEFAULTS, *MORE_DEFAULTS, *TILED, *CHAINED, *MERGED]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def tiers(cases: Iterable[Case]) -> list[Any]:
    return [case if case in FAST else slow(case) for case in cases]


def sample(number: int) -> list[Case]:
    """Cases by chance: schedules out of the space, stream counts, widths, dtypes and architectures."""
    chance = random.Random(number)
    return [drawn(chance) for _ in range(SAMPLE_SIZE)]


def drawn(chance: random.Random) -> Case:
    (op, direction), arch = chance.choice(ON_CUDA), chance.choice(("sm_80", "sm_90a", "sm_100a"))
    n, width = chance.choice((1, 2, 3, 4, 8, 11, 16)), chance.choice((8, 64, 72, 128, 136, 256))
    made = case(op, direction, n, width, chance.choice(("float32", "float16", "bfloat16")), arch)
    spec, target = kernel_specs()[op, direction], Target("cuda", arch)
    space = spec.space(made.problem, target)
    for _ in range(3000):
        schedule = spec.schedule_from({name: chance.choice(values) for name, values in space.items()})
        if spec.why_invalid(made.problem, schedule, target) is None:
            break
    else:
        schedule = None
    cuts = (0, 0) if op in ("coefficients", "sinkhorn") else (chance.choice((8, 16, 32)), chance.choice((0, 16, 32)))
    return replace(made, schedule=schedule, split_tokens=cuts[0], chunk_tokens=cuts[1])


class Kernels(dict[Case, Emulated]):
    """Emulated kernels, each compiled when a test first asks for it."""

    def __init__(self, folder: Path, emulator: Path) -> None:
        super().__init__()
        self._folder, self._emulator = folder, emulator

    def __missing__(self, case: Case) -> Emulated:
        target = Target("cuda", case.arch)
        plan = {name: getattr(case, name) for name in ("split_tokens", "chunk_tokens") if getattr(case, name)}
        if case.split_tokens:
            plan["most_splits"] = 4
        spec = kernel_specs()[case.problem.op, case.problem.direction]
        text = generate(case.problem, case.schedule or spec.default(case.problem, target), target, **plan)
        self[case] = Emulated(self._folder, self._emulator, text)
        return self[case]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, emulator):
    return Kernels(tmp_path_factory.mktemp("kernels"), emulator)


@pytest.mark.parametrize("case", tiers(FIXED), ids=str)
def test_a_kernel_computes_the_reference_without_a_finding(kernels, case):
    for tokens in COUNTS:
        kernels[case].check(tokens, seed=tokens)


@pytest.mark.parametrize("case", tiers(FIXED), ids=str)
def test_a_token_has_the_same_bits_alone_and_among_others(kernels, case):
    """At another place of a tile, of a split and of a chunk; sums over tokens aside."""
    kernel, tokens = kernels[case], 37
    arguments = {argument.name: argument for argument in kernel.spec.arguments(kernel.problem)}
    inputs = kernel.spec.inputs(kernel.problem, tokens, 0)

    def run(first: int, count: int) -> dict[str, torch.Tensor]:
        own = {
            name: value[first : first + count].clone() if arguments[name].shape[:1] == (TOKENS,) else value
            for name, value in inputs.items()
        }
        return kernel.run(own, count)

    together = run(0, tokens)
    owned = [name for name in together if arguments[name].shape[:1] == (TOKENS,)]
    assert owned
    for first, count in ((36, 1), (3, 1), (5, 9)):
        some = run(first, count)
        for name in owned:
            assert torch.equal(some[name], together[name][first : first + count]), (name, first, count)


@pytest.mark.parametrize("case", tiers(case for case in FIXED if case.updates), ids=str)
def test_what_is_updated_may_hold_nothing_yet(kernels, case):
    """Then its memory, of NaN here, is not read."""
    kernel, tokens = kernels[case], 37
    inputs = kernel.spec.inputs(kernel.problem, tokens, 0)
    zeros = kernel.run(inputs | {"dx": torch.zeros_like(inputs["dx"])}, tokens)
    for name, got in kernel.run(without_updated(kernel.spec.arguments(kernel.problem), inputs), tokens).items():
        assert torch.equal(got, zeros[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(SAMPLE), ids=lambda case: f"sample{SAMPLE}-{case}")
def test_a_sample_computes_the_reference_without_a_finding(kernels, case):
    for tokens in (0, 1, 37, 70):
        kernels[case].check(tokens, seed=tokens)


def test_the_order_of_threads_and_blocks_does_not_matter(kernels):
    """Results repeat bit for bit."""
    for case in (BACKWARD, PRE_BACKWARD):
        kernel = kernels[case]
        inputs = kernel.spec.inputs(kernel.problem, 37, 0)
        first, *others = (kernel.run(inputs, 37, Way(seed, late=seed % 2 == 0)) for seed in (11, 12, 13, 14))
        for other in others:
            assert all(other[name].equal(value) for name, value in first.items())


@pytest.mark.parametrize(
    ("case", "names"),
    [(DEFAULTS[0], ("x", "u")), (FORWARD, ("x", "phi")), (PRE_BACKWARD, ("du", "dx"))],
    ids=["loads and stores", "copies", "updates"],
)
def test_a_tensor_that_begins_where_vectors_do_not_fit_is_found(kernels, case, names):
    """On a GPU it ends the process's context: the launcher refuses it before."""
    kernel = kernels[case]
    inputs = kernel.spec.inputs(kernel.problem, 37, 0)
    past = {argument.name: DTYPE_BYTES[argument.dtype] for argument in kernel.spec.arguments(kernel.problem)}
    for name in names:
        with pytest.raises(Found, match=rf"misaligned access .* (reads|writes) \d+ bytes of {name}\+"):
            kernel.run(inputs, 37, past={name: past[name]})


@pytest.mark.parametrize("hc_eps", [0.0, 1e-6, 1e-39])
@pytest.mark.parametrize("case", SINKHORN, ids=str)
def test_rows_far_below_the_others_divide_by_no_denormal_number(kernels, case, hc_eps):
    """Logits 90 to 120 apart, whose exponentials are denormal or 0: rcp.approx.ftz would make infinity of such sums."""
    kernel, n, tokens = kernels[case], case.problem.streams, 64
    chance = torch.Generator().manual_seed(0)
    far = torch.tensor([0.0, -90.0, -105.0, -120.0])[torch.randint(0, 4, (tokens, n, n), generator=chance)]
    inputs = kernel.spec.inputs(kernel.problem, tokens, 0)
    inputs |= {"logits": far + torch.randn(tokens, n, n, generator=chance), "hc_eps": torch.tensor(hc_eps).item()}
    wanted = kernel.spec.reference(kernel.problem, in_float64(inputs))
    for name, got in kernel.run(inputs, tokens).items():
        rtol, atol = kernel.spec.tolerance(kernel.problem, name)
        torch.testing.assert_close(got.double(), wanted[name], rtol=rtol, atol=atol)


PASSES = {
    ("aggregate", "forward"): {"x": "R", "u": "W"},
    ("aggregate", "backward"): {"x": "R", "du": "R", "dx": "W"},
    ("merge", "forward"): {"x": "R", "f": "R", "out": "W"},
    ("merge", "backward"): {"x": "R", "f": "R", "g": "R", "dx": "W", "df": "W"},
    ("project", "forward"): {"x": "R"},
    ("project", "backward"): {"x": "R", "dx": "W"},
    ("pre", "forward"): {"x": "RR", "u": "W"},
    ("pre", "backward"): {"x": "RR", "dx": "RW", "du": "RR", "z": "R", "dres": "R"},
    ("step", "forward"): {"x": "R", "f": "R", "x_next": "WR", "u": "W"},
    ("step", "backward"): {"x": "RR", "f": "RR", "du": "RR", "dx_next": "R", "dx": "W", "df": "W", "dres_next": "R"},
    ("single_pass", "forward"): {"x": "R", "f": "R", "x_next": "W", "u": "W", "res_next": "W"},
    ("single_pass", "backward"): {"x": "R", "f": "R", "du": "R", "dx_next": "R", "dx": "W", "df": "W"},
}
"""How often an op goes over its streams, and u, f: what it cannot do without, and the second look of fused ones; and
over coefficients, which a thread takes a token of."""


@pytest.mark.parametrize("case", tiers(case for case in DEFAULTS + MORE_DEFAULTS if case.problem.width >= 64), ids=str)
def test_streams_are_moved_in_whole_sectors_and_as_often_as_designed(kernels, case):
    kernel, tokens = kernels[case], 128
    movements = kernel.movements(tokens)
    # A tile that reaches past its stream carries columns of the next one; narrow rows fill their sectors in part.
    width = case.problem.width
    most = 1 if width % 128 == 0 or (width == 64 and case.problem.op != "pre") else 2
    for name, passes in PASSES.get((case.problem.op, case.problem.direction), {}).items():
        argument = next(argument for argument in kernel.spec.arguments(kernel.problem) if argument.name == name)
        for writes, kind in ((False, "R"), (True, "W")):
            taken = 32 * sum(move.taken for move in movements if (move.tensor, move.writes) == (name, writes))
            needed = passes.count(kind) * argument.nbytes(tokens)
            assert needed <= taken <= most * needed, (name, kind)


@pytest.mark.parametrize("case", tiers(case for case in FIXED if case.problem.streams % 2 == 0), ids=str)
def test_threads_do_not_meet_in_the_banks_of_shared_memory(kernels, case):
    """Where sums of few outputs are written out they may, once; what a step over the streams takes does not.
    Where streams are merged, threads read a token's weights as vectors: eight are served at a time, though more want
    the same."""
    shared = [move for move in kernels[case].movements(64) if move.tensor == "shared"]
    most = 1.5 if case.problem.op in ("merge", "step", "single_pass") else 1.2
    assert sum(move.taken for move in shared) <= most * sum(move.least for move in shared)


def test_a_tile_reads_the_coefficients_of_its_tokens_once(kernels):
    """pre and ds of all streams and tokens, as one tile has all columns here."""
    kernel, tokens = kernels[PRE_BACKWARD], 64
    moved = [move for move in kernel.movements(tokens) if not move.writes]
    read = {name: 32 * sum(move.taken for move in moved if move.tensor == name) for name in ("pre", "ds", "dz")}
    assert read == {"pre": 4 * 2 * tokens, "ds": 4 * tokens, "dz": 4 * 8 * tokens}


def test_the_count_of_what_a_default_moves(emulator, tmp_path):
    problem = Problem("aggregate", "backward", 2, 64, "bfloat16", tokens=4096)
    # x and dx are 256 bytes each, du 128; the gates of a token are a part of a sector.
    op, direction, n, least, moved, _, *ratios = row(tmp_path, emulator, problem, Target("cuda", "sm_90a"), tokens=16)
    assert (op, direction, n, least, moved) == ("aggregate", "backward", "2", "0.7", "0.7")
    assert ratios == ["1.00", "1.00"]


WAIT = r"cudaGridDependencySynchronize\(\);"


@pytest.mark.parametrize(
    ("case", "old", "new", "at", "found"),
    [
        (FORWARD, r"__syncthreads\(\);(?=\s+for \(int ki)", "", 0, "race .* without a barrier"),
        slow(FORWARD, r"__syncthreads\(\);", "", -1, "race .* without a barrier"),
        (FORWARD, r"tl::cp_async_wait<\d>\(\);", "", 0, "race .* no wait"),
        slow(FORWARD, r"cp_async_wait<0>", "cp_async_wait<2>", 0, "race .* no wait"),
        (FORWARD, r"ptx_ldmatrix_x4\(", "ptx_ldmatrix_x4_trans(", 0, "z: "),
        slow(BACKWARD, r"(?<=cp_async_wait<0>\(\);)\s+__syncthreads\(\);", "", 0, "race .* no wait"),
        (BACKWARD, r"tl::fence_proxy_async\(\);", "", 2, r"race .* without fence\.proxy\.async"),
        (BACKWARD, r"tl::warpgroup_wait<0>\(\);", "", 2, "race .* wgmma|dx: "),
        (BACKWARD, r"<1, 640, 64>", "<1, 640, 32>", 1, "dx: "),
        slow(MERGED_BACKWARD, r"cp_async_wait<4>", "cp_async_wait<8>", 0, "race .* no wait"),
        (BACKWARD, r"\(dphi \+ ", "(dphi + 24576 + ", 0, "invalid access .* past the end of of_dphi"),
        (EARLY, WAIT, "", 0, "before it waits for a kernel|has not waited"),
        slow(EARLY, WAIT, "", 1, "before it waits for a kernel|has not waited"),
        (BACKWARD, r"x\[\(", "x[-8 + (", 0, "invalid access .* before x"),
    ],
)
def test_a_text_that_is_broken_on_purpose_is_found(kernels, emulator, tmp_path, case, old, new, at, found):
    text = kernels[case].text
    place = list(re.finditer(old, text.source))[at]
    changed = text.source[: place.start()] + new + text.source[place.end() :]
    with pytest.raises(AssertionError, match=found):
        Emulated(tmp_path, emulator, replace(text, source=changed)).check(37, 0)


def test_another_number_draws_another_sample():
    assert len({str(case) + str(case.schedule) for number in range(10) for case in sample(number)}) > 50
