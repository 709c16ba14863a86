"""Where trials are kept: a journal file per study, or a database that several machines share."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.samplers import BaseSampler
from optuna.study import Study

from autotune.study.journal import open_journal


def open_study(name: str, folder: Path, url: str | None, sampler: BaseSampler) -> Study:
    """The study of this name, created or resumed.

    Kept in the journal `folder`/`name`.journal, or in the database at `url`, an SQLAlchemy URL that may serve several
    machines. Raises `BadInput` for a storage that does not open.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what it warns of, we say ourselves
    if url is None:
        storage = open_journal(folder, name)
    else:
        from autotune.study.database import open_database  # SQLAlchemy takes half a second to import

        storage = open_database(url)
    return optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
