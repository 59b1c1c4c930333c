"""Reproducible random numbers, keyed by seed, purpose, step, module path and batch row."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cnf._utils.errors import ConfigError, unknown_name

__all__ = ["Kind", "Noise", "SharedNoise", "child", "draw", "number"]

Kind = Literal["uniform", "normal", "rademacher"]


class Noise:
    r"""Random source whose draws are a pure function of (seed, purpose, step, path, row of the joint batch).

    The path is that of the drawing module (``Sequential`` passes ``noise.child(i)`` to child i), with the name of the
    draw. A process that holds rows ``start .. start + n`` of a joint batch of ``total`` rows draws exactly its rows
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
            raise ConfigError(f"start must be between 0 and total (the joint batch's rows), got start={start}, total={total}")
        self.seed, self.purpose, self.step = int(seed), purpose, int(step)
        self.start, self.total = int(start), total
        self.path: tuple[int, ...] = ()

    def child(self, i: int) -> Noise:
        """Return the noise of child module ``i``."""
        other = copy.copy(self)
        other.path = (*self.path, int(i))
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
        path = "".join(f".child({i})" for i in self.path)
        return f"Noise({self.seed}, {self.purpose!r}, {self.step}{rows}){path}"

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
        joint, start = list(shape), 0
        if batch_dim is not None and self.total is not None:
            if self.start + joint[batch_dim] > self.total:
                raise ConfigError(
                    f"total={self.total} is less than the rows {self.start} to {self.start + joint[batch_dim]} that are drawn: "
                    "pass the joint batch's size to Noise"
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
        """Return a seed for a separate generator of the draw ``name``, which depends on the first local row.

        Replayed noise has no seed: None.
        """
        return self._key(f"{name}/{self.start}")

    def _key(self, name: str) -> int:
        text = repr((self.seed, self.purpose, self.step, self.path, name))
        # manual_seed takes 64 bits; 63 keep it a non-negative Python int on every backend
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    @staticmethod
    def replay(tensors: Mapping[str, Tensor]) -> Noise:
        """Return noise that replays the given tensors, keyed by path and name: ``{"1/probe": e, "0/dequantize": u}``.

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

    def draw(self, name: str, kind: Kind, shape: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        key = "/".join([*map(str, self.path), name])
        if key not in self.tensors:
            raise ConfigError(f"noise to replay has no tensor {key!r}, only {sorted(self.tensors)}")
        value = self.tensors[key].to(dtype=dtype or torch.get_default_dtype(), device=options.get("device"))
        if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
            raise ConfigError(f"noise to replay: {key!r} has shape {tuple(value.shape)}; expected {tuple(shape)}")
        return value.reshape(tuple(shape))


class SharedNoise(Noise):
    """Noise with the same draw for every row and at every call: what is computed is a function of the row.

    Args:
        seed: seed; None draws one from torch's global generator at the first draw.
        step: number of the draw.

    Example:
        >>> noise = SharedNoise(seed=0)
        >>> bool((noise.draw("probe", "normal", (3, 2)) == noise.draw("probe", "normal", (5, 2))[0]).all())
        True
    """

    def __init__(self, seed: int | None = None, step: int = 0):
        super().__init__(0, "shared", step)
        self.drawn = [] if seed is None else [seed]  # shared with the children

    def draw(self, name: str, kind: Kind, shape: Sequence[int], *, batch_dim: int | None = 0, **options: Any) -> Tensor:
        """Draw a named tensor; see :meth:`Noise.draw`."""
        one = [1 if i == batch_dim else n for i, n in enumerate(shape)]
        return super().draw(name, kind, one, batch_dim=None, **options).expand(tuple(shape))

    def _key(self, name: str) -> int:
        if not self.drawn:
            self.drawn.append(int(torch.randint(2**62, ())))
        self.seed = self.drawn[0]
        return super()._key(name)


def _sample(
    kind: Kind, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None, generator: torch.Generator | None
) -> Tensor:
    source: Any = {} if generator is None else {"generator": generator}  # generator=None does not compile for any number of rows
    if kind == "uniform":
        return torch.rand(tuple(shape), dtype=dtype, device=device, **source)
    if kind == "normal":
        return torch.randn(tuple(shape), dtype=dtype, device=device, **source)
    if kind == "rademacher":
        bits = torch.randint(0, 2, tuple(shape), dtype=torch.int8, device=device, **source)
        return (2 * bits - 1).to(dtype or torch.get_default_dtype())
    raise unknown_name("kind", kind, ("uniform", "normal", "rademacher"))


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
        return _sample(kind, shape, dtype, device, None)
    return noise.draw(name, kind, shape, dtype=dtype, device=device, batch_dim=batch_dim)


def number(noise: Noise | None, name: str) -> float:
    """Draw one uniform number on [0, 1) for the whole batch, on the CPU to avoid GPU synchronisation.

    Example:
        >>> number(Noise(0, step=3), "stage") == number(Noise(0, step=3, start=2, total=4), "stage")
        True
    """
    return float(draw(noise, name, "uniform", (), dtype=torch.float64, batch_dim=None))
