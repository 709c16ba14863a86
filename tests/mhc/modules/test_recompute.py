"""Recomputation changes the memory held between forward and backward, and nothing else."""

import copy
import gc
import weakref
from itertools import accumulate, pairwise

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

import mhc
from mhc.modules.recompute import _SegmentForward
from mhc.modules.recompute_segments import peak_widths, segment_length

WIDTH = 16


class Counted(nn.Module):
    """A pre-norm sublayer that counts its calls, and its norm's."""

    def __init__(self, width=WIDTH, norm=nn.RMSNorm):
        super().__init__()
        self.norm, self.linear = norm(width), nn.Linear(width, width)
        self.calls = self.normalised = 0
        self.norm.register_forward_hook(lambda *_: setattr(self, "normalised", self.normalised + 1))

    def forward(self, u, by=1.0, *, shift=0.0):
        self.calls += 1
        return by * torch.tanh(self.linear(self.norm(u))) + shift


def blocks(count, streams=4, sublayer=Counted, **settings):
    torch.manual_seed(0)
    made = []
    for place in range(count):
        here = {name: value[place] if isinstance(value, list) else value for name, value in settings.items()}
        block = mhc.HyperConnection(WIDTH, streams, sublayer(), **here)
        with torch.no_grad():
            for name, parameter in block.named_parameters(recurse=False):
                parameter.add_(torch.full_like(parameter, 0.7) if name == "alpha" else torch.randn_like(parameter) / 4)
        made.append(block)
    return made


def plain(made, segments):
    """The same passes over the streams, all kept."""
    ends = list(accumulate(segments, initial=0))
    return nn.Sequential(*(mhc.HyperConnectionStack(made[start:end]) for start, end in pairwise(ends)))


def outcome(run, x, parameters, upstream=None):
    """The result, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    result = run(x)
    upstream = torch.randn(result.shape).to(result) if upstream is None else upstream
    return [result.detach(), *torch.autograd.grad(result, [x, *parameters], upstream)]


def same_bits(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def check(made, segments, x, **kwargs):
    """The bits of the passes that are all kept: nothing that is made again may differ."""
    model, parameters = mhc.recompute(made, segment=segments), [each for block in made for each in block.parameters()]
    kept = plain(made, segments)
    found = outcome(lambda x: model(x, **kwargs), x, parameters)
    if kwargs:
        wanted = outcome(lambda x: [x := stack(x, **kwargs) for stack in kept][-1], x, parameters)
    else:
        wanted = outcome(kept, x, parameters)
    assert same_bits(found, wanted)


SETTINGS = {
    "mhc": {},
    "hc": {"mode": "hc"},
    "residual": {"mode": "residual"},
    "mixed": {"mode": ["residual", "mhc", "mhc", "hc", "mhc"]},
    "static": {"dynamic": [True, False, True, False, True]},
    "manifolds": {"manifold": ["sinkhorn", "orthogonal", "sinkhorn", "identity", "sinkhorn"]},
}


SEGMENTS = [[5], [2, 2, 1], [1] * 5]


def pairwise_cases():
    """Each setting with two of the segmentations, each segmentation with all settings but two; the rest is slow, and so
    are manifolds, which have most kernels to compile."""
    for number, settings in enumerate(SETTINGS):
        for place, segments in enumerate(SEGMENTS):
            slow = number % len(SEGMENTS) == place or settings == "manifolds"
            yield pytest.param(settings, segments, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("kernels", ["reference", pytest.param("compiled", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize(("settings", "segments"), [*pairwise_cases()])
def test_gradients_have_the_bits_of_those_without(kernels, settings, segments):
    check(blocks(5, **SETTINGS[settings]), segments, torch.randn(2, 3, 4, WIDTH))


@pytest.mark.parametrize("streams", [1, 2, 4, 16])
def test_any_stream_count_and_one_token(streams):
    check(blocks(3, streams), [2, 1], torch.randn(1, streams, WIDTH))


def low_precision(dtype):
    made = blocks(4)
    for block in made:
        block.sublayer.to(dtype)
    check(made, [3, 1], torch.randn(5, 4, WIDTH, dtype=dtype))


def test_bfloat16_streams():
    low_precision(torch.bfloat16)


@pytest.mark.slow
def test_bfloat16_streams_of_compiled_kernels(on_compiled):
    low_precision(torch.bfloat16)


def test_float16_streams():
    low_precision(torch.float16)


def test_streams_that_are_not_contiguous():
    check(blocks(3), [2, 1], torch.randn(WIDTH, 7, 4).permute(1, 2, 0))


def test_the_gradients_of_one_stack_to_rounding(kernels):
    """A stack has one pass less at every end of a segment, which rounds in another order."""
    made, x = blocks(6), torch.randn(4, 4, WIDTH)
    model, parameters = mhc.recompute(made), [each for block in made for each in block.parameters()]
    found, wanted = outcome(model, x, parameters), outcome(mhc.HyperConnectionStack(made), x, parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_arguments_go_to_every_sublayer():
    check(blocks(3), [2, 1], torch.randn(4, 4, WIDTH), by=0.5, shift=2.0)


def test_dropout_drops_the_same_in_both_passes():
    def sublayer():
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH))

    check(blocks(4, sublayer=sublayer, dropout=0.3), [3, 1], torch.randn(6, 4, WIDTH))


class RotatedRMSNorm(nn.Module):
    """A norm of one's own, with a product that autocast rounds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, u):
        return nn.functional.rms_norm(u, u.shape[-1:]) @ self.weight


def test_autocast_reaches_what_is_made_again():
    made = blocks(4, sublayer=lambda: nn.Sequential(RotatedRMSNorm(), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(6, 4, WIDTH)
    parameters = [each for block in made for each in block.parameters()]

    def run(model):
        def forward(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return model(x)

        return outcome(forward, x, parameters)

    assert same_bits(run(mhc.recompute(made, segment=2)), run(plain(made, [2, 2])))


class Written(nn.Module):
    """Writes in place to its normalised input, and to its input."""

    def __init__(self):
        super().__init__()
        self.norm, self.one, self.two = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, u):
        normalised = self.norm(u) * 1
        again = self.norm(u.clone())
        again.mul_(3)
        return self.one(normalised) + self.two(again)


class WrittenOutput(nn.Module):
    """Writes in place to the very tensor that its norm gave; LayerNorm's backward does not need it."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, u):
        normalised = self.norm(u)
        normalised.mul_(3)
        return self.linear(normalised)


class WrittenInput(nn.Module):
    """Writes in place to its own input before it is saved, which torch allows in mode `residual`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, u):
        return self.linear(u.mul_(3))


class Views(nn.Module):
    """Saves a transposed view and halves of its input, two norms of it, and a norm of a flattened view."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.flat = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, u):
        left, right = u.chunk(2, dim=-1)
        crossed = (u.mT * u.mT.cos()).mT
        normalised = self.one(u) * self.two(u) + self.flat(u.flatten(0, 1)).view_as(u) * self.weight
        return torch.cat((left * right, right.sin() * left), -1) + crossed + normalised


class Identity(nn.Module):
    """Gives its input back."""

    def forward(self, u):
        return u


@pytest.mark.parametrize("sublayer", [Written, WrittenOutput, Views, Identity])
def test_what_sublayers_do_with_their_input(sublayer):
    check(blocks(3, sublayer=sublayer), [2, 1], torch.randn(4, 3, 4, WIDTH))


def test_an_input_that_is_written_to_is_not_made_again():
    check(blocks(3, sublayer=WrittenInput, mode="residual"), [2, 1], torch.randn(4, 3, 4, WIDTH))


def test_every_sublayer_runs_once_a_step_and_its_norm_again():
    made = blocks(5)
    mhc.recompute(made, segment=2)(torch.randn(4, 4, WIDTH)).sum().backward()
    assert [block.sublayer.calls for block in made] == [1] * 5
    assert [block.sublayer.normalised for block in made] == [2] * 5


def test_watchers_see_every_map_once():
    made, seen = blocks(4, mode=["mhc", "mhc", "hc", "mhc"]), []
    for block in made:
        block.watchers.append(lambda block, res: seen.append((block, res)))
    mhc.recompute(made, segment=3)(torch.randn(4, 4, WIDTH)).sum().backward()
    assert [block for block, _ in seen] == made
    assert all(len(block.watchers) == 1 for block in made)


def test_a_graph_can_be_walked_twice_and_in_parts():
    made, x = blocks(4), torch.randn(4, 4, WIDTH, requires_grad=True)
    result = mhc.recompute(made, segment=2)(x)
    upstream = torch.randn_like(result)
    weight = made[1].sublayer.linear.weight
    (part,) = torch.autograd.grad(result, weight, upstream, retain_graph=True)
    whole = torch.autograd.grad(result, [x, weight], upstream, retain_graph=True)
    again = torch.autograd.grad(result, [x, weight], upstream)
    assert same_bits(whole, again)
    assert torch.equal(part, whole[1])


def test_a_module_can_be_used_twice():
    made, x = blocks(3), torch.randn(4, 4, WIDTH)
    model, parameters = mhc.recompute(made, segment=2), [each for block in made for each in block.parameters()]
    kept = plain(made, [2, 1])
    assert same_bits(outcome(lambda x: model(model(x)), x, parameters), outcome(lambda x: kept(kept(x)), x, parameters))


def test_without_gradients_nothing_is_noted(monkeypatch):
    made, x = blocks(3), torch.randn(4, 4, WIDTH)
    model, wanted = mhc.recompute(made, segment=2), plain(made, [2, 1])(x)
    monkeypatch.delattr(_SegmentForward, "forward")
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
    with torch.inference_mode():
        assert torch.equal(model(x), wanted)


def test_frozen_blocks_pass_gradients_on():
    made, x = blocks(3), torch.randn(4, 4, WIDTH)
    made[0].requires_grad_(False)
    made[1].sublayer.requires_grad_(False)
    model, kept = mhc.recompute(made, segment=2), plain(made, [2, 1])
    parameters = [each for each in model.parameters() if each.requires_grad]
    assert same_bits(outcome(model, x, parameters), outcome(kept, x, parameters))


@pytest.mark.parametrize("written", ["streams", "weight", "output"])
def test_writing_in_place_before_the_backward_raises(written):
    outputs = []

    class Told(Counted):
        def forward(self, u):
            outputs.append(super().forward(u))
            return outputs[-1]

    made, x = blocks(4, sublayer=Told), torch.randn(4, 4, WIDTH)
    result = mhc.recompute(made, segment=2)(x)
    with torch.no_grad():
        {"streams": x, "weight": made[1].sublayer.linear.weight, "output": outputs[0]}[written].add_(1)
    with pytest.raises(RuntimeError, match=r"was written to in place before the backward"):
        result.sum().backward()


def test_nothing_stays_when_a_graph_is_dropped_or_a_sublayer_fails():
    class Failing(nn.Module):
        def forward(self, u):
            raise ValueError("no")

    passes = []
    model = mhc.recompute(blocks(4), segment=2)
    gc.collect()
    gc.disable()  # a cycle through the graph is nothing that Python could find: nothing may wait for it
    try:
        with pytest.MonkeyPatch.context() as patch:
            start = _SegmentForward.__init__
            patch.setattr(
                _SegmentForward,
                "__init__",
                lambda self, *given: passes.append(weakref.ref(self)) or start(self, *given),
            )
            result = model(torch.randn(4, 4, WIDTH))
            assert len(passes) == 2
            assert all(each() is not None for each in passes)
            del result
            assert all(each() is None for each in passes)
    finally:
        gc.enable()
    made = blocks(2)
    made[1].sublayer = Failing()
    failing = mhc.recompute(made)
    with pytest.raises(ValueError, match="no"):
        failing(torch.randn(4, 4, WIDTH))
    check(made[:1], [1], torch.randn(4, 4, WIDTH))


def test_weights_go_between_it_and_a_stack_and_it_can_be_copied():
    x = torch.randn(4, 4, WIDTH)
    model, stack = mhc.recompute(blocks(3), segment=2), mhc.HyperConnectionStack(blocks(3))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.1)
    model.load_state_dict(stack.state_dict())
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(stack.state_dict())
    assert torch.equal(twin(x), model(x))
    twin(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "segments=[2, 1]" in repr(model)


@pytest.mark.parametrize("shapes", [[], [(16, 3), (16, 4)]])
def test_blocks_that_do_not_fit_are_refused(shapes):
    made = [mhc.HyperConnection(width, streams, nn.Identity()) for width, streams in shapes]
    with pytest.raises(mhc.BadInput, match="a stack needs blocks of one stream count and width"):
        mhc.recompute(made)


def test_a_segment_in_two_stages_is_refused_and_lengths_are_chosen_by_stage():
    made = blocks(6)
    with pytest.raises(mhc.BadInput, match=r"must not cross a stage.*end a segment after block 4"):
        mhc.recompute(made, segment=[3, 3], stages=[4, 2])
    assert mhc.recompute(made, stages=[4, 2]).segments == [2, 2, 1, 1]


def test_streams_of_another_shape_are_refused():
    with pytest.raises(mhc.BadInput, match=r"\(4, 4, 16\)"):
        mhc.recompute(blocks(2))(torch.randn(4, 5, WIDTH))


def test_gradients_are_reduced_once_by_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        made, x = blocks(4), torch.randn(4, 4, WIDTH)
        model = mhc.recompute(made, segment=2)
        wanted = outcome(model, x, list(model.parameters()))[2:]
        torch.manual_seed(1)
        result = DistributedDataParallel(model)(x)
        result.backward(torch.randn_like(result))
        assert same_bits([parameter.grad for parameter in model.parameters()], wanted)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's, of any module with hooks
@pytest.mark.parametrize("compiled", ["sublayers", "all"])
def test_compilers_take_the_sublayers_and_leave_the_rest(compiled):
    made, x = blocks(4), torch.randn(4, 4, WIDTH)
    model, parameters = mhc.recompute(made, segment=2), [each for block in made for each in block.parameters()]
    wanted = outcome(model, x, parameters)
    torch.compiler.reset()
    if compiled == "all":
        run = torch.compile(model, backend="aot_eager")
    else:
        run = model
        for block in made:
            block.sublayer.compile(backend="aot_eager", fullgraph=True)
    for one, other in zip(outcome(run, x, parameters), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


TOKENS, LAYERS, STREAMS, WIDE = 16, 60, 4, 32
COEFFICIENTS = STREAMS * STREAMS + STREAMS + (STREAMS * STREAMS + 2 * STREAMS) + 1
"""A token's post and res, z and s, which stay."""


def bytes_held(model, x):
    """Bytes allocated between forward and backward, and the most at once, beyond what there was."""
    model(x).sum().backward()  # gradients of parameters exist from here on
    model.zero_grad(set_to_none=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = model(x).sum()
        with record_function("between"):
            pass
        result.backward()
    waiting, changes, between = list(profiler.profiler.kineto_results.experimental_event_tree()), [], 0
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "between":
            between = event.start_time_ns
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    changes.sort()
    held = list(accumulate(change for _, change in changes))
    return sum(change for when, change in changes if when < between), max(held)


class Lean(nn.Module):
    """Saves its input, the norm's two statistics, and the normalised input."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDE), nn.Linear(WIDE, WIDE)

    def forward(self, u):
        return self.linear(self.norm(u))


@pytest.mark.parametrize("lengths", [(6,), pytest.param((1, 3, 6, 12, 60), marks=pytest.mark.slow)], ids=len)
@pytest.mark.usefixtures("one_thread")
def test_held_bytes_follow_the_formula(lengths):
    """Between the passes: exactly n widths a segment, one a sublayer's output, and the coefficients. At the peak: n + 2
    widths a block of a segment more, and what one block's backward takes, which hardly depends on the length."""
    sixty = [mhc.HyperConnection(WIDE, STREAMS, Lean(), rounds=1) for _ in range(LAYERS)]
    x, in_flight, peaks = torch.randn(TOKENS, STREAMS, WIDE), set(), {}
    for length in lengths:
        between, peaks[length] = bytes_held(mhc.recompute(sixty, segment=length), x)
        starts = STREAMS * (LAYERS // length - 1)  # those before the first segment are the caller's
        assert between == 4 + 4 * TOKENS * ((starts + LAYERS) * WIDE + LAYERS * (COEFFICIENTS + 2))
        again = ((STREAMS + 2) * length - STREAMS) * WIDE
        assert starts * WIDE + again == (peak_widths(LAYERS, STREAMS, length) - STREAMS) * WIDE
        in_flight.add((peaks[length] - between - 4 * TOKENS * again) / (4 * TOKENS * WIDE))
    assert max(in_flight) - min(in_flight) < 2 * STREAMS, "a block's backward of its own, wherever the peak is"
    assert max(in_flight) < 10 * STREAMS
    assert min(peaks, key=peaks.get) == segment_length(LAYERS, STREAMS) == 6
    between, peak = bytes_held(mhc.HyperConnectionStack(sixty), x)
    assert peak > 2 * peaks[6]


@pytest.mark.gpu
def test_gpu_memory_follows_the_formula():
    width, tokens = 1024, 4096
    made = [
        mhc.HyperConnection(
            width, STREAMS, nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)), rounds=1
        ).cuda()
        for _ in range(LAYERS)
    ]
    x, peaks, in_flight = torch.randn(tokens, STREAMS, width, device="cuda"), {}, []
    for length in (1, 3, 6, 12, 60):
        model = mhc.recompute(made, segment=length)
        model(x).sum().backward()
        model.zero_grad(set_to_none=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).sum().backward()
        peaks[length] = (torch.cuda.max_memory_allocated() - before) / (4 * tokens * width)
        in_flight.append(peaks[length] - LAYERS - peak_widths(LAYERS, STREAMS, length))
    assert max(in_flight) - min(in_flight) < 2 * STREAMS
    assert min(peaks, key=peaks.get) == segment_length(LAYERS, STREAMS)
