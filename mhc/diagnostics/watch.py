"""Watchers of the residual maps that a model's connections compute in the forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import nn

from mhc.diagnostics import gains
from mhc.modules.hyper_connection import HyperConnection
from tiles.errors import BadInput


@dataclass(frozen=True)
class Measures:
    """Measures of the residual maps of L layers: one entry a layer, in the model's order.

    The lists hold means over tokens of each token's own measure (`mhc.diagnostics.gains`), as in figure 3 of arXiv
    2512.24880. A composite runs from its layer to the last one. `mappings` and `composites` [L, n, n] are maps averaged
    over tokens, as in its figure 8, float64 on the CPU. A mean of gains is never below the gain of the mean map.
    """

    names: list[str]
    forward: list[float]
    backward: list[float]
    composite_forward: list[float]
    composite_backward: list[float]
    column_error: list[float]
    spectral_norm: list[float]
    entropy: list[float]
    mappings: torch.Tensor
    composites: torch.Tensor

    def series(self) -> dict[str, list[float]]:
        """The lists of numbers by name."""
        skip = ("names", "mappings", "composites")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skip}


@torch.no_grad()
def measure(layers: Mapping[str, torch.Tensor]) -> Measures:
    """Measure res [..., n, n] of every named layer, all of one shape. Raises `BadInput`."""
    if not layers:
        raise BadInput("measure needs res of at least one layer, got none: run a forward of mode mhc or hc first")
    maps = [res.double().reshape(-1, *res.shape[-2:]) for res in layers.values()]
    products = gains.composites(maps)

    def means(of: Callable[[torch.Tensor], torch.Tensor], over: list[torch.Tensor]) -> list[float]:
        return torch.stack([of(res).mean() for res in over]).tolist()

    return Measures(
        names=list(layers),
        forward=means(gains.forward_gain, maps),
        backward=means(gains.backward_gain, maps),
        composite_forward=means(gains.forward_gain, products),
        composite_backward=means(gains.backward_gain, products),
        column_error=means(gains.column_error, maps),
        spectral_norm=means(gains.spectral_norm, maps),
        entropy=means(gains.entropy, maps),
        mappings=torch.stack([res.mean(0) for res in maps]).cpu(),
        composites=torch.stack([res.mean(0) for res in products]).cpu(),
    )


class Watch:
    """Records res of the latest forward for every `HyperConnection` in a model, to be measured.

    Layers are in the order of `model.named_modules()`, which should be the order they run in; blocks of mode `residual`
    have no res. Recording costs no time and the memory of res; `measure` runs a few small ops a layer. Use it as a
    context manager, or call `close` to stop. Raises `BadInput` where the model has no connection.
    """

    def __init__(self, model: nn.Module) -> None:
        self._order = list(_connections(model))
        self._seen: dict[str, torch.Tensor] = {}
        self.close = _attach(model, self._keep)

    def _keep(self, name: str, block: HyperConnection, res: torch.Tensor) -> None:
        self._seen[name] = res

    def layers(self) -> dict[str, torch.Tensor]:
        """res [..., n, n] of the latest forward by the block's name, float32 and detached."""
        return {name: self._seen[name] for name in self._order if name in self._seen}

    def measure(self) -> Measures:
        """The measures of the latest forward; raises `BadInput` where there was none."""
        return measure(self.layers())

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_finite(model: nn.Module) -> Callable[[], None]:
    """Make every forward raise `BadInput` at the first block with NaN or infinity in phi, alpha, bias, res, the
    sublayer's input u or its output f; the message names block and tensor.

    res alone is not enough: kernels compiled for a CPU assume finite numbers, and may make a finite res from NaN
    logits. Returns a function that ends the checks. For debugging: it costs a pass over each tensor, and on a GPU a
    synchronisation. Raises `BadInput` where the model has no connection.
    """
    ends = [_attach(model, _expect_finite_map)]
    for name, block in _connections(model).items():
        ends.append(block.sublayer.register_forward_hook(partial(_expect_finite_sublayer, name)).remove)

    def end() -> None:
        for one in ends:
            one()

    return end


def _expect_finite_map(name: str, block: HyperConnection, res: torch.Tensor) -> None:
    for parameter, value in block.named_parameters(recurse=False):
        _expect_finite(parameter, name, value, "look at the gradients and the learning rate of the step before")
    _expect_finite("res", name, res, "look at the streams that enter this block")


def _expect_finite_sublayer(name: str, sublayer: nn.Module, given: tuple[torch.Tensor, ...], returned: object) -> None:
    _expect_finite("u", name, given[0], "look at the streams that enter this block")
    f = returned[0] if isinstance(returned, tuple) else returned
    assert isinstance(f, torch.Tensor)
    _expect_finite("f", name, f, f"look at its sublayer, {type(sublayer).__name__}")


def _expect_finite(what: str, name: str, value: torch.Tensor, advice: str) -> None:
    finite = value.detach().isfinite()
    if not finite.all():
        bad = int((~finite).sum())
        raise BadInput(
            f"{what} of block {name} must be finite, got NaN or infinity in {bad} of {finite.numel()} values: {advice}"
        )


def _attach(model: nn.Module, look: Callable[[str, HyperConnection, torch.Tensor], None]) -> Callable[[], None]:
    """Call look(name, block, res) whenever a connection computes res; returns a function that ends this."""
    blocks = _connections(model)
    if not blocks:
        raise BadInput(f"a model to watch must hold a HyperConnection, got {type(model).__name__}: wrap its layers")

    watchers = {name: partial(look, name) for name in blocks}
    for name, block in blocks.items():
        block.watchers.append(watchers[name])

    def detach() -> None:
        for name, block in blocks.items():
            if watchers[name] in block.watchers:
                block.watchers.remove(watchers[name])

    return detach


def _connections(model: nn.Module) -> dict[str, HyperConnection]:
    return {name or "model": module for name, module in model.named_modules() if isinstance(module, HyperConnection)}
