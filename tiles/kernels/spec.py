"""Specifications of kernels and kernel families: plain data, standard library only.

A family is a folder of `tiles` whose `__init__` holds `FAMILY`, a `KernelFamily`. It bundles the kernels (one per op
and direction) that share maths. Everything else in the project (compiler, tuner, cache, runtime, command line)
works on these records and knows no kernel by name.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_type_hints

from tiles.errors import BadInput
from tiles.target import Target

Direction = Literal["forward", "backward"]
Role = Literal["input", "output", "updated", "partial", "scalar", "flag"]

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_STREAMS = 16
MAX_WIDTH = 2**17
MAX_TOKENS = 2**40
"""Bytes of any tensor then stay within 64 bits."""
EVERY_TOKENS = MAX_TOKENS
"""The count that stands for all of them: of schedules that serve every batch, so that a token's bits do not depend on
what else is in it."""
WIDTH_MULTIPLE = 8
MAX_ROUNDS = 100
PAPER_ROUNDS = 20
IDENTITY = "_identity"
"""The ending of ops whose res is the identity: streams are not mixed, and maps are pre and post alone."""
NORM = "_norm"
"""The ending, before `IDENTITY`, of ops that normalise the sublayer's input (RMSNorm)."""
TOKENS = "tokens"
"""Leading dimension of an argument that has one row per token."""


@dataclass(frozen=True)
class Problem:
    """One kernel's work. `tokens` is a representative count: programs take any count at run time."""

    op: str
    direction: Direction
    streams: int
    width: int
    dtype: str = "float32"
    tokens: int = 4096
    rounds: int = PAPER_ROUNDS

    def __post_init__(self) -> None:
        for why in (
            why_bad_streams(self.streams),
            why_bad_width(self.width),
            why_bad_dtype(self.dtype),
            why_bad_tokens(self.tokens),
            why_bad_rounds(self.rounds),
        ):
            if why:
                raise BadInput(why)

    @property
    def fan_in(self) -> int:
        """K = nC, the length of one token's flattened stream state."""
        return self.streams * self.width

    @property
    def mixes(self) -> bool:
        """Whether res is a matrix of each token, and not the identity."""
        return not self.op.endswith(IDENTITY)

    @property
    def normalises(self) -> bool:
        """Whether the sublayer's input comes out normalised."""
        return self.op.removesuffix(IDENTITY).endswith(NORM)

    @property
    def base_op(self) -> str:
        """The op without the endings `NORM` and `IDENTITY`."""
        return self.op.removesuffix(IDENTITY).removesuffix(NORM)

    @property
    def maps(self) -> int:
        """How many maps a token has: pre, post and res, or pre and post."""
        return 3 if self.mixes else 2

    @property
    def weights(self) -> int:
        """What a merge weighs one token's values with: post and res."""
        return self.streams + (self.streams * self.streams if self.mixes else 0)

    @property
    def outputs(self) -> int:
        """N, the number of coefficient logits of one token: n² + 2n, or 2n where res is the identity."""
        return self.streams + self.weights

    def of(self, base_op: str, direction: Direction | None = None) -> Problem:
        """The problem of another op with the same kind of res."""
        op = base_op if self.mixes else base_op + IDENTITY
        return replace(self, op=op, direction=direction or self.direction)

    def describe(self) -> str:
        """One line for people, e.g. `merge forward n=4 C=1280 bfloat16 T=2048`."""
        tokens = "every" if self.tokens == EVERY_TOKENS else self.tokens
        return f"{self.op} {self.direction} n={self.streams} C={self.width} {self.dtype} T={tokens}"


def why_bad_streams(streams: int) -> str | None:
    """The rule for the number of streams n, or None where it holds."""
    if 1 <= streams <= MAX_STREAMS:
        return None
    return f"streams must be in 1..{MAX_STREAMS}, got {streams}: choose a stream count in that range"


def why_bad_width(width: int) -> str | None:
    """The rule for the width C, or None where it holds."""
    if width >= WIDTH_MULTIPLE and width % WIDTH_MULTIPLE == 0 and width <= MAX_WIDTH:
        return None
    if width > MAX_WIDTH:
        return f"width must be at most {MAX_WIDTH}, got {width}: split it"
    return (
        f"width must be a positive multiple of {WIDTH_MULTIPLE}, got {width}: "
        f"pad to {max(WIDTH_MULTIPLE, -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)}"
    )


def why_bad_tokens(tokens: int) -> str | None:
    """The rule for the number of tokens, or None where it holds."""
    if 0 <= tokens <= MAX_TOKENS:
        return None
    return f"tokens must be in 0..2^40, got {tokens}: choose a number in that range"


def why_bad_rounds(rounds: int) -> str | None:
    """The rule for the number of Sinkhorn rounds, or None where it holds. Kernels keep every round's sums on chip."""
    if 1 <= rounds <= MAX_ROUNDS:
        return None
    return f"Sinkhorn rounds must be in 1..{MAX_ROUNDS}, got {rounds}: the paper uses {PAPER_ROUNDS}"


def why_bad_dtype(dtype: str) -> str | None:
    """The rule for the streams' dtype, or None where it holds."""
    if dtype in DTYPES:
        return None
    return f"dtype must be one of {', '.join(DTYPES)}, got {dtype}: cast the streams to one of them"


@dataclass(frozen=True)
class Argument:
    """One kernel argument: a tensor (`shape` may lead with TOKENS) or a float32 scalar (`shape` is empty).

    An `updated` tensor is one that the kernel adds to in place. The `flag` before it, a scalar that the runtime sets,
    is 1 where the caller gives it, and 0 where it holds nothing yet: then it is written alone. A `partial` is an output
    that each slice of tokens writes on its own: the kernel sees [slices, *shape], the caller gets the sum over slices,
    in slice order, so results repeat bit for bit at a fixed slice count. Of a `flat` tensor a program sees each token
    as one row.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    role: Role
    flat: bool = False

    def sized(self, tokens: int) -> tuple[int, ...]:
        """The concrete shape for a token count."""
        return tuple(tokens if isinstance(size, str) else size for size in self.shape)

    @property
    def is_scalar(self) -> bool:
        """Whether it is passed by value."""
        return self.role in ("scalar", "flag")

    def nbytes(self, tokens: int) -> int:
        """Bytes of the tensor (4 for a scalar)."""
        total = DTYPE_BYTES[self.dtype]
        for size in self.sized(tokens):
            total *= size
        return total


@dataclass(frozen=True)
class Traffic:
    """What a kernel has to move and compute: bytes read, bytes written, floating-point operations."""

    read: int
    written: int
    flops: int

    @property
    def bytes(self) -> int:
        """Bytes moved in all."""
        return self.read + self.written


Results = tuple[Any, ...]
Run = Callable[[str, Direction, tuple[Any, ...]], Results]
"""Runs one kernel: (op, direction, what its caller gives in call order) -> its results."""


@dataclass(frozen=True)
class Separate:
    """How a fused kernel's work is done by other kernels: `call(run, *given)` -> its results; `parts` are those run."""

    call: Callable[..., Results]
    parts: tuple[tuple[str, Direction], ...]


@dataclass(frozen=True)
class KernelSpec:
    """One tunable kernel: an op in one direction.

    Fields:
        op, direction: what it computes; (op, direction) is unique over all families.
        schedules: frozen dataclasses of tunables, every field plain data: one for each variant of the program, and no
            two with the same names of fields.
        default: (problem, target) -> schedule that always works.
        space: (problem, target) -> {field: values in natural order}; names equal the schedule's fields.
        why_invalid: (problem, schedule, target) -> None, or the sentence that says which rule is broken.
        scratch: (problem, schedule, target) -> bytes of working memory that one slice of tokens (on CUDA a thread
            block, in shared memory) needs besides registers: a kernel allocates no more.
        arguments: problem -> arguments in call order: inputs, scalars, then results (updated, outputs, partials).
        builder: "module:function" of the TileLang program; imported by `tiles.compiler.compile` alone.
        reference: (problem, {name: value}) -> {name: tensor} for all results (partials summed), in the inputs'
            precision; float64 inputs give the float64 reference.
        inputs: (problem, tokens, seed) -> {name: value} on CPU, drawn afresh for each seed.
        traffic: (problem, tokens) -> Traffic at the least that the op must move.
        tolerance: (problem, argument name) -> (rtol, atol) against the float64 reference, with its reason in code.
        canonical: problem -> the problem that decides the generated code (fields that do not matter are fixed).
        targets: the kinds of target that it has programs for.
        separate: the same work by other kernels, which the tuner compares with; None where there is no such choice.
    """

    op: str
    direction: Direction
    schedules: tuple[type, ...]
    default: Callable[[Problem, Target], Any]
    space: Callable[[Problem, Target], Mapping[str, tuple[Any, ...]]]
    why_invalid: Callable[[Problem, Any, Target], str | None]
    scratch: Callable[[Problem, Any, Target], int]
    arguments: Callable[[Problem], tuple[Argument, ...]]
    builder: str
    reference: Callable[[Problem, Mapping[str, Any]], dict[str, Any]]
    inputs: Callable[[Problem, int, int], dict[str, Any]]
    traffic: Callable[[Problem, int], Traffic]
    tolerance: Callable[[Problem, str], tuple[float, float]]
    canonical: Callable[[Problem], Problem]
    targets: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
    separate: Separate | None = None

    @property
    def name(self) -> str:
        """`op.direction`, e.g. `merge.backward`."""
        return f"{self.op}.{self.direction}"

    def schedule_from(self, values: Mapping[str, Any]) -> Any:
        """The schedule with these field values; raises `BadInput` when names or types do not fit.

        Records from before a field was added lack it: its default is the value that they were measured with.
        """
        for kind in self.schedules:
            types = _field_types(kind)
            if _needed(kind) <= set(values) <= set(types):
                break
        else:
            kind = min(self.schedules, key=lambda kind: len(_needed(kind) ^ set(values)))
            unknown = reprlib.repr(sorted(set(values) - set(_field_types(kind))))
            missing = reprlib.repr(sorted(_needed(kind) - set(values)))
            raise BadInput(
                f"a schedule of {self.name} must have its fields, got unknown {unknown}, missing {missing}: "
                "tune this kernel again"
            )
        for name, value in values.items():
            if type(value) is not types[name]:
                raise BadInput(
                    f"{self.name}: {name} must be of type {types[name].__name__}, got {value!r}: tune it again"
                )
        return kind(**values)


_field_types = cache(get_type_hints)


@cache
def _needed(kind: type) -> frozenset[str]:
    return frozenset(field.name for field in fields(kind) if field.default is MISSING)


@dataclass(frozen=True)
class KernelFamily:
    """A folder of kernels that share maths; `parts` names the families whose programs it is made of."""

    name: str
    kernels: tuple[KernelSpec, ...]
    parts: tuple[str, ...] = ()
