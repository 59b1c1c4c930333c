"""Put a run's model on the shelf of the package, in half precision: python benchmarks/pretrained.py RUN [--name fm-mnist].

What the rounding costs is told by scoring both with the same noise: train_density.py --evaluate RUN and --evaluate pretrained:NAME.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from cnf.config import PRESETS, DataConfig, RunConfig, TrainConfig
from cnf.config.results import read_result
from cnf.contrib.hub import model_card
from cnf.runs import PREFIX, load, read_config, shelf, write_config, write_text, write_weights

EVALUATION = ("eval_method", "eval_rtol", "eval_atol", "eval_tolerance")


def portable(config: RunConfig) -> RunConfig:
    """The settings without what is of the machine that trained (where its data were, its device, its threads), evaluated as its preset is today."""
    plain = DataConfig()
    if config.name in PRESETS:
        today = PRESETS[config.name].config.solver
        config = replace(config, solver=config.solver.change(**{name: getattr(today, name) for name in EVALUATION}))
    data = config.data.change(data_root=plain.data_root, download=plain.download)
    return replace(config, data=data, train=config.train.change(threads=None, max_time=None, device=TrainConfig().device))


def main(argv: list[str] | None = None) -> int:
    """Write the model, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", help="by default the run's preset")
    parser.add_argument("--description", default="", help="text for the model card")
    options = parser.parse_args(argv)
    info = read_config(options.run)
    folder = shelf.SHELF / (options.name or info.config.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, load(options.run), half=True)
    write_config(folder, replace(info, config=portable(info.config)))
    scored = options.run / "result.json"
    card = model_card(load(folder), read_result(scored) if scored.is_file() else None, options.description, PREFIX + folder.name)
    write_text(folder / "README.md", card)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {size:,} bytes in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
