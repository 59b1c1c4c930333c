"""torch.compile with a way back: where a compiler is missing, or something cannot be compiled, a warning and plain Python."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch

__all__ = ["CompilationWarning", "compiled"]

BACKEND = "inductor"
# shapes and settings that one function may be compiled for: a multiscale chain on images has up to 20 shapes, each with and
# without a gradient (checkpoints) and a product of its own (a stage drawn at random)
GRAPHS = 128


class CompilationWarning(UserWarning):
    """Something runs uncompiled that was to be compiled."""


class _Compiled:
    """A compiled function that once and for all becomes the plain one where compiling fails."""

    def __init__(self, function: Callable[..., Any], graphs: bool):
        self.plain: Callable[..., Any] = function
        options: Any = {"triton.cudagraphs": True} if graphs else None
        # one graph or none: a graph in pieces is slower than no graph, and nobody would notice
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
        """What torch.compile takes from the process alone."""
        names = ("torch._dynamo.config", "torch._functorch.config")
        dynamo, functorch = cast(tuple[Any, Any], tuple(map(importlib.import_module, names)))
        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
        functorch.donated_buffer = False  # a checkpointed solve goes back twice through what was made before it


@cache
def compiled(function: Callable[..., Any], graphs: bool = False) -> _Compiled:
    """The function compiled, always the same for one function: a graph for each shape and setting it meets, kept.

    Without a compiler, or where something in it cannot be compiled, it warns once (:class:`CompilationWarning`) and then is
    the function itself.

    Args:
        function: what is compiled.
        graphs: on a GPU, launch all its kernels together, as a CUDA graph. What it gave holds until it is called again after
            a backward pass: for what is differentiated at once.

    Example:
        >>> def double(x):
        ...     return 2 * x
        >>> compiled(double) is compiled(double)
        True
    """
    return _Compiled(function, graphs)
