"""Whose a running trial is: owners that died are seen, at once on this machine and by their silence elsewhere."""

import os
import subprocess
import sys
import time

import optuna
import pytest
import toy
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from autotune.search.pool import enumerate_pool
from autotune.search.sampler import PoolSampler
from autotune.search.trials import REASON, Found
from autotune.study import heartbeat as lease
from autotune.study.heartbeat import BEAT, OWNER, Lease
from autotune.study.shared_trials import Ledger
from autotune.study.storage import open_study

FOUND = Found(1.0, 2.0, 2.0, 1.9, 2.1, "code")


@pytest.fixture
def pool():
    return enumerate_pool(toy.SPEC, toy.PROBLEM, toy.DEVICE.target)


@pytest.fixture
def study(tmp_path):
    return open_study("toy", tmp_path, None, RandomSampler(seed=0))


def ledger_of(folder, pool, budget=100, seed=0):
    """A worker's: each has a storage of its own."""
    return Ledger(open_study("toy", folder, None, PoolSampler(pool, budget=budget, seed=seed)), pool, budget)


def running(study, owner):
    """A running trial with this owner, as others find it."""
    trial = study.ask({"block": optuna.distributions.CategoricalDistribution((1, 2))})
    if owner is not None:
        trial.set_user_attr(OWNER, owner)
    return trial


def seen(study, trial):
    return study.get_trials(deepcopy=False)[trial.number]


def process(code):
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)


def owner_of(process_id, **other):
    return Lease().owner | {"process": process_id, "started": lease._started(process_id)} | other


def test_a_process_that_ended_owns_nothing(study):
    with process("input()") as other:
        trial = running(study, owner_of(other.pid))
        watching = Lease()
        assert not watching.abandoned(seen(study, trial))
        other.kill()
        while lease._started(other.pid) is not None:  # a zombie has ended, too
            time.sleep(0.01)
        assert watching.abandoned(seen(study, trial))


def test_another_process_with_the_same_id_is_not_the_owner(study):
    with process("input()") as other:
        trial = running(study, owner_of(other.pid, started="1"))
        assert Lease().abandoned(seen(study, trial))
        other.communicate()


def test_an_earlier_run_of_this_process_owns_nothing_once_it_is_closed(study):
    first = Lease()
    trial = running(study, first.owner)
    assert not Lease().abandoned(seen(study, trial))
    first.close()
    assert Lease().abandoned(seen(study, trial))


@pytest.mark.parametrize(
    "owner",
    [{"host": "another", "process": 1, "started": "1", "run": "a"}, None, ["another", 1]],
    ids=["elsewhere", "killed before it put its name down", "of an older version"],
)
def test_an_owner_that_cannot_be_looked_at_is_given_time_while_somebody_looks(study, monkeypatch, owner):
    now = [1000.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: now[0])
    trial, watching = running(study, owner), Lease()
    assert not watching.abandoned(seen(study, trial))
    now[0] += 3600  # nobody looked: that says little
    assert not watching.abandoned(seen(study, trial))
    for beat in range(20):
        now[0] += 4
        if owner:
            trial.set_user_attr(BEAT, beat)
            assert not watching.abandoned(seen(study, trial))
    for _ in range(7):
        now[0] += 4
        last = watching.abandoned(seen(study, trial))
    assert last is (owner is None)
    now[0] += 4
    assert watching.abandoned(seen(study, trial))


def test_a_stopped_process_keeps_its_trials_for_a_while_only(study, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: now[0])
    with process("input()") as other:
        trial, watching = running(study, owner_of(other.pid)), Lease()
        silent = []
        for _ in range(9):
            now[0] += 4
            silent.append(watching.abandoned(seen(study, trial)))
        other.communicate()
    assert silent == [False] * 8 + [True]


def test_what_is_held_is_renewed_until_it_is_let_go(study, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    held, trial = Lease(), running(study, None)
    held.hold(trial)
    deadline = time.monotonic() + 60
    while seen(study, trial).user_attrs.get(BEAT, 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.let_go(trial)
    study.tell(trial, 1.0)
    held.close()
    assert seen(study, trial).state == TrialState.COMPLETE


def test_trials_carry_their_owner_from_the_first_moment(tmp_path, pool):
    """So that a run that is killed while it chooses holds up nobody."""
    ledger = ledger_of(tmp_path, pool)

    def killed(*given):
        raise SystemExit

    ledger.study.sampler._sampler.sample_relative = killed
    with pytest.raises(SystemExit):
        ledger.ask()
    (trial,) = ledger.study.trials
    assert trial.params == {}
    assert trial.user_attrs[OWNER]["process"] == os.getpid()
    ledger.close()
    other = ledger_of(tmp_path, pool)
    start = time.monotonic()
    assert other.ask() is not None
    assert time.monotonic() - start < 20
    other.look()
    assert other.study.trials[0].state == TrialState.FAIL


def test_of_two_that_took_the_same_member_the_first_keeps_it(tmp_path, pool):
    first, second = ledger_of(tmp_path, pool), ledger_of(tmp_path, pool)
    theirs = first.study.ask(dict(pool.distributions))  # has chosen, and has not looked yet
    assert pool.member(theirs.params) == pool.default
    second.study.sampler._sampler._first = (pool.default, 3, 5)
    asked, member = second.ask()
    assert member == 3
    # As if both had chosen at the same time: the second did not see the first's choice.
    choices = iter([3, pool.default, 7])
    second.study.sampler._sampler._next = lambda others: next(choices)
    _, member = second.ask()
    assert member == 7
    assert pool.default not in first._before(theirs)
    withdrawn = [trial for trial in first.study.trials if trial.state == TrialState.FAIL]
    assert [pool.member(trial.params) for trial in withdrawn] == [3, pool.default]
    assert all(REASON not in trial.user_attrs for trial in withdrawn)
    assert first.look().room == 100 - 3
    assert asked.number in {trial.number for trial in second._lease.held}


def test_one_that_is_still_choosing_is_waited_for(tmp_path, pool, monkeypatch):
    """It may choose the same member, and its number is the lower one."""
    first, second = ledger_of(tmp_path, pool), ledger_of(tmp_path, pool)
    choosing = first.study._storage.create_new_trial(first.study._study_id)
    first.study._storage.set_trial_user_attr(choosing, OWNER, first._lease.owner)
    looks = []

    def look(seconds):
        looks.append(seconds)
        for name, step in zip(pool.space, pool.members[pool.default], strict=True):
            first.study._storage.set_trial_param(choosing, name, step, pool.distributions[name])

    monkeypatch.setattr("autotune.study.shared_trials.time.sleep", look)
    _, member = second.ask()
    assert len(looks) == 1
    assert member != pool.default


def test_the_budget_holds_for_workers_that_ask_at_once(tmp_path, pool):
    first, second = ledger_of(tmp_path, pool, budget=1), ledger_of(tmp_path, pool, budget=1)
    theirs = first.study.ask(dict(pool.distributions))
    ours = second.study.ask(dict(pool.distributions))
    assert first._before(theirs) == []
    assert len(second._before(ours)) == 1
    second.give_up(ours)
    assert second.ask() is None


def test_a_trial_that_was_taken_from_us_says_nothing(tmp_path, pool):
    ours, theirs = ledger_of(tmp_path, pool), ledger_of(tmp_path, pool)
    trial, member = ours.ask()
    theirs.study.tell(trial.number, state=TrialState.FAIL)  # we were silent for too long
    assert ours.complete(trial, FOUND) is False
    assert ours.settled() == []
    again, taken = theirs.ask()
    assert taken == member
    assert theirs.complete(again, FOUND) is True
    assert [trial.number for trial in ours.look().news] == [again.number]
    assert ours.look().news == theirs.look().news == []


def test_close_frees_what_was_not_told(tmp_path, pool):
    ours, theirs = ledger_of(tmp_path, pool), ledger_of(tmp_path, pool)
    _, member = ours.ask()
    assert theirs.look().elsewhere == 1
    ours.close()
    assert theirs.look().elsewhere == 0
    assert theirs.ask()[1] == member
