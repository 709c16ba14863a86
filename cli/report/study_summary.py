"""Summary of a study as plain data: the content of a report and of `mhc-tune report --json`."""

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
from cli.report.studies import StoredStudy
from tiles.cache.record import Record
from tiles.errors import BadInput, one_line
from tiles.kernels.spec import Problem

MIN_TRIALS_FOR_IMPORTANCE = 20
"""Measured trials below which no importance is computed: the method compares the fastest quarter with all of them, and
that quarter needs five trials at least."""

IMPORTANCE = "PED-ANOVA (arXiv 2304.10255): how much a tunable decides which trials are in the fastest quarter"

_ABOUT_NUMBERS = ("threads", "bytes", "flops", "copy_gb_per_s", "gflops_peak", "limit_ms")
_MEASURED_NUMBERS = ("tuned_ms", "default_ms", "ratio", "percent_of_copy", "percent_of_limit")
_VERSIONS = ("tilelang", "torch", "date", "host", "command")


def summarize(stored: StoredStudy) -> dict[str, Any]:
    """Summarize a study, from the study itself and, for what that lacks, from the cache's record.

    Raises `BadInput` for a study that the tuner did not make.
    """
    study = stored.study
    try:
        return _summarize(study, stored.record)
    except (AttributeError, KeyError, TypeError, ValueError, BadInput) as error:
        raise BadInput(
            f"a study must be one of mhc-tune tune, got {study.study_name} ({one_line(error)[:200]}): name another one"
        ) from error


def _summarize(study: Study, record: Record | None) -> dict[str, Any]:
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
    """An int or a float; raises for anything else that a file may hold."""
    return value if isinstance(value, int) else float(value)


def _about_from(record: Record | None) -> dict[str, Any] | None:
    """The same from a record: studies of older versions have no metadata."""
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
    # An interrupted trial has no result; its schedule is proposed again.
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
    """Speed-up over the default and its 95 % interval; None for bounds that too few rounds leave infinite."""
    bounds = [None if given[name] is None else float(given[name]) for name in ("low", "high")]
    low, high = bounds if all(bound is not None and math.isfinite(bound) for bound in bounds) else (None, None)
    return {"ratio": float(given["ratio"]), "low": low, "high": high}


def _conclusion(given: Mapping[str, Any] | None, record: Record | None) -> dict[str, Any] | None:
    """The end of the search: the chosen schedule, its measurement, and the finalists of the shoot-out."""
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
    """The importance of each tunable that varied, in shares of 1; none if there are too few trials."""
    measured = [trial["schedule"] for trial in trials if trial["state"] == "measured"]
    varied = [name for name in (measured[0] if measured else ()) if len({str(row.get(name)) for row in measured}) > 1]
    if len(measured) < MIN_TRIALS_FOR_IMPORTANCE or not varied:
        return {"method": IMPORTANCE, "needs": MIN_TRIALS_FOR_IMPORTANCE, "shares": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that all times are equal, which the shares show
        shares = get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25), params=varied, normalize=True
        )
    return {"method": IMPORTANCE, "needs": MIN_TRIALS_FOR_IMPORTANCE, "shares": dict(shares)}
