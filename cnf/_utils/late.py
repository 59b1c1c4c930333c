"""Functions of optional parts of the package, imported when they are called."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["late"]


def late(module: str, name: str, extra: str) -> Any:
    """Return ``name`` of a module that stands above the caller's, such as one of ``cnf.contrib``.

    Methods of a flow that serve other packages are written there, so that the flow needs none of them.

    Raises:
        ModuleNotFoundError: if a package is missing, with the extra that installs it.
    """
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "cnf"):
            raise
        raise ModuleNotFoundError(f"{name} needs {error.name}, which is not installed: pip install 'cnf[{extra}]'", name=error.name) from None
