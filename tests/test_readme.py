"""The documents hold: figures, links, paths, commands, the example, and what they say of architecture and bytes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cli.main import app
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "results").rglob("README.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *RESULTS]
FOLDER = ROOT / "results" / "amd-epyc-family-26-x86-64-v4"
RECORDS = ("bench.json", "stack-bfloat16.json", "stack-float32.json")
IMPLS = ("tuned", "default", "eager", "compile")
PACKAGES = ("tiles", "autotune", "mhc", "cli")

of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What a page has in backticks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences(page.read_text("utf-8")))]


def shell_lines(page: Path) -> list[str]:
    """The commands in a page's shell blocks, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_figure_of_the_table_is_in_the_record():
    times = {
        (row["op"], row["direction"], row["dtype"], row["impl"]): row["median_ms"]
        for record in RECORDS
        for row in json.loads((FOLDER / record).read_text(encoding="utf-8"))["results"]
    }
    rows = re.findall(r"^\| (\w+) \| (forward|both) \| (\w+) \| (.*) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 6
    for op, direction, dtype, figures in rows:
        wanted = [times[op, direction, dtype, impl] for impl in IMPLS]
        *shown, eager, compiled = map(float, figures.split(" | "))
        for time, figure in zip(wanted, shown, strict=True):
            assert abs(figure - time) <= (0.051 if time >= 10 else 0.0051)
        assert abs(eager - wanted[2] / wanted[0]) <= 0.051
        assert abs(compiled - wanted[3] / wanted[0]) <= 0.051


def test_what_the_layer_gains_over_torch_of_equal_precision_is_in_the_record():
    (gain,) = re.findall(r"the layer is ([\d.]+) times as fast as the fastest compiled form that does not", README)
    rows = json.loads((FOLDER / "bench.json").read_text(encoding="utf-8"))["results"]
    layer = {
        r["impl"]: r["median_ms"]
        for r in rows
        if (r["op"], r["direction"], r["dtype"]) == ("layer", "both", "bfloat16")
    }
    assert abs(float(gain) - layer["compile-float32"] / layer["tuned"]) <= 0.051


CONTENDERS = {
    "transformers, eager": "unpatched",
    "transformers, `torch.compile`": "unpatched-compile",
    "`mhc.patch(model, steps=False)`": "patched-merge",
    "`mhc.patch(model)`": "patched-step",
}


@pytest.mark.parametrize("page", ["README.md", "docs/adopt.md", "results/patched-deepseek-v4/README.md"])
def test_every_figure_of_patched_models_is_in_the_record(page):
    record = json.loads((ROOT / "results/patched-deepseek-v4/step.json").read_text(encoding="utf-8"))["results"]
    rows = re.findall(r"^\| (.*) \| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(CONTENDERS)
    for name, *figures in rows:
        found = record[CONTENDERS[name]]
        wanted = found["step_ms"], found["hyper_connections_ms"], found["kept_bytes"] / 1e6
        assert [int(figure) for figure in figures] == [round(value) for value in wanted]


def test_readme_is_short_and_its_picture_is_small():
    assert len(README.splitlines()) <= 150
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size < 100_000


def run_example(folder: Path, **environment: str) -> str:
    """What README's example prints, run in a process of its own with an empty kernel cache."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    variables = os.environ | {"PYTHONPATH": str(ROOT), "MHC_TUNE_CACHE": str(folder)} | environment
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_without_a_compiler(tmp_path):
    said = run_example(tmp_path, CXX="no-such-compiler")
    assert said.startswith("torch.Size([2, 16, 64])")
    assert len(re.findall(r" reference +no C\+\+ compiler", said)) == 6


@pytest.mark.slow
def test_the_example_compiles_default_schedules(tmp_path):
    assert len(re.findall(r" default +default schedule, not tuned", run_example(tmp_path))) == 6


def test_the_tree_is_that_of_the_packages():
    tree = README.split("## The tree")[1].split("```")[1]
    found: list[str] = []
    above: list[str] = []
    for indent, name, said in re.findall(r"^( *)(\w+)/ (.*)", tree, flags=re.MULTILINE):
        above[len(indent) // 2 :] = [name]
        found.append("/".join(above))
        assert all(list((ROOT / found[-1]).glob(file)) for file in re.findall(r"[\w*]+\.py", said)), said
    here = {f"{package}/{part.parent.name}" for package in PACKAGES for part in (ROOT / package).glob("*/__init__.py")}
    families = {f"tiles/kernels/{part.parent.name}" for part in (ROOT / "tiles" / "kernels").glob("*/__init__.py")}
    assert sorted(found) == sorted(here | families | {*PACKAGES, "docs", "results", "tests"})


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_fences(page.read_text("utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@of_pages
def test_every_relative_link_leads_somewhere(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text("utf-8"))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in slugs(there)):
            lost.append(link)
    assert lost == []


@of_pages
def test_every_path_that_is_named_exists(page):
    named = [
        span for span in spans(page) if re.fullmatch(r"(tiles|autotune|mhc|cli|tests|results|docs)/[\w./-]*", span)
    ]
    assert [path for path in named if not (ROOT / path).exists()] == []


@of_pages
def test_every_command_that_is_shown_parses(page):
    """In blocks with all that the command needs; elsewhere, where a command is only mentioned, its options."""
    blocks, wrong = shell_lines(page), []
    for line in [*blocks, *spans(page)]:
        words = re.match(r"(?:\S+/)?mhc-tune ([a-z].*)", re.sub(r"\$(SHAPE|IMPLS)", "", line))
        if words is None:
            continue
        try:
            parse(shlex.split(words[1], comments=True), whole=line in blocks and page not in RESULTS)
        except Exception as error:  # of typer or of click, whichever typer has inside
            wrong.append(f"{line}: {error!r}")
    assert wrong == []


def parse(words: list[str], *, whole: bool) -> None:
    """Raise where a command does not exist or does not take these options; or, if it is `whole`, these values."""
    name, *given = words
    commands: Any = typer.main.get_command(app)
    try:
        commands.commands[name].make_context(name, given)
    except Exception as error:
        if whole or "BadParameter" not in [kind.__name__ for kind in type(error).__mro__]:
            raise


@pytest.mark.parametrize("words", (["tine"], ["tune", "--widht", "64"], ["merge", "--op", "pre"]))
def test_a_command_that_does_not_exist_is_seen(words):
    with pytest.raises(Exception, match=r"tine|No such option"):
        parse(words, whole=False)


@of_pages
def test_modules_and_make_targets_that_are_shown_exist(page):
    text = page.read_text("utf-8")
    modules = re.findall(r"python3? -m ((?:mhc|cli)[\w.]+)", text)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text("utf-8").splitlines() if ":" in line}
    shown = re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)
    assert [target for target in shown if target not in targets] == []


@of_pages
def test_every_name_of_mhc_that_is_shown_exists(page):
    shown = set(re.findall(r"(?<![\w./-])mhc(?:\.[A-Za-z_]+)+", page.read_text("utf-8")))
    assert [name for name in sorted(shown) if not exists(name)] == []


def exists(name: str) -> bool:
    """Whether a dotted name of `mhc` is a module or something that a module has."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_no_install_command_asks_a_registry_for_our_name():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {name: (ROOT / name) for name in files if name.endswith((".md", ".py", ".html")) or name == "Makefile"}
    asking = re.compile(r"pip install [^\n`]*['\" ]mhc-tune\b")
    assert [name for name, path in texts.items() if asking.search(path.read_text("utf-8"))] == []


def test_parts_are_those_that_the_architecture_test_holds():
    location = ROOT / "tests" / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", location)
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    said = dict(re.findall(r"^\| (tiles|autotune|mhc|cli) \| (.+) \|$", DESIGN, flags=re.MULTILINE))
    for package, parts in architecture.PARTS.items():
        assert said[package].split(", ") == [part for part in parts if part != "__init__"]


def elements(op: str, direction: Any) -> float:
    """Elements of the streams that a token moves, in widths; at a large width, where coefficients count for little."""
    problem = Problem(op, direction, 4, 2**16, "bfloat16")
    traffic = kernel_spec(op, direction).traffic
    return (traffic(problem, 2).bytes - traffic(replace(problem, tokens=1), 1).bytes) / 2 / problem.width


def test_the_table_of_bytes_is_that_of_the_kernels():
    rows = re.findall(r"^\| ([\w, ]+) \| .+C \| .+C \| (\d+)C \+ (\d+)C \|$", DESIGN, flags=re.MULTILINE)
    assert [ops for ops, *_ in rows] == ["project, aggregate, merge", "pre, merge", "step", "single_pass"]
    for ops, forward, backward in rows:
        for direction, said in (("forward", forward), ("backward", backward)):
            assert round(sum(elements(op, direction) for op in ops.split(", ")), 1) == float(said)
