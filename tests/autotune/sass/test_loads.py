"""The model of loads under way, one rule a test."""

from __future__ import annotations

import pytest
from sass_text import code_of

from autotune.sass.code import Instruction
from autotune.sass.loads import thread_loads, width


def under_way(body: str) -> tuple[int, int]:
    """Loads of a thread under way at a time, and their bytes."""
    found = thread_loads(code_of(body))
    return found.in_flight_loads, found.in_flight_bytes


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDG.E.U8", 1),
        ("LDG.E.S8.CONSTANT", 1),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E", 4),
        ("LDG.E.64", 8),
        ("LDG.E.128.CONSTANT", 16),
        ("LDG.E.ENL2.256", 32),
        ("LDGSTS.E", 4),
        ("LDGSTS.E.64", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDGSTS.E.LTC128B", 4),
        ("LDS.128", 0),
        ("LDGDEPBAR", 0),
        ("STG.E.128", 0),
        ("LDC.64", 0),
    ],
)
def test_the_width_of_a_load(opcode, size):
    assert width(Instruction(opcode)) == size


def test_loads_are_counted_by_width():
    found = thread_loads(
        code_of(
            """
            LDG.E.128 R4, desc[UR4][R2.64]
            LDG.E.128 R8, desc[UR4][R2.64+0x10]
            LDG.E.U16 R12, desc[UR4][R2.64+0x20]
            STG.E.128 desc[UR4][R2.64], R4
            """
        )
    )
    assert found.by_width == {2: 2, 16: 32}
    assert (found.in_flight_loads, found.in_flight_bytes, found.in_loop) == (3, 34, False)


@pytest.mark.parametrize(("used", "most"), [("R22", (5, 40)), ("R5", (4, 32)), ("R6", (3, 24)), ("R7", (3, 24))])
def test_a_use_waits_for_its_load_and_those_before_it(used, most):
    """Two loads, a use of none, of the first or of the second, and three loads more."""
    body = f"""
        LDG.E.64 R4, desc[UR4][R2.64]
        LDG.E.64 R6, desc[UR4][R2.64+0x8]
        FADD R20, {used}, R21
        LDG.E.64 R8, desc[UR4][R2.64+0x10]
        LDG.E.64 R10, desc[UR4][R2.64+0x18]
        LDG.E.64 R12, desc[UR4][R2.64+0x20]
        """
    assert under_way(body) == most


def test_a_load_whose_address_was_loaded_waits():
    assert under_way("LDG.E.64 R4, desc[UR4][R2.64]\nLDG.E.64 R6, desc[UR4][R4.64]") == (1, 8)


def test_a_register_that_is_written_again_waits_unless_only_one_of_the_two_runs():
    assert under_way("LDG.E R4, desc[UR4][R2.64]\nMOV R4, RZ\nLDG.E R5, desc[UR4][R2.64]") == (1, 4)
    assert under_way("@P0 LDG.E R4, desc[UR4][R2.64]\n@!P0 MOV R4, RZ\nLDG.E R5, desc[UR4][R2.64]") == (2, 8)


def test_loads_count_whatever_their_predicate():
    assert under_way("@P0 LDG.E R4, desc[UR4][R2.64]\n@!P0 LDG.E.64 R6, desc[UR4][R2.64]") == (2, 12)


GROUPS = """
    LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]
    LDGSTS.E.BYPASS.128 [R9+0x10], desc[UR4][R2.64+0x10], P0
    LDGDEPBAR
    LDGSTS.E.64 [R9+0x20], desc[UR4][R2.64+0x20]
    LDGDEPBAR
    DEPBAR.LE SB0, {left}
    LDGSTS.E [R9+0x28], desc[UR4][R2.64+0x28]
    LDGSTS.E.BYPASS.128 [R9+0x30], desc[UR4][R2.64+0x30]
    LDGSTS.E.BYPASS.128 [R9+0x40], desc[UR4][R2.64+0x40]
    """


@pytest.mark.parametrize(("left", "most"), [("0x0", (3, 40)), ("0x1", (4, 44)), ("0x2", (6, 76)), ("0x3", (6, 76))])
def test_a_group_of_copies_is_under_way_until_it_is_waited_for(left, most):
    assert under_way(GROUPS.format(left=left)) == most


def test_copies_that_no_group_holds_yet_stay_and_other_scoreboards_are_not_theirs():
    body = """
        LDGSTS.E [R9], desc[UR4][R2.64]
        LDGDEPBAR
        LDGSTS.E [R9+0x4], desc[UR4][R2.64]
        DEPBAR.LE {}, 0x0
        LDGSTS.E.64 [R9+0x8], desc[UR4][R2.64]
        """
    assert under_way(body.format("SB0")) == (2, 12)
    assert under_way(body.format("SB1")) == (3, 16)


def test_a_use_of_a_loaded_register_waits_for_no_copy():
    body = "LDGSTS.E.128 [R9], desc[UR4][R2.64]\nLDG.E R4, desc[UR4][R2.64]\nMOV R5, R4\nLDG.E R6, desc[UR4][R2.64]"
    assert under_way(body) == (2, 20)


LOOP = """
    LDG.E.64 R20, desc[UR4][R2.64]
    LDG.E.128 R24, desc[UR4][R2.64]
    LDG.E.128 R28, desc[UR4][R2.64]
    LDG.E.128 R32, desc[UR4][R2.64]
    FADD R0, R20, R32
    .L_x_1:
    LDG.E.128 R8, desc[UR4][R2.64+0x10]
    BAR.SYNC.DEFER_BLOCKING 0x0
    FADD R0, R4, R0
    FADD R0, R8, R0
    BAR.SYNC.DEFER_BLOCKING 0x0
    LDG.E.64 R4, desc[UR4][R2.64]
    @P0 BRA `(.L_x_1)
    BAR.SYNC.DEFER_BLOCKING 0x0
    EXIT
    """


def test_the_loop_that_loads_counts_and_not_what_is_before_it():
    """56 bytes are under way before the loop; in it, the load of the turn before and one more."""
    found = thread_loads(code_of(LOOP))
    assert (found.in_flight_loads, found.in_flight_bytes, found.in_loop, found.barriers) == (2, 24, True, 2)
    assert found.by_width == {8: 16, 16: 64}


def test_without_a_loop_that_loads_all_code_counts():
    found = thread_loads(code_of(LOOP.replace("@P0 BRA `(.L_x_1)", "NOP")))
    assert (found.in_flight_loads, found.in_flight_bytes, found.in_loop, found.barriers) == (4, 56, False, 3)


def test_of_loops_the_one_that_loads_most_itself_counts():
    found = thread_loads(
        code_of(
            """
            .L_x_1:
            LDG.E.64 R4, desc[UR4][R2.64]
            FADD R0, R4, R0
            BAR.SYNC 0x0
            .L_x_2:
            LDG.E.128 R8, desc[UR4][R2.64]
            FADD R0, R8, R0
            @P0 BRA `(.L_x_2)
            @P1 BRA `(.L_x_1)
            EXIT
            """
        )
    )
    assert (found.in_flight_bytes, found.barriers) == (16, 0)


def test_a_branch_forward_is_not_taken_and_the_other_side_begins_at_the_branch():
    """One load before an `if` of two loads, with an `else` of one: three are the most, not all four."""
    body = """
        LDG.E R4, desc[UR4][R2.64]
        @P0 BRA `(.L_x_1)
        LDG.E R5, desc[UR4][R2.64]
        LDG.E R6, desc[UR4][R2.64]
        BRA `(.L_x_2)
        .L_x_1:
        LDG.E R7, desc[UR4][R2.64]
        .L_x_2:
        EXIT
        """
    assert under_way(body) == (3, 12)


def test_code_behind_the_end_begins_with_nothing():
    assert under_way("LDG.E R4, desc[UR4][R2.64]\nEXIT\nLDG.E R5, desc[UR4][R2.64]") == (1, 4)


@pytest.mark.parametrize("line", ["UBLKCP [UR4], [UR6], UR8", "UTMALDG.2D [UR4], [UR6]", "ARRIVES.LDGSTSBAR.64 [URZ]"])
def test_copies_that_the_code_does_not_tell_are_counted(line):
    assert thread_loads(code_of(f"{line}\nEXIT")).bulk == 1
