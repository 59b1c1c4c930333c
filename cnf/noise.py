"""Reproducible random numbers, keyed by seed, purpose, step, module path and batch row."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cnf.errors import ConfigError

__all__ = ["Kind", "Like", "Noise", "child", "draw", "number"]

Kind = Literal["uniform", "normal", "rademacher"]


class Like(NamedTuple):
    """Type and device of a draw."""

    dtype: torch.dtype | None = None
    device: torch.device | str | None = None


class Noise:
    r"""Random source whose draws are a pure function of (seed, purpose, step, place, row of the joint batch).

    The place is the path of the drawing module (``Sequential`` passes ``noise.child(i)`` to child i) and the name of
    the draw. A process that holds rows ``start .. start + n`` of a joint batch of ``total`` rows draws exactly its rows
    of the joint draw: ranks and micro-batches reproduce a single process, and a resumed run needs no generator state.

    Args:
        seed: seed of the run.
        purpose: use of the noise, such as ``"train"`` or ``"validation"``.
        step: training step, or index of the batch.
        start: index of the first local row in the joint batch.
        total: rows of the joint batch; ``None`` if the local rows are the whole batch.

    Raises:
        ConfigError: for local rows outside the joint batch.

    Example:
        >>> a = Noise(seed=0, step=3).child(1).draw("probe", "normal", (4, 2))
        >>> b = Noise(seed=0, step=3, start=2, total=4).child(1).draw("probe", "normal", (2, 2))
        >>> bool((a[2:] == b).all())
        True
    """

    def __init__(self, seed: int, purpose: str = "train", step: int = 0, *, start: int = 0, total: int | None = None):
        if start < 0 or (total is None and start) or (total is not None and total < start):
            raise ConfigError(f"start={start}, total={total}: expected 0 <= start <= total, the joint batch's size")
        self.seed, self.purpose, self.step = int(seed), purpose, int(step)
        self.start, self.total = int(start), total
        self.place: tuple[int, ...] = ()

    def child(self, i: int) -> Noise:
        """Return the noise of child module ``i``."""
        other = copy.copy(self)
        other.place = (*self.place, int(i))
        return other

    def rows(self, start: int, total: int) -> Noise:
        """Return the noise of a micro-batch whose rows begin at ``start`` of ``total``.

        Example:
            >>> whole = Noise(seed=0)
            >>> bool((whole.rows(2, 4).draw("u", "uniform", (2,)) == whole.draw("u", "uniform", (4,))[2:]).all())
            True
        """
        other = copy.copy(self)
        other.start, other.total = self.start + start, total if self.total is None else self.total
        return other

    def __repr__(self) -> str:
        rows = "" if self.total is None else f", start={self.start}, total={self.total}"
        place = "".join(f".child({i})" for i in self.place)
        return f"Noise({self.seed}, {self.purpose!r}, {self.step}{rows}){place}"

    def draw(
        self,
        name: str,
        kind: Kind,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        batch_dim: int | None = 0,
    ) -> Tensor:
        """Draw a named tensor; equal arguments give bitwise equal tensors on the same kind of device.

        Torch's global generator is neither read nor advanced.

        Args:
            name: identifies the draw, unique within one module and one call.
            kind: ``"uniform"`` on [0, 1), standard ``"normal"``, or ``"rademacher"`` (plus or minus one).
            shape: shape of the local result.
            dtype: floating-point type of the result.
            device: device on which the result is drawn and returned.
            batch_dim: dimension of the rows; ``None`` for one draw shared by the whole batch.

        Raises:
            ConfigError: for an unknown kind, or rows beyond the joint batch.
        """
        return self._draw(name, kind, shape, batch_dim, Like(dtype, device))

    def _draw(self, name: str, kind: Kind, shape: Sequence[int], batch_dim: int | None, like: Like) -> Tensor:
        """Draw what :meth:`draw` returns; overridden by noise of another origin."""
        joint, start = list(shape), 0
        if batch_dim is not None and self.total is not None:
            if self.start + joint[batch_dim] > self.total:
                raise ConfigError(
                    f"noise for rows {self.start}..{self.start + joint[batch_dim]} was asked for, but the joint batch "
                    f"has total={self.total} rows; give Noise the joint batch's size"
                )
            start, joint[batch_dim] = self.start, self.total
        generator = torch.Generator(device=like.device if like.device is not None else "cpu")
        generator.manual_seed(self._key(name))
        value = _sample(kind, joint, like, generator)
        if joint == list(shape):
            return value
        assert batch_dim is not None
        return value.narrow(batch_dim, start, shape[batch_dim])

    def seed_of(self, name: str) -> int | None:
        """Return a seed for a separate generator of the draw ``name``, which depends on the first local row.

        Replayed noise has no seed: None.
        """
        return self._key(f"{name}/{self.start}")

    def _key(self, name: str) -> int:
        text = repr((self.seed, self.purpose, self.step, self.place, name))
        # manual_seed takes 64 bits; 63 keep it a non-negative Python int on every backend
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    @staticmethod
    def replay(tensors: Mapping[str, Tensor]) -> Noise:
        """Return noise that replays the given tensors, keyed by place and name: ``{"1/probe": e, "0/dequantize": u}``.

        Dimensions of size one may be missing or added: a probe (N, D) also serves as (1, N, D).

        Raises:
            ConfigError: for a draw whose key has no tensor or one of another shape; the message names both.

        Example:
            >>> Noise.replay({"1/probe": torch.ones(2)}).child(1).draw("probe", "normal", (1, 2))
            tensor([[1., 1.]])
        """
        return _Replay(dict(tensors))


class _Replay(Noise):
    """Noise that replays given tensors."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(0)
        self.tensors = tensors

    def seed_of(self, name: str) -> int | None:
        return None

    def _draw(self, name: str, kind: Kind, shape: Sequence[int], batch_dim: int | None, like: Like) -> Tensor:
        key = "/".join([*map(str, self.place), name])
        if key not in self.tensors:
            raise ConfigError(f"noise to replay has no tensor {key!r}; it holds {sorted(self.tensors)}")
        value = self.tensors[key].to(dtype=like.dtype or torch.get_default_dtype(), device=like.device)
        if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
            raise ConfigError(f"noise to replay: {key!r} has shape {tuple(value.shape)}, but {tuple(shape)} is needed")
        return value.reshape(tuple(shape))


def _sample(kind: Kind, shape: Sequence[int], like: Like, generator: torch.Generator | None) -> Tensor:
    dtype, device = like
    if kind == "uniform":
        return torch.rand(tuple(shape), dtype=dtype, device=device, generator=generator)
    if kind == "normal":
        return torch.randn(tuple(shape), dtype=dtype, device=device, generator=generator)
    if kind == "rademacher":
        bits = torch.randint(0, 2, tuple(shape), dtype=torch.int8, device=device, generator=generator)
        return (2 * bits - 1).to(dtype or torch.get_default_dtype())
    raise ConfigError(f"noise kind is {kind!r}; expected 'uniform', 'normal' or 'rademacher'")


def child(noise: Noise | None, i: int) -> Noise | None:
    """Return ``noise.child(i)``, or ``None`` (torch's global generator) for ``None``."""
    return None if noise is None else noise.child(i)


def draw(
    noise: Noise | None,
    name: str,
    kind: Kind,
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    batch_dim: int | None = 0,
) -> Tensor:
    """Return ``noise.draw(...)``; ``None`` draws from torch's global generator."""
    if noise is None:
        return _sample(kind, shape, Like(dtype, device), None)
    return noise.draw(name, kind, shape, dtype=dtype, device=device, batch_dim=batch_dim)


def number(noise: Noise | None, name: str) -> float:
    """Draw one uniform number on [0, 1) for the whole batch, on the CPU to avoid GPU synchronisation.

    Example:
        >>> number(Noise(0, step=3), "stage") == number(Noise(0, step=3, start=2, total=4), "stage")
        True
    """
    return float(draw(noise, name, "uniform", (), dtype=torch.float64, batch_dim=None))
