"""The density of a table: fit, compare with a Gaussian, find odd rows, draw new ones.

Run it with: python examples/table_density.py
"""

# %% [markdown]
# # The density of a table
#
# The table is made here: age, income and rent of 2,000
# people, with a skewed income, and a rent that depends on it.

# %%
import numpy as np
import pandas as pd
from scipy.stats import multivariate_normal

import cnf

rng = np.random.default_rng(0)
income = rng.lognormal(3.0, 0.5, 2000)
rent = income * rng.beta(4, 8, 2000) + rng.normal(0.5, 0.1, 2000)
age = rng.integers(18, 80, 2000)
table = pd.DataFrame({"age": age, "income": income, "rent": rent})
train, test = table[:1500], table[1500:]

# %% [markdown]
# `max_minutes` is CPU time for the whole search: mixtures of Gaussians first, then a flow that starts from the best one.

# %%
model = cnf.DensityEstimator(max_minutes=0.1, random_state=0).fit(train)
ours = model.score_samples(test)
print(f"ours:        {ours.mean():.3f} nats a row, higher is better")

# %% [markdown]
# A single Gaussian for comparison, and the paired difference with its standard error.

# %%
gaussian = multivariate_normal(train.mean(), train.cov()).logpdf(test)
gain = ours - gaussian
print(f"a Gaussian: {gaussian.mean():.3f} nats a row")
print(f"difference: {gain.mean():.3f} ± {gain.std() / len(gain) ** 0.5:.3f}")
assert gain.mean() > 0

# %% [markdown]
# The least likely rows. Three rents are made three times the income.

# %%
odd = test.copy()
odd.iloc[:3, 2] = odd.iloc[:3, 1] * 3
order = np.argsort(model.score_samples(odd))
print(odd.iloc[order[:5]])
assert set(order[:3]) == {0, 1, 2}

# %% [markdown]
# New rows, with the columns and types of the table: ages are whole numbers.

# %%
print(model.sample(5, random_state=0))
