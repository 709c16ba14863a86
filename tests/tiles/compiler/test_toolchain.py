"""The digest of sources: whatever can decide an op's code changes it, and nothing else does."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiles
from tiles.compiler.toolchain import hash_sources, sources_hash
from tiles.kernels.registry import families

ROOT = Path(tiles.__file__).parent


def imports(module: Path) -> Iterator[Path]:
    """The modules of `tiles` that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in [name for name in names if name.split(".")[0] == "tiles"]:
            for parts in (name.split(".")[1:], name.split(".")[1:-1]):
                path = ROOT.joinpath(*parts)
                yield from (file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file())


def reached(op: str) -> set[Path]:
    """Every module that the builders of `op` or the compiler import, directly or not."""
    builders = {spec.builder.partition(":")[0] for family in families() for spec in family.kernels if spec.op == op}
    left = [ROOT.parent / f"{name.replace('.', '/')}.py" for name in builders]
    left.append(ROOT / "compiler" / "compile.py")
    found: set[Path] = set()
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += imports(module)
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "tiles"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize(
    "op", ["project", "coefficients", "sinkhorn", "merge", "aggregate", "pre", "step", "single_pass"]
)
def test_every_module_that_a_builder_or_the_compiler_reaches_changes_the_digest(op: str, copy: Path) -> None:
    before = hash_sources(op, copy)
    assert before == sources_hash(op)
    modules = {path.relative_to(ROOT) for path in reached(op)}
    assert {Path("lang/tensor_cores.py"), Path("lang/program_attrs.py"), Path("kernels/occupancy.py")} <= modules or (
        op not in ("project", "pre", "step", "single_pass")
    )
    for module in modules:
        path = copy / module
        text = path.read_bytes()
        path.write_bytes(text + b"# changed\n")
        assert hash_sources(op, copy) != before, module
        path.write_bytes(text)


def test_what_comes_after_the_code_leaves_the_digest(copy: Path) -> None:
    before = hash_sources("merge", copy)
    for module in ("cache/cache.py", "pack/pack.py", "runtime/loaded_kernel.py", "kernels/fused/schedule.py"):
        (copy / module).write_bytes(b"changed")
    assert hash_sources("merge", copy) == before


def test_a_new_a_lost_and_a_renamed_module_change_the_digest(copy: Path) -> None:
    seen = {hash_sources("pre", copy)}
    (copy / "lang" / "new.py").touch()
    seen.add(hash_sources("pre", copy))
    (copy / "lang" / "new.py").rename(copy / "lang" / "renamed.py")
    seen.add(hash_sources("pre", copy))
    (copy / "kernels" / "apply" / "merge.py").unlink()
    seen.add(hash_sources("pre", copy))
    assert len(seen) == 4
