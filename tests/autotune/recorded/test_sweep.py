"""Recording of a space: measurements, resumption, and refused files."""

import json
from dataclasses import replace

import pytest
import toy

from autotune.processes.tasks import TUNED
from autotune.processes.worker import TaskFailed
from autotune.recorded import sweep
from autotune.recorded.foreign import read_space
from autotune.recorded.sweep import record
from tiles.errors import BadInput


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setattr(sweep, "kernel_spec", lambda op, direction: toy.SPEC)
    monkeypatch.setattr(sweep.Key, "of", staticmethod(toy.key_of))


def recorded(out, workers, **options):
    return record(toy.PROBLEM, toy.DEVICE, out, workers, **options)


def test_the_whole_pool_is_measured_and_written(tmp_path):
    out, told = tmp_path / "toy.json.gz", []
    workers = toy.ToyWorkers()
    space = recorded(out, workers, on_member=lambda *said: told.append(said))
    assert read_space(out) == space
    assert len(space.pool) == 34
    assert told[0] == (0, 0, 34)
    assert told[-1] == (34, 0, 34)
    assert space.has_default
    for member, ms in enumerate(space.ms):
        schedule = toy.ToySchedule(**space.pool.values(member))
        if schedule.unroll == 1:  # packed or not is the same code
            schedule = replace(schedule, packed=False)
        assert ms == pytest.approx(toy.milliseconds(schedule), rel=0.03)
    assert space.pool.values(space.ms.index(space.optimum)) == vars(toy.BEST)
    assert all(low <= 1 <= high for low, high in space.spread)
    assert space.about["problem"]["op"] == "toy"
    assert space.about["threads"] == 2
    assert space.about["rounds"] == 24
    assert {"date", "tilelang", "torch", "commit"} <= set(space.about["made"])
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json.gz"]


def test_identical_code_is_timed_once(tmp_path):
    workers = toy.ToyWorkers()
    space = recorded(tmp_path / "toy.json.gz", workers)
    assert len(workers.assessed) == len(set(workers.assessed)) == len(set(space.sources)) == 28
    pairs = {
        source: {ms for ms, of in zip(space.ms, space.sources, strict=True) if of == source} for source in space.sources
    }
    assert all(len(times) == 1 for times in pairs.values())


def test_failures_are_kept_with_their_reason(tmp_path):
    workers = toy.ToyWorkers()
    broken, wrong = toy.ToySchedule(8, 2, False), toy.ToySchedule(8, 4, True)
    workers.not_compiling.add(broken)
    workers.wrong.add(toy.code(wrong))
    space = read_space(_made(tmp_path, workers))
    failed = {tuple(space.pool.values(member).values()): reason for member, reason in space.reasons.items()}
    assert failed == {(8, 2, False): "CompileError: no", (8, 4, True): "WrongResult: y is wrong"}
    assert [space.ms[member] for member in space.reasons] == [None, None]


def _made(folder, workers):
    recorded(folder / "toy.json.gz", workers)
    return folder / "toy.json.gz"


def test_what_was_measured_is_kept_and_the_same_call_goes_on(tmp_path):
    out, first = tmp_path / "toy.json.gz", toy.ToyWorkers()
    first.interrupt_at = 9
    with pytest.raises(KeyboardInterrupt):
        recorded(out, first)
    assert not out.exists()
    part = tmp_path / "toy.json.gz.part"
    with part.open("ab") as file:
        file.write(b'{"33": {"ra')  # kill -9 in the middle of a line
    kept = {member for line in part.read_bytes().splitlines()[1:-1] for member in json.loads(line)}
    second, told = toy.ToyWorkers(), []
    space = recorded(out, second, on_member=lambda *said: told.append(said))
    assert told[0][0] == len(kept) >= 9
    assert not set(first.assessed) & set(second.assessed)
    assert None not in space.ms
    assert not part.exists()


def test_a_default_that_fails_is_reported_and_nothing_is_lost(tmp_path):
    workers = toy.ToyWorkers()
    workers.wrong.add(toy.code(toy.DEFAULT_SCHEDULE))
    with pytest.raises(TaskFailed, match="y is wrong"):
        recorded(tmp_path / "toy.json.gz", workers)
    assert recorded(tmp_path / "toy.json.gz", toy.ToyWorkers()).reasons == {}


@pytest.mark.parametrize("content", [b"{}\n", b"x" * 50 + b"\n"])
def test_a_part_of_something_else_is_refused_and_left_alone(tmp_path, content):
    part = tmp_path / "toy.json.gz.part"
    part.write_bytes(content)
    with pytest.raises(BadInput, match="must belong to this sweep"):
        recorded(tmp_path / "toy.json.gz", toy.ToyWorkers())
    assert part.read_bytes() == content


def test_a_part_with_a_damaged_finding_is_refused(tmp_path):
    workers = toy.ToyWorkers()
    workers.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path / "toy.json.gz", workers)
    with (tmp_path / "toy.json.gz.part").open("ab") as file:
        file.write(b"[]\n")
    with pytest.raises(BadInput, match="findings by member on each line"):
        recorded(tmp_path / "toy.json.gz", toy.ToyWorkers())


def test_a_finished_file_and_a_folder_that_is_not_there_are_refused(tmp_path):
    out = _made(tmp_path, toy.ToyWorkers())
    before = out.read_bytes()
    with pytest.raises(BadInput, match="exists: move it away"):
        recorded(out, toy.ToyWorkers())
    assert out.read_bytes() == before
    with pytest.raises(BadInput, match="No such file or directory"):
        recorded(tmp_path / "none" / "toy.json.gz", toy.ToyWorkers())


class DisturbedWorkers(toy.ToyWorkers):
    """During the assessments `busy` another program has the processor: every kernel waits for it, and as long."""

    busy = range(5, 9)

    def assess(self, problem, tuned, default, seed):
        times = super().assess(problem, tuned, default, seed)
        waited = 100 if len(self.assessed) - 1 in self.busy else 0
        return {name: [ms + waited for ms in rounds] for name, rounds in times.items()}


def test_what_was_timed_on_a_busy_machine_is_timed_once_more(tmp_path):
    workers = DisturbedWorkers()
    space = recorded(tmp_path / "toy.json.gz", workers)
    again = [text for text in workers.assessed if workers.assessed.count(text) > 1]
    assert sorted(again) == sorted(workers.assessed[5:9] * 2)
    for member, ms in enumerate(space.ms):  # equal codes share the second timing, too
        schedule = toy.ToySchedule(**eval(toy.code(toy.ToySchedule(**space.pool.values(member)))))
        assert ms == pytest.approx(toy.milliseconds(schedule), rel=0.03)


def test_a_machine_that_stays_busy_is_not_waited_for(tmp_path):
    workers = DisturbedWorkers()
    workers.busy = range(20, 10**6)
    space = recorded(tmp_path / "toy.json.gz", workers)
    assert len(workers.assessed) == 28 + 8
    assert None not in space.ms


class LuckyWorkers(toy.ToyWorkers):
    """The first timings of some members are off by a factor."""

    def __init__(self, lucky, **options):
        super().__init__(**options)
        self.lucky = {toy.code(schedule): factor for schedule, factor in lucky.items()}

    def assess(self, problem, tuned, default, seed):
        times = super().assess(problem, tuned, default, seed)
        factor = self.lucky.get(tuned.decode(), 1)
        return {name: [ms * factor if name == TUNED else ms for ms in rounds] for name, rounds in times.items()}


def time_of(space, schedule):
    return space.ms[space.pool.member(vars(schedule))]


def test_a_lucky_timing_does_not_stay_the_optimum(tmp_path):
    """Two members look much faster than all others; that they are not shows one after the other."""
    near = toy.ToySchedule(8, 1, True)
    workers = LuckyWorkers({toy.ToySchedule(4, 2, False): 0.01, near: 0.1})
    space = recorded(tmp_path / "toy.json.gz", workers)
    assert space.pool.values(space.ms.index(space.optimum)) == vars(toy.BEST)
    assert time_of(space, toy.ToySchedule(4, 2, False)) == pytest.approx(5.5, rel=0.03)
    for packed in (True, False):  # the same code
        assert time_of(space, replace(near, packed=packed)) == pytest.approx(5.5, rel=0.03)
    default, *met = zip(*workers.compared, strict=True)
    assert set(default) == {str(space.pool.default)}
    assert len(met) == 1
    assert len(workers.compared) == 3
    assert space.about["confirmed"] == sorted(
        space.pool.member(vars(schedule))
        for schedule in (toy.ToySchedule(4, 2, False), near, replace(near, packed=False), toy.BEST)
    )
    assert read_space(tmp_path / "toy.json.gz") == space


def test_the_fastest_within_the_noise_meet_side_by_side(tmp_path):
    """All 28 codes are within 1 %: the 20 that looked fastest meet, verified again, and the default beside them."""
    workers = toy.ToyWorkers(time=lambda schedule: 1 + schedule.block / 1e4)
    space = recorded(tmp_path / "toy.json.gz", workers)
    first = [int(name) for name in workers.compared[0]]
    assert len(set(first) - {space.pool.default}) in (19, 20)
    assert len({space.sources[member] for member in first}) == len(first)
    assert len(workers.unverified) == sum(map(len, workers.compared))
    assert space.ms.index(space.optimum) in space.about["confirmed"]


def test_one_within_the_noise_of_the_fastest_meets_it_after_a_lucky_one_did(tmp_path):
    """The best looks slower than the second here, and both much slower than the lucky one: all three are confirmed."""
    second, lucky = replace(toy.BEST, packed=False), toy.ToySchedule(8, 2, True)
    times = {toy.code(second): 1.02, toy.code(toy.BEST): 1.0}
    workers = LuckyWorkers({toy.BEST: 1.04, lucky: 0.1}, time=lambda schedule: times.get(toy.code(schedule), 9.0))
    space = recorded(tmp_path / "toy.json.gz", workers)
    assert space.pool.values(space.ms.index(space.optimum)) == vars(toy.BEST)
    assert space.about["confirmed"] == sorted(space.pool.member(vars(each)) for each in (second, toy.BEST, lucky))


def test_a_meeting_that_is_interrupted_is_held_again(tmp_path):
    out, first = tmp_path / "toy.json.gz", toy.ToyWorkers()
    first.compare = interrupted
    with pytest.raises(KeyboardInterrupt):
        recorded(out, first)
    with (tmp_path / "toy.json.gz.part").open("ab") as file:
        file.write(b'{"3": {"ratio": 9, "sou')  # kill -9 in the middle of its line
    second = toy.ToyWorkers()
    space = recorded(out, second)
    assert second.assessed == []
    assert len(second.compared) == 1
    assert space.about["confirmed"] == [space.ms.index(space.optimum)]


def interrupted(*given):
    raise KeyboardInterrupt


def test_what_fails_when_it_meets_the_fastest_is_a_failure(tmp_path):
    workers, compare = toy.ToyWorkers(), toy.ToyWorkers().compare

    def crashing(problem, binaries, unverified, seed):
        if toy.code(toy.BEST).encode() in binaries.values():
            raise TaskFailed("Crashed: signal 11")
        return compare(problem, binaries, unverified, seed)

    workers.compare = crashing
    space = recorded(tmp_path / "toy.json.gz", workers)
    assert space.reasons == {space.pool.member(vars(toy.BEST)): "fails when it meets the fastest again"}
    assert time_of(space, toy.BEST) is None
    assert space.optimum == pytest.approx(1.5, rel=0.03)
