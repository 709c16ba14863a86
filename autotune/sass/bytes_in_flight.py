"""Bytes in flight: whether a kernel's code has enough loads under way to fill a GPU's memory, looked at without a GPU.

By Little's law a memory is kept busy by bandwidth · latency of bytes that have been asked for and have not come. What a
thread has under way comes from a model of the code (`autotune.sass.loads`), how many threads there are from the launch
and from occupancy. It is a look at code and no measurement: it ranks schedules before a GPU does, and it can be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autotune.sass.code import Code, read_code
from autotune.sass.disassembler import NotDisassembled, disassembled
from autotune.sass.launches import Launch, launches
from autotune.sass.loads import thread_loads
from tiles.compiler.compile import Artifact
from tiles.kernels.occupancy import occupancy

LATENCY = 1.1e-6
"""Seconds from a load to its data while memory is busy: assumed, and the same for every GPU. An H200 then needs 40 KB
on a multiprocessor, a B200 59 KB."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU is sold with: bytes that its memory gives in a second, and multiprocessors."""

    name: str
    bandwidth: float
    multiprocessors: int

    @property
    def needed_bytes(self) -> float:
        """Bytes that each multiprocessor must have in flight for all of the bandwidth."""
        return self.bandwidth * LATENCY / self.multiprocessors


GPUS = {
    "sm_80": Gpu("A100 80GB SXM", 2.0e12, 108),
    "sm_90": Gpu("H200", 4.8e12, 132),
    "sm_90a": Gpu("H200", 4.8e12, 132),
    "sm_100": Gpu("B200", 8.0e12, 148),
    "sm_100a": Gpu("B200", 8.0e12, 148),
}
"""The GPU that an architecture is looked at for. Bandwidths are those of NVIDIA's data sheets (A100, H200, DGX B200),
multiprocessors what the drivers of these GPUs report."""

VECTOR = 8
"""Least bytes of the loads by which kernels read streams; what loads less at a time reads coefficients and sums."""


@dataclass(frozen=True)
class KernelLook:
    """What is seen of one kernel of an artifact. None stands for what is not known.

    Fields:
        name: its symbol.
        threads, registers, shared_bytes: of a block, of a thread, of a block (static and dynamic).
        resident_blocks, resident_warps: what one multiprocessor holds at a time.
        load_bytes: bytes that a thread loads in one pass over the code, by the bytes of one load.
        thread_loads, thread_bytes: the loads of one thread that are under way at a time, and their bytes.
        in_loop: whether that is in a loop.
        barriers: in one turn of that loop, or in all code.
        bulk: copies whose size the code does not tell; where there are any, what is in flight is not known.
        blocks: of the launch.
        wave_blocks: blocks that run at a time on the whole GPU; `waves`: how often that makes all blocks.
        in_flight_bytes: on one multiprocessor: `thread_bytes` of all resident threads, fewer where the launch does not
            fill one wave.
        needed_bytes: what a multiprocessor needs (`Gpu.needed_bytes`); `ratio`: in flight / needed.
    """

    name: str
    threads: int
    registers: int
    shared_bytes: int
    resident_blocks: int
    resident_warps: int
    load_bytes: Mapping[int, int]
    thread_loads: int | None
    thread_bytes: int | None
    in_loop: bool
    barriers: int
    bulk: int
    blocks: int
    wave_blocks: int | None
    waves: float | None
    in_flight_bytes: int | None
    needed_bytes: int | None
    ratio: float | None

    @property
    def loads_vectors(self) -> bool:
        """Whether it is a kernel that reads streams."""
        return any(width >= VECTOR for width in self.load_bytes)

    def as_json(self) -> dict[str, Any]:
        """All that is known, as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def look(artifact: Artifact, tokens: int) -> list[KernelLook]:
    """A look at every kernel that a call of an artifact launches on so many tokens, in order.

    Raises `disassembler.NotDisassembled` where the code cannot be read here.
    """
    text = disassembled(artifact.binary)
    try:
        code = read_code(text)
        return [look_at(code[each.kernel], each, artifact.target.arch) for each in launches(artifact.source, tokens)]
    except (LookupError, ValueError) as error:  # versions of nvdisasm may print what the look does not know
        raise NotDisassembled(f"nvdisasm prints what is not understood here: {error!r}") from error


def look_at(code: Code, launch: Launch, arch: str) -> KernelLook:
    """A look at one kernel."""
    loads = thread_loads(code)
    shared = code.static_shared_bytes + launch.dynamic_shared_bytes
    held = occupancy(arch, launch.threads, code.registers, shared)
    gpu = GPUS.get(arch)
    wave_blocks = held.blocks * gpu.multiprocessors if gpu else None
    waves = launch.blocks / wave_blocks if wave_blocks else None
    in_flight = None
    if not loads.bulk:
        in_flight = round(loads.in_flight_bytes * launch.threads * held.blocks * min(1.0, waves or 1.0))
    return KernelLook(
        name=code.name,
        threads=launch.threads,
        registers=code.registers,
        shared_bytes=shared,
        resident_blocks=held.blocks,
        resident_warps=held.warps,
        load_bytes=loads.by_width,
        thread_loads=None if loads.bulk else loads.in_flight_loads,
        thread_bytes=None if loads.bulk else loads.in_flight_bytes,
        in_loop=loads.in_loop,
        barriers=loads.barriers,
        bulk=loads.bulk,
        blocks=launch.blocks,
        wave_blocks=wave_blocks,
        waves=None if waves is None else round(waves, 3),
        in_flight_bytes=in_flight,
        needed_bytes=round(gpu.needed_bytes) if gpu else None,
        ratio=round(in_flight / gpu.needed_bytes, 3) if gpu and in_flight is not None else None,
    )


def least_ratio(looks: Sequence[KernelLook]) -> float | None:
    """The least ratio of the kernels that read streams (`KernelLook.loads_vectors`), or of all where none does."""
    main = [each for each in looks if each.loads_vectors] or looks
    return min((each.ratio for each in main if each.ratio is not None), default=None)
