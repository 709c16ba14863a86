"""What a study found out, as plain data: what a report shows, and what `mhc-tune report --json` prints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autotune.processes.reasons import by_kind, kind_of
from autotune.search.trials import REASON, RESULT
from autotune.study.metadata import CONCLUSION, METADATA
from cli.report.studies import Found
from tiles.cache.record import Record
from tiles.errors import BadInput
from tiles.kernels.spec import Problem

LEAST_FOR_IMPORTANCE = 20
"""Measured trials below which no importance is given: the method compares the fastest quarter with all of them, and
fewer than five in that quarter say nothing."""

IMPORTANCE = "PED-ANOVA (arXiv 2304.10255): how far the choice of a tunable decides who is in the fastest quarter"

_ABOUT_NUMBERS = ("threads", "bytes", "flops", "copy_gb_per_s", "gflops_peak", "limit_ms")
_MEASURED_NUMBERS = ("tuned_ms", "default_ms", "ratio", "percent_of_copy", "percent_of_limit")
_VERSIONS = ("tilelang", "torch", "date", "host", "command")


def findings(found: Found) -> dict[str, Any]:
    """What is known of a study, from the study itself and, where it says less, from the cache's record.

    Raises `BadInput` for a study that the tuner did not make.
    """
    study = found.study
    try:
        return _findings(study, found.record)
    except (AttributeError, KeyError, TypeError, ValueError, BadInput) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(
            f"a study must be one of mhc-tune tune, got {study.study_name} ({said[:200]}): name another one"
        ) from error


def _findings(study: Study, record: Record | None) -> dict[str, Any]:
    attributes = study.user_attrs
    about = _about(attributes[METADATA]) if METADATA in attributes else _about_from(record)
    trials = [_trial(trial, about) for trial in study.get_trials(deepcopy=False)]
    reasons = [trial["reason"] for trial in trials if trial["state"] == "failed"]
    return {
        "study": study.study_name,
        "title": Problem(**about["problem"]).describe() if about else study.study_name,
        "about": about,
        "measured": sum(trial["state"] == "measured" for trial in trials),
        "failed": by_kind(reasons),
        "running": sum(trial["state"] == "running" for trial in trials),
        "conclusion": _conclusion(attributes.get(CONCLUSION), record),
        "in_cache": record.schedule if record else None,
        "importance": _importance(study, trials),
        "trials": trials,
    }


def _about(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "problem": dict(given["problem"]),
        "device": {name: str(given["device"][name]) for name in ("name", "arch", "kind")},
        **{name: _number(given[name]) for name in _ABOUT_NUMBERS},
        "pool": None if given.get("pool") is None else int(given["pool"]),
        "default": None if given.get("default") is None else dict(given["default"]),
        **{name: str(given.get(name, "")) for name in _VERSIONS},
    }


def _number(value: Any) -> float:
    """A number that may be whole; raises for anything else, which a file may hold as well."""
    return value if isinstance(value, int) else float(value)


def _about_from(record: Record | None) -> dict[str, Any] | None:
    """The same from a record: studies of older versions say nothing of themselves."""
    if record is None:
        return None
    device, problem = record.key.device.as_dict(), vars(record.key.problem)
    return _about({"problem": problem, "device": device, **record.measurement, **record.provenance})


def _trial(trial: FrozenTrial, about: Mapping[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"number": trial.number, "schedule": dict(trial.params)}
    if trial.state == TrialState.COMPLETE:
        return row | {"state": "measured"} | _timing(trial.user_attrs[RESULT], about)
    reason = trial.user_attrs.get(REASON)
    if trial.state == TrialState.FAIL and reason is not None:
        return row | {"state": "failed", "reason": str(reason), "kind": kind_of(str(reason))}
    # A trial that was cut short says nothing of its schedule, which is asked again.
    return row | {"state": "cut short" if trial.state.is_finished() else "running"}


def _timing(given: Mapping[str, Any], about: Mapping[str, Any] | None) -> dict[str, Any]:
    ms = float(given["ms"])
    return {
        "ms": ms,
        "default_ms": float(given["default_ms"]),
        **_interval(given),
        "percent_of_copy": about and 100 * about["bytes"] / ms / 1e6 / about["copy_gb_per_s"],
        "percent_of_limit": about and 100 * about["limit_ms"] / ms,
        "same_as": None if given.get("same_as") is None else int(given["same_as"]),
    }


def _interval(given: Mapping[str, Any]) -> dict[str, float | None]:
    """Times faster than the default with the bounds of the 95 % interval: None where few rounds bound nothing."""
    bounds = [None if given[name] is None else float(given[name]) for name in ("low", "high")]
    low, high = bounds if all(bound is not None and math.isfinite(bound) for bound in bounds) else (None, None)
    return {"ratio": float(given["ratio"]), "low": low, "high": high}


def _conclusion(given: Mapping[str, Any] | None, record: Record | None) -> dict[str, Any] | None:
    """How the search ended: the chosen schedule, its measurement, and how the finalists did in their shoot-out."""
    known: dict[str, Any] = dict(given or {})
    if record is not None:
        known = {"schedule": record.schedule, "measurement": record.measurement} | known
    if "measurement" not in known:
        return None
    measured = known["measurement"]
    finalists = [_finalist(row, known["schedule"]) for row in known.get("finalists", ())]
    bounds = next((row for row in finalists if row["chosen"] and not row["default"]), {"low": None, "high": None})
    return {
        "stopped": str(known.get("stopped", "not said")),
        "schedule": dict(known["schedule"]),
        "default_kept": bool(measured["default_kept"]),
        **{name: float(measured[name]) for name in _MEASURED_NUMBERS},
        "low": bounds["low"],
        "high": bounds["high"],
        **{name: measured[name] for name in ("separate_ms", "separate_ratio", "separate_wins") if name in measured},
        "finalists": finalists,
    }


def _finalist(given: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    schedule = dict(given["schedule"])
    about = {"schedule": schedule, "default": bool(given["default"]), "chosen": schedule == chosen}
    return about | {"ms": float(given["ms"]), **_interval(given)}


def _importance(study: Study, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of each tunable that was varied, of 1 in all; none where there are too few trials."""
    measured = [trial["schedule"] for trial in trials if trial["state"] == "measured"]
    varied = [name for name in (measured[0] if measured else ()) if len({str(row.get(name)) for row in measured}) > 1]
    if len(measured) < LEAST_FOR_IMPORTANCE or not varied:
        return {"method": IMPORTANCE, "needs": LEAST_FOR_IMPORTANCE, "shares": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all times are equal, say: the shares tell it
        shares = get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25), params=varied, normalize=True
        )
    return {"method": IMPORTANCE, "needs": LEAST_FOR_IMPORTANCE, "shares": dict(shares)}
