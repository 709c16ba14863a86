"""Help, bad input and exit codes of every command."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from tiles.cache.cache import KernelCache

COMMANDS = (
    "tune",
    "gpu",
    "export",
    "import",
    "inspect",
    "merge",
    "diff",
    "keys",
    "verify",
    "explain",
    "prune",
    "bench",
    "doctor",
    "compile",
)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


def test_completion_of_the_shell_can_be_installed() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.parametrize(
    ("command", "mentioned"),
    [
        ("tune", ["--target", "--streams", "--width", "--tokens", "--dtype", "--trials", "--cache", "--storage"]),
        ("tune", ["--seed", "--json", "--seconds", "--model"]),
        ("export", ["OUT.mhcpack", "--cache", "--target", "--device", "--op", "--streams", "--width", "--dtype"]),
        ("export", ["--isa", "--unsigned", "--json"]),
        ("merge", ["OUT.mhcpack", "IN...", "--trust-binaries", "--unsigned", "--json", "shorter"]),
        ("diff", ["A", "B", "--json", "Exits with 0"]),
        ("keys", ["--trust", "--forget", "--json"]),
        ("import", ["IN.mhcpack", "--cache", "--trust-binaries"]),
        ("inspect", ["--json"]),
        ("verify", ["float64", "--trust-binaries", "--json"]),
        (
            "explain",
            ["[PATH]", "--op", "--direction", "--streams", "--width", "--tokens", "--dtype", "--cache", "--json"],
        ),
        ("prune", ["--cache", "--stale", "--dry-run", "--json"]),
        (
            "bench",
            ["--target", "--streams", "--width", "--tokens", "--dtype", "--op", "--direction", "--cache", "--json"],
        ),
        ("doctor", ["ready"]),
        ("compile", ["--target", "--streams", "--width", "--tokens", "--dtype"]),
    ],
)
def test_help_of_a_command_names_its_options(command: str, mentioned: list[str]) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert [word for word in mentioned if word not in result.stdout] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune", "--width", "100"], "width must be a positive multiple of 8, got 100"),
        (["tune", "--streams", "0"], "streams must be in 1..16, got 0"),
        (["tune", "--streams", "4", "--streams", "17"], "got 17"),
        (["tune", "--op", "layer"], "op must be one of aggregate, merge,"),
        (["tune", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got int8"),
        (["tune", "--tokens", "-1"], "tokens must be in 0..2^40, got -1"),
        (["tune", "--tokens", "9" * 25], "tokens must be in 0..2^40, got 9999999999999999999999999"),
        (["explain", "--op", "merge", "--tokens", str(2**63)], "tokens must be in 0..2^40, got 9223372036854775808"),
        (["compile", "--op", "merge", "--tokens", str(2**62)], "tokens must be in 0..2^40, got 4611686018427387904"),
        (["tune", "--width", "8" * 25], "width must be at most 131072, got 8888888888888888888888888"),
        (["tune", "--target", "tpu"], "target must be auto, cpu"),
        (["tune", "--target", "cuda:sm_90a"], "needs a visible NVIDIA GPU, got cuda:sm_90a"),
        (["tune", "--json", "--width", "7"], "got 7: pad to 8"),
        (["bench", "--width", "100"], "width must be a positive multiple of 8, got 100"),
        (["bench", "--json"], "run mhc-tune tune"),
        (["export", "out.mhcpack"], "the kernel cache must hold tuned kernels"),
        (["merge", "out.mhcpack", "missing"], "found nothing at missing"),
        (["merge", "out.mhcpack"], "Missing argument"),
        (["diff", "missing", "missing"], "found nothing at missing"),
        (["keys", "--trust", "mine"], "a key is ed25519: and 64 hexadecimal digits, got 'mine'"),
        (["import", "missing.mhcpack"], "missing.mhcpack"),
        (["inspect", "missing"], "found nothing at missing"),
        (["verify", "missing"], "found nothing at missing"),
        (["compile", "--target", "cuda:sm_1"], "got cuda:sm_1"),
        (["tune", "--trials", "0"], "--trials"),
        (["tune", "--widht", "8"], "--widht"),
        (["tuna"], "Did you mean 'tune'?"),
        (["inspect"], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "prune", "explain", "diff"])
def test_a_path_that_the_system_refuses_is_one_line(command: str, tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * 300))
    given = ["--cache"] if command == "prune" else []
    more = {"explain": ["--op", "merge"], "diff": [path]}.get(command, [])
    result = CliRunner().invoke(app, [command, *given, path, *more])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert "File name too long" in result.stderr


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pack" * 50])
@pytest.mark.parametrize("command", ["inspect", "verify", "import"])
def test_what_is_no_pack_is_refused(command: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.mhcpack"
    path.write_bytes(content)
    result = CliRunner().invoke(app, [command, str(path)])
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "odd.mhcpack" in result.stderr


def test_verify_of_an_empty_folder_is_bad_input(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 2
    assert "found none" in result.stderr


def test_inspect_says_which_entries_are_corrupt(tmp_path: Path) -> None:
    (tmp_path / "0123.json").write_text("{", encoding="utf-8")
    assert KernelCache(tmp_path).records() == []
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0
    assert "warning: 0123.json" in result.stderr


def test_compile_without_a_compiler_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = CliRunner().invoke(app, ["compile", "--streams", "2", "--width", "64"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "install g++ or set CXX" in result.stderr
