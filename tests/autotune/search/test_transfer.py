"""Warm starts by neighbours' schedules: the order of neighbours, the nearest members, and the gain."""

import statistics
from dataclasses import asdict, replace

import optuna
import pytest
import toy

from autotune import tuner
from autotune.search.pool import Pool, enumerate_pool
from autotune.search.sampler import PoolSampler
from autotune.search.transfer import MAX_SEEDS, nearest_member, seeds
from autotune.tuner import tune
from tiles.cache.cache import KernelCache, Key, Record
from tiles.target import Device

optuna.logging.set_verbosity(optuna.logging.WARNING)

OTHER = replace(toy.DEVICE, name="another processor")
OTHER_ARCH = replace(OTHER, arch="x86-64-v4")


def key_of(problem=toy.PROBLEM, device=toy.DEVICE, **more):
    key = Key(
        op="toy",
        direction="forward",
        streams=problem.streams,
        width=problem.width,
        dtype=problem.dtype,
        tokens=problem.tokens,
        rounds=20,
        device=device,
        toolchain="1",
        sources="0",
    )
    return replace(key, **more)


def neighbour(block, unroll=1, packed=True, device=toy.DEVICE, **more):
    schedule = {"block": block, "unroll": unroll, "packed": packed}
    return Record(key_of(device=device, **more), schedule, "0" * 64, 1, {}, {})


def pool():
    return enumerate_pool(toy.SPEC, toy.PROBLEM, toy.DEVICE.target)


def first(*records, trials=100):
    """The schedules that a search of the toy problem starts with."""
    members = seeds(toy.SPEC, key_of(), pool(), records, trials=trials)
    return [tuple(pool().values(member).values()) for member in members]


def test_nearer_shapes_come_first_and_this_device_before_others():
    records = [
        neighbour(1, tokens=64 * 8),
        neighbour(2, width=128),
        neighbour(8, device=OTHER),
        neighbour(16, device=OTHER_ARCH),
        neighbour(32, streams=4, width=128),
    ]
    assert [block for block, _, _ in first(*records)] == [2, 32, 1, 8]
    assert first(*records) == first(*records[::-1])
    assert [block for block, _, _ in first(*records[2:4])] == [8, 16]


@pytest.mark.parametrize(
    ("near", "far"),
    [
        ({"tokens": 128}, {"tokens": 256}),
        ({"width": 32}, {"width": 256}),
        ({"streams": 4}, {"streams": 8}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
    ],
)
def test_every_part_of_a_shape_counts(near, far):
    assert [block for block, _, _ in first(neighbour(1, **far), neighbour(2, **near))] == [2, 1]
    assert [block for block, _, _ in first(neighbour(2, **far), neighbour(1, **near))] == [1, 2]


def test_of_other_sources_and_this_very_problem_serve_too():
    old = neighbour(2, sources="older")
    assert first(old, neighbour(8, toolchain="0.9")) == first(old, neighbour(8, toolchain="0.9"))
    assert [block for block, _, _ in first(old, neighbour(16))] == [16, 2]


@pytest.mark.parametrize(
    "stranger",
    [
        neighbour(2, op="merge"),
        neighbour(2, direction="backward"),
        neighbour(2, device=Device("cuda", "H200", "sm_90a")),
        replace(neighbour(2), schedule={"block": 2, "unroll": 1}),
        replace(neighbour(2), schedule={"block": 2, "unroll": 1, "packed": True, "threads": 0}),
        replace(neighbour(2), schedule={"block": "2", "unroll": 1, "packed": True}),
        replace(neighbour(2), schedule={"block": 2.0, "unroll": 1, "packed": True}),
        replace(neighbour(2), schedule={"block": 2, "unroll": 1, "packed": 1}),
    ],
)
def test_other_kernels_and_other_tunables_say_nothing(stranger):
    assert first(stranger) == []


def test_one_that_kept_its_default_says_nothing():
    assert first(replace(neighbour(1, width=128), schedule=asdict(toy.DEFAULT_SCHEDULE))) == []
    wider = replace(toy.SPEC, default=lambda problem, target: toy.ToySchedule(problem.width // 16, 1, False))
    records = [neighbour(8, packed=False, width=128), neighbour(16, packed=False, width=128)]
    (told,) = seeds(wider, key_of(), pool(), records, trials=100)
    assert pool().values(told)["block"] == 16


def test_of_two_at_the_same_distance_todays_comes_first():
    old = [neighbour(1, sources=f"older {at}", width=128) for at in range(8)]
    assert [block for block, _, _ in first(*old, neighbour(8, width=128))] == [8, 1]


@pytest.mark.parametrize(
    ("value", "moved"), [(3, 4), (5, 4), (6, 8), (7, 8), (12, 16), (1000, 32), (0, 1), (-5, 1), (2**53, 32)]
)
def test_a_value_that_does_not_exist_moves_in_log_scale(value, moved):
    assert first(neighbour(value)) == [(moved, 1, True)]


def test_an_invalid_schedule_moves_to_the_nearest_that_is_valid():
    assert first(neighbour(32, 4)) in ([(16, 4, True)], [(32, 2, True)])
    holes = Pool({"a": (1, 2, 4, 8), "b": (1, 2)}, ((0, 0), (3, 0), (3, 1)), 0)
    assert nearest_member(holes, {"a": 4, "b": 2}) == 2
    named = Pool({"order": ("row", "column")}, ((0,), (1,)), 0)
    assert nearest_member(named, {"order": "column"}) == 1
    assert nearest_member(named, {"order": "diagonal"}) is None


def test_few_and_each_once():
    blocks = [1, 2, 8, 16, 32]
    many = [neighbour(block, tokens=64 << far) for far, block in enumerate(blocks)]
    assert len(first(*many)) == MAX_SEEDS == 4
    assert len(first(*many, trials=11)) == 2
    assert first(*many, trials=3) == []
    assert first(neighbour(2), neighbour(2, width=128), neighbour(8, width=256)) == [(2, 1, True), (8, 1, True)]
    assert first() == []


def wide_pool():
    """3,000 schedules; the default is a corner."""
    space = {"a": tuple(range(20)), "b": tuple(range(20)), "c": tuple(range(10))}
    members = tuple((a, b, c) for a in range(20) for b in range(20) for c in range(10) if (a + b + c) % 4)
    return Pool(space, members, 0)


def trials_to(limit, members, seed, most=40):
    """How many trials a search needs until it finds a schedule within `limit`; the optimum is at (13, 4, 7)."""
    pool = wide_pool()
    study = optuna.create_study(sampler=PoolSampler(pool, budget=most, seed=seed, first=members))
    for count in range(1, most + 1):
        trial = study.ask(pool.distributions)
        at = trial.params
        cost = 1 + abs(at["a"] - 13) + abs(at["b"] - 4) + 3 * abs(at["c"] - 7)
        if cost <= limit:
            return count
        study.tell(trial, cost)
    return most


@pytest.mark.slow
def test_where_the_optimum_moves_slowly_a_neighbour_saves_trials():
    wide = wide_pool()
    near = [wide.member({"a": 11, "b": 4, "c": 7})]
    alone = [trials_to(2, [], seed) for seed in range(6)]
    helped = [trials_to(2, near, seed) for seed in range(6)]
    assert statistics.mean(helped) < 0.75 * statistics.mean(alone)


@pytest.fixture
def toy_kernel(monkeypatch):
    monkeypatch.setattr(tuner, "kernel_spec", lambda op, direction: toy.SPEC)
    monkeypatch.setattr(Key, "of", key_of)


def wider(width):
    return replace(toy.PROBLEM, width=width)


def search(problem, cache, trials, seed=0, workers=None):
    """The result, and the blocks of the code in the order in which it was assessed."""
    workers = workers or toy.ToyWorkers()
    result = tune(problem, toy.DEVICE, cache, trials=trials, seed=seed, workers=workers)
    return result, workers.assessed


def test_a_search_starts_from_what_the_cache_holds(toy_kernel, tmp_path):
    cache = KernelCache(tmp_path)
    search(toy.PROBLEM, cache, trials=100)
    result, assessed = search(wider(96), cache, trials=4)
    assert assessed[:2] == [toy.code(toy.DEFAULT_SCHEDULE), toy.code(toy.BEST)]
    assert result.record.schedule == asdict(toy.BEST)
    assert result.trials == 4


def test_a_search_is_warm_started_by_advice(toy_kernel, tmp_path):
    workers = toy.ToyWorkers()
    told = [neighbour(16, 2, width=512), neighbour(2, 1, device=OTHER)]
    tune(toy.PROBLEM, toy.DEVICE, KernelCache(tmp_path), trials=8, advice=told, workers=workers)
    assert workers.assessed[:3] == [
        toy.code(toy.DEFAULT_SCHEDULE),
        toy.code(toy.BEST),
        toy.code(toy.ToySchedule(2, 1, True)),
    ]


def test_a_neighbour_that_misleads_costs_its_trial_and_decides_nothing(toy_kernel, tmp_path):
    misled, alone = KernelCache(tmp_path / "misled"), KernelCache(tmp_path / "alone")
    worst = toy.ToySchedule(1, 4, True)
    key = key_of(wider(128))
    misled.put(key, asdict(worst), b"code", "source", {}, {})
    found, assessed = search(toy.PROBLEM, misled, trials=100)
    wanted, _ = search(toy.PROBLEM, alone, trials=100)
    assert assessed[1] == toy.code(worst)
    assert found.record.schedule == wanted.record.schedule == asdict(toy.BEST)
    assert found.trials == wanted.trials == 34
    assert found.stopped == "pool swept"


def test_the_same_cache_and_seed_give_the_same_trials(toy_kernel, tmp_path):
    tried = []
    for name in ("one", "two"):
        cache = KernelCache(tmp_path / name)
        search(toy.PROBLEM, cache, trials=6)
        tried.append(search(wider(128), cache, trials=12, seed=5)[1])
    assert tried[0] == tried[1]
