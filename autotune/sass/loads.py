"""Loads from global memory that a thread has under way at a time, by a simple model of its code.

The rules:

- A load is under way from its instruction on, whether or not its predicate lets it run.
- Loads to registers (LDG) come back in the order in which they were issued: an instruction that reads or writes a
  register that one of them fills waits for that one and those before it. One of the opposite predicate does not wait.
- Copies to shared memory (LDGSTS, cp.async) are under way until their group is waited for: LDGDEPBAR ends a group, and
  behind `DEPBAR.LE SB0, n` at most the last n groups are.
- Instructions run in the order of their addresses. A branch forward is not taken where it is conditional; what stands
  behind a jump or an exit that always happens begins with what was under way at the last branch to it, or with nothing.
- Every loop is gone through twice, and its second time counts.

What the model does not know: which cache a load comes from, stores, loads of constants and generic addresses (LD), how
often a loop turns, and that other warps, or threads that predicates leave out, may load less. Of a bulk copy (UBLKCP,
UTMALDG) or a copy that an mbarrier waits for, the code does not tell enough: `Loads.bulk` counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotune.sass.code import Code, Instruction

_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_BULK = ("UBLKCP", "UTMALDG", "ARRIVES")


@dataclass(frozen=True)
class Loads:
    """The loads of one thread.

    Fields:
        by_width: bytes that it loads in one pass over the code, by the bytes of one load.
        in_flight_bytes, in_flight_loads: the most that is under way at a time, in the loop that loads most, or in all
            code where no loop loads.
        in_loop: whether that is a loop.
        barriers: of all threads of the block (BAR.SYNC), in one turn of that loop, or in all code.
        bulk: copies that the model cannot follow.
    """

    by_width: dict[int, int]
    in_flight_bytes: int
    in_flight_loads: int
    in_loop: bool
    barriers: int
    bulk: int


def width(instruction: Instruction) -> int:
    """The bytes that an instruction loads from global memory for a thread; 0 for others."""
    root, *modifiers = instruction.opcode.split(".")
    if root not in ("LDG", "LDGSTS"):
        return 0
    return next((_BITS[modifier] for modifier in modifiers if modifier in _BITS), 32) // 8


@dataclass(frozen=True)
class _Load:
    bytes: int
    registers: frozenset[int]
    predicate: str


@dataclass(frozen=True)
class _UnderWay:
    """Loads to registers in the order of their issue, and the bytes of copies by group; the last group is open."""

    loads: tuple[_Load, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ((),)

    @property
    def sizes(self) -> list[int]:
        return [load.bytes for load in self.loads] + [size for group in self.groups for size in group]

    def after(self, instruction: Instruction) -> _UnderWay:
        """What is under way behind an instruction."""
        left = self._waited_for(instruction)
        if instruction.root == "LDG":
            load = _Load(width(instruction), _filled(instruction), instruction.predicate)
            return replace(left, loads=(*left.loads, load))
        if instruction.root == "LDGSTS":
            *ended, last = left.groups
            return replace(left, groups=(*ended, (*last, width(instruction))))
        if instruction.root == "LDGDEPBAR":
            return replace(left, groups=(*left.groups, ()))
        if instruction.opcode == "DEPBAR.LE" and instruction.operands[0] == "SB0":
            kept = int(instruction.operands[1], 16)
            return replace(left, groups=left.groups[max(0, len(left.groups) - 1 - kept) :])
        return left

    def _waited_for(self, instruction: Instruction) -> _UnderWay:
        touched = instruction.registers
        other = _opposite(instruction.predicate) if instruction.predicate else None
        waits = [at for at, load in enumerate(self.loads) if load.registers & touched and load.predicate != other]
        return replace(self, loads=self.loads[waits[-1] + 1 :]) if waits else self


def _filled(load: Instruction) -> frozenset[int]:
    """The registers that a load fills: those before its address."""
    address = next((at for at, operand in enumerate(load.operands) if "[" in operand), 0)
    return replace(load, operands=load.operands[:address]).registers


def _opposite(predicate: str) -> str:
    return predicate.removeprefix("!") if predicate.startswith("!") else f"!{predicate}"


def thread_loads(code: Code) -> Loads:
    """What a thread of a kernel loads, and has under way at a time."""
    widths = [width(each) for each in code.instructions]
    first, last, in_loop = _where_most_is_loaded(code, widths)
    sizes = [way.sizes for way in _walked(code)[first : last + 1]]
    most = max(sizes, key=sum, default=[])
    counted = Counter(each for each in widths if each)
    return Loads(
        by_width={each: each * count for each, count in sorted(counted.items())},
        in_flight_bytes=sum(most),
        in_flight_loads=len(most),
        in_loop=in_loop,
        barriers=sum(each.opcode.startswith("BAR.SYNC") for each in code.instructions[first : last + 1]),
        bulk=sum(each.root in _BULK for each in code.instructions),
    )


def _where_most_is_loaded(code: Code, widths: Sequence[int]) -> tuple[int, int, bool]:
    """The first and last instruction of the loop that loads most, not counting the loops inside of it, or of all code
    where no loop loads; and whether it is a loop."""
    loaded: Counter[tuple[int, int]] = Counter()
    spans = [(first, last) for last, first in code.loops.items()]
    for at, size in enumerate(widths):
        around = [span for span in spans if span[0] <= at <= span[1]]
        if size and around:
            loaded[min(around, key=lambda span: span[1] - span[0])] += size
    if not loaded:
        return 0, len(widths) - 1, False
    return *loaded.most_common(1)[0][0], True


def _walked(code: Code) -> list[_UnderWay]:
    """What is under way behind every instruction, the last time that it runs."""
    found = [_UnderWay()] * len(code.instructions)
    at_target: dict[int, _UnderWay] = {}
    loops, repeated = code.loops, set[int]()
    at, now = 0, _UnderWay()
    while at < len(found):
        instruction = code.instructions[at]
        found[at] = now = now.after(instruction)
        if at in loops and at not in repeated:
            repeated.add(at)
            at = loops[at]
            continue
        if at in code.branches:
            at_target[code.branches[at]] = now
        at += 1
        if instruction.leaves:
            now = at_target.get(at, _UnderWay())
    return found
