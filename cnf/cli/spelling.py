"""Settings as options of the command line: their names in messages, and former options in their present form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cnf._utils.output import emit
from cnf.config.former import NAMES, present
from cnf.config.settings import RunConfig
from cnf.config.tagged import schema

__all__ = ["given_settings", "option", "renamed", "spelled"]

FORMER = {"--adaptive": ("--train-solver", "adaptive"), "--no-adaptive": ("--train-solver", "grid")}


def option(name: str) -> str:
    """Return the command line option of a setting.

    Example:
        >>> option("batch_size")
        '--batch-size'
    """
    return "--" + name.replace("_", "-")


def spelled(words: str) -> str:
    """Return a sentence about settings with their options: field='conv' becomes --field conv.

    Example:
        >>> spelled("is for field='conv', not for field='mlp'")
        'is for --field conv, not for --field mlp'
    """
    words = re.sub(r"\b([a-z_]+)='", lambda m: f"{option(m[1])} '", words).replace("'", "")
    known = schema((RunConfig,))
    return re.sub(r"\b[a-z]+(_[a-z]+)+\b", lambda m: option(m[0]) if m[0] in known else m[0], words)


def given_settings(arguments: Sequence[str]) -> frozenset[str]:
    """Return the settings named on a command line."""
    return frozenset(present(word.partition("=")[0][2:].removeprefix("no-")) for word in arguments if word.startswith("--"))


def renamed(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the present names of options; report the former ones on stderr."""
    words: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        former = name[2:].replace("-", "_") if name.startswith("--") else ""
        if name in FORMER:
            chosen = FORMER[name]
            emit("warning", f"{name} is now called {' '.join(chosen)}")
            words += chosen
            continue
        if former in NAMES:
            emit("warning", f"{name} is now called {option(NAMES[former])}")
            word = option(NAMES[former]) + equals + value
        elif former == "num_blocks":  # FFJORD's name
            word = "--blocks" + equals + value
        words.append(word)
    return words
