"""The tuner's loop on the toy kernel: asking, storing, resuming and writing records."""

from dataclasses import asdict

import pytest
import toy

from autotune import tuner
from autotune.events import ProblemFinished, ProblemStarted, ShootoutStarted, TrialDone, TrialFailed
from autotune.measuring.roofline import Roofline
from autotune.processes.worker import TaskFailed
from autotune.search.pool import enumerate_pool
from autotune.search.sampler import PoolSampler
from autotune.search.trials import TrialResult
from autotune.study.shared_trials import SharedTrials
from autotune.study.storage import open_study
from autotune.tuner import TuneFailed, tune
from tiles.cache.cache import KernelCache, Key
from tiles.errors import BadInput


@pytest.fixture(autouse=True)
def toy_kernel(monkeypatch):
    monkeypatch.setattr(tuner, "kernel_spec", lambda op, direction: toy.SPEC)
    monkeypatch.setattr(Key, "of", toy.key_of)


@pytest.fixture
def cache(tmp_path):
    return KernelCache(tmp_path)


def run(cache, workers, **options):
    """The result and the events of a search."""
    events = []
    result = tune(toy.PROBLEM, toy.DEVICE, cache, workers=workers, on_event=events.append, **options)
    return result, events


def interrupted(cache, workers, **options):
    events = []
    with pytest.raises(KeyboardInterrupt):
        tune(toy.PROBLEM, toy.DEVICE, cache, workers=workers, on_event=events.append, **options)
    return events


def of_kind(events, kind):
    return [event for event in events if isinstance(event, kind)]


def stored(cache):
    return cache.get(toy.key_of(toy.PROBLEM, toy.DEVICE))


def test_the_best_schedule_ends_up_in_the_cache_with_its_code(cache):
    result, _ = run(cache, toy.ToyWorkers(), trials=100)
    assert result.record == stored(cache)
    assert result.record.schedule == asdict(toy.BEST)
    assert cache.binary_path(result.record).read_text() == cache.source(result.record) == toy.code(toy.BEST)
    found = result.record.measurement
    assert set(found) == {
        *("tuned_ms", "default_ms", "ratio", "bytes", "gb_per_s", "copy_gb_per_s", "percent_of_copy"),
        *("flops", "gflops_peak", "limit_ms", "percent_of_limit", "threads", "trials", "default_kept"),
    }
    assert found["tuned_ms"] == pytest.approx(1, rel=0.02)
    assert found["default_ms"] == pytest.approx(7.5, rel=0.02)
    assert found["ratio"] == pytest.approx(7.5, rel=0.02)
    assert found["default_kept"] is False
    assert found["threads"] == 2
    assert {"date", "host", "tilelang", "torch", "command"} <= set(result.record.provenance)
    assert result.record.provenance["cuda_toolkit"] == toy.TOOLKIT


def test_a_small_budget_finds_a_good_schedule(cache):
    result, _ = run(cache, toy.ToyWorkers(), trials=12)
    assert result.trials == 12
    assert result.stopped == "trials"
    assert result.record.measurement["ratio"] > 2


def test_the_default_ships_where_nothing_beats_it_beyond_the_noise(cache):
    workers = toy.ToyWorkers(lambda schedule: 5.0, noise=0.05)
    record = run(cache, workers, trials=100)[0].record
    assert record.schedule == asdict(toy.DEFAULT_SCHEDULE)
    assert record.measurement["default_kept"] is True
    assert record.measurement["ratio"] == 1.0
    assert record.measurement["tuned_ms"] == record.measurement["default_ms"]


def test_a_kernel_whose_schedule_does_not_matter_is_not_searched_on(cache):
    result, _ = run(cache, toy.ToyWorkers(lambda schedule: 5.0), trials=100)
    assert result.stopped == "no difference"
    assert result.trials < 10
    assert run(cache, toy.ToyWorkers(), trials=100)[0].stopped == "finished before"
    some = toy.ToyWorkers(lambda schedule: 5.0 if schedule.block < 32 else 6.0)
    assert run(KernelCache(cache.folder / "other"), some, trials=100)[0].stopped == "pool swept"


def test_the_default_schedules_code_is_kept_apart_for_whoever_needs_it(cache):
    run(cache, toy.ToyWorkers(), trials=12)
    assert [record.schedule for record in cache.records()] != [asdict(toy.DEFAULT_SCHEDULE)]
    defaults = KernelCache(cache.folder / "defaults")
    (kept,) = defaults.records()
    assert kept.schedule == asdict(toy.DEFAULT_SCHEDULE)
    assert defaults.binary_path(kept).read_text() == toy.code(toy.DEFAULT_SCHEDULE)


def test_equal_code_is_timed_once(cache):
    workers = toy.ToyWorkers()
    _, events = run(cache, workers, trials=100)
    assert len(workers.assessed) == len(set(workers.assessed)) == 28
    done = {event.number: event for event in of_kind(events, TrialDone)}
    twins = [event for event in done.values() if event.same_as is not None]
    assert len(done) == 34
    assert len(twins) == 6
    assert all(twin.ms == done[twin.same_as].ms for twin in twins)
    assert all(
        toy.code(toy.ToySchedule(**twin.schedule)) == toy.code(toy.ToySchedule(**done[twin.same_as].schedule))
        for twin in twins
    )


def test_finalists_are_different_code_and_not_the_defaults(cache):
    workers = toy.ToyWorkers()
    _, events = run(cache, workers, trials=100)
    (met,) = of_kind(events, ShootoutStarted)
    codes = {toy.code(toy.ToySchedule(**schedule)) for schedule in met.schedules}
    assert len(codes) == len(met.schedules) == 3
    assert toy.code(toy.DEFAULT_SCHEDULE) not in codes
    assert [len(names) for names in workers.compared] == [4]


def test_failures_are_reported_and_never_asked_again(cache):
    workers = toy.ToyWorkers()
    workers.not_compiling = {toy.ToySchedule(2, 2, True), toy.ToySchedule(8, 4, False)}
    workers.wrong = {toy.code(toy.BEST)}
    result, events = run(cache, workers, trials=20)
    result, more = run(cache, workers, trials=100)
    failed = of_kind(events + more, TrialFailed)
    assert {(toy.ToySchedule(**event.schedule), event.reason) for event in failed} == {
        (toy.ToySchedule(2, 2, True), "CompileError: no"),
        (toy.ToySchedule(8, 4, False), "CompileError: no"),
        (toy.BEST, "WrongResult: y is wrong"),
    }
    assert result.failed == len(failed) == 3
    assert workers.assessed.count(toy.code(toy.BEST)) == 1
    assert result.record.schedule == {"block": 16, "unroll": 2, "packed": False}


def test_a_second_run_does_nothing(cache):
    first, _ = run(cache, toy.ToyWorkers(), trials=10)
    workers = toy.ToyWorkers()
    again, events = run(cache, workers, trials=10)
    assert again.record == first.record
    assert again.stopped == "finished before"
    assert again.trials == 10
    assert (workers.compiled, workers.assessed, workers.compared) == ([], [], [])
    assert [type(event) for event in events] == [ProblemFinished]


def test_a_larger_budget_goes_on_and_measures_nothing_twice(cache):
    first, second = toy.ToyWorkers(), toy.ToyWorkers()
    run(cache, first, trials=10)
    result, events = run(cache, second, trials=18)
    assert result.trials == 18
    assert of_kind(events, ProblemStarted)[0].evaluated == 10
    assert first.unverified == []
    assert not set(first.assessed) & set(second.assessed)
    assert len(of_kind(events, TrialDone)) == 8


def test_what_an_earlier_run_verified_is_verified_again_before_it_ships(cache):
    run(cache, toy.ToyWorkers(), trials=100)
    (cache.folder / f"{toy.key_of(toy.PROBLEM, toy.DEVICE).digest}.json").unlink()
    workers = toy.ToyWorkers()
    run(cache, workers, trials=100)
    assert len(workers.unverified) == 4
    assert {toy.code(toy.BEST), toy.code(toy.DEFAULT_SCHEDULE)} < set(workers.unverified)


def test_a_lost_record_is_written_again_without_new_trials(cache):
    run(cache, toy.ToyWorkers(), trials=10)
    (cache.folder / f"{toy.key_of(toy.PROBLEM, toy.DEVICE).digest}.json").unlink()
    workers = toy.ToyWorkers()
    result, _ = run(cache, workers, trials=10)
    assert result.record == stored(cache)
    assert workers.assessed == []
    assert len(workers.compared) == 1


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_goes_on(cache):
    workers = toy.ToyWorkers()
    workers.interrupt_at = 7
    events = interrupted(cache, workers, trials=100)
    done = of_kind(events, TrialDone)
    best = max(done, key=lambda event: event.ratio)
    assert events[-1].stopped == "interrupted"
    assert events[-1].record == stored(cache)
    assert stored(cache).schedule == best.schedule
    assert stored(cache).measurement["ratio"] == best.ratio > 1
    later = toy.ToyWorkers()
    result, _ = run(cache, later, trials=100)
    assert not set(workers.assessed) & set(later.assessed)
    assert result.trials == 34
    assert result.record.schedule == asdict(toy.BEST)


def test_ctrl_c_in_the_shootout_keeps_the_best_trial_and_the_shootout_is_repeated(cache):
    workers = toy.ToyWorkers()

    def interrupt(*given):
        raise KeyboardInterrupt

    workers.compare = interrupt
    interrupted(cache, workers, trials=100)
    assert stored(cache).schedule == asdict(toy.BEST)
    later = toy.ToyWorkers()
    assert run(cache, later, trials=100)[0].stopped == "pool swept"
    assert later.assessed == []
    assert len(later.compared) == 1


def test_ctrl_c_does_not_replace_a_better_record(cache):
    run(cache, toy.ToyWorkers(), trials=100)
    better = stored(cache)
    (cache.folder / "studies").rename(cache.folder / "old studies")
    workers = toy.ToyWorkers()
    workers.interrupt_at = 2
    interrupted(cache, workers, trials=3, seed=1)  # too few trials for transfer to advise that record
    assert stored(cache) == better


def test_ctrl_c_before_anything_is_verified_leaves_nothing(cache):
    workers = toy.ToyWorkers()
    workers.interrupt_at = 0
    events = interrupted(cache, workers, trials=10)
    assert stored(cache) is None
    assert events[-1].record is None


def test_a_default_that_fails_is_an_error_and_is_asked_again(cache):
    workers = toy.ToyWorkers()
    workers.wrong = {toy.code(toy.DEFAULT_SCHEDULE)}
    with pytest.raises(TuneFailed, match=r"^toy forward .* the default schedule fails: WrongResult: y is wrong$"):
        run(cache, workers, trials=10)
    assert stored(cache) is None
    workers.wrong = set()
    workers.not_compiling = {toy.DEFAULT_SCHEDULE}
    with pytest.raises(TuneFailed, match=r"the default schedule fails: CompileError: no$"):
        run(cache, workers, trials=10)
    workers.not_compiling = set()
    assert run(cache, workers, trials=10)[0].trials == 10


# 2 MB at 2 GB/s take 1 ms, and so does a million operations at 1 GFLOP/s: the time of the best schedule.
@pytest.mark.parametrize(("limit", "of_copy"), [({"gb_per_s": 2.0}, 100), ({"gb_per_s": 20.0, "gflops": 1.0}, 10)])
def test_stops_where_the_roofline_leaves_less_than_the_noise(cache, limit, of_copy):
    workers = toy.ToyWorkers(lambda schedule: 1.0 if schedule == toy.DEFAULT_SCHEDULE else 2.0, **limit)
    result, events = run(cache, workers, trials=30)
    assert result.stopped == "roofline"
    assert result.trials == 2
    assert of_kind(events, TrialDone)[0].percent_of_copy == pytest.approx(of_copy, rel=0.02)
    assert of_kind(events, TrialDone)[0].percent_of_limit == pytest.approx(100, rel=0.02)
    assert result.record.measurement["percent_of_limit"] == pytest.approx(100, rel=0.02)
    assert run(cache, toy.ToyWorkers(), trials=30)[0].stopped == "finished before"
    slower = toy.ToyWorkers(lambda schedule: 1.2 + 0.1 * schedule.block, **limit)
    assert run(KernelCache(cache.folder / "other"), slower, trials=8)[0].stopped == "trials"


def test_a_roofline_that_is_beaten_stops_nothing(cache):
    workers = toy.ToyWorkers(lambda schedule: 0.9 if schedule == toy.DEFAULT_SCHEDULE else 1.2, gb_per_s=2.0)
    result, events = run(cache, workers, trials=8)
    assert result.stopped == "trials"
    assert of_kind(events, TrialDone)[0].percent_of_limit == pytest.approx(111, rel=0.02)


def test_time_is_a_limit_too_and_the_next_run_goes_on(cache):
    result, _ = run(cache, toy.ToyWorkers(), trials=30, seconds=0)
    assert result.stopped == "time"
    assert result.trials == 2
    assert result.record == stored(cache)
    assert run(cache, toy.ToyWorkers(), trials=30, seconds=0)[0].trials == 2
    assert run(cache, toy.ToyWorkers(), trials=30)[0].trials == 30


def test_events_tell_the_best_so_far(cache):
    _, events = run(cache, toy.ToyWorkers(), trials=20)
    assert events[0] == ProblemStarted(toy.PROBLEM, 34, 20, 0, Roofline(1e6, 1e6))
    done = of_kind(events, TrialDone)
    assert done[0].schedule == asdict(toy.DEFAULT_SCHEDULE)
    assert done[0].ratio == done[0].best_ratio == 1.0
    for count in range(1, len(done) + 1):
        best = max(done[:count], key=lambda event: event.ratio)
        last = done[count - 1]
        assert (last.best_ms, last.best_ratio) == (best.ms, best.ratio)
        assert last.percent_of_copy == pytest.approx(100 * 2e6 / last.ms / 1e6 / 1e6)
        assert last.best_percent_of_copy == pytest.approx(100 * 2e6 / best.ms / 1e6 / 1e6)
        assert last.best_percent_of_limit == pytest.approx(last.best_percent_of_copy)
    assert events[-1].record == stored(cache)


def test_trials_of_another_thread_count_or_space_do_not_count(cache, monkeypatch):
    run(cache, toy.ToyWorkers(), trials=10)
    workers = toy.ToyWorkers()
    workers.threads = 3
    run(cache, workers, trials=10)
    assert len(workers.assessed) > 0
    monkeypatch.setitem(toy.SPACE, "block", (1, 2, 4, 8, 16))
    workers = toy.ToyWorkers()
    run(cache, workers, trials=10)
    assert len(workers.assessed) > 0
    assert len(list((cache.folder / "studies").glob("*.journal"))) == 3


def test_a_database_keeps_trials_as_well(cache, tmp_path):
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    run(cache, toy.ToyWorkers(), trials=6, storage=url)
    workers = toy.ToyWorkers()
    assert run(cache, workers, trials=6, storage=url)[0].stopped == "finished before"
    assert workers.compiled == []


@pytest.mark.parametrize(
    ("device", "options", "said"),
    [
        (toy.DEVICE, {"trials": 0}, r"trials and tokens must be at least 1, got 0 and 64"),
    ],
)
def test_bad_input_is_one_line(cache, device, options, said):
    with pytest.raises(BadInput, match=said):
        tune(toy.PROBLEM, device, cache, workers=toy.ToyWorkers(), **options)


def test_what_the_device_said_of_itself_is_kept_with_the_measurement(cache):
    workers = toy.ToyWorkers()
    workers.conditions = {"sm_mhz": 1980.0, "throttled": 0.0}
    measured = run(cache, workers, trials=3)[0].record.measurement
    assert (measured["sm_mhz"], measured["throttled"]) == (1980.0, 0.0)


def test_a_finalist_that_fails_in_the_shootout_is_left_out(cache):
    workers = toy.ToyWorkers()
    compare = workers.compare

    def crash(problem, binaries, unverified, seed):
        if toy.code(toy.BEST).encode() in binaries.values():
            raise TaskFailed("compare ended its process: SIGSEGV")
        return compare(problem, binaries, unverified, seed)

    workers.compare = crash
    record = run(cache, workers, trials=100)[0].record
    assert record.schedule not in (asdict(toy.BEST), asdict(toy.DEFAULT_SCHEDULE))
    assert record.measurement["ratio"] > 2


def test_searches_of_different_seeds_choose_schedules_within_two_percent(tmp_path):
    """Many schedules are nearly as fast as the best, measurements scatter by 4 %, and half of the pool is tried."""

    def time_of(schedule):
        steps = abs(schedule.block.bit_length() - 5) ** 2 + abs(schedule.unroll.bit_length() - 2)
        return 1 + 0.1 * steps + 0.01 * schedule.packed

    chosen = []
    for seed in range(6):
        workers = toy.ToyWorkers(time_of, noise=0.04, seed=seed)
        result, _ = run(KernelCache(tmp_path / str(seed)), workers, trials=17, seed=seed)
        chosen.append(time_of(toy.ToySchedule(**result.record.schedule)))
    assert max(chosen) <= 1.02 * min(chosen)
    assert time_of(toy.DEFAULT_SCHEDULE) > 1.1 * max(chosen)


def test_a_full_disk_blames_no_schedule(cache):
    workers = toy.ToyWorkers()
    workers.not_compiling = {toy.BEST}
    compile_all = workers.compile

    def compile_on_full_disk(*given):
        done = compile_all(*given)
        return [
            TaskFailed("CompileError: g++: No space left on device") if isinstance(one, TaskFailed) else one
            for one in done
        ]

    workers.compile = compile_on_full_disk
    with pytest.raises(BadInput, match=r"room for temporary files, got CompileError.*run the same command again$"):
        run(cache, workers, trials=100)
    result, events = run(cache, toy.ToyWorkers(), trials=100)
    assert of_kind(events, TrialFailed) == []
    assert of_kind(events, ProblemStarted)[0].evaluated > 0
    assert result.record.schedule == asdict(toy.BEST)


def test_a_study_of_another_search_is_refused(cache, monkeypatch):
    """Which its name rules out, unless somebody renames files."""
    run(cache, toy.ToyWorkers(), trials=6)
    study = next((cache.folder / "studies").glob("*.journal"))
    study.write_text(study.read_text().replace("toy processor", "other processor"))
    with pytest.raises(BadInput, match=r"must be of this search's device, got .*other processor.* where .*toy"):
        run(cache, toy.ToyWorkers(), trials=8)


def test_a_record_older_than_the_trials_of_others_is_not_the_end(cache, tmp_path):
    """A worker that comes back after others went on takes part in what they found."""
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    run(cache, toy.ToyWorkers(), trials=5, storage=url)
    run(KernelCache(tmp_path / "elsewhere"), toy.ToyWorkers(), trials=100, storage=url)
    workers = toy.ToyWorkers()
    result, _ = run(cache, workers, trials=5, storage=url)
    assert workers.assessed == []
    assert len(workers.compared) == 1
    assert result.record.schedule == stored(cache).schedule == asdict(toy.BEST)


def test_results_of_other_workers_are_reported_and_count(cache, tmp_path):
    """Another worker takes a trial in the middle of our batch and ends it in the middle of the next."""
    ours, theirs = toy.ToyWorkers(), []
    assess = ours.assess

    def assess_beside_another(*given):
        name = next((cache.folder / "studies").glob("*.journal")).stem
        pool = enumerate_pool(toy.SPEC, toy.PROBLEM, toy.DEVICE.target)
        if len(ours.assessed) == 4:
            sampler = PoolSampler(pool, budget=100, seed=5)
            other = SharedTrials(open_study(name, cache.folder / "studies", None, sampler), pool, 100)
            theirs.append((other, *other.ask()))
        if len(ours.assessed) == 8:
            other, trial, _ = theirs[0]
            assert other.complete(trial, TrialResult(0.1, 7.0, 70.0, 69.0, 71.0, toy.code(toy.BEST)))
        return assess(*given)

    ours.assess = assess_beside_another
    result, events = run(cache, ours, trials=12)
    _, trial, _ = theirs[0]
    told = next(event for event in of_kind(events, TrialDone) if event.number == trial.number)
    assert (told.ms, told.best_ms) == (0.1, 0.1)
    assert result.trials == 12
    assert len(of_kind(events, TrialDone)) == 12
    theirs[0][0].close()
