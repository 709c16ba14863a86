"""The commands export, import and inspect: what is taken, who signed it, and what that means elsewhere."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import mhc_tune, put_kernel, write_config

from cli.commands import pack_selection as selection
from cli.commands import packs
from tiles.cache.cache import KernelCache, Key
from tiles.cache.record import Record
from tiles.compiler.compile import Artifact, CompileError
from tiles.pack.pack import Pack, write_pack
from tiles.target import Device, detect_device

HERE = replace(detect_device("cpu"), arch="x86-64")
OTHER = Device("cpu", "[red]Other[/red] :smile: CPU", "x86-64-v2")
GPU = Device("cuda", "NVIDIA X", "sm_90a", 132, 60)


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    cache = KernelCache(tmp_path / "cache")
    put_kernel(cache, "merge", 64, HERE)
    put_kernel(cache, "merge", 128, HERE)
    put_kernel(cache, "aggregate", 64, HERE, "bfloat16")
    put_kernel(cache, "merge", 64, OTHER)
    put_kernel(cache, "merge", 64, GPU)
    return cache


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling gives code that names its target, at once."""

    def fake(records: list[Record]) -> list[Artifact]:
        return [Artifact(r.key.device.target, "// made", f"made for {r.key.device.arch}".encode()) for r in records]

    monkeypatch.setattr(packs, "recompile", fake)
    monkeypatch.setattr(selection, "recompile", fake)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ([], 5),
        (["--op", "merge"], 4),
        (["--op", "merge", "--op", "aggregate"], 5),
        (["--width", "128"], 1),
        (["--width", "128", "--width", "64"], 5),
        (["--dtype", "bfloat16"], 1),
        (["--streams", "2"], 5),
        (["--target", "cpu"], 4),
        (["--target", "cuda"], 1),
        (["--target", "cuda:sm_90a"], 1),
        (["--target", "cpu:x86-64-v2"], 1),
        (["--device", "other"], 1),
        (["--device", "current"], 3),
        (["--device", "current", "--width", "64", "--op", "merge"], 1),
    ],
)
def test_export_takes_what_is_asked_for(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], count: int
) -> None:
    monkeypatch.setattr(selection, "_gpu_names", list)
    result = mhc_tune("export", tmp_path / "a.mhcpack", "--cache", cache.folder, *options, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    with Pack(tmp_path / "a.mhcpack") as pack:
        assert len(pack.records()) == count
        assert [record["digest"] for record in printed["records"]] == [r.key.digest for r in pack.records()]
        assert printed["signed_by"] == pack.signed_by
        assert pack.why_untrusted is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--width", "8", "--width", "16"], "none of 5 is for width 8 or 16"),
        (["--device", "no such", "--op", "merge"], "none of 5 is for device no such, op merge"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--op", "swirl"], "op must be one of"),
        (["--model", "deepseek-v4-pro"], "none of 5 is for model deepseek-v4-pro: see mhc-tune inspect"),
        (["--model", "deepseek-v4-pro", "--width", "64"], "--width must be 7168, which deepseek-v4-pro has, got 64"),
        (["--model", "nowhere"], "--model must be a config.json"),
        (["--isa", "x86-64-v9"], "isa must be one of x86-64, x86-64-v2, x86-64-v3, x86-64-v4, got x86-64-v9"),
        (["--isa", "x86-64-v3", "--target", "cuda"], "--isa compiles kernels of x86-64 CPUs, got none"),
    ],
)
def test_what_export_cannot_do_is_one_line(cache: KernelCache, tmp_path: Path, options: list[str], said: str) -> None:
    result = mhc_tune("export", tmp_path / "a.mhcpack", "--cache", cache.folder, *options)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert said in result.stderr
    assert not (tmp_path / "a.mhcpack").exists()


def test_export_takes_a_models_kernels(cache: KernelCache, tmp_path: Path) -> None:
    """Also those that do not depend on the dtype of its streams."""
    put_kernel(cache, "coefficients", 64, HERE)
    put_kernel(cache, "sinkhorn", 64, HERE)
    model = ["--model", write_config(tmp_path, torch_dtype="bfloat16")]
    taken = []
    for more in ([], ["--op", "coefficients"]):
        result = mhc_tune("export", tmp_path / "a.mhcpack", "--cache", cache.folder, *model, *more)
        assert result.exit_code == 0, result.stderr
        with Pack(tmp_path / "a.mhcpack") as pack:
            taken.append({(record.key.op, record.key.width, record.key.dtype) for record in pack.records()})
    assert taken == [
        {("aggregate", 64, "bfloat16"), ("coefficients", 64, "float32")},
        {("coefficients", 64, "float32")},
    ]


@pytest.mark.usefixtures("no_compiler")
def test_isa_puts_other_levels_beside_the_original(cache: KernelCache, tmp_path: Path) -> None:
    out = tmp_path / "a.mhcpack"
    levels = ["--isa", "x86-64-v3", "--isa", "x86-64-v2"]
    result = mhc_tune("export", out, "--cache", cache.folder, "--width", 64, "--op", "merge", *levels)
    assert result.exit_code == 0, result.stderr
    with Pack(out) as pack:
        found = {(record.key.device.name, record.key.device.arch): record for record in pack.records()}
        assert len(found) == len(pack.records()) == 6  # the other CPU's level v2 was measured there: not compiled anew
        made = found[HERE.name, "x86-64-v3"]
        assert pack.binary(made) == b"made for x86-64-v3"
        assert made.provenance == {
            "host": "a",
            "compiled_for": "x86-64-v3",
            "measured_on": f"{HERE.name} (x86-64)",
        }
        assert made.measurement == {"tuned_ms": 1.0}
        assert "measured_on" not in found[OTHER.name, OTHER.arch].provenance
        assert pack.binary(found[HERE.name, "x86-64"]).startswith(b"merge 64")
    assert "3 were compiled for other ISA levels" in mhc_tune("inspect", out).stderr


def test_a_level_that_does_not_compile_is_said_and_the_rest_is_written(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "recompile", lambda records: [CompileError("no such level") for _ in records])
    options = ["--cache", cache.folder, "--width", 128, "--isa", "x86-64-v3"]
    result = mhc_tune("export", tmp_path / "a.mhcpack", *options)
    assert result.exit_code == 1
    assert "FAILED: x86-64-v3: no such level" in result.stderr
    with Pack(tmp_path / "a.mhcpack") as pack:
        assert len(pack.records()) == 1


@pytest.mark.usefixtures("no_compiler", "own_keys")
def test_import_trusts_ones_own_signature_a_listed_one_and_no_other(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MHC_TUNE_KEYS", str(tmp_path / "their keys"))
        assert mhc_tune("export", tmp_path / "theirs", "--cache", cache.folder).exit_code == 0
        assert mhc_tune("export", tmp_path / "unsigned", "--cache", cache.folder, "--unsigned").exit_code == 0
        key = json.loads(mhc_tune("keys", "--json").stdout)["own"]
    assert mhc_tune("export", tmp_path / "mine", "--cache", cache.folder).exit_code == 0

    def imported(name: str, *options: str) -> tuple[set[str], Any]:
        result = mhc_tune(
            "import", tmp_path / name, "--cache", tmp_path / f"{len(list(tmp_path.iterdir()))}", "--json", *options
        )
        assert result.exit_code == 0, result.stderr
        printed = json.loads(result.stdout)
        return {kernel["how"] for kernel in printed["kernels"]}, printed["why_untrusted"]

    assert imported("mine") == ({"copied"}, None)
    how, why = imported("theirs")
    assert how == {"recompiled"}
    assert key in why
    assert imported("unsigned") == ({"recompiled"}, "it is not signed")
    assert imported("unsigned", "--trust-binaries")[0] == {"copied"}
    assert mhc_tune("keys", "--trust", f"{key} Alice").exit_code == 0
    assert imported("theirs") == ({"copied"}, None)


def test_import_prints_reasons_and_exits_with_1_where_one_is_skipped(
    cache: KernelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "recompile", lambda records: [CompileError("no compiler") for _ in records])
    write_pack(cache, tmp_path / "a.mhcpack", signed=False)
    result = mhc_tune("import", tmp_path / "a.mhcpack", "--cache", tmp_path / "mine")
    assert result.exit_code == 1
    assert "its schedules are compiled here: it is not signed" in result.stderr
    assert result.stderr.count("skipped: no compiler") == 5
    assert "0 of 5 kernels are in" in result.stderr


def test_inspect_says_who_signed(cache: KernelCache, tmp_path: Path) -> None:
    write_pack(cache, tmp_path / "a.mhcpack")
    result = mhc_tune("inspect", tmp_path / "a.mhcpack")
    assert "signed by ed25519:" in result.stderr
    assert "its compiled code is trusted" in result.stderr
    printed = json.loads(mhc_tune("inspect", tmp_path / "a.mhcpack", "--json").stdout)
    assert printed["signed_by"].startswith("ed25519:")
    assert printed["why_untrusted"] is None
    write_pack(cache, tmp_path / "b.mhcpack", signed=False)
    assert "its compiled code is not trusted: it is not signed" in mhc_tune("inspect", tmp_path / "b.mhcpack").stderr


def test_inspect_says_which_driver_gpu_kernels_need(own_keys: Path, tmp_path: Path) -> None:
    """What a pack says of its toolkit is a stranger's text."""
    cache = KernelCache(tmp_path / "toolkits")
    for width, toolkit in ((64, "13.0"), (128, "12.8"), (256, "12.8"), (512, "[red]13.0"), (1024, None)):
        made = put_kernel(cache, "merge", width, GPU)
        told = {} if toolkit is None else {"cuda_toolkit": toolkit}
        cache.put(made.key, made.schedule, b"code", "", made.measurement, told)
    said = [line for line in mhc_tune("inspect", cache.folder).stderr.splitlines() if "CUDA" in line]
    assert said == [
        "2 GPU kernels are built with CUDA 12.8: they need driver 525 or newer",
        "1 GPU kernels are built with CUDA 13.0: they need driver 580 or newer",
    ]


def test_names_from_a_pack_are_text_and_no_markup(cache: KernelCache, tmp_path: Path) -> None:
    write_pack(cache, tmp_path / "a.mhcpack")
    for command in (["inspect", tmp_path / "a.mhcpack"], ["diff", tmp_path / "a.mhcpack", tmp_path]):
        assert OTHER.name in mhc_tune(*command).stdout


def test_a_folder_that_others_can_write_to_is_not_signed_for(cache: KernelCache, tmp_path: Path) -> None:
    cache.folder.chmod(0o777)
    result = mhc_tune("export", tmp_path / "a.mhcpack", "--cache", cache.folder)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "a signature vouches for code" in result.stderr
    assert f"chmod o-w {cache.folder}" in result.stderr
    assert mhc_tune("export", tmp_path / "a.mhcpack", "--cache", cache.folder, "--unsigned").exit_code == 0
    assert "its compiled code is not trusted: everybody may change" in mhc_tune("inspect", cache.folder).stderr


def test_a_forged_pack_is_bad_input_for_every_command(cache: KernelCache, tmp_path: Path) -> None:
    path, out = tmp_path / "forged.mhcpack", tmp_path / "out.mhcpack"
    write_pack(cache, path)
    with zipfile.ZipFile(path) as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    entries["manifest.json"] = entries["manifest.json"].replace(b'"tuned_ms":1.0', b'"tuned_ms":2.0')
    with zipfile.ZipFile(path, "w") as forged:
        for name, content in entries.items():
            forged.writestr(name, content)
    for command in (["inspect", path], ["verify", path], ["import", path], ["diff", path, path], ["merge", out, path]):
        result = mhc_tune(*command)
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
        assert "forged.mhcpack: its content must match its signature" in result.stderr


def test_kernels_of_other_sources_are_said_in_one_line_a_pack(own_keys: Path, tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "stale")
    current = put_kernel(cache, "merge", 64, HERE)
    key = replace(Key.of(replace(current.key.problem, width=128), HERE), sources="0" * 16)
    cache.put(key, current.schedule, b"code", "", {}, {})
    line = (
        "1 of 2 schedules are compiled again where they are used: it was made from other kernel sources than this "
        "version's"
    )
    assert mhc_tune("inspect", cache.folder).stderr.splitlines().count(line) == 1
