"""Patched models of transformers under DDP and FSDP2: the gradients of one process over the whole batch."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mhc

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from tiny_transformers import batch, expect_same_gradients, gradients, made, off, outcome, text_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _needs_transformers():
    pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")


def quietly(function, *arguments):
    """Without the warnings of transformers and its libraries."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def model_of(family):
    import transformers

    return quietly(made, transformers, family)


def whole(family):
    """The unpatched model's gradients, of one process."""
    return outcome(model_of(family), batch())[2]


def backward_of_part(model):
    """This rank's row of the batch; the mean over ranks of the rows' mean losses is the whole's."""
    ids = batch()[dist.get_rank() :][:1]
    model(input_ids=ids, labels=ids).loss.backward()


def full(model):
    return {
        name.removeprefix("module."): grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in gradients(model).items()
    }


def ddp(family):
    def run():
        wanted = whole(family)
        model = DistributedDataParallel(mhc.patch(model_of(family)), find_unused_parameters=True)
        for times in (1, 2):
            backward_of_part(model)
            expect_same_gradients(full(model), {name: times * grad for name, grad in wanted.items()})

    quietly(run)


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4"])
def test_ddp(ranks, family):
    ranks.run(ddp, family)


def fsdp(family, units, order):
    """Layers as units of their own, the hyper-connections too, or the model as one; patched before or after."""

    def run():
        wanted = whole(family)
        mesh = init_device_mesh("cpu", (2,))
        model = model_of(family)
        if order == "patched first":
            mhc.patch(model)
        for layer in text_model(model).layers if units != "model" else ():
            if units == "connections":
                fully_shard(layer.ffn_hc, mesh=mesh)
                fully_shard(layer.attn_hc, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if order == "sharded first":
            mhc.patch(model)
        for times in (1, 2):
            backward_of_part(model)
            expect_same_gradients(full(model), {name: times * grad for name, grad in wanted.items()})

    quietly(run)


@pytest.mark.parametrize("order", ["patched first", "sharded first"])
@pytest.mark.parametrize(
    ("family", "units"), [("deepseek_v4", "layers"), ("deepseek_v4", "model"), ("hy_v4", "layers")]
)
def test_fsdp(ranks, family, units, order):
    ranks.run(fsdp, family, units, order)


def test_fsdp_with_connections_as_units(ranks):
    ranks.run(fsdp, "deepseek_v4", "connections", "patched first")


def fsdp_in_bfloat16():
    """Sublayers in bfloat16, streams too; connections as units of their own stay float32."""

    def run():
        wanted = outcome(model_of("deepseek_v4"), batch())[1]
        mesh, model = init_device_mesh("cpu", (2,)), mhc.patch(model_of("deepseek_v4"))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for layer in text_model(model).layers:
            for connection in (layer.attn_hc, layer.ffn_hc):
                fully_shard(connection, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        ids = batch()
        found = model(input_ids=ids, labels=ids)
        found.loss.backward()
        assert off(found.logits, wanted) < 0.1
        assert all(grad.isfinite().all() for grad in full(model).values())

    quietly(run)


def test_fsdp_in_bfloat16(ranks):
    ranks.run(fsdp_in_bfloat16)
