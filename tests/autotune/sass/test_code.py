"""Machine code read from what nvdisasm prints: instructions, registers, branches, loops."""

from __future__ import annotations

import pytest
from sass_text import code_of, printed

from autotune.sass.code import Instruction, read_code


def test_a_kernel_is_read_with_its_registers_and_shared_memory():
    text = printed("EXIT", "first", registers=0x55, shared=1024 + 512) + printed("NOP\nEXIT", "second")
    first, second = read_code(text).values()
    assert (first.name, first.registers, first.static_shared_bytes) == ("first", 0x55, 512)
    assert (second.name, second.registers, second.static_shared_bytes) == ("second", 32, 0)
    assert [each.opcode for each in second.instructions] == ["NOP", "EXIT"]


def test_before_sm_90_the_system_takes_nothing_of_a_kernels_section():
    (found,) = read_code(printed("EXIT", shared=2048).replace("sm_90a", "sm_80")).values()
    assert found.static_shared_bytes == 2048


def test_an_instruction_has_a_predicate_an_opcode_and_operands():
    load, call, bare = code_of("@!P0 LDG.E.128 R4, desc[UR4][R2.64+-0x10]\nBRA.U UP0, `(.L_x_1)\nNOP").instructions
    assert load == Instruction("LDG.E.128", ("R4", "desc[UR4][R2.64+-0x10]"), "!P0")
    assert (load.root, call.predicate, bare.operands) == ("LDG", "", ())


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("FFMA R1, R2.reuse, -R3, |R4|", {1, 2, 3, 4}),
        ("IADD3 R1, P0, R2, UR6, RZ", {1, 2}),
        ("LDG.E R1, desc[UR4][R2.64+0x8]", {1, 2, 3}),
        ("LDG.E.64 R4, desc[UR4][R2.64]", {4, 5, 2, 3}),
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", {4, 5, 6, 7, 2, 3}),
        ("LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64]", {4, 5, 6, 7, 8, 9, 10, 11, 2, 3}),
        ("STS.128 [R9+0x10], R4", {9, 4, 5, 6, 7}),
        ("HMMA.16816.F32.BF16 R4, R8, R12, RZ", {*range(4, 16)}),
        ("FFMA2 R4, R6.F32x2.HI_LO, R8.F32x2.HI_LO, RZ", {4, 5, 6, 7, 8, 9}),
        ("S2R R1, SR_TID.X", {1}),
    ],
)
def test_the_registers_that_an_instruction_touches(line, registers):
    (found,) = code_of(line).instructions
    assert found.registers == registers


def test_branches_go_to_labels_and_loops_go_back():
    code = code_of(
        """
        @P0 BRA `(.L_x_2)
        .L_x_1:
        FADD R1, R1, R2
        BSSY B0, `(.L_x_2)
        @P1 BRA `(.L_x_1)
        .L_x_2:
        EXIT
        .L_x_3:
        BRA `(.L_x_3)
        """
    )
    assert code.branches == {0: 4, 3: 1, 5: 5}
    assert code.loops == {3: 1}


def test_code_that_was_moved_behind_the_end_makes_no_loop():
    code = code_of("@P0 BRA `(.L_x_2)\n.L_x_1:\nNOP\nEXIT\n.L_x_2:\nNOP\nBRA `(.L_x_1)")
    assert code.branches == {0: 3, 4: 1}
    assert code.loops == {}


@pytest.mark.parametrize(
    ("line", "leaves"),
    [
        ("EXIT", True),
        ("@P0 EXIT", False),
        ("BRA `(.L_x_1)", True),
        ("@!P0 BRA `(.L_x_1)", False),
        ("BRA.U UP0, `(.L_x_1)", False),
        ("BSYNC B0", False),
    ],
)
def test_what_stands_behind_a_jump_that_always_happens_is_not_next(line, leaves):
    (found,) = code_of(line).instructions
    assert found.leaves == leaves
