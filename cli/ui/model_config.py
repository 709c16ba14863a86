"""Models with hyper-connections: their shapes and maps, from the config.json of a Hugging Face model or a table."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mhc.checks import check_scalars
from tiles.errors import BadInput, one_line
from tiles.kernels.spec import IDENTITY, why_bad_dtype, why_bad_rounds, why_bad_streams, why_bad_width

TABLE = Path(__file__).with_name("known_models.json")
MOST_BYTES = 4 * 2**20
"""Size of a config.json; real ones have a few kilobytes, with lists of quantised modules some hundred."""

DTYPE_KEYS = ("dtype", "torch_dtype")
LARGEST = 2**63
"""No whole number of a config is as large, and no other number."""


@dataclass(frozen=True)
class ModelConfig:
    """The hyper-connections of a model.

    Fields:
        name: what messages call it.
        source: where the values are from.
        streams, width: n and C.
        rounds: of Sinkhorn; None where res is the identity.
        eps, hc_eps, post_scale: scalars of the maps (docs/design.md, "The maths").
        dtype: of the streams; None where the source names none.
        single_pass: whether a sublayer reads the streams through the pre of the sublayer before it.
        identity: whether res is the identity, as in Hunyuan-V4.
    """

    name: str
    source: str
    streams: int
    width: int
    rounds: int | None
    eps: float
    hc_eps: float
    post_scale: float
    dtype: str | None = None
    single_pass: bool = False
    identity: bool = False

    def __post_init__(self) -> None:
        for why in (
            why_bad_streams(self.streams),
            why_bad_width(self.width),
            None if self.rounds is None else why_bad_rounds(self.rounds),
            None if self.dtype is None else why_bad_dtype(self.dtype),
            None
            if 0 < self.eps < 1
            else f"eps of the norm must be between 0 and 1, got {self.eps}: the paper has 1e-6",
        ):
            if why:
                raise BadInput(f"{self.name}: {why}")
        check_scalars(self.hc_eps, self.post_scale)

    @property
    def boundary(self) -> str:
        """The fused op between two sublayers."""
        return ("single_pass" if self.single_pass else "step") + (IDENTITY if self.identity else "")


@dataclass(frozen=True)
class Family:
    """The keys that a model's code reads from its config, and the values that it fixes itself."""

    streams: str = "hc_mult"
    rounds: str | None = "hc_sinkhorn_iters"
    hc_eps: str | float = "hc_eps"
    post_scale: str | float = 2.0
    single_pass: bool = False


FAMILIES = {
    "deepseek_v4": Family(),
    "deepseek_v41": Family(single_pass=True),
    "glm5_next": Family(),
    "hy_v4": Family(rounds=None, post_scale="hc_magnitude"),
    "hy_v4_vl": Family(rounds=None, post_scale="hc_magnitude"),
    "openpangu_v2": Family(streams="mhc_num_stream", rounds="mhc_recur_norm", hc_eps=1e-6),
}
"""By `model_type`, without the `_text` of a config's text part. transformers 5.24.0 has the code of deepseek_v4,
glm5_next, hy_v4 and hy_v4_vl; the table's sources have that of the others."""


@cache
def known_models() -> Mapping[str, ModelConfig]:
    """The models of the table, by name."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: ModelConfig(name=name, **row) for name, row in rows.items()}


def read_model(named: str) -> ModelConfig:
    """The model that `named` is: a config.json, a folder with one, or a name of the table. Nothing is downloaded.

    Raises `BadInput` for anything else, and for a config that lacks what its family has or breaks a kernel's rule.
    """
    if found := known_models().get(named):
        return found
    path = Path(named)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(
            f"--model must be a config.json, a folder with one, or one of {', '.join(known_models())}, got {named}: "
            "models are not downloaded, so name a file that is here"
        )
    return _from_config(_load(path), path)


def _load(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise BadInput(
            f"a model's config must be at most {MOST_BYTES >> 20} MiB, got more in {path}: name its config.json"
        )
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"a model's config must be JSON, got {path} ({one_line(error)}): fetch it again") from None
    if not isinstance(config, dict):
        raise BadInput(
            f"a model's config must be a JSON object, got a {type(config).__name__} in {path}: fetch it again"
        )
    return config


def _from_config(config: dict[str, Any], path: Path) -> ModelConfig:
    kind = config.get("model_type")
    family = FAMILIES.get(kind.removesuffix("_text")) if isinstance(kind, str) else None
    if family is None:
        raise BadInput(
            f"model_type must be one of {', '.join(FAMILIES)}, got {reprlib.repr(kind)} in {path}: "
            "give --streams, --width and --dtype of other models"
        )
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    values = _Values(text, f"{path} ({kind})")
    if text.get("use_mhc") is False:
        raise BadInput(f"a model must have hyper-connections, got use_mhc false in {path}: name another one")
    values.expect([key for key in ("hidden_size", "rms_norm_eps", *vars(family).values()) if isinstance(key, str)])
    return ModelConfig(
        name=str(path),
        source=f"model_type {kind}",
        streams=values.whole(family.streams),
        width=values.whole("hidden_size"),
        rounds=None if family.rounds is None else values.whole(family.rounds),
        eps=values.number("rms_norm_eps"),
        hc_eps=values.number(family.hc_eps),
        post_scale=values.number(family.post_scale),
        dtype=next((values.dtype(held[key]) for held in (text, config) for key in DTYPE_KEYS if held.get(key)), None),
        single_pass=family.single_pass,
        identity=family.rounds is None,
    )


class _Values:
    """The values of a config; `where` names it in errors."""

    def __init__(self, held: Mapping[str, Any], where: str) -> None:
        self.held, self.where = held, where

    def expect(self, keys: list[str]) -> None:
        """Raise `BadInput` where a key is missing."""
        if missing := [key for key in keys if key not in self.held]:
            raise BadInput(
                f"a config must have {', '.join(keys)}, {self.where} lacks {', '.join(missing)}: fetch it again"
            )

    def whole(self, key: str) -> int:
        """A whole number; its range is the kernels' to check."""
        value = self.held[key]
        if type(value) is not int or abs(value) >= LARGEST:
            raise BadInput(f"{key} must be a whole number, got {reprlib.repr(value)} in {self.where}: mend it")
        return value

    def number(self, key: str | float) -> float:
        """A finite number, or the one that a family fixes."""
        value = self.held[key] if isinstance(key, str) else key
        if type(value) not in (int, float) or not -LARGEST < value < LARGEST:
            raise BadInput(f"{key} must be a finite number, got {reprlib.repr(value)} in {self.where}: mend it")
        return float(value)

    def dtype(self, value: Any) -> str:
        """A dtype's name; whether kernels have it is theirs to check."""
        if not isinstance(value, str):
            raise BadInput(f"dtype must be a name, got {reprlib.repr(value)} in {self.where}: mend it")
        return value.removeprefix("torch.")
