"""A vector field of one's own, trained by cnf.fit, saved, loaded and checked.

Run it with: python examples/custom_field.py
"""

# %% [markdown]
# # A field of one's own
#
# Any `nn.Module` with `forward(t, x)` is a field. This one is a gradient: the velocity is the slope of a learned potential.

# %%
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import make_moons
from torch import nn

import cnf


class Potential(nn.Module):
    """f(t, x) = W1ᵀ tanh(W1 x + b1 + t c1) a + A x, the gradient of a scalar of x."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.scale = nn.Parameter(torch.zeros(width))
        self.linear = nn.Parameter(torch.zeros(2, 2))

    def forward(self, t, x):
        hidden = torch.tanh(self.first(torch.cat([x, t.expand(len(x), 1)], 1)))
        return (hidden * self.scale) @ self.first.weight[:, :2] + x @ (self.linear + self.linear.T)


# %%
torch.manual_seed(0)
points = torch.tensor(make_moons(3000, noise=0.1, random_state=0)[0], dtype=torch.float32)
points = (points - points.mean(0)) / points.std(0)
flow = cnf.Flow(cnf.CNF(Potential(), cnf.Exact(), cnf.FixedGrid("rk4", 6)), event_shape=(2,))
before = flow.log_prob(points[:500]).mean().item()

# %%
folder = Path(tempfile.mkdtemp()) / "moons"
result = cnf.fit(flow, points, validation=0.2, steps=100, batch_size=256, lr=1e-2, validate_every=50, folder=folder)
with torch.no_grad():
    after = flow.log_prob(points[:500]).mean().item()
print(f"log p: {before:.3f} before, {after:.3f} after; best validation {result.best:.3f} {result.unit}")
assert after > before

# %% [markdown]
# The folder holds weights and a report, and no code: the model is built again and the weights are read into it.

# %%
again = cnf.load(folder, flow=cnf.Flow(cnf.CNF(Potential(), cnf.Exact(), cnf.FixedGrid("rk4", 6)), event_shape=(2,)))
with torch.no_grad():
    assert torch.equal(again.log_prob(points[:10]), flow.log_prob(points[:10]))
    z = again.encode(points[:200])
    print(f"round trip: {(again.decode(z) - points[:200]).abs().max():.1e}")
print(f"report: {(folder / 'report.html').stat().st_size:,} bytes")
