"""Storage of studies: a journal file each, or a database that several machines share."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.samplers import BaseSampler
from optuna.study import Study

from autotune.study.journal import open_journal


def open_study(name: str, folder: Path, url: str | None, sampler: BaseSampler) -> Study:
    """Create or resume the study of this name.

    It is stored in the journal `folder`/`name`.journal, or in the database at `url`, an SQLAlchemy URL, which several
    machines may share. Raises `BadInput` for a storage that does not open.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # we report these conditions ourselves
    if url is None:
        storage = open_journal(folder, name)
    else:
        from autotune.study.database import open_database  # SQLAlchemy takes half a second to import

        storage = open_database(url)
    return optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
