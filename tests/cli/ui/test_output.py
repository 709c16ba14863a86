"""`--json` keeps stdout pure; tables and numbers are readable."""

import os
import subprocess
import sys

import pytest
from rich.console import Console

from cli.ui.output import say
from cli.ui.render import bench_table, number

NOISY = """
import os, subprocess, sys
from cli.ui.output import say, show_json, stdout_kept_free
with stdout_kept_free():
    print("a library prints")
    os.write(1, b"C code writes\\n")
    subprocess.run([sys.executable, "-c", "print('a child prints')"], check=True)
    say("a message")
show_json({"answer": 42})
"""


def test_nothing_but_the_object_reaches_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.split() == ["{", '"answer":', "42", "}"]
    for said in ("a library prints", "C code writes", "a child prints", "a message"):
        assert said in done.stderr


def test_what_a_terminal_would_obey_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b]0;title\x07 file\u202ename \udcff.json\nbéta")
    assert capsys.readouterr().err == "a?]0;title? file?name ?.json\nbéta\n"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.01234, "0.0123"), (1.5, "1.5"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_bench_table_sets_implementations_side_by_side() -> None:
    shape = {"op": "merge", "direction": "both", "streams": 4, "width": 8, "tokens": 2, "dtype": "float32"}
    rows = [
        shape | {"impl": impl, "median_ms": ms, "percent_of_limit": 30 / ms}
        for impl, ms in (("tuned", 0.5), ("separate", 0.8), ("eager", 5.0), ("compile", 2.0))
    ]
    console = Console(width=200, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    console.print(bench_table(rows, "title", ["tuned", "separate", "eager", "compile"]))
    console.file.close()
    text = console.export_text()
    row = next(line for line in text.splitlines() if "merge" in line).split()
    assert row[-8:] == ["0.5", "0.8", "5", "2", "60", "1.6x", "10.0x", "4.0x"]
    assert sum("merge" in line for line in text.splitlines()) == 1
