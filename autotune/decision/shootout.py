"""The shootout: the last, longer timing of a few kernels against each other, without those that fail in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from tiles.kernels.spec import Problem


def shootout(
    problem: Problem,
    binaries: Mapping[str, bytes],
    default: str,
    unverified: Sequence[str],
    workers: Workers,
    seed: int,
) -> dict[str, list[float]]:
    """Time kernels against each other: {name: milliseconds of each round}, without those that fail.

    Those in `unverified` are verified first. A kernel that passed its trial may still crash, hang or be wrong on other
    inputs: then each is tried alone with `default`, whose failure alone is raised (`TaskFailed`).
    """
    try:
        return workers.compare(problem, binaries, unverified, seed)
    except TaskFailed:
        sound = {name: binary for name, binary in binaries.items() if name == default}
    for name, binary in binaries.items():
        if name == default:
            continue
        try:
            workers.compare(problem, {default: binaries[default], name: binary}, [name], seed)
        except TaskFailed:
            continue
        sound[name] = binary
    return workers.compare(problem, sound, [name for name in unverified if name in sound], seed)
