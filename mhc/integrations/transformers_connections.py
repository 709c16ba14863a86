"""The hyper-connections and heads of transformers' models, run by our ops on the parameters that they have.

Their comb is our resᵀ, so the res block of fn and base is transposed on the way to an op. Parameters of other dtypes
than float32 are cast, as in their own code. What modules return are no views, as FSDP2 needs it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from mhc import functional
from mhc.converters.packing import transpose_res
from mhc.integrations import rms_norm
from mhc.integrations.patched_class import Patched
from mhc.modules.pre_with_residual import pre_with_residual
from mhc.modules.unview import unview


class Before(NamedTuple):
    """What is before a sublayer: the streams x, its input u, and the maps that its output will be merged with;
    `normed` says whether u has gone through the norm of the sublayer's input."""

    x: torch.Tensor
    u: torch.Tensor
    post: torch.Tensor
    res: torch.Tensor | None
    normed: bool = False


class Connection(Patched):
    """x [..., n, C] -> everything before a sublayer, in one pass over the streams."""

    hc_mult: int
    hc_eps: float
    input_norm: Any
    fn: nn.Parameter
    base: nn.Parameter
    scale: nn.Parameter

    gates: ClassVar[int]
    """The length of scale."""

    @staticmethod
    @abstractmethod
    def rows(streams: int) -> int:
        """N, the rows of fn."""

    @property
    def matrix(self) -> torch.Tensor:
        """The largest parameter."""
        return self.fn

    def parameters_for_ops(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """phi, alpha and bias in float32."""
        return self.fn.float(), self.scale.float(), self.base.float()

    @abstractmethod
    def settings_for_ops(self) -> dict[str, Any]:
        """rounds, eps, hc_eps and post_scale, as the module says."""

    def before(self, x: torch.Tensor, norm: nn.Module | None) -> Before:
        """Everything before the sublayer, with an RMSNorm of its input where one is given; its x is for merge or step
        alone."""
        settings = self.settings_for_ops() | rms_norm.settings_for_ops(norm)
        u, post, res, x = pre_with_residual(x, *self.parameters_for_ops(), **settings)
        return Before(x, u, post, res, normed=norm is not None)


class SinkhornConnection(Connection):
    """DeepSeek-V4's and GLM-5.3's: x [B, S, n, C] -> (post [B, S, n], comb = resᵀ [B, S, n, n], u [B, S, C])."""

    hc_sinkhorn_iters: int

    gates = 3

    @staticmethod
    def rows(streams: int) -> int:
        """See `Connection`."""
        return streams * streams + 2 * streams

    def parameters_for_ops(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Connection`; the res block is transposed."""
        phi, alpha, bias = super().parameters_for_ops()
        return transpose_res(phi, self.hc_mult), alpha, transpose_res(bias, self.hc_mult)

    def settings_for_ops(self) -> dict[str, Any]:
        """See `Connection`."""
        settings = {"eps": self.input_norm.eps, "hc_eps": self.hc_eps, "post_scale": functional.POST_SCALE}
        return {"rounds": self.hc_sinkhorn_iters, **settings}

    def forward(self, hidden_streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x -> post, comb, u."""
        u, post, res = functional.pre(hidden_streams, *self.parameters_for_ops(), **self.settings_for_ops())
        assert res is not None
        return unview(post), unview(res.transpose(-1, -2)), unview(u)


class IdentityConnection(Connection):
    """Hunyuan-V4's, whose res is the identity: x [B, S, n, C] -> (post [B, S, n], u [B, S, C])."""

    hc_post_magnitude: float

    gates = 2

    @staticmethod
    def rows(streams: int) -> int:
        """See `Connection`."""
        return 2 * streams

    def settings_for_ops(self) -> dict[str, Any]:
        """See `Connection`."""
        settings = {"eps": self.input_norm.eps, "hc_eps": self.hc_eps, "post_scale": self.hc_post_magnitude}
        return {"rounds": functional.ROUNDS, **settings}

    def forward(self, hidden_streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x -> post, u."""
        u, post, _ = functional.pre(hidden_streams, *self.parameters_for_ops(), **self.settings_for_ops())
        return unview(post), unview(u)


class Ready(NamedTuple):
    """What the layer before has computed for a layer or head, and the version that its streams had then."""

    before: Before
    version: int | None


class Receiver(Patched):
    """A module whose `before` may have been computed by the layer before it, together with that layer's end."""

    ready: Ready | None = None
    own_attributes: tuple[str, ...] = ("ready",)

    def take_ready(self, x: torch.Tensor) -> Before | None:
        """What was computed from these very streams, unless somebody has written to them since."""
        ready, self.ready = self.ready, None
        if ready is None or ready.before.x is not x or ready.version != version_of(x):
            return None
        return ready.before

    def receive(self, before: Before) -> None:
        """Keep what the layer before has computed."""
        self.ready = Ready(before, version_of(before.x))


class Head(Receiver):
    """A learned head, x [B, S, n, C] -> h [B, S, C]: the u of a connection whose post and res nobody uses."""

    eps: float
    input_norm: Any
    hc_mult: int
    hc_fn: nn.Parameter
    hc_base: nn.Parameter
    hc_scale: nn.Parameter

    follows: ClassVar[type[Connection]]
    """The connections that the model has, whose kernels serve the head too."""

    @property
    def matrix(self) -> torch.Tensor:
        """The largest parameter."""
        return self.hc_fn

    def parameters_for_ops(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """phi, alpha and bias of such a connection, zero where the head has none."""
        more, gates = self.follows.rows(self.hc_mult) - self.hc_mult, self.follows.gates - 1
        phi, alpha = pad(self.hc_fn.float(), (0, 0, 0, more)), pad(self.hc_scale.float(), (0, gates))
        return phi, alpha, pad(self.hc_base.float(), (0, more))

    def settings_for_ops(self) -> dict[str, Any]:
        """rounds, eps, hc_eps and post_scale."""
        return {"eps": self.input_norm.eps, "hc_eps": self.eps, "post_scale": functional.POST_SCALE}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x -> h in x's dtype."""
        if ready := self.take_ready(x):
            return unview(ready.u)
        return unview(functional.pre(x, *self.parameters_for_ops(), **self.settings_for_ops())[0])


class SinkhornHead(Head):
    """The head of a model with `SinkhornConnection`."""

    follows = SinkhornConnection


class IdentityHead(Head):
    """The head of a model with `IdentityConnection`."""

    follows = IdentityConnection


def version_of(x: torch.Tensor) -> int | None:
    """The number of times that x was written to; None where torch does not say, in inference and under a compiler."""
    counts = not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
    return x._version if counts else None
