"""Exit codes and error messages of the programs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from cnf._utils.errors import CNFError, ConfigError, DataError, Interrupted
from cnf._utils.output import emit_error, speaks

__all__ = ["guard"]

HUNG_UP = 141  # a shell's exit code for SIGPIPE
# optional library -> the extra of setup.cfg that installs it
EXTRAS = {
    "PIL": "plot", "matplotlib": "plot", "openpyxl": "tables", "pandas": "data", "pyarrow": "tables", "sklearn": "data",
    "tensorboard": "cli", "torchvision": "data", "tyro": "cli",
}  # fmt: skip


def guard(run: Callable[[], int], *, room: str = "--device cpu, or a machine with more memory") -> int:
    """Run a program and return its exit code.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 (SIGTERM: 143) interrupted but saved. Expected errors are printed
    without a traceback, by rank 0 only. A closed output pipe (``| head``) ends the program silently with exit code 141.
    ``room`` is the advice printed when memory runs out.
    """
    try:
        with _muted():
            code = _outcome(run, room)
        sys.stdout.flush()  # at interpreter exit a closed pipe would print a traceback
        return code
    except BrokenPipeError:
        _hang_up()
        return HUNG_UP


def _hang_up() -> None:
    """Redirect output streams with a closed pipe to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _outcome(run: Callable[[], int], room: str) -> int:
    try:
        return run()
    except BrokenPipeError:
        raise
    except (ConfigError, DataError) as error:
        return _say(f"error: {error}", 2)
    except CNFError as error:
        return _say(f"failed: {error}", 1)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        return _say(f"error: this needs {library}, which is not installed: pip install 'cnf[{EXTRAS[library]}]'", 2)
    except (MemoryError, RuntimeError) as error:
        from cnf.training.memory import is_oom  # needs torch, which has been imported if its memory ran out

        if not is_oom(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return _say(f"failed: out of memory ({reason}): try {room}", 1)
    except OSError as error:
        return _say(f"failed: {error}", 1)
    except Interrupted as stop:
        said = f"interrupted; everything up to step {stop.step} is saved, and --resume continues from there"
        return _say(said, 128 + stop.number)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except SystemExit as stop:  # from the parsers: help, or wrong usage, already explained
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code:
            emit_error("wrong usage, explained on stderr", code)
        return code


def _say(line: str, code: int) -> int:
    if speaks():  # other ranks report what rank 0 does not know when leaving the group
        print(line, file=sys.stderr)
        emit_error(line, code)
    return code


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Context manager that discards the standard output of ranks above 0."""
    if speaks():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
