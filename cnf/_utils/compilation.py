"""torch.compile with a fallback to eager execution."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch

from cnf._utils.errors import ConfigError

__all__ = ["CompilationWarning", "compiled", "require_compile"]

BACKEND = "inductor"
# recompile limit per function: a multiscale chain on images has up to 20 shapes, each with and without a gradient
# (checkpoints) and with a Jacobian product (a randomly drawn stage)
GRAPHS = 128


class CompilationWarning(UserWarning):
    """Issued when compilation fails and eager execution is used instead."""


class _Compiled:
    """Compiled function that falls back to the eager one permanently if compilation fails."""

    def __init__(self, function: Callable[..., Any], graphs: bool):
        self.plain: Callable[..., Any] = function
        options: Any = {"triton.cudagraphs": True} if graphs else None
        # one full graph or an error: a graph with breaks is slower than eager execution, unnoticed
        self.compiled: Callable[..., Any] | None = torch.compile(
            function, fullgraph=True, dynamic=False, backend=BACKEND, options=options
        )  # fmt: skip

    def __call__(self, *arguments: Any) -> Any:
        if self.compiled is None:
            return self.plain(*arguments)
        dynamo: Any = torch._dynamo
        self._configure()
        try:
            return self.compiled(*arguments)
        except (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = " ".join(str(error).split())[:300]
            if isinstance(error, dynamo.exc.FailOnRecompileLimitHit):
                reason = f"more than {dynamo.config.recompile_limit} shapes and settings"
            hint = "a C++ compiler (Linux: g++) is what it needs on a CPU" if "ompiler" in reason else "training goes on without"
            warnings.warn(f"compile=True failed, and everything runs uncompiled: {hint} ({reason})", CompilationWarning, stacklevel=2)
            self.compiled = None
            return self.plain(*arguments)

    @staticmethod
    def _configure() -> None:
        """Set the options of torch.compile that are global to the process."""
        names = ("torch._dynamo.config", "torch._functorch.config")
        dynamo, functorch = cast(tuple[Any, Any], tuple(map(importlib.import_module, names)))
        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
        functorch.donated_buffer = False  # backward of a checkpointed solve runs twice through tensors saved before it


@cache
def compiled(function: Callable[..., Any], graphs: bool = False) -> _Compiled:
    """Return the compiled function, cached per function, with one graph for each shape and setting.

    Without a compiler, or if part of the function cannot be compiled, it warns once (:class:`CompilationWarning`) and
    runs eagerly from then on.

    Args:
        function: function to compile.
        graphs: on a GPU, launch all kernels together as a CUDA graph. An output is valid until the next call that
            follows a backward pass, so differentiate it at once.

    Example:
        >>> def double(x):
        ...     return 2 * x
        >>> compiled(double) is compiled(double)
        True
    """
    return _Compiled(function, graphs)


def require_compile(compile: object) -> None:
    """Raise a ConfigError unless ``compile`` is True, False or ``"solve"``."""
    if not (isinstance(compile, bool) or compile == "solve"):
        raise ConfigError(f"compile={compile!r} is unknown: expected True, False or 'solve'")
