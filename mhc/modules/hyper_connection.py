"""A residual connection over n streams around any sublayer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import isqrt
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.functional import dropout as drop

from mhc import functional, manifolds
from mhc.checks import check_problem, stream_shape
from mhc.modules.grad_accumulate import share
from mhc.modules.init import Init, start
from mhc.modules.pre_with_residual import pre_and_streams
from tiles.errors import BadInput

Mode = Literal["mhc", "hc", "residual"]

FUSED_MANIFOLD = "sinkhorn"
"""What the kernels of pre and step have inside."""


class HyperConnection(nn.Module):
    """x [..., n, C] -> x' [..., n, C]: u = Σ_i pre_i x_i;  x'_i = Σ_j res_ij x_j + post_i sublayer(u).

    The sublayer maps [..., C] to [..., C] and brings its own normalisation, as in a pre-norm network. It gets all else
    that the block is called with. Where it returns a tuple, that output is the first part, and the block returns x'
    with the rest. With n equal streams, alpha = 0 and the biases as they start, the connection is the plain residual
    h + sublayer(h).

    Streams are float32, bfloat16 or float16; the maps are float32, also under autocast and in a model cast as a whole.
    A sublayer of another dtype than the streams works under autocast; its output is cast to theirs.

    Args:
        width, streams: C, a multiple of 8, and n in 1..16.
        sublayer: the module that is wrapped.
        mode: `mhc`, manifold-constrained (arXiv 2512.24880): pre and post are sigmoids, res is doubly stochastic;
            `hc`, unconstrained (arXiv 2409.19606): each is alpha · tanh(projection) + bias, where the projection sees
            all streams of a token at once, as mHC's does, and not each by itself;
            `residual`, nothing learned: u is the streams' mean, and each stream gets sublayer(u) added.
        manifold: where `mhc` takes res from: a name of `mhc.manifolds.NAMES`, or a function like those there. Only
            `sinkhorn` runs in the fused kernels.
        init: how parameters start, `paper` or `identity`; see `mhc.modules.init`.
        dynamic: whether the maps depend on the token. If not, they are those of the bias alone (the static
            hyper-connections of arXiv 2409.19606); phi and alpha do not exist then.
        dropout: share of the sublayer's output that is dropped, the rest scaled up, while training.
        rounds: Sinkhorn rounds (with manifold `sinkhorn` alone).
        eps: added to the mean square of a token's streams before its root is taken.

    Parameters (float32; in `residual` none): phi [N, K], alpha [3] (pre, post, res) and bias [N], N packed
    [pre | post | res row-major]. `state_dict` has these names and the sublayer's under `sublayer`; loading one of
    another shape or mode raises `BadInput`. `watchers` are called with the block and res [..., n, n], detached,
    whenever a forward has made res; a copy of the block starts without any.

    Raises `BadInput` (a `ValueError`) for a problem, mode, manifold or init that is not offered.
    """

    phi: nn.Parameter
    alpha: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        width: int,
        streams: int,
        sublayer: nn.Module,
        *,
        mode: Mode = "mhc",
        manifold: str | manifolds.Manifold = FUSED_MANIFOLD,
        init: Init = "paper",
        dynamic: bool = True,
        dropout: float = 0.0,
        rounds: int = functional.ROUNDS,
        eps: float = functional.EPS,
    ) -> None:
        super().__init__()
        check_problem(streams, width)
        _check_choice("mode", mode, get_args(Mode))
        _check_choice("init", init, get_args(Init))
        if not 0 <= dropout < 1:
            raise BadInput(f"dropout must be in [0, 1), got {dropout}: give the share to drop")
        if mode != "mhc" and manifold != FUSED_MANIFOLD:
            raise BadInput(f"a manifold is for mode mhc, got {manifold} with mode {mode}: leave it out")
        self.width, self.streams, self.sublayer = width, streams, sublayer
        self.mode, self.manifold, self.init, self.dynamic = mode, manifold, init, dynamic
        self.dropout, self.rounds, self.eps = dropout, rounds, eps
        self.watchers: list[Callable[[HyperConnection, torch.Tensor], None]] = []
        self.to_res = _manifold(manifold, streams, rounds)
        for name, value in self._start().items():
            setattr(self, name, nn.Parameter(value))

    def reset_parameters(self) -> None:
        """Start again as a fresh block; for parameters that were made on the meta device."""
        with torch.no_grad():
            for name, value in self._start().items():
                getattr(self, name).copy_(value)

    def _start(self) -> dict[str, torch.Tensor]:
        if self.mode == "residual":
            return {}
        settings: dict[str, Any] = {"dynamic": self.dynamic, "init": self.init}
        return start(self.streams, self.width, constrained=self.mode == "mhc", **settings)

    @property
    def fused(self) -> bool:
        """Whether `mhc.functional.pre` and `step` make this block's maps; else it has passes of its own."""
        return self.mode == "mhc" and self.manifold == FUSED_MANIFOLD and self.dynamic

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[Any, ...]:
        """x [..., n, C] -> x' like x, or (x', ...) where the sublayer returns more. What else is given goes to it."""
        if self.mode == "residual":
            self._check(x)
            f, rest = self.call_sublayer(x.mean(-2), *args, **kwargs)
            x_next = x + f.unsqueeze(-2)
        else:
            u, post, res, x = self.before(x)
            f, rest = self.call_sublayer(u, *args, **kwargs)
            x_next = functional.merge(x, f, res, post)
        return (x_next, *rest) if rest else x_next

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """u [..., C], post [..., n], res [..., n, n], and x for the op that merges, alone
        (`mhc.modules.pre_with_residual`)."""
        self._check(x)
        if self.fused:
            u, post, res, x = pre_and_streams(x, *self.parameters_for_ops(), rounds=self.rounds, eps=self.eps)
        else:
            x_project, x_aggregate, x = share(x, 3)
            pre, post, res = self.maps(x_project)
            u = functional.aggregate(x_aggregate, pre)
        self.observed(res)
        return u, post, res, x

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """pre [..., n], post [..., n] and res [..., n, n], in plain torch around `mhc.functional.project`."""
        n, leading = self.streams, x.shape[:-2]
        with torch.autocast(x.device.type, enabled=False):
            h = self.bias.float()
            if self.dynamic:
                phi, alpha, bias = self.parameters_for_ops()
                z, s = functional.project(x, phi)
                t = z * torch.rsqrt(s / (n * self.width) + self.eps).unsqueeze(-1)
                gate = torch.cat((alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)))
                h = gate * (torch.tanh(t) if self.mode == "hc" else t) + bias
            pre, post, res = h.split((n, n, n * n), dim=-1)
            res = res.unflatten(-1, (n, n))
            if self.mode == "mhc":
                pre, post, res = pre.sigmoid(), 2 * post.sigmoid(), self.to_res(res)
        return pre.expand(*leading, n), post.expand(*leading, n), res.expand(*leading, n, n)

    def call_sublayer(self, u: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """f [..., C], the sublayer's output after dropout in u's dtype, the streams', and what else it returned.

        Under autocast a sublayer may answer in another dtype. Raises `BadInput` where f has not u's shape.
        """
        returned = self.sublayer(u, *args, **kwargs)
        f, *rest = returned if isinstance(returned, tuple) and returned else (returned,)
        if not isinstance(f, torch.Tensor) or f.shape != u.shape:
            got = tuple(f.shape) if isinstance(f, torch.Tensor) else type(f).__name__
            raise BadInput(
                f"a sublayer must return a tensor of its input's shape {tuple(u.shape)}, alone or first in a tuple, "
                f"got {got} from {type(self.sublayer).__name__}: wrap one that keeps the width"
            )
        if self.dropout and self.training:
            f = drop(f, self.dropout)
        return f.to(u.dtype), tuple(rest)

    def observed(self, res: torch.Tensor) -> None:
        """Show res [..., n, n], detached, to every watcher."""
        for watcher in self.watchers:
            watcher(self, res.detach())

    def parameters_for_ops(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """phi, alpha, bias; widened where they were cast with the model."""
        return self.phi.float(), self.alpha.float(), self.bias.float()

    def extra_repr(self) -> str:
        """Shown by print."""
        shown = f"width={self.width}, streams={self.streams}, {self._maps_in_words()}, dynamic={self.dynamic}"
        return shown + (f", dropout={self.dropout}" if self.dropout else "")

    def _maps_in_words(self) -> str:
        if self.mode != "mhc":
            return f"mode={self.mode}"
        name = self.manifold if isinstance(self.manifold, str) else getattr(self.manifold, "__name__", self.manifold)
        return f"mode=mhc, manifold={name}"

    def _check(self, x: torch.Tensor) -> None:
        wanted = (*x.shape[:-2], self.streams, self.width)
        if x.shape != wanted:
            raise BadInput(
                f"x must be {wanted}, as the block has {self.streams} streams of width {self.width}, "
                f"got {tuple(x.shape)}: reshape it, or make streams with mhc.expand_streams"
            )
        stream_shape(x)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but the watchers, which belong to who watches this block."""
        return {**self.__dict__, "watchers": []}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What shapes do not tell, as mhc from hc, goes into torch's metadata, beside the version."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.get(prefix[:-1], {})["maps"] = self._maps_in_words()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Torch's, after one clear line where the checkpoint holds another block. It may hold none (strict=False)."""
        names = ("phi", "alpha", "bias")
        held = {name: tuple(state_dict[prefix + name].shape) for name in names if prefix + name in state_dict}
        wanted = {name: tuple(parameter.shape) for name, parameter in self._parameters.items() if parameter is not None}
        maps = self._maps_in_words()
        held_maps = local_metadata.get("maps", maps)
        differs = any(held[name] != wanted[name] for name in held.keys() & wanted.keys())
        lacks = any((name in held) != (name in wanted) for name in ("phi", "bias"))
        if differs or (held and lacks) or held_maps != maps:
            raise BadInput(
                f"a checkpoint must be of a block like {prefix[:-1] or 'this'}, {maps}, {_shapes_in_words(wanted)}, "
                f"got {held_maps}, {_shapes_in_words(held)}: build the block as the checkpoint's was"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _check_choice(name: str, value: Any, offered: tuple[str, ...]) -> None:
    if value not in offered:
        raise BadInput(f"{name} must be one of {', '.join(offered)}, got {value}: choose one of them")


def _manifold(manifold: str | manifolds.Manifold, streams: int, rounds: int) -> manifolds.Manifold:
    """The function that makes res; raises `BadInput` where it is unknown or does not take so many streams."""
    if manifold == FUSED_MANIFOLD:
        return partial(functional.sinkhorn, rounds=rounds)
    to_res = manifolds.named(manifold) if isinstance(manifold, str) else manifold
    to_res(torch.zeros(streams, streams, device="cpu"))
    return to_res


def _shapes_in_words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What block has parameters of these shapes."""
    if "bias" not in shapes:
        return "no parameters"
    streams = isqrt(shapes["bias"][0] + 1) - 1
    return f"{streams} streams, " + (f"width {shapes['phi'][1] // streams}" if "phi" in shapes else "static")


def read_in_turn(blocks: Iterable[HyperConnection]) -> None:
    """Start blocks of mode `hc`, given in the network's order, as equation 14 of arXiv 2409.19606 has it.

    Block k reads stream k mod n alone, and phi is zero: the reading in turn is what makes the streams part. Raises
    `BadInput` for another mode.
    """
    for place, block in enumerate(blocks):
        if block.mode != "hc":
            raise BadInput(f"reading in turn is the start of mode hc, got {block.mode}: leave the blocks as they start")
        n = block.streams
        with torch.no_grad():
            block.bias[:n] = torch.eye(n)[place % n]
            if block.dynamic:
                block.phi.zero_()
