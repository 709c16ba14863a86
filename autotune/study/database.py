"""Trials in a database that several machines share, through Optuna's own storage; a server may go away for a while."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
)

from autotune.study.redact import without_password
from tiles.errors import BadInput, first_line

PATIENCE = 60.0
"""Seconds for which a database that does not answer is tried again: a server's restart takes less."""

PAUSE = 0.5
"""Seconds between two tries."""

CONNECT_SECONDS = 10

LOST = (OperationalError, InterfaceError, PendingRollbackError)
"""What a lost connection looks like; the last where Optuna went on in the same transaction."""

_OPENING_TRIES = 5

Method = TypeVar("Method", bound=Callable[..., Any])


@functools.cache
def open_database(url: str) -> RDBStorage:
    """The database at `url`, an SQLAlchemy URL; its tables are made where it has none. One a process and URL.

    Raises `BadInput` for a URL that names no database, a driver that is missing and a server that does not let us in.
    """
    try:
        return _opened(url)
    except ModuleNotFoundError as error:
        raise BadInput(_missing_driver(url, error.name or "")) from error
    except ImportError as error:
        missing = error.__cause__
        raise BadInput(_missing_driver(url, str(getattr(missing, "name", None) or missing))) from error
    except Exception as error:  # the driver's own exception types
        raise BadInput(
            f"storage must be an SQLAlchemy URL of a database that answers, got {without_password(url)} "
            f"({without_password(first_line(error))}): leave it out to use a journal file"
        ) from error


def _opened(url: str) -> RDBStorage:
    for tried in range(_OPENING_TRIES):
        try:
            return Database(url, engine_kwargs=_engine_options(url))
        except (IntegrityError, ProgrammingError):  # another worker makes the tables this moment
            if tried == _OPENING_TRIES - 1:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


def _engine_options(url: str) -> dict[str, Any]:
    """A connection that hangs is given up. None is tried before it is used: one that was lost is met with patience."""
    try:
        driver = make_url(url).get_dialect().driver
    except NoSuchModuleError:
        return {}
    if not driver.startswith("psycopg"):
        return {}
    # libpq's names: without them a host that vanished holds a call for many minutes.
    limits = {"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": 1000 * CONNECT_SECONDS}
    # A server that was set up without an encoding would answer in bytes.
    return {"connect_args": {**limits, "client_encoding": "utf8"}}


def _missing_driver(url: str, module: str) -> str:
    remedy = "psycopg[binary]" if module.startswith("psycopg") else module
    return (
        f"a database needs its driver, got {without_password(url)} and no module {module}: run pip install '{remedy}'"
    )


def _patient(method: Method) -> Method:
    """Each method of a storage is one transaction: one that was lost with its connection is run again."""

    @functools.wraps(method)
    def call(self: Database, *arguments: Any, **named: Any) -> Any:
        deadline = None
        while True:
            try:
                return method(self, *arguments, **named)
            except UpdateFinishedTrialError:
                if deadline is None or method.__name__ != "set_trial_state_values":
                    raise
                return True  # the transaction had gone through; only the answer was lost
            except StorageInternalError as error:
                if not isinstance(error.__cause__, LOST):
                    raise
                deadline = deadline or time.monotonic() + PATIENCE
                if time.monotonic() > deadline:
                    raise BadInput(
                        f"the database must answer, got {without_password(first_line(error.__cause__))} from "
                        f"{without_password(self.url)} for {PATIENCE:g} s: what was finished is kept there; "
                        "run the same command again when it does"
                    ) from error
                time.sleep(PAUSE)

    return cast("Method", call)


class Database(RDBStorage):
    """Optuna's storage, patient with a server that is away; gives up with `BadInput` after `PATIENCE` seconds."""

    create_new_study = _patient(RDBStorage.create_new_study)
    get_study_id_from_name = _patient(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _patient(RDBStorage.get_study_name_from_id)
    get_study_directions = _patient(RDBStorage.get_study_directions)
    get_study_user_attrs = _patient(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _patient(RDBStorage.get_study_system_attrs)
    set_study_user_attr = _patient(RDBStorage.set_study_user_attr)
    get_all_studies = _patient(RDBStorage.get_all_studies)
    set_trial_state_values = _patient(RDBStorage.set_trial_state_values)
    set_trial_user_attr = _patient(RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _patient(RDBStorage.set_trial_system_attr)
    get_trial = _patient(RDBStorage.get_trial)
    get_trial_id_from_study_id_trial_number = _patient(RDBStorage.get_trial_id_from_study_id_trial_number)
    # What Optuna's cache in front of a database calls.
    _create_new_trial = _patient(RDBStorage._create_new_trial)
    _set_trial_param = _patient(RDBStorage._set_trial_param)
    _get_trials = _patient(RDBStorage._get_trials)
