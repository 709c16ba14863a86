"""The pool of valid schedules that a search chooses from, enumerated before it starts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy
from optuna.distributions import CategoricalDistribution

from tiles.kernels.spec import KernelSpec, Problem
from tiles.target import Target


@dataclass(frozen=True)
class Pool:
    """Every valid configuration of the tunables, in a fixed order.

    Fields:
        space: {tunable: values in natural order}.
        members: per member and tunable, the index of its value in `space`.
        default: which member is the default schedule.
    """

    space: Mapping[str, tuple[Any, ...]]
    members: tuple[tuple[int, ...], ...]
    default: int

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """The tunables as Optuna sees them.

        All are categorical: on recorded spaces TPE over ordinal integers did no better than random search.
        """
        return {name: CategoricalDistribution(values) for name, values in self.space.items()}

    def values(self, member: int) -> dict[str, Any]:
        """A member's tunables by name."""
        return {
            name: values[step] for (name, values), step in zip(self.space.items(), self.members[member], strict=True)
        }

    def member(self, values: Mapping[str, Any]) -> int | None:
        """The member with these tunables, or None where some are missing, invalid or not in the space."""
        if not values.keys() >= self.space.keys():
            return None
        return self._index.get(tuple(values[name] for name in self.space))

    def nearest(self, values: Mapping[str, Any], among: Iterable[int]) -> list[int]:
        """The members of `among` with the least L1 distance from `values` in index steps."""
        candidates = sorted(among)
        at = [choices.index(values[name]) for name, choices in self.space.items()]
        steps = numpy.abs(self._steps[candidates] - at).sum(axis=1)
        return [member for member, distance in zip(candidates, steps, strict=True) if distance == steps.min()]

    @cached_property
    def digest(self) -> str:
        """A hash of the pool: 12 hex digits of SHA-256."""
        text = json.dumps([dict(self.space), self.members, self.default])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def _index(self) -> dict[tuple[Any, ...], int]:
        return {tuple(self.values(member).values()): member for member in range(len(self))}

    @cached_property
    def _steps(self) -> numpy.ndarray[Any, Any]:
        return numpy.array(self.members, dtype=numpy.int64).reshape(len(self), len(self.space))


def enumerate_pool(spec: KernelSpec, problem: Problem, target: Target) -> Pool:
    """The schedules in `spec.space` that `spec.why_invalid` accepts, and the default schedule in any case."""
    default = asdict(spec.default(problem, target))
    space = {
        name: values if default[name] in values else (*values, default[name])
        for name, values in spec.space(problem, target).items()
    }
    members = tuple(
        steps
        for steps in itertools.product(*(range(len(values)) for values in space.values()))
        if (chosen := {name: values[step] for (name, values), step in zip(space.items(), steps, strict=True)})
        == default
        or spec.why_invalid(problem, spec.schedule_from(chosen), target) is None
    )
    at_default = tuple(values.index(default[name]) for name, values in space.items())
    return Pool(space, members, members.index(at_default))
