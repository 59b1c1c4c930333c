"""Two spirals by cnf.fit from a mixture of Gaussians, against the known entropy, with pictures.

Run it with: python examples/toy_points.py
"""

# %% [markdown]
# # Points in the plane
#
# The base density is a mixture fitted to the points. The field starts at zero, so the flow starts at the mixture's likelihood.

# %%
import tempfile
from pathlib import Path

import torch

import cnf
from cnf import plotting

data = cnf.data.load("2spirals", sizes=(8000, 1000, 4000))
base = cnf.GaussianMixture.fit(data.train, 12)
flow = cnf.Flow(cnf.CNF(cnf.fields.MLP(2, (32, 32), zero_init=True), cnf.Exact(), cnf.FixedGrid("rk4", 4)), (2,), base=base)

# %%
with torch.no_grad():
    start = -flow.log_prob(data.test).mean()
result = cnf.fit(flow, data.train, validation=data.validation, steps=100, batch_size=500, lr=5e-3, validate_every=25)
with torch.no_grad():
    end = -flow.log_prob(data.test)
print(f"test: {start:.4f} nats from the mixture alone, {end.mean():.4f} ± {end.std() / len(end) ** 0.5:.4f} after training")
print("entropy of the spirals: 2.6454 nats, the least that any model can have")
assert 2.6 < end.mean() < start + 0.01

# %%
folder = Path(tempfile.mkdtemp())
plotting.density_2d(flow, data.test, folder / "density.png", resolution=60)
plotting.trajectories_2d(flow, data.test, folder / "paths.png", n=100)
print(f"pictures in {folder}")
