"""Pretrained models of the package, available as ``pretrained:NAME`` wherever a run folder is expected."""

from __future__ import annotations

from pathlib import Path

from cnf._utils.errors import ConfigError

__all__ = ["PREFIX", "located", "outputs", "pretrained"]

PREFIX = "pretrained:"
SHELF = Path(__file__).parent.parent / "pretrained"


def pretrained() -> list[str]:
    """Return the names of the pretrained models.

    Example:
        >>> "fm-mnist" in pretrained()
        True
    """
    return sorted(path.parent.name for path in SHELF.glob("*/config.json"))


def located(run: str | Path) -> Path:
    """Return the folder of a run: the path itself, or the package's folder of ``pretrained:NAME``.

    Raises:
        ConfigError: for an unknown name.

    Example:
        >>> located("runs/digits-0").as_posix(), located("pretrained:fm-mnist").name
        ('runs/digits-0', 'fm-mnist')
    """
    text = str(run)
    if not text.startswith(PREFIX):
        return Path(run)
    name = text.removeprefix(PREFIX)
    if name not in pretrained():
        raise ConfigError(f"{text} is not a pretrained model: expected {' or '.join(PREFIX + n for n in pretrained())}, or a run folder")
    return SHELF / name


def outputs(run: str | Path) -> Path:
    """Return the folder for files made from a run: its own, or runs/NAME-pretrained for a pretrained model.

    Example:
        >>> outputs("runs/digits-0").as_posix(), outputs("pretrained:fm-mnist").as_posix()
        ('runs/digits-0', 'runs/fm-mnist-pretrained')
    """
    text = str(run)
    return Path("runs", text.removeprefix(PREFIX) + "-pretrained") if text.startswith(PREFIX) else Path(run)
