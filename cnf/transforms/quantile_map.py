"""Monotone per-column maps to a standard normal: standardisation, logarithm, logit, and quantile tables with tails."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KINDS", "LOG", "LOGIT", "MarginalState", "forward_map", "inverse_map", "ndtri_exp"]

KINDS = ("standardize", "log", "logit", "gaussianize")  # from the simplest to the richest
_, LOG, LOGIT, GAUSSIANIZE = range(4)


class MarginalState(NamedTuple):
    """Parameters of D columns with up to K pieces; every tensor's leading dimension is D.

    A column is first mapped to y = (g(x) - loc) / scale, g the identity, log(x - low) or log((x - low) / (high - x)).
    ``gaussianize`` then maps y to Φ⁻¹(F(y)). F is a rational quadratic on each piece, with the piece's probability
    ``mass`` and the density at its two ends in units of mass / width; ones make it linear. Beyond the outermost knots
    F has a Gaussian tail (z linear in y) or a generalised Pareto tail.
    """

    kind: Tensor
    """(D,) int64, index into :data:`KINDS`."""
    loc: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    pieces: Tensor
    """(D,) int64, number of pieces in use."""
    origin: Tensor
    """(D,) y at the first knot."""
    width: Tensor
    """(D, K) in units of y; zero where unused, as is mass."""
    mass: Tensor
    left: Tensor
    right: Tensor
    tail_mass: Tensor
    """(D, 2) probabilities below the first and above the last knot."""
    tail_shape: Tensor
    """(D, 2) shape of the Pareto tail, positive; zero for a Gaussian tail."""
    tail_scale: Tensor
    """(D, 2) scale of the Pareto tail in units of y; for a Gaussian tail the slope dz/dy."""


def ndtri_exp(log_p: Tensor) -> Tensor:
    r"""Return Φ⁻¹(exp(log_p)), also where exp(log_p) underflows; for log_p up to about ln(3/4).

    Newton's method on ln Φ(z) = log_p, with Mills' ratio :math:`\Phi/\varphi` from the scaled complementary error
    function. The last two steps are differentiable, which makes first and second derivatives exact.

    Example:
        >>> ndtri_exp(torch.tensor([math.log(0.025), -5000.0], dtype=torch.float64))
        tensor([ -1.9600, -99.9447], dtype=torch.float64)
    """
    with torch.no_grad():
        fixed = log_p.detach()
        twice = (-2 * fixed).clamp(min=20)
        far = -(twice - twice.log() - math.log(2 * math.pi)).sqrt()
        z = torch.where(fixed < -300, far, torch.special.ndtri(fixed.clamp(min=-300).exp()))
        z = _newton(z, fixed)
    return _newton(_newton(z, log_p), log_p)


def _newton(z: Tensor, log_p: Tensor) -> Tensor:
    step: Tensor = (torch.special.log_ndtr(z) - log_p) * _mills(z)
    return z - step


def _mills(z: Tensor) -> Tensor:
    """Return Φ(z) / φ(z)."""
    scaled: Tensor = torch.special.erfcx(-z / math.sqrt(2))
    return math.sqrt(math.pi / 2) * scaled


class _Table(NamedTuple):
    """Knots (D, K + 1), probabilities below and above each of them, the pieces, and the tails; all in float64."""

    knots: Tensor
    below: Tensor
    above: Tensor
    width: Tensor
    mass: Tensor
    left: Tensor
    right: Tensor
    tail_mass: Tensor
    tail_shape: Tensor
    tail_scale: Tensor
    last: Tensor


def _table(state: MarginalState) -> _Table:
    width, mass, tails = state.width.double(), state.mass.double(), state.tail_mass.double()
    # positive widths and masses keep the knots in order whatever they were rounded to
    total = mass.sum(1, keepdim=True) + tails.sum(1, keepdim=True)
    mass, tails = mass / total, tails / total
    zero = torch.zeros_like(tails[:, :1])
    knots = state.origin.double()[:, None] + torch.cat([zero, width.cumsum(1)], 1)
    below = tails[:, :1] + torch.cat([zero, mass.cumsum(1)], 1)
    above = tails[:, 1:] + torch.cat([mass.flip(1).cumsum(1).flip(1), zero], 1)
    ends, shape = (state.left.double(), state.right.double()), (state.tail_shape.double(), state.tail_scale.double())
    return _Table(knots, below, above, width, mass, *ends, tails, *shape, state.pieces - 1)


class _Piece(NamedTuple):
    """Parameters of each value's piece (N, D)."""

    knot: Tensor
    below: Tensor
    above: Tensor
    width: Tensor
    mass: Tensor
    left: Tensor
    right: Tensor


def _piece(table: _Table, borders: Tensor, values: Tensor) -> _Piece:
    """Return the pieces of values (N, D) among ``borders`` (D, K + 1)."""
    index = torch.searchsorted(borders[:, 1:].contiguous(), values.detach().T.contiguous(), right=True)
    index = torch.minimum(index, table.last[:, None])  # (D, N)

    def pick(values: Tensor) -> Tensor:
        return values.gather(1, index).T

    fields = (table.knots, table.below, table.above[:, 1:], table.width, table.mass, table.left, table.right)
    return _Piece(*map(pick, fields))


def _log_density(piece: _Piece, t: Tensor) -> Tensor:
    """Return the log-density of y at the fraction t of the piece (rational quadratic spline, 1906.04032)."""
    s = t * (1 - t)
    top = piece.right * t.square() + 2 * s + piece.left * (1 - t).square()
    return (piece.mass / piece.width).log() + top.log() - 2 * (1 + (piece.left + piece.right - 2) * s).log()


def _log_slope(z: Tensor, log_p: Tensor, log_density: Tensor) -> Tensor:
    """Return ln dz/dy as ln (density / p) (p / φ(z)), p = Φ(-|z|) the probability on z's side."""
    return log_density - log_p + _mills(-z.abs()).log()


def _excess(table: _Table, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return whether y is in the lower and upper tail, and its distance from the outermost knot."""
    first, last = table.knots[:, 0], table.knots[:, -1]
    lower, upper = y < first, y > last
    return lower, upper, torch.where(lower, first - y, torch.where(upper, y - last, 0.0))


def _tail(table: _Table, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mass, shape and scale (N, D) of the tail on each value's side."""

    def pick(values: Tensor) -> Tensor:
        return torch.where(upper, values[:, 1], values[:, 0])

    return pick(table.tail_mass), pick(table.tail_shape), pick(table.tail_scale)


def _gaussianize(table: _Table, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return z = Φ⁻¹(F(y)) and ln dz/dy."""
    lower, upper, excess = _excess(table, y)
    piece = _piece(table, table.knots, y)
    outside = lower | upper
    # not clamped: t may leave [0, 1] by rounding, and a clamp has no derivative there
    t = torch.where(outside, upper.to(y), (y - piece.knot) / piece.width)
    s = t * (1 - t)
    bottom = 1 + (piece.left + piece.right - 2) * s
    p = piece.below + piece.mass * (t.square() + piece.left * s) / bottom
    q = piece.above + piece.mass * ((1 - t).square() + piece.right * s) / bottom
    flip = torch.where(outside, upper, q < p)
    mass, shape, scale = _tail(table, flip)
    pareto, safe = outside & (shape > 0), torch.where(shape > 0, shape, 1.0)
    growth = torch.log1p(torch.where(pareto, safe * excess / scale, 0.0))
    log_p = torch.where(pareto, mass.log() - growth / safe, torch.where(flip, q, p).log())
    side = ndtri_exp(log_p)  # the lower tail's quantile of the smaller of p and 1 - p
    log_density = torch.where(pareto, log_p - scale.log() - growth, _log_density(piece, t))
    slope = _log_slope(side, log_p, log_density)
    gaussian = outside & ~pareto
    # with t at the knot, `side` is the knot's quantile
    side = side - torch.where(gaussian, scale * excess, 0.0)
    return torch.where(flip, -side, side), torch.where(gaussian, scale.log(), slope)


def _gaussianize_inverse(table: _Table, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = F⁻¹(Φ(z)) and ln dz/dy there."""
    half = table.below <= table.above
    quantile = torch.special.ndtri(torch.where(half, table.below, table.above))
    borders = torch.where(half, quantile, -quantile)
    lower, upper = z < borders[:, 0], z > borders[:, -1]
    outside = lower | upper
    flip = z > 0
    piece = _piece(table, borders, z)
    log_p = torch.special.log_ndtr(-z.abs())
    p = log_p.exp()
    u = torch.where(flip, 1 - (p - piece.above) / piece.mass, (p - piece.below) / piece.mass)
    u = torch.where(outside, upper.to(z), u)
    # u = (t² + l t (1 - t)) / (1 + c t (1 - t)) solved for t, in the form without cancellation
    c = piece.left + piece.right - 2
    linear = piece.left - u * c
    t = 2 * u / (linear + (linear.square() + 4 * u * (1 - linear)).sqrt())
    mass, shape, scale = _tail(table, flip)
    pareto, safe = outside & (shape > 0), torch.where(shape > 0, shape, 1.0)
    gap = safe * torch.where(pareto, mass.log() - log_p, 0.0)
    border = torch.where(flip, -borders[:, -1], borders[:, 0])
    excess = torch.where(pareto, scale * torch.expm1(gap) / safe, torch.where(outside, (border + z.abs()) / scale, 0.0))
    inside = piece.knot + piece.width * t
    y = torch.where(upper, table.knots[:, -1] + excess, torch.where(lower, table.knots[:, 0] - excess, inside))
    log_density = torch.where(pareto, log_p - scale.log() - gap, _log_density(piece, t))
    return y, torch.where(outside & ~pareto, scale.log(), _log_slope(z, log_p, log_density))


def forward_map(state: MarginalState, x: Tensor) -> tuple[Tensor, Tensor]:
    """Map x (N, D) to z (N, D) in float64; return z and ln dz/dx (N, D), NaN or infinite outside the support."""
    kind, x = state.kind, x.double()
    loc, scale, low, high = state.loc.double(), state.scale.double(), state.low.double(), state.high.double()
    logit = kind == LOGIT
    bounded = (kind == LOG) | logit
    above = torch.where(bounded, x - low, 1.0).log()
    below = torch.where(logit, high - x, 1.0).log()
    y = (torch.where(bounded, above - below, x) - loc) / scale
    slope = torch.where(logit, high - low, 1.0).log() - above - below - scale.log()
    z, own = _gaussianize(_table(state), y)
    quantiles = kind == GAUSSIANIZE
    return torch.where(quantiles, z, y), slope + torch.where(quantiles, own, 0.0)


def inverse_map(state: MarginalState, z: Tensor) -> tuple[Tensor, Tensor]:
    """Map z (N, D) to x (N, D) in float64; return x and ln dx/dz (N, D)."""
    kind, z = state.kind, z.double()
    loc, scale, low, high = state.loc.double(), state.scale.double(), state.low.double(), state.high.double()
    quantiles = kind == GAUSSIANIZE
    y, own = _gaussianize_inverse(_table(state), z)
    v = torch.where(quantiles, y, z) * scale + loc
    log, logit = kind == LOG, kind == LOGIT
    exponent, odds = torch.where(log, v, 0.0), torch.where(logit, v, 0.0)
    x = torch.where(log, low + exponent.exp(), torch.where(logit, low + (high - low) * torch.sigmoid(odds), v))
    spread = torch.nn.functional.logsigmoid(odds) + torch.nn.functional.logsigmoid(-odds) + (high - low).log()
    slope = scale.log() + torch.where(log, exponent, torch.where(logit, spread, 0.0))
    return x, slope - torch.where(quantiles, own, 0.0)
