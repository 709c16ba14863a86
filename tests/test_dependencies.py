"""Dependencies: what the packages import is declared, and constraints.txt names one tested release of each."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = ("tiles", "autotune", "mhc", "cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = [
    Requirement(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"
]


KNOWN = packages_distributions()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(node: ast.AST) -> Iterator[str]:
    """Top-level names of what is imported when the code runs."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module.split(".")[0]
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def distributions(source: str) -> set[str]:
    """The distributions of what a source imports besides the standard library and our own packages."""
    names = set(imported(ast.parse(source))) - set(sys.stdlib_module_names) - set(PACKAGES)
    return {normal(KNOWN.get(name, [name])[0]) for name in names}


def declared(requirements: list[str]) -> set[str]:
    return {normal(Requirement(line).name) for line in requirements}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package: str) -> None:
    allowed = declared(PROJECT["dependencies"]).union(
        *(declared(EXTRAS[name]) for name in ("plot", "peers", "postgres"))
    )
    for file in (ROOT / package).rglob("*.py"):
        missing = distributions(file.read_text(encoding="utf-8")) - allowed
        assert not missing, f"{file.relative_to(ROOT)} imports {sorted(missing)}: declare them in pyproject.toml"


def test_an_import_that_is_not_declared_is_seen() -> None:
    source = (
        "if TYPE_CHECKING:\n    import scipy\ndef f():\n    import os, markupsafe.x\n    from psycopg.sql import a\n"
    )
    assert distributions(source) == {"markupsafe", "psycopg"}


def test_only_tilelang_is_pinned() -> None:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    assert [line for line in lines if "==" in line.split(";")[0] or "<" in line.split(";")[0]] == ["tilelang==0.1.15"]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_every_requirement_has_one_tested_release(python: str) -> None:
    environment: dict[str, Any] = {"python_version": python}
    tested = [pin for pin in CONSTRAINTS if pin.marker is None or pin.marker.evaluate(environment)]
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        requirement = Requirement(line)
        (pin,) = [pin for pin in tested if normal(pin.name) == normal(requirement.name)]
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert exact.version in requirement.specifier, (line, str(pin))
