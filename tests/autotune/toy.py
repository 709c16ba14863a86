"""A toy kernel, which is a table of times: the tuner's loop runs on it in milliseconds."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace

from autotune.measuring.roofline import Roofline
from autotune.processes.tasks import DEFAULT, TUNED
from autotune.processes.worker import TaskFailed
from tiles.cache.cache import Key, token_bucket
from tiles.compiler.compile import Artifact
from tiles.kernels.spec import KernelSpec, Problem, Traffic
from tiles.target import Device, Target

DEVICE = Device("cpu", "toy processor", "x86-64-v3")
PROBLEM = Problem("toy", "forward", 2, 64, tokens=64)
TOOLKIT = "13.0"


@dataclass(frozen=True)
class ToySchedule:
    block: int
    unroll: int
    packed: bool


SPACE = {"block": (1, 2, 4, 8, 16, 32), "unroll": (1, 2, 4), "packed": (False, True)}
DEFAULT_SCHEDULE = ToySchedule(4, 1, False)
BEST = ToySchedule(16, 2, True)


def why_invalid(problem, schedule, target):
    return "block times unroll is above 64" if schedule.block * schedule.unroll > 64 else None


SPEC = KernelSpec(
    op="toy",
    direction="forward",
    schedules=(ToySchedule,),
    default=lambda problem, target: DEFAULT_SCHEDULE,
    space=lambda problem, target: SPACE,
    why_invalid=why_invalid,
    scratch=lambda problem, schedule, target: 0,
    arguments=lambda problem: (),
    builder="nowhere:nothing",
    reference=lambda problem, values: {},
    inputs=lambda problem, tokens, seed: {},
    traffic=lambda problem, tokens: Traffic(read=10**6, written=10**6, flops=10**6),
    tolerance=lambda problem, name: (0.0, 0.0),
    canonical=lambda problem: problem,
)


def key_of(problem: Problem, device: Device) -> Key:
    return Key(
        "merge", "forward", 2, 64, "float32", token_bucket(problem.tokens), 20, device, toolchain="1", sources="0"
    )


def code(schedule: ToySchedule) -> str:
    """Packing changes nothing without unrolling, so those two generate the same code."""
    return str(asdict(schedule if schedule.unroll > 1 else replace(schedule, packed=False)))


def milliseconds(schedule: ToySchedule) -> float:
    """Smooth, with its minimum at `BEST`; the default takes 7 ms."""
    time = 1 + 2 * abs(schedule.block.bit_length() - BEST.block.bit_length())
    return time + 2 * abs(schedule.unroll - BEST.unroll) + (0.5 if schedule.packed != BEST.packed else 0)


class ToyWorkers:
    """Stands in for `Workers`: answers from the table, counts what it is asked, fails where it is told to."""

    compilers = threads = 2

    def __init__(self, time=milliseconds, *, noise=0.01, gb_per_s=1e6, gflops=1e6, seed=0):
        self.time, self.noise, self._roofline = time, noise, Roofline(gb_per_s, gflops)
        self.compiled: list[str] = []
        self.assessed: list[str] = []
        self.compared: list[tuple[str, ...]] = []
        self.unverified: list[str] = []
        self.not_compiling: set[ToySchedule] = set()
        self.wrong: set[str] = set()
        self.interrupt_at: int | None = None
        self.conditions: dict[str, float] = {}
        self._random = random.Random(seed)

    def roofline(self) -> Roofline:
        return self._roofline

    def compile(self, problem: Problem, schedules: list[ToySchedule], target: Target) -> list[Artifact | TaskFailed]:
        self.compiled += [str(asdict(schedule)) for schedule in schedules]
        return [
            TaskFailed("CompileError: no")
            if schedule in self.not_compiling
            else Artifact(target, text, text.encode(), toolkit=TOOLKIT)
            for schedule, text in ((schedule, code(schedule)) for schedule in schedules)
        ]

    def assess(self, problem: Problem, tuned: bytes, default: bytes, seed: int) -> dict[str, list[float]]:
        if self.interrupt_at == len(self.assessed):
            raise KeyboardInterrupt
        self.assessed.append(tuned.decode())
        if tuned.decode() in self.wrong:
            raise TaskFailed("WrongResult: y is wrong")
        return {TUNED: self._times(tuned), DEFAULT: self._times(default)}

    def compare(
        self, problem: Problem, binaries: dict[str, bytes], unverified: list[str], seed: int
    ) -> dict[str, list[float]]:
        self.compared.append(tuple(binaries))
        self.unverified += [binaries[name].decode() for name in unverified]
        return {name: self._times(binary) for name, binary in binaries.items()}

    def _times(self, binary: bytes) -> list[float]:
        exact = self.time(ToySchedule(**eval(binary.decode(), {"__builtins__": {}})))
        return [exact * (1 + self.noise * self._random.uniform(-1, 1)) for _ in range(24)]
