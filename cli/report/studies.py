"""Studies that a command names, opened read-only: in journals of cache folders, or in a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study

from autotune.study.database import open_database
from tiles.cache.cache import KernelCache
from tiles.cache.record import Record
from tiles.errors import BadInput

SUFFIX = ".journal"


@dataclass(frozen=True)
class StoredStudy:
    """A study, and the record in the kernel cache that came from it, if any."""

    study: Study
    record: Record | None


def find_studies(named: Sequence[str], cache: KernelCache, storage: str | None) -> tuple[list[StoredStudy], list[str]]:
    """The studies of these names, and a warning for each journal in a folder that cannot be read.

    A name is that of a study, or the beginning of exactly one, in `storage` (a database URL) or else in the cache
    folder; or a journal file; or a cache folder with all its studies. No name means all studies.

    Raises `BadInput` if a name matches no study or several, and if there is no study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if storage is not None:
        database = open_database(storage)
        known = sorted(optuna.get_all_study_names(database))
        wanted = list(dict.fromkeys(_one_of(known, name, "the database") for name in named)) if named else known
        if not wanted:
            raise BadInput("storage must hold studies, found none in this database: run mhc-tune tune with --storage")
        records = _records(cache)
        return [_load(database, name, records) for name in wanted], []
    journals = _journals(named, cache)
    by_folder = {folder: _records(KernelCache(folder)) for folder in {_cache_folder(path) for path in journals}}
    found, warnings = [], []
    for path, named_itself in journals.items():
        try:
            found.append(_read(path, by_folder[_cache_folder(path)]))
        except BadInput as error:
            if named_itself:
                raise
            warnings.append(str(error))
    if not found and not warnings:
        raise BadInput(f"a report needs studies, found none in {_folder(cache)}: run mhc-tune tune")
    return found, warnings


def _journals(named: Sequence[str], cache: KernelCache) -> dict[Path, bool]:
    """The named journals, each once, and whether it was named itself rather than its folder."""
    if not named:
        return dict.fromkeys(_of_folder(cache), False)
    journals: dict[Path, bool] = {}
    for name in named:
        path = Path(name)
        if path.is_dir():
            journals |= dict.fromkeys(_of_folder(KernelCache(path)), False)
        elif path.is_file():
            journals[path.absolute()] = True
        else:
            known = {inside.name.removesuffix(SUFFIX): inside for inside in _of_folder(cache)}
            journals[known[_one_of(list(known), name, str(_folder(cache)))]] = True
    return journals


def _cache_folder(journal: Path) -> Path:
    folder = journal.parent
    return folder.parent if folder.name == "studies" else folder


def _folder(cache: KernelCache) -> Path:
    return cache.folder / "studies"


def _of_folder(cache: KernelCache) -> list[Path]:
    """The journals of a cache folder, or of the folder `studies` in it."""
    folder = _folder(cache)
    try:
        return sorted((folder if folder.is_dir() else cache.folder).absolute().glob(f"*{SUFFIX}"))
    except OSError as error:
        raise BadInput(f"studies must be readable, got {folder} ({error.strerror}): check its permissions") from error


def _one_of(known: Sequence[str], name: str, where: str) -> str:
    matches = [name] if name in known else [other for other in known if other.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise BadInput(
            f"STUDY must be a study's name or the beginning of it, a journal file or a cache folder, got {name}, which "
            f"matches none of {len(known)} studies in {where}: check it, or leave it out for all studies"
        )
    raise BadInput(
        f"STUDY must match one study, got {name}, which matches {len(matches)}: {', '.join(matches[:3])}"
        f"{', ...' if len(matches) > 3 else ''}: write more of the name"
    )


def _read(path: Path, records: Mapping[str, Record]) -> StoredStudy:
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        names = optuna.get_all_study_names(storage)
    except OSError as error:
        raise BadInput(f"a journal must be readable, got {path} ({error.strerror}): check it") from error
    except Exception as error:  # a journal may hold any text
        said = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"a journal must hold an Optuna study, got {path} ({said}): check the file") from error
    if len(names) != 1:
        raise BadInput(f"a journal of the tuner holds one study, got {path} with {len(names)}: check the file")
    return _load(storage, names[0], records)


def _load(storage: BaseStorage, name: str, records: Mapping[str, Record]) -> StoredStudy:
    return StoredStudy(optuna.load_study(study_name=name, storage=storage), records.get(name))


def _records(cache: KernelCache) -> Mapping[str, Record]:
    """The records of a cache by the name of their study."""
    return {str(record.provenance.get("study")): record for record in cache.records()}
