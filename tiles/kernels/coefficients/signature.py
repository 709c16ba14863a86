"""The arguments of the kernels coefficients and sinkhorn, in call order."""

from __future__ import annotations

from tiles.kernels.spec import TOKENS, Argument, Problem, Role


def arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: z, s, alpha, bias, eps -> pre, post, res;
    backward: z, s, alpha, bias, dpre, dpost, dres, eps -> dz, ds, dalpha, dbias."""
    n, outputs = problem.streams, problem.outputs

    def of(name: str, role: Role, *shape: int | str) -> Argument:
        return Argument(name, shape, "float32", role)

    common = (
        of("z", "input", TOKENS, outputs),
        of("s", "input", TOKENS),
        of("alpha", "input", 3),
        of("bias", "input", outputs),
    )
    eps = of("eps", "scalar")
    if problem.direction == "forward":
        results = (("pre", (n,)), ("post", (n,)), ("res", (n, n)))
        return (*common, eps, *(of(name, "output", TOKENS, *shape) for name, shape in results))
    return (
        *common,
        of("dpre", "input", TOKENS, n),
        of("dpost", "input", TOKENS, n),
        of("dres", "input", TOKENS, n, n),
        eps,
        of("dz", "output", TOKENS, outputs),
        of("ds", "output", TOKENS),
        of("dalpha", "partial", 3),
        of("dbias", "partial", outputs),
    )


def sinkhorn_arguments(problem: Problem) -> tuple[Argument, ...]:
    """forward: logits -> res;  backward: logits, dres -> dlogits."""
    shape = (TOKENS, problem.streams, problem.streams)
    logits = Argument("logits", shape, "float32", "input")
    if problem.direction == "forward":
        return (logits, Argument("res", shape, "float32", "output"))
    return (
        logits,
        Argument("dres", shape, "float32", "input"),
        Argument("dlogits", shape, "float32", "output"),
    )
