"""The likeliest value of each column given the others: which column makes a row odd."""

from __future__ import annotations

import torch
from torch import Tensor

from cnf._utils.errors import DataError
from cnf._utils.validation import context_rows, match_flow
from cnf.evaluation.columns import column_marginal, exact_trace
from cnf.flow import Flow
from cnf.ode.divergence import closed
from cnf.random import Noise
from cnf.solvers import coarse
from cnf.transforms.quantile_map import forward_map, inverse_map

__all__ = ["cost_of_value", "likeliest_values"]

SAMPLES = 256  # of the model, whose quantiles are the first candidates
COARSE, FINE, ROUNDS = 33, 9, 4  # candidates of the first round and of each later one, between the neighbours of the best
EVALUATIONS = COARSE + 1 + FINE * ROUNDS  # of the density, for a value
DIRECTIONS = 16  # derivatives of an exact trace without a closed form that take about as long as one with it


def cost_of_value(flow: Flow) -> float:
    """Return the cost of a value of :func:`likeliest_values`, in evaluations of a density whose trace has a closed form.

    Example:
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> [cost_of_value(build(FlowConfig.of(hidden=hidden), SolverConfig(), (64,))) for hidden in ((8,), (8, 8, 8))]
        [70.0, 280.0]
    """
    exact = all(closed(exact_trace(block), block.field) for block in flow.blocks)
    return EVALUATIONS * (1.0 if exact else max(1.0, flow.dim / DIRECTIONS))


@torch.no_grad()
def likeliest_values(flow: Flow, x: Tensor, context: Tensor | None = None, *, seed: int = 0, batch_size: int = 8192) -> tuple[Tensor, Tensor]:
    r"""Return for each value of some rows the likeliest one given the rest of its row, and by how much it is likelier.

    The value of column j maximises :math:`p(x_j | x_{-j})`, of which the row's own density is a multiple, so that no
    integral is needed. The search starts from the quantiles of samples and narrows the interval around the best
    candidate: it stays between the least and the largest sample, and finds the highest mode of a density that is smooth
    on the scale of the quantiles. In a flow that begins with a :class:`~cnf.MarginalTransform`, the density is that of
    the column's latent, as a logarithm would otherwise move every mode towards zero. For a normal conditional density, the gain is :math:`z^2/2` of a value z standard
    deviations away from its mean.

    Args:
        flow: a flow of vectors, in evaluation mode.
        x: rows (N, D), inside the support.
        context: (N, C), (C,) or None.
        seed: of the samples.
        batch_size: rows of a solve.

    Returns:
        The likeliest values (N, D), and the gains in nats (N, D), at least 0; float64, on the CPU.

    Raises:
        DataError: for events that are not vectors.
        SolverError: if a solve fails.

    Example:
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> flow = build(FlowConfig.of(hidden=(8,)), SolverConfig(), (2,)).eval()  # a standard normal
        >>> values, gains = likeliest_values(flow, torch.tensor([[0.0, 4.0]]))
        >>> [round(float(gain), 1) for gain in gains[0]], abs(float(values[0, 1])) < 0.05
        ([0.0, 8.0], True)
    """
    if x.ndim != 2 or len(flow.event_shape) != 1:
        raise DataError(f"x has shape {tuple(x.shape)}, expected rows (N, D) of a flow of vectors")
    x, context = match_flow(x, context, flow.like)
    if not len(x):
        return x.double().cpu(), x.double().cpu()
    count = SAMPLES if context is None or context.ndim == 1 else max(1, SAMPLES // len(x))
    drawn = flow.sample(count, context, noise=Noise(seed, "sample")).reshape(-1, x.shape[1])
    values, gains = x.double().clone(), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for j in range(x.shape[1]):
        values[:, j], gains[:, j] = _column(flow, x, context, j, drawn[:, j], batch_size)
    return values.cpu(), gains.cpu()


def _column(flow: Flow, x: Tensor, context: Tensor | None, j: int, drawn: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest values (N,) of column j and their gains (N,); ``drawn`` (S,) are samples of the column."""
    marginal = column_marginal(flow, j)
    start, own = (v.double()[:, None] if marginal is None else forward_map(marginal, v[:, None])[0] for v in (drawn, x[:, j]))
    start = start[:, 0].quantile(torch.linspace(0, 1, COARSE, dtype=torch.float64, device=x.device))

    def values_of(u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of latents (M,) in the column, and ln dx/du."""
        if marginal is None:
            return u, torch.zeros_like(u)
        value, slope = inverse_map(marginal, u[:, None])
        return value[:, 0], slope[:, 0]

    def log_density(u: Tensor) -> Tensor:
        """Return ln p (N, K) of the rows with latents u (N, K) in column j."""
        values, slope = values_of(u.flatten())
        rows = x[:, None].repeat(1, u.shape[1], 1)
        rows[:, :, j] = values.reshape(u.shape).to(x.dtype)
        owner = torch.arange(len(x), device=x.device).repeat_interleave(u.shape[1]).split(batch_size)
        parts = [
            flow.log_prob(part, context_rows(context, mine), divergence=exact_trace, solver=coarse).double()
            for part, mine in zip(rows.flatten(0, 1).split(batch_size), owner, strict=True)
        ]
        return (torch.cat(parts) + slope).reshape(u.shape).nan_to_num(nan=-torch.inf, posinf=-torch.inf)

    candidates = torch.cat([own, start.expand(len(x), -1)], 1)
    density = log_density(candidates)
    reference = density[:, :1]
    steps = torch.linspace(0, 1, FINE + 2, dtype=torch.float64, device=x.device)[1:-1]
    for _ in range(ROUNDS):
        candidates, order = candidates.sort(dim=1)
        density = density.gather(1, order)
        best = density.argmax(1, keepdim=True)
        low = candidates.gather(1, (best - 1).clamp(min=0))
        high = candidates.gather(1, (best + 1).clamp(max=candidates.shape[1] - 1))
        more = low + (high - low) * steps
        candidates, density = torch.cat([candidates, more], 1), torch.cat([density, log_density(more)], 1)
    best = density.argmax(1, keepdim=True)
    gain = (density.gather(1, best) - reference).clamp(min=0.0)
    return values_of(candidates.gather(1, best)[:, 0])[0], gain[:, 0]
