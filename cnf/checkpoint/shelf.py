"""Trained models that come with the package: ``pretrained:NAME`` where a run folder is expected."""

from __future__ import annotations

from pathlib import Path

from cnf.errors import ConfigError

__all__ = ["PREFIX", "located", "outputs", "pretrained"]

PREFIX = "pretrained:"
SHELF = Path(__file__).parent.parent / "pretrained"


def pretrained() -> list[str]:
    """The names of the models that come with the package.

    Example:
        >>> "fm-mnist" in pretrained()
        True
    """
    return sorted(path.parent.name for path in SHELF.glob("*/config.json"))


def located(run: str | Path) -> Path:
    """Where a run's files are: the folder itself, or the package's for ``pretrained:NAME``.

    Raises:
        ConfigError: for a name that does not come with the package.

    Example:
        >>> located("runs/digits-0").as_posix(), located("pretrained:fm-mnist").name
        ('runs/digits-0', 'fm-mnist')
    """
    text = str(run)
    if not text.startswith(PREFIX):
        return Path(run)
    name = text.removeprefix(PREFIX)
    if name not in pretrained():
        raise ConfigError(f"{text} does not come with the package: expected {' or '.join(PREFIX + n for n in pretrained())}, or a run folder")
    return SHELF / name


def outputs(run: str | Path) -> Path:
    """Where to put what is made of a run: its own folder, or runs/NAME-pretrained, since the package's stays as it is.

    Example:
        >>> outputs("runs/digits-0").as_posix(), outputs("pretrained:fm-mnist").as_posix()
        ('runs/digits-0', 'runs/fm-mnist-pretrained')
    """
    text = str(run)
    return Path("runs", text.removeprefix(PREFIX) + "-pretrained") if text.startswith(PREFIX) else Path(run)
