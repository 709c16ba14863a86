"""A small stack to watch, and one forward of it."""

import torch

import mhc


def stack(mode="mhc", blocks=3, streams=4, width=16):
    torch.manual_seed(0)
    layers = [mhc.HyperConnection(width, streams, torch.nn.Linear(width, width), mode=mode) for _ in range(blocks)]
    return mhc.HyperConnectionStack(layers)


def forward(model, tokens=(2, 5), streams=4, width=16):
    return model(torch.randn(*tokens, streams, width, generator=torch.Generator().manual_seed(1)))
