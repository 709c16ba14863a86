"""Where project's tiles leave their sums: in z and s, or with those of other splits, which a kernel adds up."""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.lang.values import Buffer, Expr


class Whole(NamedTuple):
    """Where the sums over all columns go."""

    z: Buffer
    s: Buffer

    def product(self, token: Expr, k: Expr, value: Expr) -> None:
        """A token's z_k."""
        _store(self.z, (token, k), value)

    def length(self, token: Expr, value: Expr) -> None:
        """A token's s."""
        _store(self.s, (token,), value)


class SplitSums(NamedTuple):
    """Where one split's sums go: [splits, T · (N + 1)], for every token N of z and the one of s."""

    parts: Buffer
    split: Expr
    outputs: int

    def product(self, token: Expr, k: Expr, value: Expr) -> None:
        """A token's part of z_k."""
        _store(self.parts, (self.split, token * (self.outputs + 1) + k), value)

    def length(self, token: Expr, value: Expr) -> None:
        """A token's part of s."""
        self.product(token, self.outputs, value)


@T.macro
def _store(tensor: Buffer, index: Any, value: Expr) -> None:
    tensor[index] = value
