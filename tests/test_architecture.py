"""The architecture: which package and which part may import which, without a circle; the size of files."""

import ast
import graphlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {
    "tiles": ("errors", "folders", "target", "lang", "kernels", "compiler", "runtime", "cache", "pack"),
    "autotune": (
        *("measuring", "sass", "processes", "search", "study", "events", "decision", "recorded", "tuner", "buckets"),
    ),
    "mhc": (
        *("checks", "dispatch", "sublayer_norm", "functional", "manifolds", "modules", "converters", "diagnostics"),
        *("distributed", "integrations", "serving", "__init__", "examples"),
    ),
    "cli": ("ui", "report", "bench", "commands", "gpu", "maintain", "main"),
}
"""The parts of each package, lowest first: a part may import those before it."""

MAY_IMPORT = {
    "tiles": {"tiles"},
    "autotune": {"autotune", "tiles"},
    "mhc": {"mhc", "tiles"},
    "cli": {"cli", "autotune", "mhc", "tiles"},
}
STANDARD_LIBRARY_ONLY = (
    *("tiles/cache/cache.py", "tiles/kernels/spec.py", "tiles/target.py", "tiles/errors.py", "tiles/folders.py"),
)
LATE = {"tiles/folders.py": "platformdirs", "tiles/target.py": "torch"}
"""What these look up through a library, inside of the function that does so: both load in an interpreter without it."""

LOADED_WITHOUT = {"tilelang", "optuna", "rich", "typer"}
MOST_LINES = 400


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for package in PARTS for path in (ROOT / package).rglob("*.py"))


def imported(source: str) -> Iterator[tuple[str, int]]:
    """Dotted name and line of everything that is imported, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def wrong_imports(file: str, source: str) -> list[str]:
    """Every import of `file` that the design does not allow, as `file:line imports name`."""
    wrong = []
    for name, line in imported(source):
        package = name.split(".")[0]
        if package in PARTS:
            allowed = package_allowed(file, package) and part_allowed(file, name)
        else:
            allowed = library_allowed(file, package)
        if not allowed:
            wrong.append(f"{file}:{line} imports {name}")
    return list(dict.fromkeys(wrong))


def package_allowed(file: str, package: str) -> bool:
    return package in MAY_IMPORT[file.split("/", maxsplit=1)[0]]


def part_allowed(file: str, name: str) -> bool:
    """Whether a part may import another one of its package; the whole package is what its `__init__` brings."""
    package, *rest = name.split(".")
    if package != file.split("/", maxsplit=1)[0]:
        return True
    other = rest[0] if rest and exists(f"{package}.{rest[0]}") else "__init__"
    order = PARTS[package]
    own = part_of(file)
    if other == own or (other == "__init__" and "__init__" not in order):
        return True
    return own in order and other in order and order.index(other) < order.index(own)


def part_of(file: str) -> str:
    """The sub-package or module that a file belongs to."""
    return Path(file).parts[1].removesuffix(".py")


def library_allowed(file: str, library: str) -> bool:
    if file in STANDARD_LIBRARY_ONLY:
        return library in sys.stdlib_module_names or LATE.get(file) == library
    if library in ("tilelang", "tvm"):
        return writes_programs(file)
    heavy = library in LOADED_WITHOUT and file.split("/", maxsplit=1)[0] in ("tiles", "mhc")
    return not heavy and library not in ("tests", "results")


def writes_programs(file: str) -> bool:
    """Whether TileLang may be imported: by the language, the compiler, and the programs of the families' folders."""
    place = Path(file).parts
    in_family = place[:2] == ("tiles", "kernels") and len(place) == 4 and place[3] not in ("__init__.py", "schedule.py")
    return in_family or place[:2] == ("tiles", "lang") or file == "tiles/compiler/compile.py"


@cache
def exists(name: str) -> bool:
    """Whether a dotted name of our packages is a module."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_of(name: str) -> str:
    """The module that an imported name comes from."""
    return name if exists(name) else name.rpartition(".")[0]


def lost_imports(file: str, source: str) -> list[str]:
    """Imports of modules that are not there, as `file:line imports name`: what a move has left behind."""
    return [
        f"{file}:{line} imports {name}"
        for name, line in imported(source)
        if name.split(".")[0] in PARTS and not exists(module_of(name))
    ]


@pytest.mark.parametrize("package", PARTS)
def test_imports_follow_the_arrows(package: str) -> None:
    files = [file for file in sources() if file.startswith(f"{package}/")]
    assert [wrong for file in files for wrong in wrong_imports(file, text(file))] == []


def test_every_import_names_a_module_that_is_there() -> None:
    files = sources() + [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")]
    assert [lost for file in files for lost in lost_imports(file, text(file))] == []


@pytest.mark.parametrize("package", PARTS)
def test_every_part_has_its_place_in_the_table(package: str) -> None:
    found = {part_of(file) for file in sources() if file.startswith(f"{package}/")}
    assert found | {"__init__"} == {*PARTS[package], "__init__"}


def test_modules_import_each_other_without_a_circle() -> None:
    graph = {}
    for file in sources():
        own = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        names = {module_of(name) for name, _ in imported(text(file)) if name.split(".")[0] in PARTS}
        graph[own] = names - {own}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_files_stay_short() -> None:
    assert {file for file in sources() if len(text(file).splitlines()) >= MOST_LINES} == set()


def text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "source", "name"),
    [
        ("tiles/x.py", "import mhc.functional", "mhc.functional"),
        ("tiles/lang/x.py", "from tiles.kernels import limits", "tiles.kernels.limits"),
        ("tiles/cache/x.py", "from tiles.pack.pack import Pack", "tiles.pack.pack.Pack"),
        ("autotune/tuner.py", "def f():\n    from cli.main import app", "cli.main.app"),
        ("autotune/search/x.py", "import autotune.study.journal", "autotune.study.journal"),
        ("autotune/study/x.py", "def f():\n    from autotune import tuner", "autotune.tuner"),
        ("autotune/new/x.py", "from autotune.search.pool import Pool", "autotune.search.pool.Pool"),
        ("mhc/dispatch/x.py", "from mhc.modules import stack", "mhc.modules.stack"),
        ("mhc/modules/x.py", "import mhc", "mhc"),
        ("mhc/x.py", "from autotune import tune", "autotune.tune"),
        ("mhc/x.py", "import optuna", "optuna"),
        ("mhc/x.py", "import tilelang", "tilelang"),
        ("tiles/kernels/apply/schedule.py", "import tilelang.language as T", "tilelang.language"),
        ("tiles/cache/cache.py", "import torch", "torch"),
        ("cli/ui/x.py", "from cli.bench import cases", "cli.bench.cases"),
        ("cli/report/x.py", "from cli.commands import packs", "cli.commands.packs"),
        ("cli/x.py", "import results.old", "results.old"),
    ],
)
def test_a_wrong_arrow_is_seen(file: str, source: str, name: str) -> None:
    assert [wrong.split()[-1] for wrong in wrong_imports(file, source)] == [name]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from tiles.family import Problem", "tiles.family.Problem"),
        ("def f():\n    import mhc.wrapping.llama", "mhc.wrapping.llama"),
        ("from tiles.compile import compile_kernel as c", "tiles.compile.compile_kernel"),
    ],
)
def test_an_import_that_a_move_left_behind_is_named(source: str, name: str) -> None:
    assert [lost.split()[-1] for lost in lost_imports("cli/x.py", source)] == [name]


def test_packages_hold_a_docstring() -> None:
    empty = [
        file for file in sources() if file.endswith("__init__.py") and not ast.get_docstring(ast.parse(text(file)))
    ]
    assert empty == []


def test_late_imports_are_inside_of_functions() -> None:
    for file, library in LATE.items():
        body = ast.parse(text(file)).body
        names = {name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for name, _ in of(node)}
        assert library not in names


def of(node: ast.AST) -> Iterator[tuple[str, int]]:
    yield from ((name.split(".")[0], line) for name, line in imported(ast.unparse(node)))


def test_our_names_are_those_of_the_checkout() -> None:
    """Another distribution that brings a package of one of our names would be tested in place of ours."""
    for package in PARTS:
        found = importlib.util.find_spec(package)
        assert found
        assert found.origin == str(ROOT / package / "__init__.py")
