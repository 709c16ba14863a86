"""Look-up order: exact, nearest bucket, sibling device, and never code of other sources."""

from dataclasses import asdict, replace

import pytest

from tiles.cache.lookup import candidates
from tiles.cache.record import Key, Record
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device

HERE = Device("cpu", "This CPU", "x86-64-v3")
PROBLEM = Problem("merge", "forward", 4, 64, "float32", tokens=1024)


SCHEDULE = asdict(kernel_spec("merge", "forward").default(PROBLEM, HERE.target))


def record(tokens=1024, device=HERE, problem=PROBLEM, schedule=None, **changes):
    key = Key.of(replace(problem, tokens=tokens), device)
    return Record(replace(key, **changes), schedule or {}, "0" * 64, 0, {}, {})


def find(records, problem, device):
    """The first candidate whose own code may run, or None."""
    return next((c for c in candidates(records, problem, device) if not c.why_recompile and not c.why_refused), None)


def only(measured, device=HERE, **options):
    (found,) = candidates([measured], PROBLEM, device, **options)
    return found


def test_exact_wins_and_says_so():
    wanted = record(1024)
    choice = find([record(512), wanted, record(1024, replace(HERE, name="Other"))], PROBLEM, HERE)
    assert (choice.record, choice.match) == (wanted, "exact")
    assert choice.why == "tuned for 1024 tokens on this device, This CPU"


def test_tokens_of_the_same_bucket_are_exact():
    assert find([record(1024)], replace(PROBLEM, tokens=700), HERE).match == "exact"


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [((64, 2048), 2048), ((512, 8192), 512), ((512, 2048), 2048), ((2048, 512), 2048), ((256, 4096), 4096), ((1,), 1)],
)
def test_nearest_bucket_by_log2_the_larger_on_a_tie(measured, chosen):
    choice = find([record(tokens) for tokens in measured], PROBLEM, HERE)
    assert (choice.record.key.tokens, choice.match) == (chosen, "nearest bucket")
    assert choice.why == f"tuned for {chosen} tokens on this device, the nearest to the 1024 wanted"


def test_this_devices_far_bucket_beats_a_siblings_exact_one():
    far = record(1)
    assert find([record(1024, replace(HERE, name="Other")), far], PROBLEM, HERE).record == far


def test_sibling_of_the_same_architecture_and_nearest_bucket():
    sibling = replace(HERE, name="Other")
    older = record(1024, replace(HERE, name="Older", arch="x86-64-v2"))
    near, far = record(2048, sibling), record(64, sibling)
    choice = find([older, far, near], PROBLEM, HERE)
    assert (choice.record, choice.match) == (near, "sibling device")
    assert choice.why == (
        "tuned for 2048 tokens on Other (x86-64-v3), for the 1024 tokens wanted on this device, This CPU (x86-64-v3)"
    )
    assert find([older], PROBLEM, HERE).match == "sibling device"


def test_gpu_siblings_share_an_architecture():
    h200 = Device("cuda", "NVIDIA H200", "sm_90a", 132, 60 * 2**20)
    h100 = replace(h200, name="NVIDIA H100", l2_bytes=50 * 2**20)
    a100 = Device("cuda", "NVIDIA A100", "sm_80", 108, 40 * 2**20)
    assert find([record(device=h100)], PROBLEM, h200).match == "sibling device"
    assert find([record(device=a100)], PROBLEM, h200) is None


@pytest.mark.parametrize(
    "unfit",
    [
        record(device=replace(HERE, name="Newer", arch="x86-64-v4")),
        record(device=Device("cuda", "This CPU", "x86-64-v3")),
        record(sources="other"),
        record(toolchain="0.0.1"),
        record(format=2),
        record(problem=replace(PROBLEM, streams=3)),
        record(problem=replace(PROBLEM, width=128)),
        record(problem=replace(PROBLEM, dtype="bfloat16")),
        record(problem=replace(PROBLEM, direction="backward")),
        record(problem=replace(PROBLEM, op="aggregate")),
    ],
    ids=["newer isa", "other kind", "sources", "toolchain", "format", "streams", "width", "dtype", "direction", "op"],
)
def test_unfit_records_never_serve(unfit):
    assert find([unfit], PROBLEM, HERE) is None
    fit = record(64)
    assert find([unfit, fit], PROBLEM, HERE).record == fit


def test_the_choice_does_not_depend_on_the_records_order():
    twins = [record(1024, replace(HERE, name=name)) for name in ("A", "B", "C")]
    assert find(twins, PROBLEM, HERE) == find(twins[::-1], PROBLEM, HERE)


def test_nothing_stored_is_no_candidate():
    assert candidates([], PROBLEM, HERE) == []


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"toolchain": "0.0.1"}, "it was made with TileLang 0.0.1, this version uses"),
        ({"sources": "other"}, "other kernel sources"),
        ({"format": 2}, "format 2"),
    ],
    ids=["toolchain", "sources", "format"],
)
def test_schedules_of_other_versions_are_kept_for_compiling(changes, because):
    found = only(record(schedule=SCHEDULE, **changes))
    assert because in found.why_recompile
    assert (found.why_refused, found.match) == (None, "exact")


def test_schedules_without_code_that_may_run_are_kept_for_compiling():
    found = only(record(schedule=SCHEDULE), why_no_code="it is not signed")
    assert (found.why_recompile, found.why_refused) == ("it is not signed", None)


@pytest.mark.parametrize(
    ("schedule", "because"),
    [
        ({}, "got unknown [], missing ['block_width', 'threads']"),
        (SCHEDULE | {"block_width": 7}, "must divide 64, got 7"),
    ],
    ids=["fields", "rule"],
)
def test_schedules_that_todays_rules_refuse_are_refused(schedule, because):
    assert because in only(record(schedule=schedule, sources="other")).why_refused


def test_code_for_a_newer_isa_is_refused_and_so_is_its_schedule():
    newer = replace(HERE, name="Newer", arch="x86-64-v4")
    for changes in ({}, {"sources": "other"}):
        found = only(record(device=newer, schedule=SCHEDULE, **changes))
        assert found.why_refused == "built for x86-64-v4, this CPU offers x86-64-v3"


def test_ready_code_of_this_device_then_its_stale_schedules_then_siblings():
    other = replace(HERE, name="Other")
    best_first = [
        record(64),
        record(1024, sources="other", schedule=SCHEDULE),
        record(1024, other),
        record(1024, other, sources="other", schedule=SCHEDULE),
    ]
    found = candidates(reversed(best_first), PROBLEM, HERE)
    assert [candidate.record for candidate in found] == best_first
