"""Output: `--json` keeps stdout valid, and messages contain no control characters."""

import os
import subprocess
import sys

import pytest

from cli.ui.output import say

NOISY = """
import os, subprocess, sys
from cli.ui.output import say, show_json, stdout_to_stderr
with stdout_to_stderr():
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
