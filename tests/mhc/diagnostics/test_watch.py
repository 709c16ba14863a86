"""Watchers of a model's residual maps, and the check that values are finite. The measures: test_gains."""

import copy
import math

import pytest
import torch
from watched import forward, stack

import mhc
from mhc.diagnostics import Watch, check_finite, composites, entropy, forward_gain, measure, spectral_norm
from tiles.errors import BadInput


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: forward_gain(torch.zeros(2, 3)), "(2, 3)"),
        (lambda: entropy(torch.zeros(3)), "(3,)"),
        (lambda: spectral_norm(torch.zeros(2, 2, dtype=torch.int64)), "int64"),
        (lambda: composites([torch.zeros(4, 2, 2), torch.zeros(5, 2, 2)]), "(4, 2, 2), (5, 2, 2)"),
        (lambda: measure({}), "got none"),
        (lambda: Watch(torch.nn.Linear(2, 2)), "got Linear"),
        (lambda: check_finite(torch.nn.Identity()), "got Identity"),
        (lambda: Watch(stack()).measure(), "got none"),
    ],
)
def test_bad_input_is_one_line(call, says):
    with pytest.raises(BadInput) as raised:
        call()
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("mode", ["mhc", "hc"])
def test_watch_sees_every_block_of_a_stack_as_alone(kernels, mode):
    model = stack(mode)
    with Watch(model) as watch:
        forward(model)
        in_stack = watch.layers()
        x = torch.randn(2, 5, 4, 16, generator=torch.Generator().manual_seed(1))
        for block in model.blocks:
            x = block(x)
        alone = watch.layers()
    assert list(in_stack) == list(alone) == ["blocks.0", "blocks.1", "blocks.2"]
    for name, res in in_stack.items():
        assert res.shape == (2, 5, 4, 4)
        assert not res.requires_grad
        torch.testing.assert_close(res, alone[name], rtol=1e-4, atol=1e-5)  # the joined pass sums in another order


def test_watch_ends_and_changes_nothing():
    model = stack()
    expected = forward(model)
    with Watch(model) as first, Watch(model) as second:
        assert torch.equal(forward(model), expected)
    assert all(not block.watchers for block in model.blocks)
    before = first.layers()["blocks.0"].clone()
    model.blocks[0].bias.data.add_(torch.randn(24))
    forward(model)
    assert torch.equal(first.layers()["blocks.0"], before)
    assert torch.equal(second.layers()["blocks.0"], before)
    second.close()
    assert list(model.state_dict()) == list(stack().state_dict())


def test_a_watched_model_can_be_copied_and_trained():
    model = stack()
    watch = Watch(model)
    twin = copy.deepcopy(model)
    forward(model).square().mean().backward()
    assert model.blocks[0].phi.grad.isfinite().all()
    assert len(watch.layers()) == 3
    del watch
    forward(twin)


def test_a_compiled_model_is_watched_too():
    model = stack("hc", blocks=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with Watch(model) as watch:
        forward(compiled)
        before = watch.measure()
        model.blocks[0].bias.data[8] += 1  # res[0, 0]
        forward(compiled)
        after = watch.measure()
    assert after.forward[0] == pytest.approx(
        before.forward[0] + 1, abs=0.1
    )  # the largest row was another by at most 0.1
    assert after.forward[1] == pytest.approx(before.forward[1], abs=0.1)


def test_residual_blocks_have_no_map_and_mixed_stacks_do():
    blocks = [mhc.HyperConnection(16, 4, torch.nn.Identity(), mode=mode) for mode in ("residual", "mhc", "hc")]
    with Watch(model := mhc.HyperConnectionStack(blocks)) as watch:
        forward(model)
        assert list(watch.layers()) == ["blocks.1", "blocks.2"]


def test_a_block_by_itself_and_one_token():
    block = mhc.HyperConnection(16, 4, torch.nn.Identity())
    with Watch(block) as watch:
        block(torch.randn(4, 16))
        found = watch.measure()
    assert found.names == ["model"]
    assert found.forward == pytest.approx([1.0], abs=1e-6)


def test_mhc_gains_are_one_and_hc_gains_are_what_its_maps_say():
    with Watch(model := stack("mhc", blocks=60)) as watch:
        forward(model)
        constrained = watch.measure()
    assert max(constrained.composite_forward) == pytest.approx(1, abs=1e-5)  # rows are divided last
    assert max(constrained.composite_backward) < 1.05  # columns as 20 rounds leave them
    with Watch(model := stack("hc", blocks=60)) as watch:
        for block in model.blocks:
            block.bias.data[8:].add_(0.1 * torch.eye(4).flatten())
        forward(model)
        free = watch.measure()
    assert free.composite_forward[0] > 1.1**60 / 3 > 100


@pytest.mark.parametrize("mode", ["mhc", "hc"])
@pytest.mark.parametrize(("parameter", "values"), [("phi", 24 * 64), ("alpha", 3), ("bias", 24)])
def test_check_finite_names_the_block_whose_logits_are_nan(kernels, mode, parameter, values):
    """Compiled kernels for a CPU make finite maps of them, which is why parameters are looked at."""
    model = torch.nn.ModuleDict({"decoder": stack(mode)})
    done = check_finite(model)
    forward(model["decoder"])
    getattr(model["decoder"].blocks[1], parameter).data.view(-1)[-1] = math.nan
    with pytest.raises(BadInput, match=rf"{parameter} of block decoder\.blocks\.1 .*1 of {values} values") as raised:
        forward(model["decoder"])
    assert len(str(raised.value).splitlines()) == 1
    done()
    forward(model["decoder"])
    assert all(not block.watchers for block in model["decoder"].blocks)


@pytest.mark.parametrize("mode", ["mhc", "hc", "residual"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_check_finite_finds_bad_streams_and_a_bad_sublayer(kernels, mode, bad):
    model = stack(mode)
    check_finite(model)
    x = torch.randn(3, 4, 16)
    model.blocks[2].sublayer.bias.data[3] = bad
    with pytest.raises(BadInput, match=r"f of block blocks\.2 .* 3 of 48 values: look at its sublayer, Linear"):
        model(x)
    x[2, 0, 0] = bad
    with pytest.raises(BadInput, match=r"(res|u) of block blocks\.0 .*streams that enter"):
        model(x)


class Pair(torch.nn.Module):
    """A sublayer that gives a second output."""

    def forward(self, u):
        return u, u.sum()


def test_check_finite_takes_sublayers_of_several_outputs():
    block = mhc.HyperConnection(16, 4, Pair())
    check_finite(block)
    found, total = block(torch.randn(3, 4, 16))
    assert found.isfinite().all()
    assert total.isfinite()
