"""p(y | x) where y has two branches: fit, intervals, a check of their coverage, samples.

Run it with: python examples/conditional_density.py
"""

# %% [markdown]
# # A conditional density with two branches
#
# y is about +(1 + x) or −(1 + x), each half of the time. Its mean is 0 everywhere, where y hardly ever is.

# %%
import numpy as np
from scipy.stats import norm

import cnf

rng = np.random.default_rng(0)
x = rng.uniform(-0.5, 1, (2000, 1))
y = rng.choice([-1.0, 1.0], 2000) * (1 + x[:, 0]) + rng.normal(0, 0.15, 2000)
train, test = slice(0, 1500), slice(1500, None)

# %%
model = cnf.ConditionalDensityEstimator(max_minutes=0.1, random_state=0).fit(x[train], y[train])
ours = model.score(x[test], y[test])

# %% [markdown]
# The truth is known here, and so is the best single Gaussian.

# %%
branch = [norm(sign * (1 + x[test, 0]), 0.15).pdf(y[test]) for sign in (-1, 1)]
truth = np.log(0.5 * sum(branch)).mean()
gaussian = norm(0, np.sqrt((1 + x[test, 0]) ** 2 + 0.15**2)).logpdf(y[test]).mean()
print(f"log p(y | x), nats: ours {ours:.3f}, the truth {truth:.3f}, the best Gaussian {gaussian:.3f}")
assert gaussian < ours

# %%
print(f"inside the 90 % interval: {100 * model.coverage(x[test], y[test]):.1f} % of the test rows")
draws = model.sample(np.array([[0.0], [1.0]]), 1000, random_state=0)
for at, row in zip((0, 1), draws, strict=True):
    print(f"x = {at}: {100 * (np.abs(row) > 0.5).mean():.0f} % of the samples are far from the mean, {100 * (row > 0).mean():.0f} % are positive")
