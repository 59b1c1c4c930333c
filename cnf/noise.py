"""Where randomness enters: one object, handed down, whose draws are a pure function of what they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from cnf.errors import ConfigError

__all__ = ["Kind", "Noise", "child", "draw", "number"]

Kind = Literal["uniform", "normal", "rademacher"]


class Noise:
    r"""Noise as a pure function of (seed, purpose, step, place, row of the joint batch).

    The place is the path of the module that draws (``Sequential`` hands ``noise.child(i)`` to child i) and the name it
    draws by. A process that holds rows ``start .. start + n`` of a joint batch of ``total`` rows draws exactly its rows of
    the joint draw, so many ranks or micro-batches see what one process sees, and a resumed run needs no generator state.

    Args:
        seed: the run's seed.
        purpose: what the noise is for, such as ``"train"`` or ``"validation"``.
        step: the training step, or the number of the batch.
        start: the first row of the joint batch that is held here.
        total: rows of the joint batch; ``None`` means that the rows held here are all.

    Raises:
        ConfigError: for rows that do not lie in the joint batch.

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
        """The noise of child ``i`` of the module that holds this one."""
        other = self._copy()
        other.place = (*self.place, int(i))
        return other

    def rows(self, start: int, total: int) -> Noise:
        """The noise of a micro-batch: rows from ``start`` on of the ``total`` that this one serves.

        Example:
            >>> whole = Noise(seed=0)
            >>> bool((whole.rows(2, 4).draw("u", "uniform", (2,)) == whole.draw("u", "uniform", (4,))[2:]).all())
            True
        """
        other = self._copy()
        other.start, other.total = self.start + start, total if self.total is None else self.total
        return other

    def __repr__(self) -> str:
        rows = "" if self.total is None else f", start={self.start}, total={self.total}"
        place = "".join(f".child({i})" for i in self.place)
        return f"Noise({self.seed}, {self.purpose!r}, {self.step}{rows}){place}"

    def _copy(self) -> Noise:
        other = Noise(self.seed, self.purpose, self.step, start=self.start, total=self.total)
        other.place = self.place
        return other

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
        """Draw by name: the same arguments give the same tensor, bit for bit, on the same kind of device.

        Torch's global generator is neither read nor moved.

        Args:
            name: what is drawn, unique within one module and one call.
            kind: ``"uniform"`` on [0, 1), standard ``"normal"``, or ``"rademacher"`` (plus or minus one).
            shape: the shape wanted here.
            dtype: floating-point type of the result.
            device: where the result lives (and is drawn).
            batch_dim: which dimension counts the rows; ``None`` where the draw is one for the whole batch.

        Raises:
            ConfigError: for an unknown kind, or rows beyond the joint batch.
        """
        joint, start = list(shape), 0
        if batch_dim is not None and self.total is not None:
            if self.start + joint[batch_dim] > self.total:
                raise ConfigError(
                    f"noise for rows {self.start}..{self.start + joint[batch_dim]} was asked for, but the joint batch "
                    f"has total={self.total} rows; give Noise the joint batch's size"
                )
            start, joint[batch_dim] = self.start, self.total
        generator = torch.Generator(device=device if device is not None else "cpu")
        generator.manual_seed(self._key(name))
        value = _sample(kind, joint, dtype, device, generator)
        if joint == list(shape):
            return value
        assert batch_dim is not None
        return value.narrow(batch_dim, start, shape[batch_dim])

    def seed_of(self, name: str) -> int | None:
        """A seed for a generator of its own, which draws what ``name`` says for the rows held here; None for replayed noise."""
        return self._key(f"{name}/{self.start}")

    def _key(self, name: str) -> int:
        text = repr((self.seed, self.purpose, self.step, self.place, name))
        # manual_seed takes 64 bits; 63 keep it a non-negative Python int on every backend
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    @staticmethod
    def replay(tensors: Mapping[str, Tensor]) -> Noise:
        """Noise that returns the given tensors, keyed by place and name: ``{"1/probe": e, "0/dequantize": u}``.

        A tensor may lack, or have, dimensions of size one: a probe (N, D) serves as (1, N, D).

        Raises:
            ConfigError: at a draw that has no tensor, or one whose shape does not fit (both named).

        Example:
            >>> Noise.replay({"1/probe": torch.ones(2)}).child(1).draw("probe", "normal", (1, 2))
            tensor([[1., 1.]])
        """
        return _Replay(dict(tensors))


class _Replay(Noise):
    """Given tensors in place of random ones."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__(0)
        self.tensors = tensors

    def seed_of(self, name: str) -> int | None:
        return None

    def _copy(self) -> Noise:
        other = _Replay(self.tensors)
        other.place = self.place
        return other

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
        key = "/".join([*map(str, self.place), name])
        if key not in self.tensors:
            raise ConfigError(f"noise to replay has no tensor {key!r}; it holds {sorted(self.tensors)}")
        value = self.tensors[key].to(dtype=dtype or torch.get_default_dtype(), device=device)
        if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
            raise ConfigError(f"noise to replay: {key!r} has shape {tuple(value.shape)}, but {tuple(shape)} is needed")
        return value.reshape(tuple(shape))


def _sample(
    kind: Kind,
    shape: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    if kind == "uniform":
        return torch.rand(tuple(shape), dtype=dtype, device=device, generator=generator)
    if kind == "normal":
        return torch.randn(tuple(shape), dtype=dtype, device=device, generator=generator)
    if kind == "rademacher":
        bits = torch.randint(0, 2, tuple(shape), dtype=torch.int8, device=device, generator=generator)
        return (2 * bits - 1).to(dtype or torch.get_default_dtype())
    raise ConfigError(f"noise kind is {kind!r}; expected 'uniform', 'normal' or 'rademacher'")


def child(noise: Noise | None, i: int) -> Noise | None:
    """``noise.child(i)``, where ``None`` (torch's global generator) stays ``None``."""
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
    """``noise.draw(...)``, where ``None`` draws from torch's global generator."""
    if noise is None:
        return _sample(kind, shape, dtype, device, None)
    return noise.draw(name, kind, shape, dtype=dtype, device=device, batch_dim=batch_dim)


def number(noise: Noise | None, name: str) -> float:
    """One number for the whole batch, uniform on [0, 1), that the CPU decides by: drawn there, so that no GPU is waited for.

    Example:
        >>> number(Noise(0, step=3), "stage") == number(Noise(0, step=3, start=2, total=4), "stage")
        True
    """
    return float(draw(noise, name, "uniform", (), dtype=torch.float64, batch_dim=None))
