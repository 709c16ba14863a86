"""HyperConnection: its modes, arguments, state_dict and errors; compiled, exported, captured."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mhc

WIDTH = 16


class Block(nn.Module):
    """A pre-norm sublayer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, u):
        return self.down(torch.nn.functional.gelu(self.up(self.norm(u))))


def connections(count, n, mode="mhc"):
    torch.manual_seed(1)
    return nn.ModuleList(mhc.HyperConnection(WIDTH, n, Block(), mode=mode) for _ in range(count))


@pytest.mark.parametrize("mode", ["mhc", "hc", "residual"])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_without_gates_a_stack_is_the_plain_residual_network(n, mode):
    stack, h = connections(12, n, mode), torch.randn(2, 5, WIDTH)
    x = mhc.expand_streams(h, n)
    for layer in stack:
        if mode != "residual":
            layer.alpha.data.zero_()
        x, h = layer(x), h + layer.sublayer(h)
    torch.testing.assert_close(mhc.reduce_streams(x), h, rtol=2e-5, atol=2e-5)


def test_a_stack_on_compiled_kernels_is_the_plain_residual_network(on_compiled):
    test_without_gates_a_stack_is_the_plain_residual_network(4, "mhc")


@pytest.mark.parametrize("mode", ["mhc", "hc"])
def test_a_fresh_stack_starts_close_to_the_plain_network_with_every_gradient_alive(mode):
    stack, h = connections(12, 4, mode), torch.randn(2, 5, WIDTH)
    x = mhc.expand_streams(h, 4)
    for layer in stack:
        x, h = layer(x), h + layer.sublayer(h)
    assert (mhc.reduce_streams(x) - h).square().mean() < 0.01 * h.square().mean()
    assert x.std(dim=-2).max() > 1e-4, "the streams part"
    (x * torch.randn_like(x)).sum().backward()
    for name, parameter in stack.named_parameters():
        if name.startswith("0.") and name.endswith(("phi", "bias")):  # equal streams: no way of mixing them matters yet
            continue
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_modes_differ_in_their_maps():
    """hc may weigh a stream negatively, mhc may not; residual learns nothing."""
    x = torch.randn(3, 4, WIDTH)
    for mode, bound in (("hc", -0.5), ("mhc", 0.0)):
        layer = mhc.HyperConnection(WIDTH, 4, nn.Identity(), mode=mode)
        layer.bias.data.fill_(-1.0)
        u, post, res, _x = layer.pre_with_residual(x)
        assert (post.min() >= bound) == (mode == "mhc")
        assert u.shape == (3, WIDTH)
        assert torch.allclose(res.sum(-1), torch.ones(3, 4)) == (mode == "mhc")
    assert not list(mhc.HyperConnection(WIDTH, 4, nn.Identity(), mode="residual").parameters())


def maps_in_float64(layer, flat, res_of):
    """pre, post, res of flattened streams [..., K], after the papers, in plain torch."""
    n, bias = layer.streams, layer.bias.double()
    t = torch.zeros(*flat.shape[:-1], len(bias), dtype=torch.float64)
    if layer.dynamic:
        t = flat @ layer.phi.double().T / (flat.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        t = t.tanh() if layer.mode == "hc" else t
        t = t * layer.alpha.double().repeat_interleave(torch.tensor([n, n, n * n]))
    pre, post, res = (t + bias).split((n, n, n * n), -1)
    res = res.unflatten(-1, (n, n))
    return (pre, post, res) if layer.mode == "hc" else (pre.sigmoid(), 2 * post.sigmoid(), res_of(res))


def sinkhorn_in_float64(logits, rounds=20):
    res = logits.exp()
    for _ in range(rounds):
        res = res / res.sum(-2, keepdim=True)
        res = res / res.sum(-1, keepdim=True)
    return res


SETTINGS = [
    {"mode": "hc"},
    {"mode": "hc", "dynamic": False},
    {"dynamic": False},
    {"dynamic": False, "rounds": 3},
    {"manifold": "orthogonal"},
    {"manifold": "sinkhorn-tolerance", "dynamic": False},
    {},
]


@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_results_and_gradients_follow_the_formula(settings, n):
    torch.manual_seed(0)
    layer = mhc.HyperConnection(WIDTH, n, nn.Linear(WIDTH, WIDTH), **settings)
    with torch.no_grad():
        layer.bias.add_(0.5 * torch.randn_like(layer.bias))
        if layer.dynamic:
            layer.alpha.copy_(torch.tensor([0.5, -1.0, 0.8]))
    x = torch.randn(WIDTH, 2, n).permute(1, 2, 0).requires_grad_()  # not contiguous
    upstream = torch.randn(2, n, WIDTH)
    wanted_layer, wanted_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    orthogonal = settings.get("manifold") == "orthogonal"
    res_of = mhc.manifolds.cayley if orthogonal else lambda logits: sinkhorn_in_float64(logits, layer.rounds)
    if settings.get("manifold") == "sinkhorn-tolerance":
        res_of = lambda logits: sinkhorn_in_float64(logits, 1000)  # noqa: E731
    pre, post, res = maps_in_float64(wanted_layer, wanted_x.flatten(-2), res_of)
    f = wanted_layer.sublayer((pre.unsqueeze(-1) * wanted_x).sum(-2))
    wanted = res @ wanted_x + post.unsqueeze(-1) * f.unsqueeze(-2)
    found = layer(x)
    found.backward(upstream)
    wanted.backward(upstream.double())
    # float32 against float64, through a norm, up to 256 products and 20 rounds; the tolerance's own error is 1e-6
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), wanted_x.grad, rtol=1e-4, atol=1e-4)
    for (name, parameter), other in zip(layer.named_parameters(), wanted_layer.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 2e-4 * other.grad.norm().clamp_min(1), name


def test_static_blocks_have_a_bias_alone_and_the_same_maps_for_every_token():
    for mode in ("mhc", "hc"):
        layer = mhc.HyperConnection(WIDTH, 3, nn.Identity(), mode=mode, dynamic=False)
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        maps = layer.maps(torch.randn(5, 3, WIDTH))
        assert all(torch.equal(each[0], each[4]) for each in maps)
        assert not layer.fused


def test_only_dynamic_blocks_with_sinkhorn_or_the_identity_run_fused(kernels):
    for settings, op in [
        ({}, "pre"),
        ({"dynamic": False}, ""),
        ({"manifold": "orthogonal"}, ""),
        ({"manifold": "identity"}, "pre_identity"),
        ({"manifold": "identity", "dynamic": False}, ""),
    ]:
        with mhc.using(mhc.Kernels.reference()) as active:
            layer = mhc.HyperConnection(WIDTH, 4, nn.Identity(), **settings)
            layer(torch.randn(2, 4, WIDTH))
            found = {row.op for row in active.report()} & {"pre", "pre_identity"}
            assert layer.fused == bool(op)
            assert found == ({op} if op else set())


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 0, 3), (2, 1)])
@pytest.mark.parametrize("settings", [{}, {"dynamic": False}, {"manifold": "permutations"}, {"mode": "residual"}])
def test_any_leading_dimensions(leading, settings):
    layer = mhc.HyperConnection(WIDTH, 4, nn.Linear(WIDTH, WIDTH), **settings)
    x = torch.randn(*leading, 4, WIDTH, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == layer(x).shape == x.shape


def test_what_else_is_given_goes_to_the_sublayer():
    class Scaled(nn.Module):
        def forward(self, u, by, *, shift):
            return by * u + shift

    x = torch.randn(3, 4, WIDTH)
    for mode in ("mhc", "hc", "residual"):
        layer = mhc.HyperConnection(WIDTH, 4, Scaled(), mode=mode)
        assert not torch.allclose(layer(x, 2.0, shift=1.0), layer(x, 2.0, shift=2.0))
        with pytest.raises(TypeError):
            layer(x)


class Weighing(nn.Module):
    """A sublayer that returns more than its output."""

    def forward(self, u, *, extra=True):
        return (2 * u, "weights", u.sum()) if extra else (2 * u,)


@pytest.mark.parametrize("mode", ["mhc", "hc", "residual"])
def test_what_else_a_sublayer_returns_is_passed_on(mode):
    class Doubled(nn.Module):
        def forward(self, u, *, extra):
            return 2 * u

    torch.manual_seed(0)
    layer, x = mhc.HyperConnection(WIDTH, 4, Weighing(), mode=mode), torch.randn(3, 4, WIDTH)
    found, name, total = layer(x)
    alone = layer(x, extra=False)
    layer.sublayer = Doubled()
    assert torch.equal(found, alone)
    assert torch.equal(found, layer(x, extra=True))
    assert name == "weights"
    assert total.shape == ()


@pytest.mark.parametrize("mode", ["mhc", "hc", "residual"])
def test_dropout_drops_the_sublayers_output_in_training_alone(mode):
    layer = mhc.HyperConnection(WIDTH, 4, nn.Identity(), mode=mode, dropout=0.25)
    u = torch.randn(64, WIDTH)
    f, _ = layer.call_sublayer(u)
    kept = f != 0
    torch.testing.assert_close(f[kept], u[kept] / 0.75)
    assert 0.65 < kept.float().mean() < 0.85, "1024 draws: 0.75 ± 0.014"
    assert torch.equal(layer.eval().call_sublayer(u)[0], u)
    x = torch.randn(64, 4, WIDTH)
    assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_watchers_see_res_of_every_forward():
    seen = []
    for settings in ({}, {"mode": "hc"}, {"dynamic": False}, {"mode": "residual"}):
        layer = mhc.HyperConnection(WIDTH, 4, nn.Identity(), **settings)
        layer.watchers.append(lambda block, res: seen.append((block, res)))
        x = torch.randn(2, 3, 4, WIDTH, requires_grad=True)
        layer(x)
        if layer.mode == "residual":
            assert not seen
            continue
        ((block, res),) = seen
        assert block is layer
        assert not res.requires_grad
        torch.testing.assert_close(res, layer.maps(x)[2].detach())
        seen.clear()


def test_copies_are_equal_and_nobody_watches_them():
    layer, x = connections(1, 4)[0], torch.randn(3, 4, WIDTH)
    layer.watchers.append(lambda block, res: None)  # a lambda is no good in a pickle
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.watchers == []
        assert torch.equal(copied(x), layer(x))
        assert copied.phi.data_ptr() != layer.phi.data_ptr()
    assert len(layer.watchers) == 1


def test_a_copy_keeps_its_manifold():
    layer, x = mhc.HyperConnection(WIDTH, 3, nn.Identity(), manifold="orthogonal"), torch.randn(3, 3, WIDTH)
    layer.bias.data.normal_()
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


class Returning(nn.Module):
    """Answers with what it was made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, u):
        return self.answer


def built(**settings):
    return mhc.HyperConnection(WIDTH, 3, nn.Identity(), **settings)


def called(sublayer, *shape):
    return mhc.HyperConnection(WIDTH, 3, sublayer)(torch.zeros(*shape))


WRONG = {
    "manifold": (lambda: built(manifold="simplex"), "one of sinkhorn, .*got simplex: choose"),
    "manifold of hc": (lambda: built(mode="hc", manifold="orthogonal"), "mode mhc, got orthogonal with mode hc: leave"),
    "manifold's streams": (lambda: built(manifold="kronecker"), "power of two of streams.*got 3"),
    "init": (lambda: built(init="zero"), "one of paper, identity, got zero: choose"),
    "dropout": (lambda: built(dropout=1.0), r"in \[0, 1\), got 1.0: give"),
    "streams of x": (lambda: called(nn.Identity(), 5, 4, 16), r"\(5, 3, 16\).*got \(5, 4, 16\): .*expand_streams"),
    "no streams in x": (lambda: called(nn.Identity(), 16), r"\(3, 16\).*got \(16,\): .*expand_streams"),
    "sublayer's width": (lambda: called(nn.Linear(16, 8), 5, 3, 16), r"\(5, 16\).*got \(5, 8\) from Linear: wrap"),
    "sublayer's answer": (lambda: called(Returning(None), 5, 3, 16), "got NoneType from Returning: wrap"),
    "sublayer's list": (lambda: called(Returning([1]), 5, 3, 16), "got list from Returning: wrap"),
    "sublayer's nothing": (lambda: called(Returning(()), 5, 3, 16), "got tuple from Returning: wrap"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(case):
    call, expected = WRONG[case]
    with pytest.raises(mhc.BadInput, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_keep_their_dtype(dtype):
    layer = mhc.HyperConnection(WIDTH, 4, Block().to(dtype))
    out = layer(torch.randn(3, 4, WIDTH, dtype=dtype))
    assert out.dtype == dtype
    out.sum().backward()
    assert layer.phi.grad.dtype == torch.float32


def test_a_model_cast_as_a_whole_still_runs():
    layer = mhc.HyperConnection(WIDTH, 4, Block()).bfloat16()
    out = layer(torch.randn(3, 4, WIDTH, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == layer.phi.grad.dtype == torch.bfloat16


def test_autocast_keeps_the_streams_dtype():
    layer, x = mhc.HyperConnection(WIDTH, 4, Block()), torch.randn(3, 4, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, layer(x), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # RMSNorm takes its slow path
@pytest.mark.parametrize(("streams", "weights"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_streams_and_sublayers_of_two_dtypes_work_under_autocast(streams, weights):
    layer, x = connections(1, 4)[0], torch.randn(3, 4, WIDTH)
    wanted = layer(x)
    layer.sublayer.to(getattr(torch, weights))
    given = x.to(getattr(torch, streams)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(given)
    assert out.dtype == given.dtype
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05)  # streams or weights rounded to 2^-9
    out.sum().backward()
    assert given.grad.dtype == given.dtype
    assert layer.phi.grad.dtype == torch.float32


def products(logits):
    """A manifold of one's own: nothing of the kind, but a product in float32."""
    return logits @ logits


@pytest.mark.parametrize("settings", [{"mode": "hc"}, {"manifold": "permutations"}, {"manifold": products}, {}])
def test_autocast_does_not_touch_the_maps(settings):
    layer, x = mhc.HyperConnection(WIDTH, 4, nn.Identity(), **settings), torch.randn(3, 4, WIDTH)
    layer.bias.data.normal_()
    expected = layer.maps(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.maps(x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_weights_survive_saving(tmp_path):
    layer, other = connections(1, 4)[0], mhc.HyperConnection(WIDTH, 4, Block())
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.randn(3, 4, WIDTH)
    assert torch.equal(layer(x), other(x))


def test_the_names_in_a_state_dict_are_stable():
    sublayer = ["sublayer.down.bias", "sublayer.down.weight", "sublayer.norm.weight"]
    sublayer += ["sublayer.up.bias", "sublayer.up.weight"]
    for settings, own in [
        ({}, ["alpha", "bias", "phi"]),
        ({"mode": "hc"}, ["alpha", "bias", "phi"]),
        ({"manifold": "permutations"}, ["alpha", "bias", "phi"]),
        ({"dynamic": False}, ["bias"]),
        ({"mode": "residual"}, []),
    ]:
        assert sorted(mhc.HyperConnection(WIDTH, 4, Block(), **settings).state_dict()) == own + sublayer


def other_block(streams=4, width=WIDTH, **settings):
    return nn.Sequential(mhc.HyperConnection(width, streams, nn.Identity(), **settings))


MHC = "mode=mhc, manifold=sinkhorn"
USUAL = f"{MHC}, 4 streams, width 16"


@pytest.mark.parametrize(
    ("held", "wanted", "text"),
    [
        ({"streams": 2}, {}, f"{USUAL}, got {MHC}, 2 streams, width 16"),
        ({"width": 32}, {}, f"{USUAL}, got {MHC}, 4 streams, width 32"),
        ({"mode": "hc"}, {}, f"{USUAL}, got mode=hc, 4 streams, width 16"),
        ({"manifold": "orthogonal"}, {}, f"{USUAL}, got mode=mhc, manifold=orthogonal, 4 streams, width 16"),
        ({"dynamic": False}, {}, f"{USUAL}, got {MHC}, 4 streams, static"),
        ({}, {"dynamic": False, "streams": 2}, f"{MHC}, 2 streams, static, got {USUAL}"),
        ({"mode": "residual"}, {}, f"{USUAL}, got mode=residual, no parameters"),
        ({}, {"mode": "residual"}, f"mode=residual, no parameters, got {USUAL}"),
    ],
)
def test_a_checkpoint_of_another_block_is_refused_in_one_line(held, wanted, text, tmp_path):
    torch.save(other_block(**held).state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    with pytest.raises(mhc.BadInput) as caught:
        other_block(**wanted).load_state_dict(state)
    assert str(caught.value) == (
        f"a checkpoint must be of a block like 0, {text}: build the block as the checkpoint's was"
    )


def test_a_plain_networks_checkpoint_loads_where_it_is_asked_for():
    layer = connections(1, 4)[0]
    state = {name: torch.zeros_like(value) for name, value in layer.state_dict().items() if "sublayer" in name}
    with pytest.raises(RuntimeError, match=r'Missing key.*"phi", "alpha", "bias"'):
        layer.load_state_dict(state)
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["alpha", "bias", "phi"], [])
    assert not layer.sublayer.up.weight.any()
    assert layer.phi.any()


def test_a_missing_parameter_is_torchs_own_error():
    layer = connections(1, 4)[0]
    state = layer.state_dict()
    del state["alpha"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"alpha"'):
        layer.load_state_dict(state)


def test_printing_shows_the_settings():
    shown = "width=16, streams=3, mode=mhc, manifold=identity, dynamic=False, dropout=0.5"
    assert shown in str(built(manifold="identity", dynamic=False, dropout=0.5))
    assert "manifold=cayley" in str(built(manifold=mhc.manifolds.cayley))


CONNECTIONS = [
    {},
    {"mode": "hc"},
    {"mode": "residual"},
    {"dynamic": False},
    {"manifold": "permutations"},
    {"manifold": "orthogonal"},
]


class Model(nn.Module):
    """Embedding, a block of each of the settings, and a head: a whole language model in small."""

    def __init__(self, *settings):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11)
        self.layers = nn.ModuleList(mhc.HyperConnection(WIDTH, 4, Block(), **each) for each in settings)
        for layer in self.layers:
            if layer.mode != "residual":
                layer.bias.data.add_(0.3 * torch.randn_like(layer.bias))

    def forward(self, tokens):
        x = mhc.expand_streams(self.embed(tokens), 4)
        for layer in self.layers:
            x = layer(x)
        return self.head(mhc.reduce_streams(x))


def loss_and_gradients(model, tokens, run):
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(run(tokens).flatten(0, 1).float(), tokens.flatten())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
def test_a_model_of_every_kind_of_block_compiles_in_one_graph():
    torch._dynamo.reset()
    model, tokens = Model(*CONNECTIONS), torch.randint(11, (2, 5))
    expected = loss_and_gradients(model, tokens, model)
    found = loss_and_gradients(model, tokens, torch.compile(model, fullgraph=True, backend="aot_eager"))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
def test_a_compiled_model_takes_autocast_and_is_watched():
    torch._dynamo.reset()
    model, tokens, seen = Model({}, {}), torch.randint(11, (2, 5)), []

    def with_autocast(run):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(tokens)

    expected = with_autocast(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # bfloat16 sublayers: 2^-9 a step
    torch.testing.assert_close(with_autocast(compiled), expected, rtol=0.05, atol=0.05)
    model.layers[1].watchers.append(lambda block, res: seen.append(res))
    with_autocast(torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 5, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.export's own import
def test_a_model_of_every_kind_of_block_can_be_exported():
    model, tokens = Model(*CONNECTIONS).eval(), torch.randint(11, (2, 5))
    exported = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), model(tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"mode": "hc"}, {"manifold": "permutations"}], ids=str)
def test_a_training_step_can_be_captured_in_a_cuda_graph(settings):
    model = Model(settings, settings).cuda()
    tokens = torch.randint(11, (2, 5), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are found and built, gradients allocated
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tokens.copy_(torch.randint(11, (2, 5), device="cuda"))
    graph.replay()
    found = [captured.clone(), *(parameter.grad.clone() for parameter in model.parameters())]
    wanted = [step().detach(), *(parameter.grad for parameter in model.parameters())]
    for actual, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5)
