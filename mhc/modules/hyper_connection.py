"""HyperConnection: a residual connection over n streams around any sublayer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import isqrt
from typing import Any, Literal, get_args

import torch
from torch import nn

from mhc import functional, manifolds
from mhc.checks import check_problem, check_scalars, stream_shape
from mhc.modules.grad_accumulate import grad_accumulating_views
from mhc.modules.init import Init, add_parameters, initial_parameters, reset_parameters
from mhc.modules.pre_with_residual import pre_with_residual
from tiles.errors import BadInput

Mode = Literal["mhc", "hc", "residual"]

FUSED_MANIFOLD = "sinkhorn"
"""The manifold that the kernels of pre and step compute."""

IDENTITY_MANIFOLD = "identity"
"""The one that they have no need to compute: streams are not mixed."""


class HyperConnection(nn.Module):
    """x [..., n, C] -> x' [..., n, C]: u = Σ_i pre_i x_i;  x'_i = Σ_j res_ij x_j + post_i sublayer(u).

    The sublayer maps [..., C] to [..., C] and contains its own normalisation, as in a pre-norm network, or leaves it to
    `norm`: then it gets norm(u). Further arguments of the block go to it. If it returns a tuple, the first element is
    its output, and the block returns (x', *rest). With n equal streams, alpha = 0 and the initial bias, the connection
    is the residual h + sublayer(h).

    Streams are float32, bfloat16 or float16; pre, post and res are float32, also under autocast and in a model that was
    cast. A sublayer may have another dtype than the streams under autocast; its output is cast to theirs.

    Args:
        width, streams: C, a multiple of 8, and n in 1..16.
        sublayer: the module to connect.
        norm: an `nn.RMSNorm` of the width, with a weight, for the sublayer's input. Where the block is `fused`, kernels
            normalise u while they have it, and the norm's own forward (with hooks on it) does not run.
        mode: `mhc`, manifold-constrained (arXiv 2512.24880): pre and post are sigmoids, res is doubly stochastic;
            `hc`, unconstrained (arXiv 2409.19606): each is alpha · tanh(projection) + bias, where the projection sees
            all streams of a token at once, as mHC's does, and not each by itself;
            `residual`, no parameters: u is the mean of the streams, and sublayer(u) is added to each of them.
        manifold: what makes res in mode `mhc`: a name of `mhc.manifolds.NAMES`, or a function like those. Only
            `sinkhorn` and `identity` run in the fused kernels; `identity` has no logits of res (N = 2n, alpha [2]).
        init: the initial parameters, `paper` or `identity`; see `mhc.modules.init`.
        dynamic: whether pre, post and res depend on the token. If not, they are functions of the bias only (the static
            hyper-connections of arXiv 2409.19606), and there are no phi and alpha.
        dropout: probability of dropping an element of the sublayer's output in training.
        rounds: Sinkhorn rounds (manifold `sinkhorn` only).
        eps: added to the mean square of a token's streams in the norm.
        hc_eps: added to pre; in the manifold `sinkhorn` also to the softmax and every sum (1e-6 in DeepSeek-V4's maps),
            in `identity` also to post (1e-6 in Hunyuan-V4's).
        post_scale: the factor of post's sigmoid. Both of mode `mhc` only.

    Parameters (float32; in `residual` none): phi [N, K], alpha [3] (pre, post, res) and bias [N], N packed
    [pre | post | res row-major]. `state_dict` has these names, `norm.weight`, and the sublayer's under `sublayer`;
    loading one of another shape or mode raises `BadInput`. `watchers` are called with the block and res [..., n, n],
    detached, in every forward; copies of the block have none.

    Raises `BadInput` (a `ValueError`) for an unsupported shape, mode, manifold or init.

    Example:
        >>> block = mhc.HyperConnection(512, 4, nn.Sequential(nn.RMSNorm(512), nn.Linear(512, 512)))
        >>> x = mhc.expand_streams(torch.randn(2, 128, 512), streams=4)  # [2, 128, 4, 512]
        >>> h = mhc.reduce_streams(block(x))  # [2, 128, 512]
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
        norm: nn.RMSNorm | None = None,
        mode: Mode = "mhc",
        manifold: str | manifolds.Manifold = FUSED_MANIFOLD,
        init: Init = "paper",
        dynamic: bool = True,
        dropout: float = 0.0,
        rounds: int = functional.ROUNDS,
        eps: float = functional.EPS,
        hc_eps: float = 0.0,
        post_scale: float = functional.POST_SCALE,
    ) -> None:
        super().__init__()
        check_problem(streams, width)
        check_scalars(hc_eps, post_scale)
        _check_norm(norm, width)
        _check_choice("mode", mode, get_args(Mode))
        _check_choice("init", init, get_args(Init))
        if not 0 <= dropout < 1:
            raise BadInput(f"dropout must be in [0, 1), got {dropout}: give the share to drop")
        if mode != "mhc" and manifold != FUSED_MANIFOLD:
            raise BadInput(f"a manifold is for mode mhc, got {manifold} with mode {mode}: leave it out")
        if mode != "mhc" and (hc_eps, post_scale) != (0.0, functional.POST_SCALE):
            text = f"got {hc_eps} and {post_scale} with mode {mode}: leave them out"
            raise BadInput(f"hc_eps and post_scale are for mode mhc, {text}")
        manifold = IDENTITY_MANIFOLD if manifold is manifolds.identity_of else manifold
        self.width, self.streams, self.sublayer, self.norm = width, streams, sublayer, norm
        self.mode, self.manifold, self.init, self.dynamic = mode, manifold, init, dynamic
        self.dropout, self.rounds, self.eps, self.hc_eps, self.post_scale = dropout, rounds, eps, hc_eps, post_scale
        self.watchers: list[Callable[[HyperConnection, torch.Tensor], None]] = []
        self.to_res = _manifold(manifold, streams, rounds, hc_eps)
        add_parameters(self, self._initial_parameters())

    def reset_parameters(self) -> None:
        """Initialise the parameters again; for those that were made on the meta device."""
        reset_parameters(self, self._initial_parameters())

    def _initial_parameters(self) -> dict[str, torch.Tensor]:
        if self.mode == "residual":
            return {}
        settings: dict[str, Any] = {"dynamic": self.dynamic, "init": self.init}
        return initial_parameters(
            self.streams, self.width, constrained=self.mode == "mhc", mixes=self.mixes, **settings
        )

    @property
    def fused(self) -> bool:
        """Whether `mhc.functional.pre` and `step` compute this block's maps; else `maps` does."""
        return self.mode == "mhc" and self.manifold in (FUSED_MANIFOLD, IDENTITY_MANIFOLD) and self.dynamic

    @property
    def mixes(self) -> bool:
        """Whether res mixes streams: whether it is made of logits, and not the identity."""
        return self.mode != "mhc" or self.manifold != IDENTITY_MANIFOLD

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[Any, ...]:
        """x [..., n, C] -> x' like x, or (x', *rest) if the sublayer returns more; it gets args and kwargs."""
        if self.mode == "residual":
            self._check(x)
            f, rest = self.call_sublayer(self.normalised(x.mean(-2)), *args, **kwargs)
            x_next = x + f.unsqueeze(-2)
        else:
            u, post, res, x = self.pre_with_residual(x)
            f, rest = self.call_sublayer(u, *args, **kwargs)
            x_next = functional.merge(x, f, res, post)
        return (x_next, *rest) if rest else x_next

    def pre_with_residual(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The sublayer's input [..., C], post [..., n], res [..., n, n] or None (the identity), and x as the residual,
        for merge or step only (`mhc.modules.pre_with_residual`)."""
        self._check(x)
        if self.fused:
            u, post, res, x = pre_with_residual(x, *self.parameters_for_ops(), **self.settings_with_norm())
        else:
            x_project, x_aggregate, x = grad_accumulating_views(x, 3)
            pre, post, res = self.maps(x_project)
            u = self.normalised(functional.aggregate(x_aggregate, pre))
        self.notify_watchers(post, res)
        return u, post, res, x

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """pre [..., n], post [..., n] and res [..., n, n] or None (the identity): by kernels for `sinkhorn`, else by
        `mhc.functional.project` and plain torch."""
        n, leading = self.streams, x.shape[:-2]
        if self.fused and self.mixes:
            phi, alpha, bias = self.parameters_for_ops()
            z, s = functional.project(x, phi)
            settings = self.settings_for_ops()
            return functional.coefficients(z, s, alpha, bias, streams=n, width=self.width, **settings)
        with torch.autocast(x.device.type, enabled=False):
            h = self.bias.float()
            sizes = (n, n, n * n)[: 3 if self.mixes else 2]
            if self.dynamic:
                phi, alpha, bias = self.parameters_for_ops()
                z, s = functional.project(x, _all_rows(phi, n))
                t = z[..., : len(phi)] * torch.rsqrt(s / (n * self.width) + self.eps).unsqueeze(-1)
                gate = torch.cat([each.expand(size) for each, size in zip(alpha, sizes, strict=True)])
                h = gate * (torch.tanh(t) if self.mode == "hc" else t) + bias
            pre, post, *logits = h.split(sizes, dim=-1)
            if self.mode == "mhc":
                pre, post = pre.sigmoid() + self.hc_eps, self.post_scale * post.sigmoid()
            if not self.mixes:
                return pre.expand(*leading, n), (post + self.hc_eps).expand(*leading, n), None
            res = logits[0].unflatten(-1, (n, n))
            res = self.to_res(res) if self.mode == "mhc" else res
        return pre.expand(*leading, n), post.expand(*leading, n), res.expand(*leading, n, n)

    def call_sublayer(self, u: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """f [..., C], the sublayer's output after dropout, cast to u's dtype, and the rest of what it returned.

        Raises `BadInput` where f has not u's shape.
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
            f = nn.functional.dropout(f, self.dropout)
        return f.to(u.dtype), tuple(rest)

    def notify_watchers(self, post: torch.Tensor, res: torch.Tensor | None) -> None:
        """Call every watcher with res [..., n, n], detached; post [..., n] belongs to it."""
        for watcher in self.watchers:
            if res is None:
                res = manifolds.identity_of(post.unsqueeze(-1).expand(*post.shape, self.streams))
            watcher(self, res.detach())

    def parameters_for_ops(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """phi, alpha, bias in float32, also where they were cast with the model."""
        return self.phi.float(), self.alpha.float(), self.bias.float()

    def settings_for_ops(self) -> dict[str, Any]:
        """rounds, eps, hc_eps and post_scale, as `mhc.functional.pre` and `step` take them."""
        return {"rounds": self.rounds, "eps": self.eps, "hc_eps": self.hc_eps, "post_scale": self.post_scale}

    def settings_with_norm(self) -> dict[str, Any]:
        """The same, and norm_weight and norm_eps where there is a norm."""
        if self.norm is None:
            return self.settings_for_ops()
        eps = torch.finfo(torch.float32).eps if self.norm.eps is None else self.norm.eps
        return {**self.settings_for_ops(), "norm_weight": self.norm.weight, "norm_eps": eps}

    def normalised(self, u: torch.Tensor) -> torch.Tensor:
        """u [..., C] after the norm, where there is one; for where no kernel has done it."""
        return u if self.norm is None else self.norm(u).to(u.dtype)

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        shown = f"width={self.width}, streams={self.streams}, {self._describe_maps()}, dynamic={self.dynamic}"
        shown += f", hc_eps={self.hc_eps}" if self.hc_eps else ""
        shown += f", post_scale={self.post_scale}" if self.post_scale != functional.POST_SCALE else ""
        return shown + (f", dropout={self.dropout}" if self.dropout else "")

    def _describe_maps(self) -> str:
        if self.mode != "mhc":
            return f"mode={self.mode}"
        return f"mode=mhc, manifold={_name_of(self.manifold)}"

    def _check(self, x: torch.Tensor) -> None:
        wanted = (*x.shape[:-2], self.streams, self.width)
        if x.shape != wanted:
            raise BadInput(
                f"x must be {wanted}, as the block has {self.streams} streams of width {self.width}, "
                f"got {tuple(x.shape)}: reshape it, or make streams with mhc.expand_streams"
            )
        stream_shape(x)

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles: everything but the watchers."""
        return {**self.__dict__, "watchers": []}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add mode and manifold, which shapes do not tell, to torch's metadata, beside the version."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.get(prefix[:-1], {})["maps"] = self._describe_maps()

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
        """Load, after a check that the checkpoint is of a block like this. It may hold none (strict=False)."""
        if not self.mixes:
            state_dict = _without_res(state_dict, prefix, self.streams)
        names = ("phi", "alpha", "bias")
        held = {name: tuple(state_dict[prefix + name].shape) for name in names if prefix + name in state_dict}
        wanted = {name: tuple(parameter.shape) for name, parameter in self._parameters.items() if parameter is not None}
        maps = self._describe_maps()
        held_maps = _OBJECT.sub(r"\1", local_metadata.get("maps", maps))
        differs = any(held[name] != wanted[name] for name in held.keys() & wanted.keys())
        lacks = any((name in held) != (name in wanted) for name in ("phi", "bias"))
        if differs or (held and lacks) or held_maps != maps:
            raise BadInput(
                f"a checkpoint must be of a block like {prefix[:-1] or 'this'}, {maps}, {_describe_shapes(wanted)}, "
                f"got {held_maps}, {_describe_shapes(held)}: build the block as the checkpoint's was"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _all_rows(phi: torch.Tensor, streams: int) -> torch.Tensor:
    """phi [n² + 2n, K], which `project` takes: with zeros for the logits that there are not."""
    return nn.functional.pad(phi, (0, 0, 0, streams * streams + 2 * streams - len(phi)))


def _check_norm(norm: nn.RMSNorm | None, width: int) -> None:
    if norm is None or (isinstance(norm, nn.RMSNorm) and norm.normalized_shape == (width,) and norm.weight is not None):
        return
    raise BadInput(
        f"norm must be an nn.RMSNorm of ({width},) with a weight, got {norm}: leave other norms in the sublayer"
    )


def _check_choice(name: str, value: Any, offered: tuple[str, ...]) -> None:
    if value not in offered:
        raise BadInput(f"{name} must be one of {', '.join(offered)}, got {value}: choose one of them")


def _manifold(manifold: str | manifolds.Manifold, streams: int, rounds: int, hc_eps: float) -> manifolds.Manifold:
    """The function that makes res; raises `BadInput` where it is unknown or does not support this stream count."""
    if manifold == FUSED_MANIFOLD:
        return partial(functional.sinkhorn, rounds=rounds, hc_eps=hc_eps)
    to_res = manifolds.named(manifold) if isinstance(manifold, str) else manifold
    to_res(torch.zeros(streams, streams, dtype=torch.float32, device="cpu"))
    return to_res


_OBJECT = re.compile(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-f]+>|(?<=SinkhornToTolerance)\(.*\)")
"""What checkpoints said of a manifold that is an object, before they gave its type alone: an address, or settings."""


def _name_of(manifold: Any) -> str:
    """A manifold's name, the same in every process: its own, else that of its function, else that of its type."""
    if isinstance(manifold, str):
        return manifold
    function = getattr(manifold, "func", manifold)  # of a functools.partial
    return str(getattr(function, "__name__", type(manifold).__name__))


def _without_res(state_dict: Mapping[str, Any], prefix: str, streams: int) -> Mapping[str, Any]:
    """The state with parameters of pre and post alone: identities once had logits of res, which nothing read."""
    held, kept = streams * streams + 2 * streams, {"phi": 2 * streams, "bias": 2 * streams, "alpha": 2}
    if prefix + "bias" not in state_dict or len(state_dict[prefix + "bias"]) != held:
        return state_dict
    found = {prefix + name: count for name, count in kept.items() if prefix + name in state_dict}
    return {**state_dict, **{key: state_dict[key][:count] for key, count in found.items()}}


def _describe_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A description of the block whose parameters have these shapes."""
    if "bias" not in shapes:
        return "no parameters"
    count = shapes["bias"][0]
    streams = count // 2 if shapes.get("alpha") == (2,) else isqrt(count + 1) - 1
    return f"{streams} streams, " + (f"width {shapes['phi'][1] // streams}" if "phi" in shapes else "static")


def init_cyclic_pre(blocks: Iterable[HyperConnection]) -> None:
    """Initialise blocks of mode `hc`, in the network's order, by equation 14 of arXiv 2409.19606.

    pre of block k is one at stream k mod n and zero elsewhere, which makes equal streams diverge, and phi is zero.
    Raises `BadInput` for another mode.
    """
    for index, block in enumerate(blocks):
        if block.mode != "hc":
            raise BadInput(f"a cyclic pre is the start of mode hc, got {block.mode}: leave the blocks as they are")
        n = block.streams
        with torch.no_grad():
            block.bias[:n] = torch.eye(n, device=block.bias.device)[index % n]
            if block.dynamic:
                block.phi.zero_()
