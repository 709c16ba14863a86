"""The pool of schedules a search chooses from."""

from dataclasses import replace

import toy

from autotune.search.pool import Pool, enumerate_pool
from tiles.target import Target

TARGET = Target("cpu", "x86-64-v3")


def pool_of(spec=toy.SPEC):
    return enumerate_pool(spec, toy.PROBLEM, TARGET)


def test_holds_exactly_the_valid_schedules_in_a_fixed_order():
    pool = pool_of()
    schedules = [toy.ToySchedule(**pool.values(member)) for member in range(len(pool))]
    assert all(toy.why_invalid(None, schedule, None) is None for schedule in schedules)
    assert len(set(schedules)) == len(schedules) == 36 - 2  # 32 x 4 is out, packed or not
    assert pool.members == pool_of().members == tuple(sorted(pool.members))


def test_default_is_a_member_even_where_the_space_lacks_it():
    pool = pool_of(replace(toy.SPEC, default=lambda problem, target: toy.ToySchedule(3, 1, True)))
    assert pool.values(pool.default) == {"block": 3, "unroll": 1, "packed": True}
    assert pool_of(replace(toy.SPEC, why_invalid=lambda *given: "nothing goes")).members == ((2, 0, 0),)


def test_member_is_the_inverse_of_values():
    pool = pool_of()
    assert [pool.member(pool.values(member)) for member in range(len(pool))] == list(range(len(pool)))
    assert pool.member({"block": 32, "unroll": 4, "packed": True}) is None


def test_nearest_counts_steps_in_natural_order():
    space = {"block": (1, 2, 4, 1024), "unroll": (1, 2)}
    pool = Pool(space, ((0, 0), (2, 0), (3, 1)), 0)
    assert pool.nearest({"block": 1024, "unroll": 1}, {0, 1, 2}) == [1, 2]
    assert pool.nearest({"block": 1024, "unroll": 2}, {0, 1, 2}) == [2]
    assert pool.nearest({"block": 1024, "unroll": 2}, {0}) == [0]


def test_digest_tells_pools_apart():
    digests = {
        pool_of().digest,
        pool_of(replace(toy.SPEC, why_invalid=lambda *given: None)).digest,
        pool_of(replace(toy.SPEC, default=lambda problem, target: toy.BEST)).digest,
    }
    assert len(digests) == 3
    assert pool_of().digest == pool_of().digest
