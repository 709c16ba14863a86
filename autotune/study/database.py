"""Optuna's database storage with retries: trials that several machines share outlast a restart of the server."""

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

RETRY_SECONDS = 60.0
"""Seconds for which a call to a database that does not answer is retried: a server's restart takes less."""

RETRY_PAUSE = 0.5
"""Seconds between two attempts."""

CONNECT_SECONDS = 10

CONNECTION_LOST = (OperationalError, InterfaceError, PendingRollbackError)
"""Exceptions of a lost connection; the last where Optuna went on in the same transaction."""

_OPEN_ATTEMPTS = 5

Method = TypeVar("Method", bound=Callable[..., Any])


@functools.cache
def open_database(url: str) -> RDBStorage:
    """Open the database at `url` (SQLAlchemy), with its tables made where it has none; one object per process and URL.

    Raises `BadInput` for a URL that names no database, a missing driver and a server that refuses the connection.
    """
    try:
        return _open(url)
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


def _open(url: str) -> RDBStorage:
    for attempt in range(_OPEN_ATTEMPTS):
        try:
            return Database(url, engine_kwargs=_engine_options(url))
        except (IntegrityError, ProgrammingError):  # another worker is making the tables
            if attempt == _OPEN_ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


def _engine_options(url: str) -> dict[str, Any]:
    """Timeouts for connections that hang. None is pinged before use: calls on a lost one are retried."""
    try:
        driver = make_url(url).get_dialect().driver
    except NoSuchModuleError:
        return {}
    if not driver.startswith("psycopg"):
        return {}
    # libpq's names: without them a host that vanished blocks a call for many minutes.
    limits = {"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": 1000 * CONNECT_SECONDS}
    # A server that was set up without an encoding would answer in bytes.
    return {"connect_args": {**limits, "client_encoding": "utf8"}}


def _missing_driver(url: str, module: str) -> str:
    remedy = "psycopg[binary]" if module.startswith("psycopg") else module
    return (
        f"a database needs its driver, got {without_password(url)} and no module {module}: run pip install '{remedy}'"
    )


def _retrying(method: Method) -> Method:
    """Retry a storage's method, which is one transaction, when it was lost with its connection."""

    @functools.wraps(method)
    def call(self: Database, *arguments: Any, **named: Any) -> Any:
        deadline = None
        while True:
            try:
                return method(self, *arguments, **named)
            except UpdateFinishedTrialError:
                if deadline is None or method.__name__ != "set_trial_state_values":
                    raise
                return True  # the transaction was committed; only the answer was lost
            except StorageInternalError as error:
                if not isinstance(error.__cause__, CONNECTION_LOST):
                    raise
                deadline = deadline or time.monotonic() + RETRY_SECONDS
                if time.monotonic() > deadline:
                    raise BadInput(
                        f"the database must answer, got {without_password(first_line(error.__cause__))} from "
                        f"{without_password(self.url)} for {RETRY_SECONDS:g} s: what was finished is kept there; "
                        "run the same command again when it does"
                    ) from error
                time.sleep(RETRY_PAUSE)

    return cast("Method", call)


class Database(RDBStorage):
    """Optuna's storage with retries; raises `BadInput` after `RETRY_SECONDS` without an answer."""

    create_new_study = _retrying(RDBStorage.create_new_study)
    get_study_id_from_name = _retrying(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _retrying(RDBStorage.get_study_name_from_id)
    get_study_directions = _retrying(RDBStorage.get_study_directions)
    get_study_user_attrs = _retrying(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _retrying(RDBStorage.get_study_system_attrs)
    set_study_user_attr = _retrying(RDBStorage.set_study_user_attr)
    get_all_studies = _retrying(RDBStorage.get_all_studies)
    set_trial_state_values = _retrying(RDBStorage.set_trial_state_values)
    set_trial_user_attr = _retrying(RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _retrying(RDBStorage.set_trial_system_attr)
    get_trial = _retrying(RDBStorage.get_trial)
    get_trial_id_from_study_id_trial_number = _retrying(RDBStorage.get_trial_id_from_study_id_trial_number)
    # Called by Optuna's cache in front of a database.
    _create_new_trial = _retrying(RDBStorage._create_new_trial)
    _set_trial_param = _retrying(RDBStorage._set_trial_param)
    _get_trials = _retrying(RDBStorage._get_trials)
