"""A script that runs the tuner repeatedly on the toy kernel, kills it at random moments, and checks what is stored.

    python killing.py FOLDER KILLS SEED

Prints one JSON object: how many runs were killed in which phase, how the finished searches ended, and every rule that
was found broken. A process of its own, because forks of it have to be cheap and free of threads.
"""

import json
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path

import optuna
import toy
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from autotune import tuner
from autotune.search.trials import evaluated
from autotune.study import heartbeat
from tiles.cache.cache import KernelCache, Key

PHASES = ("starts", "searches", "shootout", "writes the cache", "ends")
MAX_DELAY = {"starts": 0.01, "searches": 0.15, "shootout": 0.003, "writes the cache": 0.003, "ends": 0.003}
"""Seconds after the beginning of a phase within which the kill falls."""

WEIGHTS = (1, 3, 1, 2, 1)
"""How often each phase is aimed at."""

toy.SPACE = {"block": (4, 8, 16, 32), "unroll": (1, 2), "packed": (False, True)}


def tune_once(folder: Path, phase: mmap.mmap) -> None:
    """A run of the tuner; notes in `phase` how far it is."""

    class Workers(toy.ToyWorkers):
        def roofline(self):
            phase[0] = max(phase[0], 1)
            return super().roofline()

        def compare(self, *given):
            phase[0] = 2
            return super().compare(*given)

    class Cache(KernelCache):
        def put(self, *given):
            phase[0] = 3
            record = super().put(*given)
            phase[0] = 4
            return record

    tuner.tune(toy.PROBLEM, toy.DEVICE, Cache(folder), trials=100, workers=Workers(noise=0.0))


def kept(folder: Path, problems: list[str]) -> dict[int, object]:
    """The evaluated trials in the study, read by Optuna alone; also checks the cache."""
    cache = KernelCache(folder)
    cache.get(toy.key_of(toy.PROBLEM, toy.DEVICE))
    cache.records()
    problems += cache.complaints
    found: dict[int, object] = {}
    for journal in folder.glob("studies/*.journal"):
        # What a reader sees who comes this moment, before anybody has repaired the journal.
        storage = JournalStorage(JournalFileBackend(str(journal)))
        for name in optuna.get_all_study_names(storage):
            trials = optuna.load_study(study_name=name, storage=storage).trials
            found |= {trial.number: [trial.params, trial.value] for trial in trials if evaluated(trial)}
    return found


def outcome(folder: Path) -> object:
    """The outcome of a finished search: the record in the cache, and its evaluated trials."""
    record = KernelCache(folder).get(toy.key_of(toy.PROBLEM, toy.DEVICE))
    trials = sorted(json.dumps(trial) for trial in kept(folder, []).values())
    return [record and [record.schedule, record.measurement], trials]


def main(folder: Path, kills: int, seed: int) -> None:
    tuner.kernel_spec = lambda op, direction: toy.SPEC
    Key.of = toy.key_of
    heartbeat.LEASE_SECONDS, heartbeat.HEARTBEAT_SECONDS = 0.3, 0.1
    os.fsync = lambda descriptor: None  # it guards against power cuts, which a kill is not, and takes most of the time
    draw, phase = random.Random(seed), mmap.mmap(-1, 1)
    killed = dict.fromkeys(PHASES, 0)
    problems: list[str] = []
    outcomes: list[object] = []
    search, before = 0, {}
    while sum(killed.values()) < kills:
        place, (at,) = folder / str(search), draw.choices(range(len(PHASES)), WEIGHTS)
        phase[0] = 0
        child = os.fork()
        if child == 0:
            try:
                tune_once(place, phase)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
                os._exit(1)
            os._exit(0)
        done = 0
        while phase[0] < at and done == 0:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.0002)
        if done == 0:
            time.sleep(draw.uniform(0, MAX_DELAY[PHASES[at]]))
            reached = phase[0]
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        try:
            after = kept(place, problems)
        except Exception as error:
            problems.append(f"search {search} cannot be read: {type(error).__name__}: {error}")
            break
        lost = [number for number in before if after.get(number) != before[number]]
        problems += [f"search {search} lost trial {number}" for number in lost]
        before = after
        if os.WIFSIGNALED(status):
            killed[PHASES[reached]] += 1
        elif os.WEXITSTATUS(status):
            problems.append(f"search {search} failed")
            break
        else:
            outcomes.append(outcome(place))
            search, before = search + 1, {}
    tune_once(folder / "undisturbed", phase)
    seen = {
        "killed": killed,
        "problems": problems,
        "outcomes": outcomes,
        "undisturbed": outcome(folder / "undisturbed"),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
