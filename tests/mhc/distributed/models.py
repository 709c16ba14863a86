"""A small model of hyper-connections whose gradients depend on every parameter, and how gradients are compared."""

import torch
from torch import nn

import mhc
from mhc.modules.recompute import recompute

WIDTH, STREAMS, TOKENS = 16, 4, 8
RUNNERS = {"stack": mhc.HyperConnectionStack, "recompute": lambda made: recompute(made, segment=2)}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, u):
        return self.down(nn.functional.gelu(self.up(self.norm(u))))


def blocks(count=4, modes=("mhc",)):
    """Blocks away from where they start, the same on every rank."""
    torch.manual_seed(1)
    made = [mhc.HyperConnection(WIDTH, STREAMS, Mlp(), mode=modes[i % len(modes)]) for i in range(count)]
    for block in made:
        if block.mode != "residual":
            with torch.no_grad():
                block.alpha.fill_(0.7)
                block.bias.add_(torch.randn_like(block.bias))
    return made


def expand(h, streams=STREAMS):
    """Unequal streams: between equal ones the gradient of the first block's res cancels to rounding noise."""
    return mhc.expand_streams(h, streams) * torch.linspace(0.5, 1.5, streams, dtype=h.dtype).unsqueeze(-1)


class Model(nn.Module):
    """h [batch, C] -> [batch, C]: an embedding, streams, blocks, a head."""

    def __init__(self, made, runner="stack"):
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.reduce = mhc.StreamHead(WIDTH, STREAMS)
        self.blocks = RUNNERS[runner](made)

    def forward(self, h):
        return self.head(self.reduce(self.blocks(expand(self.embed(h)))))


def batch(tokens=TOKENS):
    torch.manual_seed(2)
    return torch.randn(tokens, WIDTH), torch.randn(tokens, WIDTH)


def loss_of(result, target):
    return nn.functional.mse_loss(result, target)


def gradients(model):
    """The gradients by parameter, whole also where they are sharded; raises where one is missing."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad
        found[name.removeprefix("module.")] = (
            (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()
        )
    return found


def expect_same(found, wanted, within=1e-4):
    """Equal names, and each gradient within a part of its norm.

    Float32 rounds to 6e-8; most gradients agree to 1e-6. Alpha's is a sum of a few hundred terms of both signs that
    cancel to a hundredth: 1e-4. A gradient of a microbatch that is lost or counted twice is off by a tenth.
    """
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        off = (found[name].double() - want.double()).norm() / want.double().norm()
        assert off <= within, f"{name} is off by {off:.1e} of its norm"
