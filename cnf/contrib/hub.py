"""Models as folders of the Hugging Face hub: config.json, model.safetensors and a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnf._utils.errors import CheckpointError, ConfigError
from cnf._utils.version import __version__
from cnf.config.results import read_result
from cnf.flow import Flow
from cnf.runs import PREFIX, load, save, write_atomic, write_text
from cnf.training import comparability

__all__ = ["from_pretrained", "model_card", "save_pretrained"]

FILES = ("config.json", "model.safetensors", "README.md")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    result: str | Path | Mapping[str, Any] | None = None,
    description: str = "",
    push_to: str | None = None,
    private: bool = False,
) -> Path:
    """Write a model and its card into a folder, and upload it if asked; ``flow.save_pretrained(folder)`` calls it.

    The folder holds what :func:`cnf.save` writes, and README.md. No code is saved: a model with custom classes is read by
    ``from_pretrained(folder, flow=my_flow)``.

    Args:
        model: a flow or a predictor.
        folder: created if missing.
        result: a run's result.json, or its entries: the card states the figure and what it depends on.
        description: text for the card: the data, and the use that the model is meant for.
        push_to: repository ``"user/repo"`` of the hub to upload the folder to, created if missing.
        private: whether a repository that is created is private.

    Raises:
        ConfigError: for a folder of a run of ``cnf train``, or an invalid ``push_to``.
        DataError: for a file that is no result.
        ModuleNotFoundError: with ``push_to``, without huggingface_hub (``pip install 'cnf[hub]'``).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from cnf import FlowConfig, SolverConfig, build
        >>> with TemporaryDirectory() as folder:
        ...     path = save_pretrained(build(FlowConfig.of(hidden=(8,)), SolverConfig(), (2,)), folder)
        ...     sorted(file.name for file in path.iterdir()), from_pretrained(path).event_shape
        (['README.md', 'config.json', 'model.safetensors'], (2,))
    """
    if push_to is not None and not REPOSITORY.fullmatch(push_to):
        raise ConfigError(f"push_to={push_to!r} is no repository of the hub, expected 'user/repo'")
    folder = Path(folder)
    entries = result if result is None or isinstance(result, Mapping) else read_result(Path(result))
    save(model, folder)
    card = model_card(model, entries, description, push_to or folder.name)
    write_atomic(folder / "README.md", lambda path: write_text(path, card))
    if push_to is not None:
        api = _hub().HfApi()
        api.create_repo(push_to, private=private, exist_ok=True)
        api.upload_folder(repo_id=push_to, folder_path=str(folder), allow_patterns=list(FILES))
    return folder


def from_pretrained(
    source: str | Path, device: str | torch.device = "cpu", *, flow: nn.Module | None = None, revision: str | None = None, cache: str | Path | None = None
) -> Any:
    """Return the model of a folder, of ``pretrained:NAME``, or of a repository of the hub, in evaluation mode.

    Nothing in the files is executed: of a repository, only config.json, model.safetensors and README.md are downloaded.

    Args:
        source: a folder (of :func:`save_pretrained`, ``cnf.save``, ``cnf.fit`` or ``cnf train``), a name of the package's
            models, or ``"user/repo"``. A folder that exists has precedence.
        device: where the model is put.
        flow: a model of custom classes, which takes the weights.
        revision: branch, tag or commit of the repository.
        cache: folder of the downloads; the hub's own if None.

    Raises:
        ConfigError: for a source that is none of these.
        CheckpointError: if files are missing, damaged or do not match, or cannot be downloaded.
        ModuleNotFoundError: for a repository, without huggingface_hub (``pip install 'cnf[hub]'``).
    """
    text = str(source)
    if text.startswith(PREFIX) or Path(source).is_dir():
        return load(source, device, flow=flow)
    if not REPOSITORY.fullmatch(text):
        raise ConfigError(f"source={text!r} is no folder; expected one, {PREFIX}NAME, or a repository of the hub, 'user/repo'")
    try:
        folder = _hub().snapshot_download(text, revision=revision, cache_dir=cache, allow_patterns=list(FILES))
    except (OSError, ValueError) as error:  # the hub's errors are of these kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{text} is no folder here, and cannot be downloaded from the hub: {reason}") from None
    return load(folder, device, flow=flow)


def model_card(model: nn.Module, result: Mapping[str, Any] | None = None, description: str = "", name: str = "") -> str:
    """Return the text of a model card: what the model is, how to load it, and its figure with what it depends on.

    Args:
        model: a flow or a predictor.
        result: entries of a result.json.
        description: text for the card.
        name: title of the card and, with a slash, the repository that its example loads.
    """
    flow = isinstance(model, Flow)
    tags = ["continuous-normalizing-flow", "density-estimation"] if flow else ["neural-ode"]
    source = name if "/" in name or name.startswith(PREFIX) else "FOLDER"
    count = sum(p.numel() for p in model.parameters())
    facts = [f"parameters: {count:,}", f"event shape: {tuple(getattr(model, 'event_shape', ()))}", f"cnf {__version__}, torch {torch.__version__}"]
    if flow and model.context_dim != 0:
        facts.insert(2, f"context: {'of unknown size' if model.context_dim is None else f'{model.context_dim} numbers'}")
    if custom := [k for k in dict.fromkeys(type(m).__qualname__ for m in model.modules() if not type(m).__module__.startswith(("cnf.", "torch.")))]:
        facts.append(f"classes whose code is not in this repository: {', '.join(custom)}")
    call = "flow.sample(16), flow.log_prob(x)" if flow and not model.context_dim else "flow(context).sample((16,))" if flow else "flow(x)"
    lines = ["---", "library_name: cnf", "tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {name or type(model).__name__}", ""]
    lines += [description, ""] if description else []
    lines += ["```python", "import cnf", "", f'flow = cnf.Flow.from_pretrained("{source}")', call, "```", ""]
    lines += [f"- {fact}" for fact in facts] + ["", "## Figure", ""]
    if result is None:
        lines.append("None is given.")
    else:
        error = "" if result.get("standard_error") is None else f" ± {result['standard_error']:.4f}"
        lines += [f"**{result['value']:.4f}{error} {result['unit']}** ({result['split']})", ""]
        lines.append(f"It compares only with figures for which this line is the same: {_comparability(result)}.")
    return "\n".join(lines)


def _comparability(result: Mapping[str, Any]) -> str:
    """Return what a figure depends on; of a predictor, its data alone."""
    if "divergence" in result:
        return comparability(dict(result))
    return f"{result.get('items', '?')} {result['split']} items of {result.get('data', 'unnamed data')}"


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError("models of the hub need huggingface_hub: pip install 'cnf[hub]'", name="huggingface_hub") from None
    return huggingface_hub
