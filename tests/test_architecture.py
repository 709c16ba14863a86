"""The imports against the table of DESIGN, folders and who may import whom; the size of files."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("tiles", "autotune", "mhc", "cli")
MAY_IMPORT = {
    "tiles": {"tiles"},
    "autotune": {"autotune", "tiles"},
    "mhc": {"mhc", "tiles"},
    "cli": {"cli", "autotune", "mhc", "tiles"},
}
AUTOTUNE_MAY_IMPORT = {
    "measuring": set(),
    "processes": {"measuring"},
    "search": {"processes"},
    "study": {"measuring", "search"},
    "recorded": {"measuring", "processes", "search", "study"},
    "events": {"measuring"},
    "ending": {"measuring", "processes", "search", "study", "events"},
    "tuner": {"measuring", "processes", "search", "study", "events", "ending"},
    "buckets": {"measuring", "processes", "search", "study", "events", "ending", "tuner"},
}
"""Of every part of `autotune` which others it may import; all come before it here, so that the arrows have no cycle."""

STANDARD_LIBRARY_ONLY = ("tiles/cache.py", "tiles/family.py", "tiles/target.py", "tiles/errors.py")
TILELANG_IN = (
    "tiles/compile.py",
    "tiles/dialect.py",
    "tiles/matmul.py",
    "tiles/rows.py",
    "tiles/values.py",
    "tiles/apply/columns.py",
    "tiles/apply/grouped.py",
    "tiles/coefficients/gates.py",
    "tiles/coefficients/sinkhorn.py",
    "tiles/fused/chain_macros.py",
    "tiles/fused/merged_macros.py",
    "tiles/fused/patches.py",
    "tiles/project/halves.py",
)
LOADED_WITHOUT = {"tilelang", "optuna", "rich", "typer"}
MOST_LINES = 400


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> Iterator[tuple[str, int]]:
    """Dotted name and line of everything that is imported, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def wrong_imports(file: str, source: str) -> list[str]:
    """Every import of `file` that the design does not allow, as `file:line imports package`."""
    folder = file.split("/", maxsplit=1)[0]
    may_use_tilelang = file in TILELANG_IN or (folder == "tiles" and file.endswith("programs.py"))
    wrong = []
    for name, line in imported(source):
        package = name.split(".")[0]
        if (
            (package in FOLDERS and package not in MAY_IMPORT[folder])
            or (package in ("tests", "results"))
            or (package in ("tilelang", "tvm") and not may_use_tilelang)
            or (package in LOADED_WITHOUT - {"tilelang"} and folder in ("tiles", "mhc"))
            or (file in STANDARD_LIBRARY_ONLY and package not in sys.stdlib_module_names and not allowed(file, package))
        ):
            wrong.append(f"{file}:{line} imports {package}")
        if folder == package == "autotune" and not part_allowed(part_of(file), name.split(".")[1]):
            wrong.append(f"{file}:{line} imports {name}")
    return list(dict.fromkeys(wrong))


def part_of(file: str) -> str:
    """The sub-package or module of `autotune` that a file belongs to."""
    return Path(file).parts[1].removesuffix(".py")


def part_allowed(part: str, other: str) -> bool:
    """Whether a part of `autotune` may import another one; one that the table lacks may not, nor be imported."""
    return other == part or other in AUTOTUNE_MAY_IMPORT.get(part, set())


def allowed(file: str, package: str) -> bool:
    """`tiles` imports itself; a folder and a GPU are looked up through libraries, inside the functions that do so."""
    late = {"tiles/cache.py": "platformdirs", "tiles/target.py": "torch"}
    return package == "tiles" or late.get(file) == package


@pytest.mark.parametrize("file", sources())
def test_imports_follow_the_arrows(file: str) -> None:
    assert wrong_imports(file, (ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", sources())
def test_files_stay_short(file: str) -> None:
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) < MOST_LINES


@pytest.mark.parametrize(
    ("file", "source", "package"),
    [
        ("tiles/x.py", "import mhc.kernels", "mhc"),
        ("autotune/tuner.py", "def f():\n    from cli.main import app", "cli"),
        ("autotune/search/x.py", "from autotune.study.ledger import Ledger", "autotune.study.ledger.Ledger"),
        ("autotune/study/x.py", "def f():\n    from autotune import tuner", "autotune.tuner"),
        ("autotune/processes/x.py", "import autotune.search.pool", "autotune.search.pool"),
        ("autotune/new/x.py", "from autotune.search.pool import Pool", "autotune.search.pool.Pool"),
        ("mhc/x.py", "from autotune import tune", "autotune"),
        ("mhc/x.py", "import optuna", "optuna"),
        ("mhc/x.py", "import tilelang", "tilelang"),
        ("tiles/apply/schedule.py", "import tilelang.language as T", "tilelang"),
        ("tiles/cache.py", "import torch", "torch"),
        ("cli/x.py", "import results.old", "results"),
    ],
)
def test_a_wrong_arrow_is_seen(file: str, source: str, package: str) -> None:
    assert [text.split()[-1] for text in wrong_imports(file, source)] == [package]


def test_the_arrows_inside_of_autotune_have_no_cycle() -> None:
    before: set[str] = set()
    for part, others in AUTOTUNE_MAY_IMPORT.items():
        assert others <= before
        before.add(part)
    assert before | {"__init__"} == {part_of(file) for file in sources() if file.startswith("autotune/")}


@pytest.mark.parametrize("file", [file for file in sources() if file.startswith("autotune/") and "__init__" in file])
def test_packages_of_autotune_hold_a_docstring_and_no_names(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_module_level_imports_of_target_and_cache_are_standard() -> None:
    """What `allowed` lets through may only be imported late, so that both load in an interpreter without torch."""
    for file in ("tiles/cache.py", "tiles/target.py"):
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        names = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            for node in body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "tiles"}
