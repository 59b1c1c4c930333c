"""Butcher tableaus of the fixed-grid methods."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TABLEAUS", "Tableau"]


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau: nodes c, rows a (strictly lower triangular), weights b, and the order of the method.

    ``error`` is b minus the weights of a lower-order method with the same stages; () if there is none.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    error: tuple[float, ...] = ()


TABLEAUS = {
    "euler": Tableau((0.0,), ((),), (1.0,), 1),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0), 2, (-1.0, 1.0)),  # minus Euler's weights
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5), 2, (-0.5, 0.5)),
    # the 3/8 rule, called rk4 by torchdiffeq and the published codes
    "rk4": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0),
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
        4,
        (1 / 8, -1 / 8, -1 / 8, 1 / 8),  # minus (0, 1/2, 1/2, 0), of order 2
    ),
    "rk4-classic": Tableau(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
        4,
        (1 / 6, -1 / 6, -1 / 6, 1 / 6),  # minus (0, 1/2, 1/2, 0), of order 2
    ),
    # Dormand-Prince of order 5 without its seventh stage, which only estimates the error
    "dopri5": Tableau(
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        5,
    ),
}
