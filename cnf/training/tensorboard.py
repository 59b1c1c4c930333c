"""TensorBoard logs: scalars in groups, samples at validations, the settings, and the pictures of a run."""

from __future__ import annotations

import json
import math
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cnf.config.results import read_json
from cnf.flow import Flow
from cnf.losses import FlowMatching, Likelihood
from cnf.ode.continuous import CNF
from cnf.random import Noise
from cnf.solvers import Solver
from cnf.training.callbacks import Callback, Run
from cnf.vae import FlowVAE

__all__ = ["TensorBoardLogger", "conclude", "tag"]

SOLVER = ("nfe", "nfe_backward", "solver_error", "grid_steps", "most_grid_steps", "rtol")
SHARES = 20  # of the steps, with samples of one validation each
TILES, SIDE, PIXELS = 4, 64, 2**18  # images in a row, pixels of their longer side at least, of all together at most
POINTS, CELLS, ENLARGED = 2000, 64, 4  # of the plane: points, bins of a side, pixels of a bin's side
VALIDATION = ("best", "best_step", "straightness", "path_energy")


def tag(name: str) -> str:
    """Return the TensorBoard tag of an entry of metrics.jsonl.

    Example:
        >>> tag("loss"), tag("nfe"), tag("validation_nfe"), tag("straightness")
        ('train/loss', 'solver/nfe', 'validation/nfe', 'validation/straightness')
    """
    if name.startswith("validation_"):
        return f"validation/{name.removeprefix('validation_')}"
    return f"{'solver' if name in SOLVER else 'validation' if name in VALIDATION else 'train'}/{name}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names; lists as text, entries without a value left out."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found


def samples_image(run: Run) -> Tensor | None:
    """Return samples of the model that is validated as one image (channels, H, W) in [0, 1], by its training solver.

    Images are tiles; points in the plane are a histogram over the box of the training data, denser where lighter. None
    for other events, and where samples cannot be drawn.
    """
    flow, batches = run.averaged(), run.batches
    if isinstance(flow, FlowVAE):
        x = flow.sample(TILES**2, noise=Noise(0, "sample")).cpu()
        return _tiles(x) if x.ndim == 4 and x.shape[1] in (1, 3) else None
    if not isinstance(flow, Flow) or not (flow.event_shape == (2,) or (flow.levels is not None and flow.event_shape[0] in (1, 3))):
        return None
    count = POINTS if flow.event_shape == (2,) else max(1, min(TILES**2, PIXELS // math.prod(flow.event_shape[1:])))
    context = None if not flow.context_dim or batches.context is None else batches.context[:count]
    noise = Noise(0, "sample")
    try:
        x = flow.sample(count, noise=noise, solver=_training) if context is None else flow.sample(1, context, noise=noise, solver=_training)[0]
    except Exception:  # samples of an early model may be anywhere, and a custom transform may have no inverse
        return None
    if flow.levels is not None:
        return _tiles(x.cpu())
    data = batches.x[:POINTS].double().cpu()
    low, high = data.amin(0), data.amax(0)
    room = 0.1 * (high - low) + 1e-6 * (1.0 + high.abs())
    edges = [torch.linspace(float(a), float(b), CELLS + 1, dtype=torch.float64) for a, b in zip(low - room, high + room, strict=True)]
    counts = torch.histogramdd(x.double().cpu(), edges).hist.log1p()
    shown = (counts / counts.max().clamp(min=1.0)).T.flip(0)  # the second coordinate points upwards
    return shown.repeat_interleave(ENLARGED, 0).repeat_interleave(ENLARGED, 1)[None]


def _training(block: CNF) -> Solver:
    return block.solver


def _tiles(x: Tensor) -> Tensor:
    """Return images (N, C, H, W) side by side in rows, small ones enlarged, with grey lines between them."""
    scale = max(1, SIDE // max(x.shape[2:]))
    x = functional.pad(x.repeat_interleave(scale, 2).repeat_interleave(scale, 3), (0, 1, 0, 1), value=0.5)
    across = math.ceil(math.sqrt(len(x)))
    x = torch.cat([x, x.new_full((-len(x) % across, *x.shape[1:]), 0.5)])
    return torch.cat([torch.cat(list(row), 2) for row in x.split(across)], 1)


class TensorBoardLogger(Callback):
    """TensorBoard logger: scalars in three groups, samples, settings as text and as hyper-parameters, pictures at the end.

    Samples of images, and of points in the plane, are logged as ``validation/samples`` at about 20 validations, evenly
    over the steps. After a failed write (a full disk) it reports once and logs no more.

    Args:
        folder: the run folder; events go into its ``tensorboard``.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "tensorboard"
        self._writer: Any = None
        self._hook, self._failed, self._shown = threading.excepthook, False, -1

    def setup(self, run: Run) -> None:
        """Remember where messages go, and whether validations are of the likelihood."""
        self.say = run.say
        self.metric = "nll" if isinstance(run.objective, FlowMatching | Likelihood) else "loss"

    def on_start(self, run: Run) -> None:
        """Open the event file; events of later steps, logged before a resume, are purged."""
        self._hook = threading.excepthook
        threading.excepthook = self._quietly
        self._shown = SHARES * run.state.step // run.steps if run.state.step else -1
        self._begin(run.state.step)

    def on_validation(self, run: Run, better: bool) -> None:
        """Log samples, if none have been logged in this twentieth of the steps."""
        share, step = SHARES * run.state.step // run.steps, run.state.step
        if share <= self._shown or self._writer is None:
            return
        self._shown = share
        with suppress(ImportError):  # Pillow, which encodes the image, is an extra
            if (image := samples_image(run)) is not None:
                self._try(lambda writer: writer.add_image("validation/samples", image, step))

    def on_row(self, run: Run, row: dict[str, Any]) -> None:
        """Log the numbers of a row at step ``row["step"]``."""
        self._add(row)

    def on_end(self, run: Run) -> None:
        """Close the event file."""
        self._try(lambda writer: writer.close())
        self._writer = None
        if threading.excepthook == self._quietly:
            threading.excepthook = self._hook

    def flush(self) -> None:
        """Flush the event file."""
        self._try(lambda writer: writer.flush())

    def recreate(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the event files of a removed folder again."""
        self._try(lambda writer: writer.close())
        self._begin(-1)
        for row in rows:
            self._add(row)

    def _begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        except OSError as error:
            self._give_up(error)
        self._try(self._describe)

    def _describe(self, writer: Any) -> None:
        """Write the run's config.json as text and, flattened, as hyper-parameters."""
        from torch.utils.tensorboard.summary import hparams

        if not (config := read_json(self.folder.parent / "config.json")):
            return
        writer.add_text("config", textwrap.indent(json.dumps(config, indent=2), "    "), 0)
        settings = config.get("config") or {name: value for name, value in config.items() if name not in ("format", "sha256")}
        for summary in hparams(_flat(settings), dict.fromkeys((f"validation/{self.metric}", f"test/{self.metric}"), 0.0)):
            writer.file_writer.add_summary(summary)

    def _add(self, row: dict[str, Any]) -> None:
        def add(writer: Any) -> None:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(f"validation/{self.metric}" if name == "validation" else tag(name), value, row["step"])

        self._try(add)

    def conclude(self, run: Run, value: float, accuracy: float | None = None) -> None:
        """Log the figure of the test, and the pictures of the run folder."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        step = run.state.step

        def add(writer: Any) -> None:
            writer.add_scalar(f"test/{self.metric}", value, step)
            if accuracy is not None:
                writer.add_scalar("test/accuracy", accuracy, step)
            for path in sorted(self.folder.parent.glob("*/*.png")):
                content = path.read_bytes()  # as it is: SummaryWriter.add_image would encode it again
                width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
                picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
                summary = Summary(value=[Summary.Value(tag=f"{path.parent.name}/{path.stem}", image=picture)])
                writer.file_writer.add_summary(summary, step)

        if not self._failed:
            self.on_start(run)
            self._try(add)
            self.on_end(run)

    def _try(self, write: Callable[[Any], object]) -> None:
        if self._writer is not None:
            try:
                write(self._writer)
            except (OSError, ValueError) as error:  # ValueError: the file was closed by an earlier failure
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._writer is not None:
            with suppress(OSError, ValueError):
                self._writer.close()
        self._writer, self._failed = None, True
        self.say(f"TensorBoard's files in {self.folder} cannot be written ({error}): training goes on without; metrics.jsonl has all")

    def _quietly(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer thread dies on a full disk; the next call in this thread raises the same error
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            self._hook(failure)


def conclude(run: Run, value: float, accuracy: float | None = None) -> None:
    """Log the figure and the pictures of a finished run, if it has a TensorBoard logger."""
    if (board := run.callback(TensorBoardLogger)) is not None:
        board.conclude(run, value, accuracy)
