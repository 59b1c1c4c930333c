"""Shared by all tests: one thread, where golden files and data are looked for, and helpers used by several files."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cnf.solvers import Adaptive

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, whose bits are compared
ROOT = Path(__file__).resolve().parent.parent
F64 = torch.float64
TIGHT = Adaptive("dopri5", 1e-11, 1e-11)


# -- cases of a parametrisation ----------------------------------------------------------------------------------


def slow(*values, **options):
    """A case that ``make slow`` runs, beside cheaper ones of its kind in the default run."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def mostly_slow(cases, *kept):
    """The cases, of which the default run takes those that are kept and ``make slow`` the others."""
    cases = list(cases)
    assert all(case in cases for case in kept)
    return [case if case in kept else slow(case) for case in cases]


# -- tensors and modules -----------------------------------------------------------------------------------------


def normal(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def perturbed(module, scale=0.2, seed=0):
    """The module in double precision, away from its initial values, whose zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.double().parameters():
        p.data += scale * torch.randn(p.shape, generator=generator, dtype=F64)
    return module


def jacobian(value, x):
    """Jacobian (N, D', D) of rows that are computed independently."""
    rows = [torch.autograd.grad(column.sum(), x, create_graph=True)[0] for column in value.flatten(1).T]
    return torch.stack(rows, 1).flatten(2)


class LinearField(torch.nn.Module):
    """The field A x."""

    def __init__(self, a):
        super().__init__()
        self.a = torch.nn.Parameter(a)

    def forward(self, t, x, context=None):
        return (x.flatten(1) @ self.a.T).reshape(x.shape)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test, whatever runs before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def double(seeded):
    """Double precision by default."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


# -- files and data ----------------------------------------------------------------------------------------------


def data_root() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    path = Path(os.environ.get("CNF_DATA_ROOT", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data at {path}: set CNF_DATA_ROOT to a folder that holds it")
    return path


def shared(name: str) -> Path:
    """A file or folder under :func:`data_root`; the test is skipped without it."""
    path = data_root() / name
    if not path.exists():
        pytest.skip(f"no {path}: set CNF_DATA_ROOT to a folder that holds it")
    return path


def rows_of(data) -> np.ndarray:
    return np.concatenate([p.numpy().reshape(len(p), -1) for p in (data.train, data.validation, data.test)])


def same_rows(data, expected: np.ndarray) -> bool:
    return np.array_equal(np.unique(rows_of(data), axis=0), np.unique(expected.reshape(len(expected), -1), axis=0))


def contents(folder):
    """The bytes of every file in the folder."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def logged_rows(folder):
    """metrics.jsonl without the wall clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


class Malicious:
    """Unpickled, it creates a folder."""

    def __init__(self, trap):
        self.trap = str(trap)

    def __reduce__(self):
        return os.mkdir, (self.trap,)
