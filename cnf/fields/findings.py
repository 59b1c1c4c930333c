"""Findings of the checks of custom fields, each with the weights for which it holds."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

__all__ = ["Findings", "version"]

T = TypeVar("T")


@dataclass
class _Record(Generic[T]):
    finding: T
    weights: int
    changes: int = 0
    due: bool = False


class Findings(Generic[T]):
    """Findings of one check, by module and key.

    A part that is switched off at initialisation, such as a last layer of zeros or a gate, shows nothing, so a finding
    holds for the weights at which it was made: in evaluation mode the check is due for any others, in training for the
    1st, 2nd, 4th, 8th, ... change.

    Example:
        >>> module, findings = nn.Linear(1, 1).eval(), Findings()
        >>> findings.keep(module, "key", 3)
        >>> findings.known(module, "key")
        3
        >>> _ = nn.init.zeros_(module.bias)
        >>> findings.known(module, "key") is None
        True
    """

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Record[T]]] = weakref.WeakKeyDictionary()

    def known(self, module: nn.Module, key: Hashable) -> T | None:
        """Return the finding, or None if the check is due."""
        record = self._of.get(module, {}).get(key)
        if record is None:
            return None
        if (now := version(module.parameters())) != record.weights:
            record.weights, record.changes = now, record.changes + 1
            record.due |= not module.training or record.changes & (record.changes - 1) == 0
        return None if record.due else record.finding

    def keep(self, module: nn.Module, key: Hashable, finding: T) -> None:
        """Record a finding at the present weights."""
        records = self._of.setdefault(module, {})
        records[key] = _Record(finding, version(module.parameters()), records[key].changes if key in records else 0)


def version(tensors: Iterable[Tensor]) -> int:
    """Return a number that grows with every change of the tensors in place."""
    return sum(0 if v.is_inference() else v._version for v in tensors)
