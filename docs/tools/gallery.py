"""The gallery: pictures with their commands. Makes those that take seconds, or the named ones, and writes docs/gallery.md.

    python docs/tools/gallery.py              # what takes seconds
    python docs/tools/gallery.py straight     # one picture
    python docs/tools/gallery.py page         # docs/gallery.md alone
    python docs/tools/gallery.py all          # everything: about an hour and a half of one core
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"


@dataclass(frozen=True)
class Entry:
    """One picture of the gallery.

    Attributes:
        name: of the entry, for the command line.
        picture: file in docs/pictures.
        title, text: what is to be seen.
        minutes: of CPU time on one core, measured.
        command: the command of the program; the picture is ``source`` in its run folder.
        source: file in the run folder.
        draw: function of the path, in place of a command.
    """

    name: str
    picture: str
    title: str
    text: str
    minutes: float
    command: str = ""
    source: str = ""
    draw: Callable[[Path], None] | None = None

    @property
    def line(self) -> str:
        """Command that makes the picture."""
        return self.command or f"make gallery ARGS={self.name}"


def picture_density(path: Path) -> None:
    """A heart drawn as a grey picture, its density learned by the demo."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[1.4:-1.4:96j, -1.4:1.4:96j]
    heart = (x**2 + y**2 - 1) ** 3 - x**2 * y**3 < 0
    Image.fromarray((255 * ~heart).astype(np.uint8)).save("heart.png")
    _program("train demo --data heart.png --minutes 0.25 --out run")
    shutil.copy("run/plots/density.png", path)


def mnist_samples(path: Path) -> None:
    """The same noise solved with 6 and 12 evaluations and adaptively."""
    from PIL import Image

    parts = []
    for quality in ("draft", "default", "exact"):
        _program(f"sample pretrained:fm-mnist -n 16 --quality {quality} --seed 3 --out {quality}.png")
        parts.append(Image.open(f"{quality}.png").convert("RGB"))
    width, height = parts[0].size
    sheet = Image.new("RGB", (3 * width + 40, height), "white")
    for i, part in enumerate(parts):
        sheet.paste(part, (i * (width + 20), 0))
    sheet.save(path)


def corner(path: Path) -> None:
    """Income, rent and age: a table whose columns depend on each other."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(0)
    age = rng.integers(18, 80, 3000)
    income = rng.lognormal(2.5 + 0.02 * (age - 18), 0.3)
    rent = income * rng.beta(4, 8, 3000) + rng.normal(0.5, 0.1, 3000)
    pd.DataFrame({"age": age, "income": income, "rent": rent}).to_csv("people.csv", index=False)
    _program("train --data people.csv --minutes 0.15 --out run")
    shutil.copy("run/plots/corner.png", path)


def conditional(path: Path) -> None:
    """p(y | x) with two branches, as a map, above the data."""
    import numpy as np

    import cnf
    from cnf.plotting.canvas import new_figure, save_figure, subplots

    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2500, 1))
    y = rng.choice([-1.0, 1.0], 2500) * (1 + x[:, 0]) + rng.normal(0, 0.1 + 0.1 * (x[:, 0] > 0), 2500)
    model = cnf.ConditionalDensityEstimator(max_minutes=0.15, random_state=0).fit(x, y)
    across, up = np.linspace(-1, 1, 90), np.linspace(-2.8, 2.8, 140)
    given, value = (grid.ravel() for grid in np.meshgrid(across, up))
    density = np.exp(model.score_samples(given[:, None], value)).reshape(len(up), len(across))
    figure = new_figure(10.5, 4.4)
    left, right = subplots(figure, 1, 2, sharey=True)
    left.scatter(x[:, 0], y, 4, alpha=0.5, linewidths=0)
    left.set(title="data", xlabel="$x$", ylabel="$y$", xlim=(-1, 1), ylim=(-2.8, 2.8))
    image = right.imshow(density, origin="lower", extent=(-1, 1, -2.8, 2.8), aspect="auto", cmap="magma", vmax=np.quantile(density, 0.995))
    right.set(title="p(y | x)", xlabel="$x$")
    figure.colorbar(image, ax=right, label="density", extend="max")
    save_figure(figure, path)


def straight(path: Path) -> None:
    """Paths x(t) on the line without and with the penalty on kinetic energy, after equal training."""
    import numpy as np
    import torch

    import cnf
    from cnf.losses import Likelihood
    from cnf.plotting.canvas import new_figure, save_figure, subplots

    draws = torch.Generator().manual_seed(0)
    side = 2.0 * torch.randint(0, 2, (4000, 1), generator=draws) - 1
    data = 2 * side + 0.4 * torch.randn(4000, 1, generator=draws)
    figure = new_figure(10.5, 4.4)
    times = torch.linspace(0, 1, 60)
    for axis, weight in zip(subplots(figure, 1, 2, sharey=True), (0.0, 0.05), strict=True):
        torch.manual_seed(0)
        flow = cnf.Flow(cnf.CNF(cnf.fields.MLP(1, (32, 32)), cnf.Exact(), cnf.FixedGrid("rk4", 8)), (1,))
        loss = Likelihood(flow, kinetic=weight, jacobian=weight / 10)
        cnf.fit(flow, data[:3500], loss=loss, steps=250, batch_size=256, lr=1e-2, quiet=True)
        with torch.no_grad():
            nats = -float(flow.log_prob(data[3500:]).mean())
            nfe = flow.evaluate(data[3500:]).stats.nfe
            way = flow.trajectory(data[3500:3700], times).numpy()[..., 0]
        energy = (np.diff(way, axis=0) ** 2).sum(0).mean() * (len(times) - 1)
        least = ((way[-1] - way[0]) ** 2).mean()
        axis.plot(times, way, color="#0072b2", lw=0.5, alpha=0.5)
        name = "likelihood alone (FFJORD)" if not weight else "with kinetic 0.05, jacobian 0.005 (RNODE)"
        axis.set_title(f"{name}\n{nats:.3f} nats, {nfe:.0f} evaluations, energy {100 * (energy / least - 1):.0f} % above straight lines", fontsize=9)
        axis.set(xlabel="time t, from data to noise", xlim=(0, 1))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("$x(t)$")
    save_figure(figure, path)


ENTRIES = (
    Entry(
        "spirals", "flow.gif", "Noise flows to two spirals", "Blue: the density of the moving points, with trails. Orange: where they arrive.",
        1.6, "cnf train demo --data 2spirals", "plots/flow.gif",
    ),
    Entry("picture", "gallery-picture.png", "A picture as a density", "Dark is dense. The edge is sharp, and the model rounds it.", 0.8, draw=picture_density),
    Entry(
        "checkerboard", "checkerboard.png", "A checkerboard", "FFJORD's network by likelihood alone. It loses at the corners where squares touch.",
        11.5, "cnf train ffjord-toy --data checkerboard", "plots/density.png",
    ),
    Entry("straight", "gallery-straight.png", "Straight paths", "RNODE's penalties after the same 250 steps from the same weights. On the line the likelihood alone is nearly straight, too.", 0.7, draw=straight),
    Entry("corner", "gallery-corner.png", "A table", "Data below the diagonal, samples above, both on it.", 0.3, draw=corner),
    Entry("conditional", "gallery-conditional.png", "A conditional density", "Two branches, whose mean is never seen.", 0.3, draw=conditional),
    Entry("mnist", "gallery-mnist.png", "MNIST in 6 and 12 evaluations, and exactly", "From left to right, from the same noise.", 0.4, draw=mnist_samples),
    Entry(
        "digits", "digits.png", "Digits", "8x8 images by likelihood: data and samples.", 2.0, "cnf train digits", "samples/samples.png",
    ),
    Entry(
        "affjord", "affjord-checkerboard.png", "AFFJORD", "Densities of FFJORD and of fields with a learned time, by the same number of steps.",
        45, "python benchmarks/affjord_toy.py --steps 2000 --drives none concat hyper",
    ),
    Entry(
        "anode", "anode-fits.png", "NODE against ANODE", "Squared error and evaluations over training. NODE cannot flip a line.",
        20, "python benchmarks/anode.py fits --seeds 4 --picture docs/pictures/anode-fits.png",
    ),
    Entry(
        "depth", "adaptive-depth-paths.png", "Adaptive depth", "Each point stops at its own time, so that no two paths cross.",
        0.7, "cnf train node-flip --adaptive-depth", "plots/trajectories.png",
    ),
    Entry(
        "curves", "fm-mnist-curves.png", "MNIST over the hours", "Validation, cost and straightness against wall-clock, by flow matching and by likelihood.",
        141, "cnf train fm-mnist --steps 36000 --validate-every 3000 --threads 2",
    ),
)  # fmt: skip


def _program(words: str) -> None:
    subprocess.run([sys.executable, "-m", "cnf", *shlex.split(words)], check=True)


def make(entry: Entry) -> None:
    """Make one picture in a folder of its own."""
    started = time.process_time()
    target = PICTURES / entry.picture
    with tempfile.TemporaryDirectory() as place:
        before = Path.cwd()
        os.chdir(place)
        try:
            if entry.draw is not None:
                entry.draw(target)
            elif entry.source:
                _program(entry.command.removeprefix("cnf ") + " --out run")
                shutil.copy(Path("run") / entry.source, target)
            else:
                print(f"{entry.name}: run {entry.line}")
                return
        finally:
            os.chdir(before)
    children: Any = os.times()
    print(f"{target.relative_to(ROOT)}: {(time.process_time() - started + children.children_user) / 60:.1f} minutes so far")


def page() -> str:
    """Return docs/gallery.md."""
    lines = [
        "# Gallery", "",
        "Each picture stands next to its command. Times are minutes on one core. `make gallery` makes those that are drawn by the gallery's own",
        "code, within seconds to a minute each; `make gallery ARGS=NAME` makes one, `ARGS=all` all that have a command of `cnf`.", "",
    ]  # fmt: skip
    for entry in ENTRIES:
        lines += [f"## {entry.title}", "", entry.text, "", f"    {entry.line}", "", f"{entry.minutes:g} minutes.", "", f"![{entry.title}](pictures/{entry.picture})", ""]
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Make the named pictures, or those that take seconds, and write the page."""
    named = {entry.name: entry for entry in ENTRIES}
    if unknown := [word for word in words if word not in named and word not in ("all", "page")]:
        sys.exit(f"no picture {unknown[0]!r}: expected page, all, or some of {', '.join(named)}")
    chosen = [named[word] for word in words if word in named] or [entry for entry in ENTRIES if entry.draw and "page" not in words]
    for entry in ENTRIES if "all" in words else chosen:
        make(entry)
    (ROOT / "docs" / "gallery.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
