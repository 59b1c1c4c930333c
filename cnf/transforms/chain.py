"""Chains of transforms, and the one interpreter that walks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn

from cnf.solvers import Stats
from cnf.transforms.adapter import as_transform
from cnf.transforms.base import Shape, Transform, TransformOutput, zeros
from cnf.transforms.request import DEFAULT, Request

__all__ = ["Chain", "Sequential", "State", "Visit", "input_of", "iter_leaves", "sum_outputs", "walk"]

State = tuple[Tensor, ...]
"""The point, and whatever travels with it: tensors (\\*lead, \\*event), all of the point's event shape."""
Visit = Callable[[Transform, State, Request], State]


class Chain(Transform):
    """Base class of transforms that are made of transforms; a subclass says in ``through`` how they follow each other."""

    def through(self, state: State, request: Request, visit: Visit, reverse: bool = False) -> State:
        """Call ``visit(child, state, its request)`` for each child on the way, and return the state at the end.

        The state may be empty, to list the children. Children come last to first with ``reverse``.
        """
        raise NotImplementedError

    def _run(self, x: Tensor, request: Request, reverse: bool) -> TransformOutput:
        outputs: list[TransformOutput] = []

        def visit(part: Transform, state: State, own: Request) -> State:
            # forward by __call__, so that module hooks run
            outputs.append(part.inverse(state[0], own) if reverse else part(state[0], own))
            return (outputs[-1].value,)

        (value,) = self.through((x,), request, visit, reverse)
        return sum_outputs(value, outputs)


class Sequential(Chain):
    """Composition of transforms; child i receives ``noise.child(i)``, integrals of the same name are summed.

    Transforms of torch.distributions and of zuko, read from data to noise, become :class:`TorchTransform`.

    Example:
        >>> from cnf.transforms import Logit, Rescale
        >>> chain = Sequential([Logit(0.05), Rescale()])
        >>> chain(torch.full((2, 3), 0.5)).value
        tensor([[-0.5000, -0.5000, -0.5000],
                [-0.5000, -0.5000, -0.5000]])
    """

    def __init__(self, transforms: Iterable[Any]):
        super().__init__()
        self.transforms = nn.ModuleList(as_transform(each) for each in transforms)

    def through(self, state: State, request: Request, visit: Visit, reverse: bool = False) -> State:
        """Visit the transforms, first to last or (``reverse``) last to first."""
        for part, own in self.steps(request, reverse):
            state = visit(part, state, own)
        return state

    def steps(self, request: Request = DEFAULT, reverse: bool = False) -> list[tuple[Transform, Request]]:
        """Return the transforms in order, each with its request."""
        steps = [(cast(Transform, part), request.child(i)) for i, part in enumerate(self.transforms)]
        return steps[::-1] if reverse else steps

    def latent_shape(self, shape: Shape) -> Shape:
        """Compose the ``latent_shape`` of all transforms."""
        for transform in self.transforms:
            shape = cast(Transform, transform).latent_shape(shape)
        return shape


def walk(transform: Transform, state: State, request: Request, visit: Visit, reverse: bool = False) -> State:
    """Call ``visit(leaf, state, its request)`` at every leaf of a chain of chains, and return the state at the end."""
    if not isinstance(transform, Chain):
        return visit(transform, state, request)
    return transform.through(state, request, lambda part, at, own: walk(part, at, own, visit, reverse), reverse)


def iter_leaves(transform: Transform, request: Request = DEFAULT) -> list[tuple[Transform, Request]]:
    """Return the leaves of a chain of chains in order, each with its request.

    Example:
        >>> from cnf.transforms import Logit, Rescale
        >>> chain = Sequential([Sequential([Logit(0.05)]), Rescale()])
        >>> [type(leaf).__name__ for leaf, _ in iter_leaves(chain)]
        ['Logit', 'Rescale']
    """
    leaves: list[tuple[Transform, Request]] = []

    def note(leaf: Transform, state: State, own: Request) -> State:
        leaves.append((leaf, own))
        return state

    walk(transform, (), request, note)
    return leaves


class _Arrived(Exception):
    """Ends a walk early."""


def input_of(transform: Transform, x: Tensor, request: Request, where: Callable[[Transform], bool]) -> Tensor:
    """Return the input (N, \\*event') of the first leaf for which ``where`` is true; the chain's output if there is none."""

    def step(leaf: Transform, state: State, own: Request) -> State:
        if where(leaf):
            raise _Arrived(state[0])
        return (leaf(state[0], own).value,)

    try:
        return walk(transform, (x,), request, step)[0]
    except _Arrived as arrived:
        value: Tensor = arrived.args[0]
        return value


def sum_outputs(value: Tensor, outputs: Iterable[TransformOutput]) -> TransformOutput:
    """Return the output of a composition: log-dets, integrals of the same name and statistics are summed."""
    total: Tensor | None = None
    sums: dict[str, Tensor] = {}
    stats = Stats()
    for _, log_det, integrals, cost in outputs:
        total = log_det if total is None else total + log_det
        for name, integral in integrals.items():
            sums[name] = sums[name] + integral if name in sums else integral
        stats = stats + cost
    return TransformOutput(value, zeros(value) if total is None else total, sums, stats)
