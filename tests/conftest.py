"""Shared by all tests: one thread, and where golden files and data are looked for."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


def data_root() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    path = Path(os.environ.get("CNF_DATA_ROOT", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data at {path}: set CNF_DATA_ROOT to a folder that holds it")
    return path
