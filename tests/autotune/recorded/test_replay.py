"""Replay: every sampler on a small space, the summaries, and recorded spaces of other tools."""

import json
import statistics
from pathlib import Path

import pytest
import toy_space
from optuna.samplers import RandomSampler

from autotune.recorded import samplers
from autotune.recorded.foreign import read_space
from autotune.recorded.replay import Run, replay, replay_all, summary
from autotune.recorded.samplers import SAMPLERS, neighbours
from autotune.recorded.score import best_so_far
from autotune.recorded.spaces import write_space
from tiles.errors import BadInput

SHARED = Path(__file__).parents[4] / "shared" / "spaces"
OURS = sorted((Path(__file__).parents[3] / "results" / "spaces").glob("*.json.gz"))
GOALS = {"convolution.A6000.json.gz": 1.05, "convolution.W6600.T4.json.gz": 1.05, "dedispersion.W6600.json.gz": 1.01}


@pytest.mark.parametrize("sampler", ["ours", "tpe", "random", "local"])
def test_every_sampler_spends_its_trials_from_the_default_on(sampler):
    space = toy_space.bowl()
    run = replay(space, sampler, 30, seed=3)
    assert run.members[0] == space.pool.default
    assert len(run.members) == 30
    assert run.members == replay(space, sampler, 30, seed=3).members
    assert run.members != replay(space, sampler, 30, seed=4).members
    if sampler != "tpe":
        assert run.duplicates == 0
        assert None not in run.members


@pytest.mark.parametrize("sampler", ["ours", "random", "local"])
def test_a_small_space_is_swept_and_then_left(sampler):
    space = toy_space.bowl(sizes=(16, 256))
    run = replay(space, sampler, 1000, seed=0)
    assert sorted(run.members) == list(range(len(space.pool)))


def test_without_a_default_each_seed_starts_elsewhere_and_all_samplers_there():
    space = toy_space.bowl(default=False)
    starts = {seed: replay(space, "random", 1, seed).members for seed in range(5)}
    assert len(set(starts.values())) > 2
    for sampler in ("ours", "tpe", "local"):
        assert {seed: replay(space, sampler, 1, seed).members for seed in range(5)} == starts


def test_ours_beats_the_others_on_a_bowl():
    space = toy_space.bowl()
    rows = {
        sampler: summary(space, sampler, [replay(space, sampler, 40, seed) for seed in range(3)], 40)
        for sampler in ("ours", "tpe", "random")
    }
    assert rows["ours"]["found"]["median"] == 1
    assert rows["ours"]["to_99"] <= 30
    assert rows["ours"]["score"] > max(rows["tpe"]["score"], rows["random"]["score"])
    assert rows["ours"]["duplicates"] == 0


@pytest.mark.parametrize("sampler", ["gp", "gp-pool"])
def test_optunas_gaussian_process_says_what_it_needs(monkeypatch, sampler):
    monkeypatch.setattr(samplers, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install scipy"):
        replay(toy_space.bowl(), sampler, 12, seed=0)


@pytest.mark.parametrize("sampler", ["gp", "gp-pool"])
def test_optunas_gaussian_process_finds_the_bowl_of_its_tunables(sampler):
    """After the 10 random trials of its own it comes closer than they did."""
    pytest.importorskip("scipy", reason="SciPy, which Optuna's GPSampler needs, is not installed")
    space = toy_space.bowl()
    run = replay(space, sampler, 20, seed=3)
    assert run.members[0] == space.pool.default
    assert None not in run.members  # every combination is a member here, and those that fail are told so
    found = best_so_far(space, run.members)
    assert found[-1] < found[10]


def test_optunas_gaussian_process_over_the_pool_tries_members_only_and_each_once(monkeypatch):
    """Optuna's random sampler proposes in its place, so that SciPy is not needed."""
    monkeypatch.setattr(samplers, "find_spec", lambda name: True)
    monkeypatch.setattr(samplers, "GPSampler", RandomSampler)
    space = toy_space.bowl()
    run = replay(space, "gp-pool", 40, seed=3)
    assert run.members[0] == space.pool.default
    assert len(set(run.members)) == 40
    assert None not in run.members
    assert run.members != replay(space, "gp-pool", 40, seed=4).members
    small = toy_space.bowl(sizes=(16, 256))
    assert sorted(replay(small, "gp-pool", 1000, seed=0).members) == list(range(len(small.pool)))


def test_neighbours_differ_in_one_tunable():
    pool = toy_space.bowl().pool
    beside = neighbours(pool, 7)
    assert len(beside) == 8 + 4 + 4
    differ = [sum(a != b for a, b in zip(pool.members[7], pool.members[other], strict=True)) for other in beside]
    assert set(differ) == {1}


def test_summary_counts_repeats_what_is_outside_and_what_is_not_reached():
    space = toy_space.bowl()
    best = space.ms.index(1.0)
    runs = [Run((0, 0, None, best), 1.0), Run((0, best, 1, 1), 1.0), Run((0, 1, 2, 3), 1.0)]
    row = summary(space, "any", runs, 4)
    assert (row["duplicates"], row["outside"]) == (2, 1)
    assert (row["to_95"], row["to_99"]) == (4, 4)
    assert row["found"]["median"] == 1
    assert row["found"]["high"] > 1
    assert row["ms_per_trial"] == 250
    assert summary(space, "any", runs[2:] * 2 + runs[:1], 4)["to_99"] is None
    assert len(row["curve"]) == len(row["random_curve"]) == 4


def test_processes_give_what_one_process_gives(tmp_path):
    space, path = toy_space.bowl(), tmp_path / "bowl.json"
    write_space(space, path)
    told = []
    rows = replay_all([path], ["random", "local"], 10, 3, lambda: told.append(1))
    assert len(told) == 6
    assert [row["sampler"] for row in rows] == ["random", "local"]
    for row in rows:
        here = summary(space, row["sampler"], [replay(space, row["sampler"], 10, seed) for seed in range(3)], 10)
        assert {**here, "ms_per_trial": 0} == {**row, "ms_per_trial": 0}
    json.dumps(rows, allow_nan=False)


def test_all_samplers_have_a_docstring_that_says_what_they_do():
    assert all(search.__doc__ for search in SAMPLERS.values())


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/spaces, recorded by others, is not beside this checkout")
def test_spaces_recorded_by_others_reach_the_goals():
    """In the median over seeds, within 100 configurations that were compiled or tried to."""
    rows = replay_all([SHARED / name for name in GOALS], ["ours"], 100, 5)
    found = {row["space"]: row["found"]["median"] for row in rows}
    assert all(found[name] <= goal for name, goal in GOALS.items()), found
    assert all(row["duplicates"] == 0 for row in rows)


def test_our_own_spaces_are_read():
    spaces = [read_space(path) for path in OURS]
    assert len(spaces) >= 6
    assert all(space.has_default and space.optimum < space.worst for space in spaces)


@pytest.mark.slow
def test_our_own_spaces_are_searched_soon_and_better_than_by_others():
    """In the median 99 % of the optimum within 50 trials, but for one space (results/spaces tells why); the mean score
    over the spaces above every other sampler's."""
    names = ["ours", "tpe", "random", "local"]
    rows = replay_all(OURS, names, 50, 7)
    ours = [row for row in rows if row["sampler"] == "ours"]
    late = [row["space"] for row in ours if row["to_99"] is None or row["to_99"] > 50]
    assert late in ([], ["pre forward n=4 C=64 float32 T=2048"])
    assert all(row["duplicates"] == 0 for row in ours)
    scores = {name: statistics.fmean(row["score"] for row in rows if row["sampler"] == name) for name in names}
    assert all(scores["ours"] > scores[other] for other in names[1:]), scores
