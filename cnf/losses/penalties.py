"""Weighted and measured integrals along the path, by name or as quadratures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from cnf._utils.errors import ConfigError, unknown_name
from cnf.ode.quadratures import Directional, JacobianFrobenius, Kinetic, Quadrature, TotalDerivative, check_names
from cnf.ode.released import RELEASED

__all__ = ["QUADRATURES", "Penalties", "find_quadrature", "parse_penalties", "penalised", "released_factor"]

QUADRATURES: dict[str, Quadrature] = {
    "kinetic": Kinetic(),
    "jacobian": JacobianFrobenius(),
    "directional": Directional(),
    "total-derivative": TotalDerivative(),
    **RELEASED,
}

Penalties = Mapping[str | Quadrature, float]
"""Weights by name of :data:`QUADRATURES`, or by quadrature, such as a :class:`~cnf.ode.quadratures.RunningCost`."""


def find_quadrature(name: str | Quadrature) -> Quadrature:
    """Return the quadrature of a name of :data:`QUADRATURES`; a quadrature is returned as it is.

    Raises:
        ConfigError: for an unknown name.

    Example:
        >>> find_quadrature("total-derivative").name
        'total_derivative'
    """
    if not isinstance(name, str):
        return name
    if name not in QUADRATURES:
        raise unknown_name("penalty", name, tuple(QUADRATURES))
    return QUADRATURES[name]


def penalised(penalties: Penalties, measure: Iterable[str | Quadrature] = ()) -> tuple[list[Quadrature], dict[str, float]]:
    """Return the quadratures of a loss, without duplicates, and the weights of those that enter it, by name of the quadrature.

    Args:
        penalties: weights; those of zero are left out.
        measure: integrals that are reported, whether they are penalised or not.

    Raises:
        ConfigError: for an unknown name, or a weight that is negative or not finite.

    Example:
        >>> quadratures, weights = penalised({"kinetic": 0.1}, ["jacobian", "kinetic"])
        >>> [q.name for q in quadratures], weights
        (['kinetic', 'jacobian'], {'kinetic': 0.1})
    """
    if wrong := {str(name): w for name, w in penalties.items() if not 0 <= w < math.inf}:
        name, weight = next(iter(wrong.items()))
        raise ConfigError(f"penalties[{name!r}]={weight}: a regulariser's weight must be finite and not negative")
    found: dict[str, Quadrature] = {}
    weights: dict[str, float] = {}
    for one, weight in penalties.items():
        quadrature = find_quadrature(one)
        if weight:
            found[quadrature.name], weights[quadrature.name] = quadrature, weight
    for one in measure:
        quadrature = find_quadrature(one)
        found.setdefault(quadrature.name, quadrature)
    check_names(list(found.values()))
    return list(found.values()), weights


def released_factor(quadrature: Quadrature) -> float:
    """Return the factor of RNODE's released code: one half, except for ‖J‖²."""
    return 1.0 if quadrature.name == "jacobian" else 0.5


def parse_penalties(words: Sequence[str], given: Mapping[str, float] | None = None) -> dict[str | Quadrature, float]:
    """Return weights by name: those of ``given`` that are not zero, and those in ``NAME=WEIGHT`` words of the command line.

    Raises:
        ConfigError: for a word of another form, or an unknown or repeated name.

    Example:
        >>> parse_penalties(["total-derivative=0.01"], {"kinetic": 0.1, "jacobian": 0.0})
        {'kinetic': 0.1, 'total-derivative': 0.01}
    """
    found: dict[str | Quadrature, float] = {name: weight for name, weight in (given or {}).items() if weight}
    for word in words:
        name, equals, number = word.partition("=")
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"penalty {word!r}: expected NAME=WEIGHT, such as total-derivative=0.01")
        find_quadrature(name)
        if name in found:
            raise ConfigError(f"penalty {word!r}: {name} has a weight already")
        found[name] = weight
    return found
