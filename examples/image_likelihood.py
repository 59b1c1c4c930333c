"""bits/dim of images by a trained model: digits that it drew, the same upside down and inverted, and noise.

Run it with: python examples/image_likelihood.py
"""

# %% [markdown]
# # bits/dim of images
#
# `pretrained:fm-mnist` comes with the package. Without MNIST at hand, the images are samples of the model itself, drawn in 12 evaluations.

# %%
import torch

import cnf
from cnf.solvers import ExponentialMultistep, RatioSpacing

flow = cnf.load("pretrained:fm-mnist")
torch.manual_seed(0)
quick = ExponentialMultistep("unipc", 12, RatioSpacing(flow.blocks[0].field.interpolant))
digits = flow.sample(2, solver=quick, quantize=True)  # bytes

# %% [markdown]
# bits/dim of a byte image needs noise (dequantisation), and a `Noise` with a seed makes the figure repeatable. The solver is adaptive:
# a coarse grid would give a figure that is not the model's.

# %%
noise = torch.randint(0, 256, digits.shape, dtype=torch.uint8)
kinds = {"digits": digits, "upside down": digits.flip(2), "inverted": 255 - digits, "noise": noise}
with torch.no_grad():
    bits = {name: flow.bits_per_dim(images, noise=cnf.Noise(0)) for name, images in kinds.items()}
for name, values in bits.items():
    print(f"{name:12} {' '.join(f'{value:7.3f}' for value in values.tolist())} bits/dim")
print("a uniform density: 8 bits/dim")
assert bits["digits"].mean() < bits["inverted"].mean() < bits["noise"].mean()

# %% [markdown]
# What a coarse grid does to the figure:

# %%
with torch.no_grad():
    for steps in (6, 12):
        coarse = flow.bits_per_dim(digits, noise=cnf.Noise(0), solver=cnf.FixedGrid("rk4", steps))
        print(f"rk4 with {steps} steps: {(coarse - bits['digits']).mean():+.3f} bits/dim")
