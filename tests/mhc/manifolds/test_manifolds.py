"""The properties of every manifold: sums and norms, large logits, gradients, shapes, bad input."""

import itertools
import math
import pickle

import pytest
import torch

from mhc import BadInput, functional, manifolds
from mhc.manifolds import permutations

ROUNDING = 3e-7  # a sum of 16 float32 entries of at most 1, each rounded once
STOCHASTIC = ("sinkhorn-tolerance", "permutations", "kronecker", "identity")
OF_LOGITS = tuple(name for name in manifolds.NAMES if name != "identity")
PROBLEMS = [
    (name, n)
    for name in manifolds.NAMES
    for n in (1, 2, 3, 4, 5, 8, 16)
    if not (name == "permutations" and n > 5) and not (name == "kronecker" and n in (3, 5))
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def off(found, expected):
    """The largest difference."""
    return (found - expected).abs().max().item()


def column_error(res):
    return off(res.sum(-2), 1)


@pytest.mark.parametrize(("name", "n"), PROBLEMS)
def test_shapes_and_sums(name, n):
    manifold = manifolds.named(name)
    res = manifold(draw(3, 5, n, n))
    assert res.shape == (3, 5, n, n)
    assert res.dtype == torch.float32
    if name in STOCHASTIC:
        allowed = 1e-6 if name == "sinkhorn-tolerance" else 0
        assert (res >= 0).all()
        assert off(res.sum(-1), 1) < ROUNDING
        assert column_error(res) < allowed + ROUNDING
    assert torch.linalg.matrix_norm(res, 2).max() < 1 + 1e-3  # 20 rounds of Sinkhorn: the others keep to rounding


@pytest.mark.parametrize(("name", "n"), PROBLEMS)
def test_far_equal_and_symmetric_logits(name, n):
    manifold = manifolds.named(name)
    furthest = 1e8 if name == "orthogonal" else 1e38
    for logits in (1e4 * draw(2, n, n).sign(), 1e4 * draw(2, n, n), furthest * draw(2, n, n).clamp(-3, 3)):
        given = logits.requires_grad_()
        res = manifold(given)
        assert res.isfinite().all()
        assert torch.linalg.matrix_norm(res.detach(), 2).max() < n**0.5 + 1e-5
        if name != "identity":
            (grad,) = torch.autograd.grad(res, given, draw(2, n, n, seed=1))
            assert grad.isfinite().all()
    equal = manifold(torch.full((2, n, n), -7.0))
    expected = torch.eye(n) if name in ("orthogonal", "identity") else torch.full((n, n), 1 / n)
    assert off(equal, expected) < ROUNDING


@pytest.mark.parametrize(("name", "n"), PROBLEMS)
def test_a_fresh_block_hardly_mixes(name, n):
    """The biases that `mhc.modules.init` gives: a stream keeps 0.95 of itself or more, whatever the manifold."""
    kept = math.log(0.95 / 0.05 * (n - 1)) if n > 1 else 0.0
    assert manifolds.named(name)(kept * torch.eye(n)).diagonal().min() > 0.95 - 1e-6


@pytest.mark.parametrize("name", OF_LOGITS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_nan_stays_with_its_token(name, n):
    logits = draw(2, n, n)
    logits[0, 0, -1] = float("nan")
    res = manifolds.named(name)(logits)
    assert res[0].isnan().any()
    assert res[1].isfinite().all()


@pytest.mark.parametrize("name", manifolds.NAMES)
def test_any_leading_dimensions_and_layouts(name):
    manifold = manifolds.named(name)
    logits = draw(6, 4, 4)
    res = manifold(logits)
    assert torch.equal(manifold(logits[2]), res[2])
    assert torch.equal(manifold(logits.view(2, 1, 3, 4, 4)), res.view(2, 1, 3, 4, 4))
    assert torch.equal(manifold(logits.mT.contiguous().mT), res)
    assert manifold(logits[:0]).shape == (0, 4, 4)


def test_names():
    assert manifolds.NAMES == (
        "sinkhorn",
        "sinkhorn-tolerance",
        "permutations",
        "kronecker",
        "orthogonal",
        "identity",
    )
    assert manifolds.named("sinkhorn") is functional.sinkhorn
    with pytest.raises(BadInput, match=r"^manifold must be one of sinkhorn, .*, got simplex: choose"):
        manifolds.named("simplex")


@pytest.mark.parametrize("name", manifolds.NAMES)
def test_bad_logits(name):
    manifold = manifolds.named(name)
    for bad in (torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(2, 17, 17), torch.zeros(4, 4, dtype=torch.bfloat16)):
        with pytest.raises(BadInput) as caught:
            manifold(bad)
        assert "\n" not in str(caught.value)


def test_bad_stream_counts():
    with pytest.raises(BadInput, match=r"at most 5 streams.* got 6: take"):
        manifolds.mean_permutation(torch.zeros(6, 6))
    with pytest.raises(BadInput, match=r"power of two of streams.* got 6: take"):
        manifolds.kronecker_of_pairs(torch.zeros(6, 6))


@pytest.mark.parametrize("name", ["permutations", "kronecker", "orthogonal"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradients(name, n):
    """float64, against differences; gradients of gradients too, along random directions."""
    logits = draw(2, n, n, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(manifolds.named(name), logits)
    assert torch.autograd.gradgradcheck(manifolds.named(name), logits, fast_mode=True)


@pytest.mark.parametrize(
    "name",
    ["orthogonal", "identity", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kronecker", "permutations"))],
)
def test_compiles_whole(name):
    """Into one graph, gradients included; a graph of its own for each name."""
    torch._dynamo.reset()
    logits = draw(3, 4, 4).requires_grad_()
    manifold = manifolds.named(name)
    res = torch.compile(lambda h: manifold(h) @ h, backend="aot_eager", fullgraph=True)(logits)
    (found,) = torch.autograd.grad(res.square().sum(), logits)
    (expected,) = torch.autograd.grad((manifold(logits) @ logits).square().sum(), logits)
    assert off(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["sinkhorn-tolerance", "permutations", "kronecker", "orthogonal"])
def test_autocast_does_not_round(name):
    logits = draw(3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = manifolds.named(name)(logits)
    assert torch.equal(found, manifolds.named(name)(logits))


@pytest.mark.parametrize("name", ["permutations", "kronecker", "orthogonal"])
def test_products_of_many_layers_stay(name):
    """64 layers in a row, in float64: sums or norms are still kept."""
    layers = manifolds.named(name)(3 * draw(64, 4, 4, dtype=torch.float64))
    product = torch.linalg.multi_dot(list(layers))
    if name == "orthogonal":
        assert off(product.mT @ product, torch.eye(4)) < 1e-12
    else:
        assert off(product.sum(-1), 1) < 1e-12
        assert column_error(product) < 1e-12


# --- permutations


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_permutations_against_a_loop(n):
    logits = draw(n, n, dtype=torch.float64)
    total, expected = 0.0, torch.zeros(n, n, dtype=torch.float64)
    for images in itertools.permutations(range(n)):
        weight = sum(logits[i, j] for i, j in enumerate(images)).exp()
        total = total + weight
        for i, j in enumerate(images):
            expected[i, j] += weight
    assert off(manifolds.mean_permutation(logits), expected / total) < 1e-14


def test_permutations_reach_any_interior_matrix():
    """A mean of random permutations with some of all, found again from n² logits: the mean map is onto the interior."""
    generator = torch.Generator().manual_seed(0)
    target = sum(torch.eye(4, dtype=torch.float64)[torch.randperm(4, generator=generator)] for _ in range(3)) / 3
    target = 0.95 * target + 0.05 / 4
    logits = torch.zeros(4, 4, dtype=torch.float64).requires_grad_()
    solver = torch.optim.LBFGS([logits], lr=1, max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        loss = (manifolds.mean_permutation(logits) - target).square().sum()
        loss.backward()
        return loss

    solver.step(loss)
    assert off(manifolds.mean_permutation(logits.detach()), target) < 1e-3


def test_permutations_first_seen_without_gradients_train_later():
    logits = torch.zeros(2, 2)
    with torch.inference_mode():
        permutations._CACHE.clear()
        manifolds.mean_permutation(logits)
    given = logits.requires_grad_()
    (grad,) = torch.autograd.grad(manifolds.mean_permutation(given)[0, 0], given)
    assert off(grad, torch.tensor([[0.25, -0.25], [-0.25, 0.25]])) < ROUNDING


def test_permutations_first_seen_by_a_tracer_work_later():
    permutations._CACHE.clear()

    class Mixing(torch.nn.Module):
        def forward(self, logits):
            return manifolds.mean_permutation(logits)

    logits = draw(3, 3, 3)
    exported = torch.export.export(Mixing(), (logits,)).module()
    assert torch.equal(manifolds.mean_permutation(logits), exported(logits))


# --- kronecker


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_kronecker_against_torch_kron(n):
    logits = draw(n, n, dtype=torch.float64)
    expected = torch.ones(1, 1, dtype=torch.float64)
    for bit in reversed(range(n.bit_length() - 1)):
        sign = torch.tensor([[-1.0 if (i ^ j) >> bit & 1 else 1.0 for j in range(n)] for i in range(n)])
        a = torch.sigmoid((sign * logits).sum(-1).mean())
        expected = torch.kron(expected, torch.stack((a, 1 - a, 1 - a, a)).view(2, 2))
    res = manifolds.kronecker_of_pairs(logits)
    assert off(res, expected) < 1e-14
    assert torch.equal(res, res.mT)


# --- orthogonal


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_orthogonal(n, size):
    logits = size * draw(5, n, n)
    res = manifolds.cayley(logits)
    assert off(res.mT @ res, torch.eye(n)) < 1e-6
    assert off(torch.linalg.det(res.double()), 1) < 1e-6
    skew = (logits.double() - logits.double().mT) / 2
    eye = torch.eye(n, dtype=torch.float64)
    expected = (eye - skew) @ torch.linalg.inv(eye + skew)
    assert off(res, expected) < 1e-6
    assert off(manifolds.cayley(logits + logits.mT), eye) == 0


# --- sinkhorn to a tolerance


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("spread", [1, 3, 10])
def test_tolerance_is_kept_and_rounds_are_told(n, spread):
    logits = spread * draw(100, n, n)
    rough, fine = manifolds.SinkhornToTolerance(1e-2), manifolds.SinkhornToTolerance(1e-6)
    for manifold in (rough, fine):
        res = manifold(logits)
        assert column_error(res) <= manifold.tolerance + ROUNDING
        assert abs(manifold.error - column_error(res.double())) < ROUNDING
        assert manifold.error <= manifold.tolerance
    assert 1 <= rough.rounds < fine.rounds < 60
    fine(torch.zeros(n, n))
    assert (fine.rounds, fine.error < 1e-15) == (0, True)


def test_rounds_that_run_out_are_told():
    manifold = manifolds.SinkhornToTolerance(most_rounds=7)
    res = manifold(1e4 * draw(20, 4, 4))
    assert manifold.rounds == 7
    assert manifold.error > 1e-3
    assert off(res.sum(-1), 1) < ROUNDING


def through_many_rounds(logits, rounds=3000):
    """The limit, as autograd sees it: Sinkhorn-Knopp in the log domain, float64."""
    for _ in range(rounds):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


def test_limit_and_gradient_against_autograd_through_many_rounds():
    """At a tolerance of 1e-6 on the sums, entries and gradients of these tokens are as near up to a factor of 10."""
    logits = (2 * draw(5, 4, 4)).requires_grad_()
    weights = draw(5, 4, 4, seed=1)
    wide = logits.detach().double().requires_grad_()
    res, expected = manifolds.SinkhornToTolerance()(logits), through_many_rounds(wide)
    assert off(res, expected) < 1e-5
    (found,) = torch.autograd.grad(res, logits, weights)
    (truth,) = torch.autograd.grad(expected, wide, weights.double())
    assert off(found, truth) < 1e-5


def test_the_kernels_rounds_go_to_the_same_matrix():
    logits = 2 * draw(20, 4, 4)
    limit = manifolds.SinkhornToTolerance()(logits)
    after_20, after_100 = (off(functional.sinkhorn(logits, rounds), limit) for rounds in (20, 100))
    assert after_100 < 1e-6 < 1e-3 < after_20


def test_a_token_does_not_depend_on_its_batch():
    logits = draw(6, 4, 4)
    logits[3] *= 6  # goes on longer
    manifold = manifolds.SinkhornToTolerance()
    together = manifold(logits)
    slowest = manifold.rounds
    for token in range(6):
        assert off(manifold(logits[token]), together[token]) < 1e-9  # the batch may change how LAPACK rounds float64
        assert manifold.rounds < slowest or token == 3


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spread", [1, 4])
def test_gradient_of_the_limit(n, spread):
    """Against differences of the limit itself, in float64; at n = 8 along a random direction, as there are many."""
    logits = (spread * draw(2, n, n, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(manifolds.SinkhornToTolerance(1e-12), logits, fast_mode=n == 8)


def test_gradients_of_its_gradients():
    logits = (2 * draw(3, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradgradcheck(manifolds.SinkhornToTolerance(1e-12), logits)


def test_nearly_separate_streams_get_small_gradients():
    """Where res is a permutation to rounding, the limit hardly moves."""
    logits = (200 * torch.eye(4)[[2, 0, 3, 1]] + draw(4, 4)).requires_grad_()
    (grad,) = torch.autograd.grad(manifolds.SinkhornToTolerance()(logits), logits, draw(4, 4, seed=1))
    assert grad.abs().max() < 1e-12


def test_tolerance_inside_torch_compile():
    """Runs as it is, with the graph broken around it; a whole graph is refused."""
    torch._dynamo.reset()
    logits = draw(3, 4, 4)
    manifold = manifolds.SinkhornToTolerance()
    assert torch.equal(torch.compile(lambda h: 2 * manifold(h), backend="eager")(logits), 2 * manifold(logits))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="how many rounds there are depends on the logits"):
        torch.compile(lambda h: 2 * manifold(h), backend="eager", fullgraph=True)(logits)


def test_bad_tolerance_and_pickles():
    for bad in ({"tolerance": 0.0}, {"tolerance": float("nan")}, {"most_rounds": 0}):
        with pytest.raises(BadInput, match="tolerance must be above 0 and most_rounds at least 1, got"):
            manifolds.SinkhornToTolerance(**bad)
    for name in manifolds.NAMES:
        kept = pickle.loads(pickle.dumps(manifolds.named(name)))
        assert torch.equal(kept(torch.eye(4)), manifolds.named(name)(torch.eye(4)))
