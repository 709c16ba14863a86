"""Trial leases: a dead owner is detected, at once on this machine and by missing heartbeats elsewhere."""

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
from autotune.search.trials import REASON, TrialResult
from autotune.study import heartbeat
from autotune.study.heartbeat import HEARTBEAT, OWNER, Leases
from autotune.study.shared_trials import SharedTrials
from autotune.study.storage import open_study

RESULT = TrialResult(1.0, 2.0, 2.0, 1.9, 2.1, "code")


@pytest.fixture
def pool():
    return enumerate_pool(toy.SPEC, toy.PROBLEM, toy.DEVICE.target)


@pytest.fixture
def study(tmp_path):
    return open_study("toy", tmp_path, None, RandomSampler(seed=0))


def shared_trials_of(folder, pool, budget=100, seed=0):
    """A worker's: each has a storage of its own."""
    return SharedTrials(open_study("toy", folder, None, PoolSampler(pool, budget=budget, seed=seed)), pool, budget)


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
    return Leases().owner | {"process": process_id, "started": heartbeat._process_start(process_id)} | other


def test_the_lease_of_a_process_that_ended_has_expired(study):
    with process("input()") as other:
        trial = running(study, owner_of(other.pid))
        watching = Leases()
        assert not watching.expired(seen(study, trial))
        other.kill()
        while heartbeat._process_start(other.pid) is not None:  # a zombie has ended, too
            time.sleep(0.01)
        assert watching.expired(seen(study, trial))


def test_another_process_with_the_same_id_is_not_the_owner(study):
    with process("input()") as other:
        trial = running(study, owner_of(other.pid, started="1"))
        assert Leases().expired(seen(study, trial))
        other.communicate()


def test_the_lease_of_an_earlier_run_of_this_process_expires_when_it_is_closed(study):
    first = Leases()
    trial = running(study, first.owner)
    assert not Leases().expired(seen(study, trial))
    first.close()
    assert Leases().expired(seen(study, trial))


@pytest.mark.parametrize(
    "owner",
    [{"host": "another", "process": 1, "started": "1", "run": "a"}, None, ["another", 1]],
    ids=["elsewhere", "killed before its owner was written", "of an older version"],
)
def test_the_lease_of_an_owner_elsewhere_expires_after_observed_silence(study, monkeypatch, owner):
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    trial, watching = running(study, owner), Leases()
    assert not watching.expired(seen(study, trial))
    now[0] += 3600  # nobody polled: that adds little
    assert not watching.expired(seen(study, trial))
    for beat in range(20):
        now[0] += 4
        if owner:
            trial.set_user_attr(HEARTBEAT, beat)
            assert not watching.expired(seen(study, trial))
    for _ in range(7):
        now[0] += 4
        last = watching.expired(seen(study, trial))
    assert last is (owner is None)
    now[0] += 4
    assert watching.expired(seen(study, trial))


def test_the_lease_of_a_stopped_process_expires(study, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    with process("input()") as other:
        trial, watching = running(study, owner_of(other.pid)), Leases()
        silent = []
        for _ in range(9):
            now[0] += 4
            silent.append(watching.expired(seen(study, trial)))
        other.communicate()
    assert silent == [False] * 8 + [True]


def test_a_lease_is_renewed_until_it_is_released(study, monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.02)
    held, trial = Leases(), running(study, None)
    held.acquire(trial)
    deadline = time.monotonic() + 60
    while seen(study, trial).user_attrs.get(HEARTBEAT, 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release(trial)
    study.tell(trial, 1.0)
    held.close()
    assert seen(study, trial).state == TrialState.COMPLETE


def test_trials_carry_their_owner_from_the_first_moment(tmp_path, pool):
    """So that a run that is killed while it chooses holds up nobody."""
    shared = shared_trials_of(tmp_path, pool)

    def killed(*given):
        raise SystemExit

    shared.study.sampler._sampler.sample_relative = killed
    with pytest.raises(SystemExit):
        shared.ask()
    (trial,) = shared.study.trials
    assert trial.params == {}
    assert trial.user_attrs[OWNER]["process"] == os.getpid()
    shared.close()
    other = shared_trials_of(tmp_path, pool)
    start = time.monotonic()
    assert other.ask() is not None
    assert time.monotonic() - start < 20
    other.poll()
    assert other.study.trials[0].state == TrialState.FAIL


def test_of_two_that_claim_the_same_member_the_first_keeps_it(tmp_path, pool):
    first, second = shared_trials_of(tmp_path, pool), shared_trials_of(tmp_path, pool)
    theirs = first.study.ask(dict(pool.distributions))  # has chosen, and has not polled yet
    assert pool.member(theirs.params) == pool.default
    second.study.sampler._sampler._first = (pool.default, 3, 5)
    asked, member = second.ask()
    assert member == 3
    # As if both had chosen at the same time: the second did not see the first's choice.
    choices = iter([3, pool.default, 7])
    second.study.sampler._sampler._next = lambda others: next(choices)
    _, member = second.ask()
    assert member == 7
    assert pool.default not in first._claimed_before(theirs)
    withdrawn = [trial for trial in first.study.trials if trial.state == TrialState.FAIL]
    assert [pool.member(trial.params) for trial in withdrawn] == [3, pool.default]
    assert all(REASON not in trial.user_attrs for trial in withdrawn)
    assert first.poll().budget_left == 100 - 3
    assert asked.number in {trial.number for trial in second._leases.held}


def test_a_trial_without_its_tunables_is_waited_for(tmp_path, pool, monkeypatch):
    """It may choose the same member, and its number is the lower one."""
    first, second = shared_trials_of(tmp_path, pool), shared_trials_of(tmp_path, pool)
    choosing = first.study._storage.create_new_trial(first.study._study_id)
    first.study._storage.set_trial_user_attr(choosing, OWNER, first._leases.owner)
    polls = []

    def poll(seconds):
        polls.append(seconds)
        for name, step in zip(pool.space, pool.members[pool.default], strict=True):
            first.study._storage.set_trial_param(choosing, name, step, pool.distributions[name])

    monkeypatch.setattr("autotune.study.shared_trials.time.sleep", poll)
    _, member = second.ask()
    assert len(polls) == 1
    assert member != pool.default


def test_the_budget_holds_for_workers_that_ask_at_once(tmp_path, pool):
    first, second = shared_trials_of(tmp_path, pool, budget=1), shared_trials_of(tmp_path, pool, budget=1)
    theirs = first.study.ask(dict(pool.distributions))
    ours = second.study.ask(dict(pool.distributions))
    assert first._claimed_before(theirs) == []
    assert len(second._claimed_before(ours)) == 1
    second.release_trial(ours)
    assert second.ask() is None


def test_a_trial_whose_lease_expired_is_not_told(tmp_path, pool):
    ours, theirs = shared_trials_of(tmp_path, pool), shared_trials_of(tmp_path, pool)
    trial, member = ours.ask()
    theirs.study.tell(trial.number, state=TrialState.FAIL)  # our lease had expired
    assert ours.complete(trial, RESULT) is False
    assert ours.evaluated() == []
    again, taken = theirs.ask()
    assert taken == member
    assert theirs.complete(again, RESULT) is True
    assert [trial.number for trial in ours.poll().new] == [again.number]
    assert ours.poll().new == theirs.poll().new == []


def test_close_frees_trials_that_were_not_told(tmp_path, pool):
    ours, theirs = shared_trials_of(tmp_path, pool), shared_trials_of(tmp_path, pool)
    _, member = ours.ask()
    assert theirs.poll().running_elsewhere == 1
    ours.close()
    assert theirs.poll().running_elsewhere == 0
    assert theirs.ask()[1] == member
