"""Shapes that a command works on: from its options, or from a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cli.ui.model_config import ModelConfig, read_model
from cli.ui.options import DEFAULT_DTYPE, DEFAULT_STREAMS, DEFAULT_WIDTH, KERNEL_OPS, check_choices, problems
from tiles.errors import BadInput
from tiles.kernels.spec import IDENTITY, NORM, PAPER_ROUNDS, Problem

T = TypeVar("T", int, str)

ENDINGS = ("", NORM, IDENTITY, NORM + IDENTITY)
STEP = ("layer", "stack", *(op + ending for op in ("pre", "step") for ending in ENDINGS))
SINGLE_PASS = tuple("single_pass" + ending for ending in ENDINGS)
"""Fused ops, and what bench makes of them, of the two ways in which a sublayer reads the streams."""
SHARED = ("aggregate",)
OF_IDENTITY = (*SHARED, *(op for op in KERNEL_OPS if op.endswith(IDENTITY)))
"""Ops that do not know res, and those of maps whose res is the identity."""
UNUSED = ("sinkhorn",)
"""Ops of no model: coefficients has its Sinkhorn inside."""


@dataclass(frozen=True)
class Shapes:
    """All combinations of streams, widths and dtypes at these Sinkhorn rounds, and the ops that matter."""

    streams: list[int]
    widths: list[int]
    dtypes: list[str]
    ops: list[str]
    rounds: int = PAPER_ROUNDS
    model: ModelConfig | None = None

    def __contains__(self, problem: Problem) -> bool:
        """Whether a kernel of this problem is one of these, whatever its tokens."""
        return problem in problems(self.streams, self.widths, [problem.tokens], self.dtypes, self.ops, self.rounds)

    def __str__(self) -> str:
        """The model's name."""
        return self.model.name if self.model else ""

    def reasons(self) -> Iterator[str]:
        """What a model says of its kernels, a line each; nothing where the shapes are from options."""
        if (model := self.model) is None:
            return
        fused = [op for op in self.ops if op in STEP + SINGLE_PASS]
        parts = [op for op in self.ops if op in KERNEL_OPS and op not in fused]
        whose = "the pre of the sublayer before" if model.single_pass else "its own pre"
        rounds = "res is the identity" if model.identity else f"{self.rounds} Sinkhorn rounds"
        shape = f"{model.streams} streams of width {model.width}, {rounds}"
        yield f"{model.name}: {shape} ({model.source})"
        yield f"{', '.join(self.dtypes)}: " + ("its dtype" if model.dtype else "--dtype, as it names none")
        if fused:
            yield f"{', '.join(fused)}: a sublayer of it reads the streams through {whose}"
        if parts:
            why = "of what is before the first sublayer and after the last one"
            why = why if model.identity else "what a boundary consists of, and what runs where that is faster"
            yield f"{', '.join(parts)}: {why}"
        yield (
            f"eps {model.eps:g}, hc_eps {model.hc_eps:g}, post_scale {model.post_scale:g}: arguments of a call, "
            "the same kernels serve all values"
        )


def shapes(
    model: str | None,
    streams: Sequence[int] | None,
    widths: Sequence[int] | None,
    dtypes: Sequence[str] | None,
    ops: Sequence[str] | None,
    offered: Sequence[str] = KERNEL_OPS,
) -> Shapes:
    """The shapes of `--model`, or of the other options, None where one is not given, and their defaults.

    `offered` are the ops that the command has. Raises `BadInput` where an option contradicts the model.
    """
    usual = [op for op in offered if not op.endswith(IDENTITY)]
    if model is None:
        check_choices("op", ops or (), offered)
        return Shapes(
            list(streams or DEFAULT_STREAMS),
            list(widths or DEFAULT_WIDTH),
            list(dtypes or DEFAULT_DTYPE),
            list(ops or without_norm(usual)),
        )
    found = read_model(model)
    used = [op for op in offered if op in OF_IDENTITY] if found.identity else usual
    used = [op for op in used if op not in (*UNUSED, *(STEP if found.single_pass else SINGLE_PASS))]
    if not set(used) - {*SHARED}:
        raise BadInput(
            f"this command has ops of maps that mix streams, got the identity of {found.name}: "
            "give --streams, --width and --dtype instead of --model"
        )
    check_choices("op", ops or (), used)
    return Shapes(
        _agreed("--streams", streams, found.streams, found.name),
        _agreed("--width", widths, found.width, found.name),
        _agreed("--dtype", dtypes, found.dtype, found.name) if found.dtype else list(dtypes or DEFAULT_DTYPE),
        list(ops or without_norm(used)),
        PAPER_ROUNDS if found.rounds is None else found.rounds,
        found,
    )


def without_norm(ops: Sequence[str]) -> list[str]:
    """Ops of sublayers that have their norm inside: what is worked on where no op is named."""
    return [op for op in ops if NORM not in op]


def _agreed(option: str, given: Sequence[T] | None, held: T, name: str) -> list[T]:
    """The model's value; raises `BadInput` where the option has another."""
    if given and list(given) != [held]:
        values = " and ".join(map(str, given))
        raise BadInput(f"{option} must be {held}, which {name} has, got {values}: leave {option} or --model out")
    return [held]
