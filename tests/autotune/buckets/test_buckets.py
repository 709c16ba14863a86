"""Schedules for several token buckets: the smallest cover, its measurements, and the rewritten records."""

import itertools
import random
from dataclasses import asdict, replace

import pytest
import toy

from autotune import tuner
from autotune.buckets import choose
from autotune.buckets.choose import MAX_SLOWDOWN, BucketMeasurement, choose_schedules, group_by_tokens
from autotune.buckets.cover import smallest_cover
from autotune.events import BucketSchedulesChosen, BucketShootoutStarted
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers as RealWorkers
from autotune.search.tuning_case import TuneFailed
from autotune.tuner import TuneResult, tune
from cli.ui.options import problems
from tiles.cache.cache import KernelCache, Key, token_bucket
from tiles.cache.record import check_schedule
from tiles.errors import BadInput
from tiles.kernels.apply.schedule import ApplySchedule
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import EVERY_TOKENS, Problem, Separate
from tiles.runtime.loaded_kernel import LoadedKernel
from tiles.target import detect_device

FLAT = [1.0] * 12


# --- the cover


def test_one_that_covers_all_is_taken_by_all():
    serving = [{"a": 1.0, "c": 1.015}, {"b": 1.0, "c": 1.01}, {"c": 1.0}]
    assert smallest_cover(serving, ["d", "d", "d"]) == ["c", "c", "c"]


def test_where_none_covers_all_as_few_as_possible_do():
    """Taking the one that serves most first, c, would need three."""
    left, right, most = {0, 1, 2}, {3, 4, 5}, {1, 2, 3, 4}
    serving = [{name: 1.0 for name, of in zip("abc", (left, right, most), strict=True) if at in of} for at in range(6)]
    assert smallest_cover(serving, ["d"] * 6) == ["a", "a", "a", "b", "b", "b"]


def test_ties_go_to_the_widest_cover_then_to_the_default_then_to_the_fastest():
    assert smallest_cover([{"a": 1.0, "b": 1.01}, {"c": 1.0, "b": 1.02}, {"z": 1.0}], ["d"] * 3) == ["b", "b", "z"]
    assert smallest_cover([{"a": 1.0, "d": 1.02}, {"a": 1.0, "d": 1.01}], ["d", "d"]) == ["d", "d"]
    assert smallest_cover([{"a": 1.01, "b": 1.0}, {"a": 1.0, "b": 1.005}], ["d", "d"]) == ["b", "b"]
    # Both of the cover serve the second bucket and as many buckets in all.
    assert smallest_cover([{"a": 1.0}, {"a": 1.01, "b": 1.0}, {"b": 1.0}], ["x"] * 3) == ["a", "b", "b"]
    assert smallest_cover([{"a": 1.0}, {"a": 1.01, "b": 1.0}, {"b": 1.0}], ["x", "a", "x"]) == ["a", "a", "b"]


def test_it_is_the_smallest_of_all_sets():
    draw = random.Random(0)
    for _ in range(200):
        count, names = draw.randint(1, 5), "abcdefg"
        serving = [
            {name: draw.uniform(1, 1.02) for name in draw.sample(names, draw.randint(1, 4))} for _ in range(count)
        ]
        chosen = smallest_cover(serving, [draw.choice(names) for _ in range(count)])
        assert all(name in of for name, of in zip(chosen, serving, strict=True))
        smallest = next(
            size
            for size in range(1, count + 1)
            if any(all(set(some) & set(of) for of in serving) for some in itertools.combinations(names, size))
        )
        assert len(set(chosen)) == smallest


def test_a_bucket_is_covered_within_two_percent_and_no_slower_than_its_default():
    times = {"default": [1.0] * 12, "fast": [0.8] * 12, "close": [0.8 * 1.019] * 12, "far": [0.8 * 1.021] * 12}
    assert set(BucketMeasurement(times, "default", kept=True).acceptable()) == {"fast", "close"}
    best = {"default": [1.0] * 12, "slower": [1.01] * 12, "noisy": [0.97, 1.04] * 6}
    assert set(BucketMeasurement(best, "default", kept=False).acceptable()) == {"default", "noisy"}
    luck = {"default": [1.0, 1.06] * 6, "luckier": [1.03, 1.0] * 6, "worse": [1.1] * 12}
    assert BucketMeasurement(luck, "default", kept=True).acceptable() == pytest.approx(
        {"default": 1.015, "luckier": 1.0}, abs=0.003
    )
    luck["default"] = [1.0, 1.10] * 6
    assert set(BucketMeasurement(luck, "default", kept=True).acceptable()) == {"default", "luckier"}
    assert BucketMeasurement(luck, "default", kept=True).slowdowns()["default"] > MAX_SLOWDOWN
    assert set(BucketMeasurement(luck, "default", kept=False).acceptable()) == {"luckier"}


# --- which problems belong together


def test_problems_that_differ_in_tokens_are_a_group_that_starts_at_the_median():
    shape = problems([2, 4], [64], [32, 2048, 64, 512, 1], ["float32", "bfloat16"], ["merge"])
    grouped = group_by_tokens(shape)
    assert len(grouped) == 8
    assert all([problem.tokens for problem in group] == [64, 32, 512, 1, 2048] for group in grouped)
    assert all(len({replace(problem, tokens=0) for problem in group}) == 1 for group in grouped)
    assert sorted(map(str, itertools.chain(*grouped))) == sorted(map(str, shape))


def test_all_parts_of_a_shape_are_tuned_and_covered_before_what_is_fused_of_them():
    for tokens in ([64], [32, 64, 128]):
        order = [
            problem
            for group in group_by_tokens(problems([2, 4], [64, 128], tokens, ["float32", "bfloat16"]))
            for problem in group
        ]
        for at, problem in enumerate(order):
            separate = kernel_specs()[problem.op, problem.direction].separate
            for op, direction in separate.parts if separate else ():
                part = replace(problem, op=op, direction=direction)
                part = replace(kernel_specs()[op, direction].canonical(part), tokens=problem.tokens)
                assert part in order[:at], f"{part.describe()} must come before {problem.describe()}"


# --- on toy kernels


def key_of(problem, device):
    return replace(toy.key_of(problem, device), tokens=token_bucket(problem.tokens), width=problem.width)


@pytest.fixture(autouse=True)
def toy_kernel(monkeypatch, request):
    if "cache" in request.fixturenames:
        monkeypatch.setattr(tuner, "kernel_spec", lambda op, direction: toy.SPEC)
        monkeypatch.setattr(choose, "kernel_spec", lambda op, direction: toy.SPEC)
        monkeypatch.setattr(Key, "of", key_of)
        monkeypatch.setitem(toy.SPACE, "unroll", (1,))
        monkeypatch.setitem(toy.SPACE, "packed", (False,))


@pytest.fixture
def cache(tmp_path):
    return KernelCache(tmp_path)


SMALL, MIDDLE, LARGE = (replace(toy.PROBLEM, tokens=tokens) for tokens in (64, 256, 1024))
BUCKETS = (SMALL, MIDDLE, LARGE)


class Workers(toy.ToyWorkers):
    """`best` says which block is the fastest at a token count; a step away from it costs `step` of the time."""

    def __init__(self, best, *, step=0.5, noise=0.0005):
        super().__init__(noise=noise)
        self.best, self.step = best, step
        self.broken = {}  # {tokens: code that is wrong there}

    def assess(self, problem, tuned, default, seed):
        self._at(problem)
        if tuned.decode() == self.broken.get(problem.tokens):
            raise TaskFailed("WrongResult: y is wrong")
        return super().assess(problem, tuned, default, seed)

    def compare(self, problem, binaries, unverified, seed):
        self._at(problem)
        if self.broken.get(problem.tokens) in [binary.decode() for binary in binaries.values()]:
            raise TaskFailed("WrongResult: y is wrong")
        return super().compare(problem, binaries, unverified, seed)

    def _at(self, problem):
        def milliseconds(schedule):
            away = abs(schedule.block.bit_length() - self.best[problem.tokens].bit_length())
            return problem.tokens / 64 * (1 + self.step * away)

        self.time = milliseconds


def tuned(cache, workers, trials=100, problems=BUCKETS):
    return {problem: tune(problem, toy.DEVICE, cache, trials=trials, workers=workers) for problem in problems}


def choose_and_check(cache, workers, results):
    events = []
    records = choose_schedules(results, toy.DEVICE, cache, workers, on_event=events.append)
    assert records == tuple(cache.get(record.key) for record in records)
    return records, events


def blocks(records):
    return [record.schedule["block"] for record in records]


def test_one_schedule_covers_all_buckets_where_it_is_within_two_percent(cache):
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    results = tuned(cache, workers)
    assert blocks(result.record for result in results.values()) == [8, 16, 32]
    workers.compared.clear()
    records, events = choose_and_check(cache, workers, results)
    assert blocks(records) == [16, 16, 16]
    assert len({record.sha256 for record in records}) == 1
    assert [record.key.tokens for record in records] == [64, 256, 1024]
    assert len(workers.compared) == 3
    meet, done = events
    assert meet == BucketShootoutStarted(BUCKETS, len(workers.compared[0]))
    assert isinstance(done, BucketSchedulesChosen)
    assert (done.problems, done.records, done.schedules) == (BUCKETS, records, 1)
    assert done.worst == pytest.approx(1.015, abs=0.003)


def test_batch_invariance_takes_the_schedule_that_is_slowed_down_least_in_the_mean(cache):
    """Each bucket keeps its own schedule beside it; a choice that was made is not made again."""
    workers = Workers({64: 8, 256: 16, 1024: 16}, step=0.1)
    results = tuned(cache, workers)
    *own, every = choose_schedules(results, toy.DEVICE, cache, workers, batch_invariant=True)
    assert blocks(own) == [8, 16, 16]
    assert (every.key.tokens, every.schedule["block"]) == (EVERY_TOKENS, 16)
    assert every == cache.get(every.key)
    assert every.measurement["tuned_ms"] == pytest.approx(4, rel=0.002), "that of the middle bucket"
    workers.compared.clear()
    again = {problem: replace(result, record=cache.get(result.record.key)) for problem, result in results.items()}
    choose_schedules(again, toy.DEVICE, cache, workers, batch_invariant=True)
    assert not workers.compared


def test_batch_invariance_needs_one_token_count_only(cache):
    workers = Workers({256: 16}, step=0.1)
    results = tuned(cache, workers, problems=(MIDDLE,))
    own, every = choose_schedules(results, toy.DEVICE, cache, workers, batch_invariant=True)
    assert blocks([own, every]) == [16, 16]
    assert every.key.tokens == EVERY_TOKENS


def test_records_say_what_was_measured_in_their_bucket(cache):
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    before = tuned(cache, workers)
    for (problem, result), record in zip(before.items(), choose_and_check(cache, workers, before)[0], strict=True):
        found, old = record.measurement, result.record.measurement
        assert set(found) == {*old, "best_ms"}
        scale, away = problem.tokens / 64, 0 if problem == MIDDLE else 1
        default_away = {64: 1, 256: 2, 1024: 3}[problem.tokens]
        assert found["best_ms"] == pytest.approx(scale, rel=0.002)
        assert found["tuned_ms"] == pytest.approx(scale * (1 + 0.015 * away), rel=0.002)
        assert found["default_ms"] == pytest.approx(scale * (1 + 0.015 * default_away), rel=0.002)
        assert found["ratio"] == pytest.approx(found["default_ms"] / found["tuned_ms"], rel=0.002)
        assert found["tuned_ms"] <= MAX_SLOWDOWN * found["best_ms"]
        assert (found["trials"], found["default_kept"]) == (old["trials"], False)
        assert record.provenance["study"] == result.record.provenance["study"]
        assert record.provenance["buckets"] == "64 256 1024"
        assert cache.binary_path(record).read_text() == cache.source(record) == toy.code(toy.ToySchedule(16, 1, False))


def test_every_candidate_is_verified_in_every_bucket(cache):
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    results = tuned(cache, workers)
    workers.unverified.clear()
    workers.compared.clear()
    choose_and_check(cache, workers, results)
    assert len(workers.unverified) == sum(map(len, workers.compared)) >= 3 * 4


def test_buckets_keep_their_own_where_the_others_are_worse(cache):
    workers = Workers({64: 1, 256: 8, 1024: 32})
    results = tuned(cache, workers)
    assert blocks(choose_and_check(cache, workers, results)[0]) == [1, 8, 32]


def test_a_schedule_that_is_slower_than_a_buckets_default_does_not_serve_it(cache):
    """Block 8 is 1 % slower than the default, block 4, at 64 tokens: within 2 % of the best, but beyond the noise."""
    workers = Workers({64: 4, 1024: 8}, step=0.01)
    workers._at = lambda problem: setattr(
        workers,
        "time",
        lambda schedule: {64: {4: 1.0, 8: 1.01}, 1024: {4: 1.2, 8: 1.0}}[problem.tokens].get(schedule.block, 3.0),
    )
    results = tuned(cache, workers, problems=(SMALL, LARGE))
    records, _ = choose_and_check(cache, workers, results)
    assert blocks(records) == [4, 8]
    assert [record.measurement["default_kept"] for record in records] == [True, False]
    assert records[0].measurement["ratio"] == 1.0


def test_the_default_is_chosen_where_it_is_as_good(cache):
    workers = Workers({64: 8, 256: 8, 1024: 8}, step=0.015)
    records, _ = choose_and_check(cache, workers, tuned(cache, workers))
    assert blocks(records) == [4, 4, 4]
    assert all(record.measurement["default_kept"] for record in records)


def test_a_second_call_does_nothing(cache):
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    first, _ = choose_and_check(cache, workers, tuned(cache, workers))
    again = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    results = tuned(cache, again)
    assert {result.stopped for result in results.values()} == {"finished before"}
    assert choose_and_check(cache, again, results) == (first, [])
    some = {problem: results[problem] for problem in (SMALL, LARGE)}
    assert choose_and_check(cache, again, some) == ((first[0], first[2]), [])
    assert (again.compiled, again.assessed, again.compared) == ([], [], [])


def test_records_of_two_choices_are_chosen_again(cache):
    """They may hold two schedules where one is enough."""
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    first, _ = choose_and_check(cache, workers, tuned(cache, workers))
    made = first[0].provenance | {"buckets": "64 256 1024 4096"}
    cache.put(first[0].key, first[0].schedule, b"code", "source", first[0].measurement, made)
    records, events = choose_and_check(cache, workers, tuned(cache, workers))
    assert len(events) == 2
    assert {record.provenance["buckets"] for record in records} == {"64 256 1024"}


def test_one_bucket_alone_is_left_as_it_is(cache):
    workers = Workers({64: 8, 60: 8})
    results = tuned(cache, workers, problems=(SMALL, replace(SMALL, tokens=60)))
    workers.compared.clear()
    assert choose_and_check(cache, workers, results) == ((results[SMALL].record,), [])
    assert workers.compared == []


def test_a_bucket_that_is_searched_further_is_chosen_again(cache):
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    choose_and_check(cache, workers, tuned(cache, workers, trials=4))
    results = tuned(cache, workers, trials=100)
    assert all("buckets" not in result.record.provenance for result in results.values())
    assert blocks(choose_and_check(cache, workers, results)[0]) == [16, 16, 16]


@pytest.mark.parametrize("killed_at", range(3))
def test_cut_short_at_any_record_it_is_done_again_from_the_same_candidates(cache, monkeypatch, killed_at):
    best = {64: 8, 256: 16, 1024: 32}
    workers = Workers(best, step=0.015)
    results = tuned(cache, workers)
    put, done = KernelCache.put, []

    def killed(*given):
        if len(done) == killed_at:
            raise KeyboardInterrupt
        done.append(put(*given))
        return done[-1]

    with monkeypatch.context() as patched:
        patched.setattr(KernelCache, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            choose_schedules(results, toy.DEVICE, cache, workers)
    first = workers.compared[-1]
    assert len(cache.records()) == 3
    again = Workers(best, step=0.015)
    records, events = choose_and_check(cache, again, tuned(cache, again))
    assert again.assessed == []
    assert len(again.compared[-1]) == len(first)
    assert blocks(records) == [16, 16, 16]
    assert len(events) == 2


def test_one_that_is_wrong_in_a_bucket_does_not_serve_it(cache):
    best = {64: 8, 256: 16, 1024: 32}
    workers = Workers(best, step=0.015)
    results = tuned(cache, workers)
    workers.broken = {1024: toy.code(toy.ToySchedule(16, 1, False))}
    records, _ = choose_and_check(cache, workers, results)
    assert blocks(records) == [16, 16, 32]


def test_nothing_is_written_where_a_default_fails(cache):
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    results = tuned(cache, workers)
    before = cache.records()
    workers.broken = {1024: toy.code(toy.DEFAULT_SCHEDULE)}
    with pytest.raises(TuneFailed, match=r"^toy forward .* T=1024: .* cannot be compared: WrongResult: y is wrong$"):
        choose_schedules(results, toy.DEVICE, cache, workers)
    workers.not_compiling = {toy.DEFAULT_SCHEDULE}
    with pytest.raises(TuneFailed, match=r"cannot be compared: CompileError: no$"):
        choose_schedules(results, toy.DEVICE, cache, workers)
    assert cache.records() == before


def test_a_full_disk_is_no_fault_of_a_kernel(cache):
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    results = tuned(cache, workers)

    def full(*given):
        raise TaskFailed("OSError: [Errno 28] No space left on device")

    workers.assess = workers.compare = full
    with pytest.raises(BadInput, match=r"tuning needs room .* T=64: .* No space left on device: what was finished is"):
        choose_schedules(results, toy.DEVICE, cache, workers)


def test_one_that_does_not_compile_any_more_is_left_out(cache):
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    results = tuned(cache, workers)
    workers.not_compiling = {toy.ToySchedule(16, 1, False)}
    assert 16 not in blocks(choose_and_check(cache, workers, results)[0])


def test_a_fused_kernel_with_another_schedule_is_weighed_against_its_parts_again(cache, monkeypatch):
    spec = replace(toy.SPEC, separate=Separate(lambda run: (), ()))
    weighed = []

    def compare_with_separate(problem, fused, *given):
        weighed.append(problem.tokens)
        return {"separate_ms": 1.0, "separate_ratio": 0.5, "separate_wins": len(weighed) > 3}

    monkeypatch.setattr("autotune.decision.conclude.compare_with_separate", compare_with_separate)
    monkeypatch.setattr(choose, "compare_with_separate", compare_with_separate)
    for module in (tuner, choose):
        monkeypatch.setattr(module, "kernel_spec", lambda op, direction: spec)
    workers = Workers({64: 8, 256: 16, 1024: 32}, step=0.015)
    results = tuned(cache, workers)
    assert weighed == [64, 256, 1024]
    records, _ = choose_and_check(cache, workers, results)
    assert weighed[3:] == [64, 1024]
    assert [record.measurement["separate_wins"] for record in records] == [True, False, True]


# --- on real kernels


@pytest.mark.slow  # real processes, twice; test_workers.py has their answers
def test_real_kernels_are_compared_and_one_choice_is_written(tmp_path):
    device, cache, results = detect_device("cpu"), KernelCache(tmp_path), {}
    with RealWorkers() as workers:
        for tokens, schedule in ((16, ApplySchedule(64, 0)), (128, ApplySchedule(128, 0))):
            problem = Problem("aggregate", "forward", 2, 128, tokens=tokens)
            (compiled,) = workers.compile(problem, [schedule], device.target)
            record = cache.put(Key.of(problem, device), asdict(schedule), compiled.binary, compiled.source, {}, {})
            results[problem] = TuneResult(record, 1, 0, "trials")
        records = choose_schedules(results, device, cache, workers)
    assert cache.records() == sorted(records, key=lambda record: record.key.digest)
    assert [record.provenance["buckets"] for record in records] == ["16 128"] * 2
    for problem, record in zip(results, records, strict=True):
        check_schedule(record)
        assert record.measurement["tuned_ms"] >= record.measurement["best_ms"] > 0
        assert LoadedKernel(cache.binary_path(record), problem)
