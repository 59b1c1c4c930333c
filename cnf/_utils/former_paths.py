"""Former import paths of modules, which resolve to the present ones with a DeprecationWarning for one release."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from cnf._utils.aliases import warn_deprecated

__all__ = ["FORMER", "install"]

# former module -> present module, both below ``cnf``; submodules follow their room
FORMER = {
    "aliases": "_utils.aliases",
    "checkpoint": "runs",
    "collocation": "ode.logdet_quadrature",
    "compilation": "_utils.compilation",
    "compat.regularisers": "ode.released",
    "continuous": "ode.continuous",
    "datasets": "data",
    "deferral": "_utils.async_checks",
    "dequantization": "transforms.dequantization",
    "derivatives": "ode.derivatives",
    "divergence": "ode.divergence",
    "fields.interpolant": "solvers.interpolant",
    "fitting": "training.fitting",
    "halving": "ode.halving",
    "likelihood": "evaluation",
    "likelihood.evaluation": "evaluation.likelihood",
    "matching": "flow_matching",
    "models.neural_ode": "neural_ode",
    "models.odenet": "neural_ode.odenet",
    "models.predictor": "neural_ode.predictor",
    "models.residual": "neural_ode.residual",
    "multiscale": "ode.multiscale",
    "noise": "random",
    "objectives": "losses",
    "progress": "_utils.progress",
    "quadratures": "ode.quadratures",
    "recompute": "solvers.checkpointing",
    "refinement": "ode.refinement",
    "results": "config.results",
    "rhs": "ode.dynamics",
    "schema": "data.schema",
    "statistics": "ode.statistics",
    "strangers": "_utils.untrusted",
    "trajectory": "ode.trajectory",
    "validation": "_utils.validation",
}


def _present(name: str) -> str | None:
    """Return the present name of a former module, or None."""
    head, _, rest = name.removeprefix("cnf.").partition(".")
    if not name.startswith("cnf."):
        return None
    if (exact := FORMER.get(f"{head}.{rest}")) is not None:
        return f"cnf.{exact}"
    return None if head not in FORMER else ".".join(filter(None, ("cnf", FORMER[head], rest)))


class _Forward:
    """Finder and loader that answer a former name with the present module itself, so that classes stay the same objects."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        present = _present(name)
        if present is None or find_spec(present) is None:
            return None
        return ModuleSpec(name, self, origin=present)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warn_deprecated(f"{spec.name} is called {spec.origin}; the former import path will be removed by the next release")
        module = import_module(str(spec.origin))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has replaced; the module itself has run already."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Resolve former import paths from now on."""
    if not any(isinstance(finder, _Forward) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Forward())  # type: ignore[arg-type]
