"""bits/dim of images by a trained model: digits it knows, the same upside down, and noise.

Run it with: python examples/image_likelihood.py
"""

# %% [markdown]
# # bits/dim of images
#
# `pretrained:fm-mnist` comes with the package. Without MNIST at hand, the images are samples of the model itself.

# %%
import torch

import cnf

flow = cnf.load("pretrained:fm-mnist")
grid = cnf.FixedGrid("rk4", 6)  # a coarse solver, so that this takes seconds; the default is adaptive
torch.manual_seed(0)

# %% [markdown]
# Floats in [0, 1] are points, bytes are images. bits/dim of a byte image needs noise (dequantisation), and a `Noise` with a seed makes the
# figure repeatable.

# %%
with torch.no_grad():
    digits = (flow.sample(4, solver=grid) * 255).round().clamp(0, 255).to(torch.uint8)
    noise = torch.randint(0, 256, digits.shape, dtype=torch.uint8)
    kinds = {"digits": digits, "upside down": digits.flip(2), "inverted": 255 - digits, "noise": noise}
    bits = {name: flow.bits_per_dim(images, noise=cnf.Noise(0), solver=grid) for name, images in kinds.items()}

# %%
for name, values in bits.items():
    print(f"{name:12} {values.mean():7.3f} ± {values.std() / len(values) ** 0.5:.3f} bits/dim")
print("a uniform density: 8 bits/dim")
assert bits["digits"].mean() < bits["noise"].mean()

# %% [markdown]
# A figure depends on the noise. Averaged over two draws:

# %%
with torch.no_grad():
    draws = torch.stack([flow.bits_per_dim(digits, noise=cnf.Noise(seed), solver=grid).mean() for seed in range(2)])
print(f"two draws: {draws.tolist()}")
