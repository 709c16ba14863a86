"""A kernel's machine code as data: instructions in order, branches and loops, read from what nvdisasm prints."""

from __future__ import annotations

import re
from dataclasses import dataclass

SYSTEM_SHARED, SINCE = 1024, 90
"""From sm_90 on a kernel's section of shared memory begins with so many bytes of the system's, which
`tiles.kernels.occupancy` adds for itself."""

_ARCH = re.compile(r"\.target\s+sm_(\d+)")
_SECTION = re.compile(r"^\s*\.section\s+([^\s,]+),", re.MULTILINE)
_LINE = re.compile(
    r"^(?P<label>\.L\w+):"
    r"|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;\n]*);",
    re.MULTILINE,
)
_TARGET = re.compile(r"`\((\.L\w+)\)")
_REGISTERS = re.compile(r"EIATTR_REGCOUNT.*?index@\((.+?)\).*?\.word\s+(0x[0-9a-f]+)", re.DOTALL)
_ZERO = re.compile(r"\.zero\s+(\d+)")
_NAMED = re.compile(r"\bR(\d+)(\.64)?")

_LEAVING = ("EXIT", "RET", "BRA", "JMP", "BRX", "JMX")
"""Opcodes behind which the code does not go on, where nothing makes them conditional."""

_PAIRS = ("FFMA2", "FADD2", "FMUL2", "DADD", "DMUL", "DFMA", "DSETP")
"""Opcodes whose operands are pairs of registers and do not say so."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Fields:
        opcode: with its modifiers, such as LDG.E.128.CONSTANT.
        operands: as they are printed: the destination comes first where there is one.
        predicate: P0 or !P0 where it runs only then, or nothing.
    """

    opcode: str
    operands: tuple[str, ...] = ()
    predicate: str = ""

    @property
    def root(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def registers(self) -> frozenset[int]:
        """All registers that it reads or writes. One is named for several: an address has two where it says .64, and
        how many another operand has is the opcode's (`_wide`)."""
        found: set[int] = set()
        for operand in self.operands:
            for number, pair in _NAMED.findall(operand):
                count = (2 if pair else 1) if "[" in operand else _wide(self.opcode)
                found.update(range(int(number), int(number) + count))
        return frozenset(found)

    @property
    def leaves(self) -> bool:
        """Whether what stands behind it does not run next, as behind a jump or an exit that always happens."""
        conditional = self.predicate or (self.root == "BRA" and len(self.operands) > 1)
        return self.root in _LEAVING and not conditional


def _wide(opcode: str) -> int:
    """How many registers an operand of an opcode has, as far as that is told: too few loses a use, too many makes one
    up, and most opcodes name every register that they touch."""
    root, *modifiers = opcode.split(".")
    if root.endswith("MMA") or "128" in modifiers or "256" in modifiers:  # 256 bits are two operands
        return 4
    return 2 if root in _PAIRS or "64" in modifiers or root == "CS2R" else 1


@dataclass(frozen=True)
class Code:
    """The code of one kernel.

    Fields:
        name: its symbol.
        registers: of a thread.
        static_shared_bytes: shared memory that is laid out by the compiler.
        instructions: in the order of their addresses.
        branches: the places of branches, and of the instructions that they go to.
    """

    name: str
    registers: int
    static_shared_bytes: int
    instructions: tuple[Instruction, ...]
    branches: dict[int, int]

    @property
    def loops(self) -> dict[int, int]:
        """The last and first instruction of every loop: a branch backward, and what it goes to.

        One that goes back over the kernel's end comes from code that was moved out of the way, and makes no loop.
        """
        ends = [at for at, each in enumerate(self.instructions) if each.root in ("EXIT", "RET") and each.leaves]
        backward = {last: first for last, first in self.branches.items() if first < last}
        return {last: first for last, first in backward.items() if not any(first <= end <= last for end in ends)}


def read_code(text: str) -> dict[str, Code]:
    """The kernels in what nvdisasm prints of a cubin, by name."""
    parts = _SECTION.split(text)
    sections = list(zip(parts[1::2], parts[2::2], strict=True))
    registers = {name: int(count, 16) for _, body in sections for name, count in _REGISTERS.findall(body)}
    arch = _ARCH.search(text)
    system = SYSTEM_SHARED if arch and int(arch[1]) >= SINCE else 0
    shared = {
        name.removeprefix(".nv.shared."): sum(map(int, _ZERO.findall(body))) - system
        for name, body in sections
        if name.startswith(".nv.shared.")
    }
    kernels = [(name.removeprefix(".text."), body) for name, body in sections if name.startswith(".text.")]
    return {
        name: Code(name, registers.get(name, 0), max(0, shared.get(name, 0)), *_instructions(body))
        for name, body in kernels
    }


def _instructions(body: str) -> tuple[tuple[Instruction, ...], dict[int, int]]:
    """The instructions of a section and its branches."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _LINE.finditer(body):
        if line["label"]:
            labels[line["label"]] = len(found)
        else:
            operands = tuple(each.strip() for each in line["operands"].split(",") if each.strip())
            found.append(Instruction(line["opcode"], operands, line["predicate"] or ""))
    branches = {}
    for place, each in enumerate(found):
        target = _TARGET.search(each.operands[-1]) if each.root in ("BRA", "JMP") and each.operands else None
        if target and target[1] in labels:
            branches[place] = labels[target[1]]
    return tuple(found), branches
