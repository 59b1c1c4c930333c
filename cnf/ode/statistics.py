"""Fitting of transforms and denoisers to statistics of the training data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cnf.fields import VectorField
from cnf.fields.signature import wrapped
from cnf.ode.continuous import CNF
from cnf.random import Noise
from cnf.transforms import Gaussianize, MarginalTransform, Request, Standardize, Transform, iter_leaves
from cnf.transforms.chain import input_of

__all__ = ["fit_statistics"]


@torch.no_grad()
def fit_statistics(transform: Transform, x: Tensor, batch_size: int = 8192) -> None:
    """Fit the data-dependent transforms before the first block to their input, and the block's field if a denoiser.

    These are Standardize, Gaussianize and MarginalTransform.

    Args:
        transform: transform of a flow.
        x: training data (N, \\*event); images are dequantised with fixed noise.
        batch_size: number of rows per batch, converted to floats at once.

    Raises:
        DataError: for fewer than two rows, non-finite values, or a constant dimension.
    """

    def inputs(target: Transform) -> Iterator[Tensor]:
        for number, part in enumerate(x.split(batch_size)):
            request = Request(noise=Noise(0, "statistics", number))
            yield input_of(transform, part, request, lambda leaf: leaf is target)

    for leaf, _ in iter_leaves(transform):
        if any(isinstance(m, CNF) for m in leaf.modules()):
            if isinstance(leaf, CNF) and isinstance(field := wrapped(leaf.field), VectorField):
                field.fit_batches(inputs(leaf))
            return
        if isinstance(leaf, Standardize | Gaussianize | MarginalTransform):
            leaf.fit_batches(inputs(leaf))
