"""A Gaussian process over the tunables, the surrogate model of measured schedules.

Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006): the regression is their equations 2.23 and
2.24, the marginal likelihood and its gradient 5.8 and 5.9. The covariance is Matérn 5/2 with one length scale per
feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy

from autotune.search.pool import Pool

Array = numpy.ndarray[Any, Any]

JITTER = 1e-6
STEPS = 30
"""Steps of the search for the parameters of maximum a posteriori density (MAP)."""

MAX_FITTED = 200
"""Observations that the parameters are fitted to; predictions use all."""


def encode(pool: Pool) -> Array:
    """Features [members, features] of all members, each within [0, 1].

    A number is encoded as its logarithm and, where that differs, as the power of two in it: vector lanes, cache lines
    and banks come in powers of two, so 96 is near 128 in size and near 32 in alignment. Two values of any kind are 0
    and 1, three or more texts are one-hot. A tunable that never varies has no feature.
    """
    steps = numpy.array(pool.members, dtype=numpy.int64).reshape(len(pool), len(pool.space))
    columns: list[Array] = []
    for column, values in zip(steps.T, pool.space.values(), strict=True):
        used, rank = numpy.unique(column, return_inverse=True)
        if len(used) < 2:
            continue
        chosen = [values[step] for step in used]
        if len(used) == 2:
            columns.append(rank.astype(float))
        elif all(isinstance(value, int | float) and math.isfinite(value) for value in chosen):
            columns += [feature[rank] for feature in _number_features(chosen)]
        else:
            # One-hot texts are a distance of 1 apart.
            columns += [(rank == other) / math.sqrt(2) for other in range(len(used))]
    return numpy.array(columns).T.reshape(len(pool), len(columns))


def _number_features(values: list[Any]) -> list[Array]:
    lowest = min(values)
    size = numpy.arange(len(values)) if lowest < 0 else numpy.log2(numpy.array(values, float) + (lowest == 0))
    features = [size]
    if lowest > 0 and all(isinstance(value, int) for value in values):
        twos = numpy.array([(value & -value).bit_length() for value in values], float)
        if numpy.ptp(twos) > 0 and abs(numpy.corrcoef(size, twos)[0, 1]) < 0.999:
            features.append(twos)
    return [(feature - feature.min()) / numpy.ptp(feature) for feature in features]


def compressed_logs(times: Array) -> Array:
    """Positive times [n] as values [n] of mean 0 and variance 1: logarithms, compressed above the median.

    In units of the distance from the best to the median; above the median log1p once more, as differences between slow
    schedules say little about the fast ones.
    """
    logs = numpy.log(times)
    middle = numpy.median(logs)
    scaled = (logs - middle) / max(float(middle - logs.min()), 1e-6)
    return _standardized(numpy.where(scaled > 0, numpy.log1p(numpy.maximum(scaled, 0)), scaled))


def speeds(times: Array) -> Array:
    """Positive times [n] as values [n] of mean 0 and variance 1: minus the speed, which resolves the fastest ones."""
    return _standardized(-times.min() / times)


def _standardized(values: Array) -> Array:
    return (values - values.mean()) / (values.std() + 1e-9)


@dataclass(frozen=True)
class Surrogate:
    """A Gaussian process conditioned on values [n] at features [n, d].

    `scale` [d] is 1/length scale of each feature; `signal` and `nugget` are variances. The nugget is what is each
    member's own: how its time differs from what its neighbours say, and the noise of the measurement (Gramacy and Lee
    2012, "Cases for the nugget in modeling computer experiments").
    """

    features: Array
    values: Array
    scale: Array
    signal: float
    nugget: float

    @classmethod
    def fitted(cls, features: Array, values: Array) -> Surrogate:
        """The process with MAP parameters."""
        some = numpy.argsort(values, kind="stable")
        if len(some) > MAX_FITTED:
            some = some[numpy.linspace(0, len(some) - 1, MAX_FITTED).astype(int)]
        parameters = _map_parameters(features[some], values[some])
        scale = numpy.exp(parameters[:-2] / 2)
        return cls(features, values, scale, math.exp(parameters[-2]), math.exp(parameters[-1]) + JITTER)

    def with_pending(self, features: Array) -> Surrogate:
        """The process conditioned on its own predictions for pending trials at `features` [m, d] (kriging believer)."""
        mean, _ = self.predict(features)
        together = numpy.concatenate([self.features, features]), numpy.concatenate([self.values, mean])
        return Surrogate(*together, self.scale, self.signal, self.nugget)

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Mean [m] and standard deviation [m] of the signal, without the nugget, at `features` [m, d]."""
        own = self.signal * self.correlation(self.features, self.features)
        own[numpy.diag_indices(len(own))] += self.nugget
        inverse = numpy.linalg.inv(own)
        across = self.signal * self.correlation(features, self.features)
        variance = self.signal - ((across @ inverse) * across).sum(axis=1)
        return across @ (inverse @ self.values), numpy.sqrt(numpy.maximum(variance, 1e-12))

    def correlation(self, left: Array, right: Array) -> Array:
        """Correlation [l, r] of the signal between `left` [l, d] and `right` [r, d]."""
        scaled, other = left * self.scale, right * self.scale
        return _matern(squared_distances(scaled, other))


def squared_distances(left: Array, right: Array) -> Array:
    """Squared Euclidean distances [l, r] between the rows of `left` [l, d] and of `right` [r, d]."""
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    return numpy.maximum(squares, 0)


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """E[max(best - value, 0)], the expected improvement of a minimum (Jones et al. 1998, equation 15)."""
    gain = (best - mean) / deviation
    density = numpy.exp(-(gain**2) / 2) / math.sqrt(2 * math.pi)
    return deviation * numpy.maximum(gain * _normal_below(gain) + density, 0)


def probability_of_feasibility(features: Array, worked: Array, at: Array) -> Array:
    """The probability [m] that members at `at` [m, d] run, given `worked` [n], which at `features` [n, d] did.

    Least-squares classification (Rasmussen and Williams, section 6.5): a process over the standardized outcomes, and
    the probability that it lies above their middle; far from all features that is about the share that worked.
    """
    share, spread = worked.mean(), worked.std()
    mean, deviation = Surrogate.fitted(features, (worked - share) / spread).predict(at)
    return _normal_below((mean - (0.5 - share) / spread) / deviation)


def _normal_below(values: Array) -> Array:
    """The standard normal distribution function."""
    return numpy.array([math.erfc(-value / math.sqrt(2)) / 2 for value in values])


def _matern(squared: Array) -> Array:
    root = numpy.sqrt(5 * squared)
    return (1 + root + root**2 / 3) * numpy.exp(-root)


def _map_parameters(features: Array, values: Array) -> Array:
    """Logarithms [d + 2] of the MAP parameters: inverse squared lengths, variances of signal and nugget.

    Of the two priors' maxima the higher one counts (Rasmussen and Williams, section 5.4.1, on such pairs).
    """
    apart = ((features[:, None] - features) ** 2).transpose(2, 0, 1).copy()
    maxima = [
        _minimum(partial(_negative_log_posterior, apart=apart, values=values, prior=prior), prior[:, 0])
        for prior in _priors(len(apart))
    ]
    return min(maxima, key=lambda found: found[0])[1]


def _priors(features: int) -> tuple[Array, Array]:
    """Log-normal priors [d + 2, 2] of the parameters in a smooth space and in a rugged one: mean, deviation of the log.

    Features span [0, 1] and values have unit variance, so one choice serves all pools. In a smooth space a member's
    time follows from its neighbours': short lengths explain all differences, and the nugget is small. In a rugged one
    they tell where the valley is, and its members differ by the nugget. There squared lengths grow with the number of
    features, as squared distances do: with shorter ones nothing is known one step away from what was measured
    (Hvarfner et al. 2024, "Vanilla Bayesian optimization performs great in high dimensions", section 4).
    """

    def prior(inverse_squared_length: float, nugget: float) -> Array:
        return numpy.array([(inverse_squared_length, 1.0)] * features + [(0.0, 1.0), (math.log(nugget), 1.0)])

    return prior(1.0, 1e-3), prior(0.3 - math.log(features), 0.05)


def _minimum(function: Callable[[Array], tuple[float, Array]], start: Array) -> tuple[float, Array]:
    """The least value and where, of a function that returns (value, gradient), from `start` downhill.

    Rprop (Riedmiller and Braun 1993): a step for each parameter, which grows while the gradient keeps its sign and
    halves when that changes; no line search, and always the same work.
    """
    at, step, before = start, numpy.full(len(start), 0.3), numpy.zeros(len(start))
    least, best = math.inf, at
    for _ in range(STEPS + 1):
        value, slope = function(at)
        if value < least:
            least, best = value, at
        turned = numpy.sign(slope * before)
        step = numpy.clip(step * numpy.array([0.5, 1.0, 1.3])[turned.astype(int) + 1], 1e-3, 1.0)
        at, before = at - numpy.sign(slope) * step, slope
    return least, best


def _negative_log_posterior(at: Array, apart: Array, values: Array, prior: Array) -> tuple[float, Array]:
    """Minus the logarithm of the posterior density, up to a constant, and its gradient; `apart` is [d, n, n]."""
    weights, signal, nugget = numpy.exp(at[:-2]), math.exp(at[-2]), math.exp(at[-1])
    root = numpy.sqrt(5 * numpy.tensordot(weights, apart, 1))
    decay = numpy.exp(-root)
    covariance = signal * (1 + root + root**2 / 3) * decay
    total = covariance + (nugget + JITTER) * numpy.eye(len(values))
    inverse = numpy.linalg.inv(total)
    solved = inverse @ values
    loss = values @ solved / 2 + numpy.linalg.slogdet(total)[1] / 2
    slope = (inverse - numpy.outer(solved, solved)) / 2  # of the loss, by each element of `total`
    # The Matérn function by the squared distance is -5/6 (1 + root) exp(-root).
    by_squared = slope * (-5 / 6 * signal) * (1 + root) * decay
    gradient = numpy.array(
        [
            *(weights * numpy.tensordot(apart, by_squared, ((1, 2), (0, 1)))),
            (slope * covariance).sum(),
            nugget * numpy.trace(slope),
        ]
    )
    off = (at - prior[:, 0]) / prior[:, 1]
    return float(loss + (off**2).sum() / 2), gradient + off / prior[:, 1]
