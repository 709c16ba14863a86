"""Programs: TileLang functions whose parameters come from a kernel's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import tilelang.language as T
from tilelang.language.eager.builder import Builder

from tiles.lang.dialect import Dialect
from tiles.lang.program_attrs import with_attributes
from tiles.lang.values import Expr

TOKENS, SPLITS = "tokens", "splits"
"""Dynamic sizes: the tokens of a call, and how many parts of them have sums of their own."""


class Parameters(SimpleNamespace):
    """A program's parameters by name: tensors, scalars, workspace; and `tokens` and `splits`."""

    def renamed(self, **names: str) -> Parameters:
        """The same with more names: `renamed(x="x_next")` has x_next as x too."""
        return Parameters(**(vars(self) | {new: getattr(self, old) for new, old in names.items()}))


def program(
    arguments: Sequence[Any],
    dialect: Dialect,
    workspace: Callable[[Expr], Mapping[str, Any]] | None = None,
    **attributes: int,
) -> Callable[[Callable[[Any], None]], Any]:
    """Make a decorated function of `Parameters` a TileLang function of that name.

    `arguments` are those of `tiles.kernels.spec`: a tensor is [tokens, ...] as its shape says, or [tokens, row] where
    it is flat; a partial is [splits, ...]. `workspace` makes more tensors of tokens, which the CUDA launcher provides
    between kernels; `attributes` are those of `program_attrs`.
    """

    def made(body: Callable[[Any], None]) -> Any:
        sizes = {TOKENS: T.dynamic(TOKENS), SPLITS: T.dynamic(SPLITS)}
        types = {argument.name: _type(argument, sizes, dialect) for argument in arguments}
        types |= workspace(sizes[TOKENS]) if workspace else {}
        builder = Builder()
        with builder.prim_func(body.__name__):
            given = {name: builder.arg(name, kind) for name, kind in types.items()}
            T.macro(body)(Parameters(**given, **sizes))
        return with_attributes(builder.get(), **attributes)

    return made


def _type(argument: Any, sizes: Mapping[str, Expr], dialect: Dialect) -> Any:
    if argument.is_scalar:
        return T.float32()
    shape = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in argument.shape)
    if argument.flat:
        shape = (shape[0], prod(shape[1:]))
    if argument.role == "partial":
        shape = (sizes[SPLITS], *shape)
    return T.Tensor(shape, dialect.storage(argument.dtype))
