"""Models' configs: read as transformers writes them; the table of known models; what is wrong, in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.ui import model_config
from cli.ui.model_config import FAMILIES, ModelConfig, known_models, read_model
from tiles.errors import BadInput

TINY = {
    "model_type": "deepseek_v4",
    "hidden_size": 64,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
V41 = {
    "model_type": "deepseek_v41",
    "dtype": "bfloat16",
    "vision_config": {"model_type": "deepseek_v41_vision", "hidden_size": 1024},
    "text_config": {
        "model_type": "deepseek_v41_text",
        "hidden_size": 5120,
        "rms_norm_eps": 1e-20,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
    },
}
OPENPANGU = {
    "model_type": "openpangu_v2",
    "hidden_size": 2560,
    "use_mhc": True,
    "mhc_num_stream": 4,
    "mhc_recur_norm": 20,
    "mhc_use_gamma": True,
    "rms_norm_eps": 1e-5,
}


def write(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Reads what transformers' config class of a model saves."""
    from transformers import AutoConfig

    def read(model_type: str, **settings: Any) -> ModelConfig:
        AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
        return read_model(str(tmp_path))

    return read


MADE_BY_TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek_v4": (
        {"hidden_size": 64, "hc_mult": 2, "hc_sinkhorn_iters": 10, "rms_norm_eps": 1e-4, "dtype": "float16"},
        {"width": 64, "streams": 2, "rounds": 10, "eps": 1e-4, "dtype": "float16"},
    ),
    "glm5_next": (
        {"text_config": {"hidden_size": 64, "hc_mult": 8, "hc_eps": 1e-4}, "dtype": "bfloat16"},
        {"width": 64, "streams": 8, "rounds": 20, "eps": 1e-5, "hc_eps": 1e-4, "dtype": "bfloat16"},
    ),
    "glm5_next_text": ({"hidden_size": 72}, {"width": 72, "streams": 4, "rounds": 20, "eps": 1e-5, "dtype": None}),
    "hy_v4": (
        {"hidden_size": 64, "hc_magnitude": 3.0},
        {"width": 64, "rounds": None, "post_scale": 3.0, "eps": 1e-5, "identity": True},
    ),
    "hy_v4_vl": (
        {"text_config": {"hidden_size": 64, "hc_mult": 2, "dtype": "float32"}},
        {"width": 64, "streams": 2, "rounds": None, "identity": True, "dtype": "float32"},
    ),
}


@pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own
@pytest.mark.parametrize("model_type", MADE_BY_TRANSFORMERS)
def test_a_config_is_read_as_transformers_saves_it(saved: Any, tmp_path: Path, model_type: str) -> None:
    settings, wanted = MADE_BY_TRANSFORMERS[model_type]
    found = saved(model_type, **settings)
    assert found == replace(found, single_pass=False, **wanted)
    assert (found.name, found.source) == (str(tmp_path / "config.json"), f"model_type {model_type}")


@pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own
@pytest.mark.parametrize(
    ("name", "model_type"),
    [("deepseek-v4-flash", "deepseek_v4"), ("glm-5.3-flash", "glm5_next"), ("hunyuan-v4", "hy_v4_vl")],
)
def test_rows_of_the_table_are_transformers_defaults(saved: Any, name: str, model_type: str) -> None:
    row = known_models()[name]
    assert replace(saved(model_type), name=name, source=row.source) == row
    assert f"models/{model_type}/configuration_{model_type}.py" in row.source


@pytest.mark.parametrize(("name", "config"), [("deepseek-v4.1-flash", V41), ("openpangu-2.0-flash", OPENPANGU)])
def test_configs_without_a_class_in_transformers(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    found = read_model(str(write(tmp_path, config)))
    row = known_models()[name]
    assert replace(found, name=name, source=row.source, dtype=None) == row
    assert found.dtype == config.get("dtype")


def test_the_table_names_widths_boundaries_and_sources() -> None:
    assert {name: (row.width, row.boundary) for name, row in known_models().items()} == {
        "deepseek-v4-flash": (4096, "step"),
        "deepseek-v4-pro": (7168, "step"),
        "deepseek-v4.1-flash": (5120, "single_pass"),
        "glm-5.3-flash": (4096, "step"),
        "openpangu-2.0-flash": (2560, "step"),
        "hunyuan-v4": (6144, "step_identity"),
    }
    for name, row in known_models().items():
        assert read_model(name) is row
        assert row.streams == 4
        assert row.source


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_file_or_its_folder_is_named(tmp_path: Path, place: str) -> None:
    path = write(tmp_path, TINY)
    found = read_model(str(path if place == "file" else tmp_path))
    wanted = {"streams": 2, "width": 64, "rounds": 20, "eps": 1e-6, "hc_eps": 1e-6, "post_scale": 2.0}
    assert found == ModelConfig(str(path), "model_type deepseek_v4", **wanted, dtype="bfloat16")  # type: ignore[arg-type]


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "must be JSON, got .*JSONDecodeError"),
    "endless nesting": ('{"a":' * 20_000, "must be JSON, got .*RecursionError"),
    "no object": ([1], "must be a JSON object, got a list"),
    "another model": (
        TINY | {"model_type": "llama"},
        "model_type must be one of deepseek_v4, .* got 'llama' .*--streams",
    ),
    "no model_type": ({"hidden_size": 64}, "model_type must be one of .* got None"),
    "a model_type that is no name": (TINY | {"model_type": ["x"]}, "model_type must be one of"),
    "missing keys": (
        {key: TINY[key] for key in ("model_type", "hidden_size", "hc_mult")},
        "must have hidden_size, rms_norm_eps, hc_mult, hc_sinkhorn_iters, hc_eps, .* lacks rms_norm_eps, hc_sinkhorn_i",
    ),
    "without mHC": (OPENPANGU | {"use_mhc": False}, "must have hyper-connections, got use_mhc false"),
    "a width that kernels lack": (TINY | {"hidden_size": 63}, "width must be a positive multiple of 8, got 63"),
    "too many streams": (TINY | {"hc_mult": 17}, "streams must be in 1..16, got 17"),
    "no streams": (TINY | {"hc_mult": 0}, "streams must be in 1..16, got 0"),
    "no whole number": (TINY | {"hc_mult": 4.5}, "hc_mult must be a whole number, got 4.5"),
    "a truth for a number": (TINY | {"hc_mult": True}, "hc_mult must be a whole number, got True"),
    "a width of a hundred digits": (TINY | {"hidden_size": 10**100}, "hidden_size must be a whole number, got 1000"),
    "a constant of 400 digits": (TINY | {"hc_eps": 10**400}, "hc_eps must be a finite number, got 1000"),
    "rounds that kernels lack": (TINY | {"hc_sinkhorn_iters": 101}, "Sinkhorn rounds must be in 1..100, got 101"),
    "infinity": (TINY | {"hc_eps": float("inf")}, "hc_eps must be a finite number, got inf"),
    "text for a number": (TINY | {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number, got '1e-6'"),
    "no eps": (TINY | {"rms_norm_eps": 0}, "eps of the norm must be between 0 and 1, got 0.0"),
    "an hc_eps that makes no maps": (TINY | {"hc_eps": -1e-6}, "hc_eps must be 0, or in"),
    "a dtype that kernels lack": (TINY | {"torch_dtype": "float8_e4m3fn"}, "dtype must be one of .* got float8_e4m3fn"),
    "a dtype that is no name": (TINY | {"dtype": {"text": "x"}}, "dtype must be a name, got "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_config_is_one_line(tmp_path: Path, case: str) -> None:
    config, said = BAD[case]
    path = write(tmp_path, config)
    with pytest.raises(BadInput, match=said) as caught:
        read_model(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250 + len(str(path)) + len(", ".join(FAMILIES))


def test_a_config_is_read_to_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, TINY)
    monkeypatch.setattr(model_config, "MOST_BYTES", path.stat().st_size)
    assert read_model(str(path)).width == 64
    write(tmp_path, json.dumps(TINY) + " ")
    with pytest.raises(BadInput, match=r"must be at most 0 MiB, got more in .*config.json: name its"):
        read_model(str(path))


@pytest.mark.parametrize("named", ["deepseek-v5", "deepseek-ai/DeepSeek-V4-Flash", "/dev/zero", "/nowhere/config.json"])
def test_an_unknown_name_is_told_the_known_ones(named: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_model(named)
    said = str(caught.value)
    assert said.startswith(f"--model must be a config.json, a folder with one, or one of {', '.join(known_models())}, ")
    assert said.endswith(f"got {named}: models are not downloaded, so name a file that is here")
