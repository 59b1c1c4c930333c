"""Expectation maximisation for a Gaussian mixture: scikit-learn's, and iterations as products with the rows' monomials."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf._utils.errors import DataError

__all__ = ["MixtureParameters", "fit", "iterate"]

CHUNK = 1 << 20  # numbers in the log-densities of a chunk of rows
KEPT = 1 << 26  # numbers in monomials that are kept between iterations


@dataclass
class MixtureParameters:
    """Parameters of a mixture in double precision.

    Attributes:
        log_weights: (K,).
        means: (K, D).
        factors: lower triangular A (K, D, D) of the covariances (A^T A)^{-1}.
    """

    log_weights: Tensor
    means: Tensor
    factors: Tensor


def fit(
    rows: Tensor, components: int, covariance: str, *, seed: int, restarts: int, max_iter: int, min_variance: float
) -> MixtureParameters:
    """Return scikit-learn's mixture of rows (N, D) on the CPU, in double precision; tied factors are (1, D, D).

    Raises:
        DataError: if scikit-learn cannot fit it.
    """
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        components, covariance_type=covariance, random_state=seed, n_init=restarts, max_iter=max_iter, reg_covar=min_variance
    )
    try:
        mixture.fit(rows.numpy())
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{components} components cannot be fitted to z: {reason[:300]}") from None
    a = torch.from_numpy(mixture.precisions_cholesky_)
    a = torch.diag_embed(a) if covariance == "diag" else a.reshape(-1, *a.shape[-2:]).mT  # theirs is upper triangular, for rows
    return MixtureParameters(torch.from_numpy(mixture.weights_).log(), torch.from_numpy(mixture.means_), a)


@torch.no_grad()
def iterate(
    z: Tensor, start: MixtureParameters, covariance: str, iterations: int, tolerance: float, min_variance: float
) -> tuple[MixtureParameters, list[float]]:
    """Return the parameters after some iterations, and the mean log-likelihood (nats) before each of them.

    A log-density is a polynomial of second degree, so that both steps are one product with the monomials of all rows:
    7 times as fast as scikit-learn's loop over the components for 150 of them in 8 columns. A component whose covariance
    is singular in spite of ``min_variance`` keeps its parameters.

    Args:
        z: rows (N, D), in double precision: differences of large terms remain.
        start: parameters to begin from.
        covariance: ``"full"``, ``"tied"`` or ``"diag"``.
        iterations: at most.
        tolerance: gain in nats per row below which to stop.
        min_variance: added to the diagonal of the covariances.
    """
    center = z.mean(0)
    z, dim = z - center, z.shape[1]
    now = MixtureParameters(start.log_weights, start.means - center, start.factors)
    rows, columns = torch.triu_indices(dim, dim, device=z.device) if covariance != "diag" else torch.arange(dim, device=z.device).expand(2, -1)
    size = max(1, min(len(z), CHUNK // max(len(now.log_weights), len(rows) + dim)))
    kept = [_monomials(part, rows, columns) for part in z.split(size)] if z.shape[0] * len(rows) <= KEPT else None
    course: list[float] = []
    for _ in range(iterations):
        chunks = iter(kept) if kept is not None else (_monomials(part, rows, columns) for part in z.split(size))
        total, counts, sums = _expectation(chunks, _coefficients(now, rows, columns), len(now.log_weights))
        course.append(total / len(z))
        if len(course) > 1 and course[-1] - course[-2] < tolerance:
            break
        now = _maximisation(counts, sums, now, rows, columns, covariance, min_variance)
    return MixtureParameters(now.log_weights, now.means + center, now.factors), course


def _monomials(z: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return 1, z_i and z_i z_j (n, 1 + D + P)."""
    return torch.cat([torch.ones_like(z[:, :1]), z, z[:, rows] * z[:, columns]], 1)


def _coefficients(at: MixtureParameters, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the coefficients (1 + D + P, K) of the weighted log-densities in the monomials."""
    precision = (at.factors.mT @ at.factors).expand(len(at.means), -1, -1)
    linear = (precision @ at.means[..., None])[..., 0]
    volume = at.factors.diagonal(dim1=1, dim2=2).log().sum(1) - 0.5 * at.means.shape[1] * math.log(2 * math.pi)
    constant = at.log_weights + volume - 0.5 * (linear * at.means).sum(1)
    quadratic = precision[:, rows, columns] * torch.where(rows == columns, -0.5, -1.0)
    return torch.cat([constant[:, None], linear, quadratic], 1).T.contiguous()


def _expectation(chunks: Iterator[Tensor], coefficients: Tensor, components: int) -> tuple[float, Tensor, Tensor]:
    """Return the log-likelihood, and responsibilities summed over the rows, alone (K,) and with the monomials (K, D + P)."""
    total, sums = 0.0, torch.zeros(components, len(coefficients), dtype=coefficients.dtype, device=coefficients.device)
    for monomials in chunks:
        height = monomials @ coefficients
        top = height.amax(1, keepdim=True)
        # the exponentials in single precision: half the time, and their error of 1e-7 is that of a weight
        share = (height - top).float().exp_()
        mass = share.sum(1, keepdim=True)
        total += float((top[:, 0] + mass[:, 0].double().log()).sum())
        sums += (share / mass).double().T @ monomials
    return total, sums[:, 0], sums[:, 1:]


def _maximisation(
    counts: Tensor, sums: Tensor, before: MixtureParameters, rows: Tensor, columns: Tensor, covariance: str, min_variance: float
) -> MixtureParameters:
    k, dim = before.means.shape
    counts = counts + 10 * torch.finfo(counts.dtype).eps
    means = sums[:, :dim] / counts[:, None]
    moments = means.new_zeros(k, dim, dim)
    moments[:, rows, columns] = sums[:, dim:] / counts[:, None]
    moments[:, columns, rows] = moments[:, rows, columns]
    about = moments - (torch.diag_embed(means.square()) if covariance == "diag" else means[:, :, None] * means[:, None, :])
    if covariance == "tied":
        about = torch.einsum("k,kij->ij", counts / counts.sum(), about)[None]
    about = about + min_variance * torch.eye(dim, dtype=means.dtype, device=means.device)
    lower, failed = torch.linalg.cholesky_ex(about)
    sound = (failed == 0) & (lower.diagonal(dim1=1, dim2=2) > 0).all(1)
    lower = torch.where(sound[:, None, None], lower, torch.eye(dim, dtype=means.dtype, device=means.device))
    factors = torch.linalg.solve_triangular(lower, torch.eye(dim, dtype=means.dtype, device=means.device).expand_as(lower), upper=False)
    factors = torch.where(sound[:, None, None], factors, before.factors)
    means = torch.where(sound.expand(k)[:, None], means, before.means)
    return MixtureParameters((counts / counts.sum()).log(), means, factors)
