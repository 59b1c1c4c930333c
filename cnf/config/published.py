"""Published image models, densities and predictors, and their parameter counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cnf.config.model import FlowConfig, NeuralODEConfig

__all__ = ["AFFJORD", "ANODE", "FFJORD", "PUBLISHED", "RNODE", "Published"]

FFJORD = FlowConfig.of(
    architecture="multiscale",
    field="conv",
    hidden=(64, 64, 64),
    blocks=2,  # the README's --num_blocks 2
    time_conditioning="concat",
    nonlinearity="softplus",
    zero_init=False,
    learn_end_time=True,  # --train_T; in the released code no gradient reaches T, here it does
    alpha=1e-6,
    preprocess="logit",
)
"""FFJORD's image model (1810.01367), by its README's command."""

RNODE = FlowConfig.of(
    architecture="multiscale",
    field="conv",
    hidden=(64, 64, 64),
    blocks=2,  # the default of its training script
    time_conditioning="concat",
    nonlinearity="softplus",
    # f = 0 at the start, as in the paper; the released code leaves the last bias random
    zero_init=True,
    learn_end_time=False,
    alpha=0.05,
    preprocess="logit",
)
"""RNODE's image model (2002.02798)."""

AFFJORD = FFJORD.change(blocks=1, augmented_time="both")
"""AFFJORD's image model (2306.02731) as in its paper, f([x, a], θ(a)), with one a(t) of size k = 20 per scale.

a is 20 constant channels of the first convolution's input; its first 10 entries generate all weights. With
``augmented_time="hyper"`` a is not a channel; with ``augmented_time="concat"`` every convolution sees a, which generates no weights."""

ANODE = NeuralODEConfig.of(
    field="conv",
    hidden=(64, 64),
    strides=(0, 1, 0),
    time_conditioning="ignore",  # as the published counts, although the paper mentions time
    nonlinearity="relu",
    zero_init=False,
)
"""ANODE's image model (1904.01681) but for its number of filters and of added channels."""

MNIST, CIFAR, IMAGENET64, CELEBAHQ256 = (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 256, 256)
BUILT_SQUASH = {MNIST: 393_470, CIFAR: 669_130}
SQUASH = "the released layer has one input channel too many and cannot run; without it the count is ours"


@dataclass(frozen=True)
class Published:
    """Published model: settings, image shape, and number of parameters in the paper or the released code.

    ``reason`` explains a difference from our count ``built``, if there is one.
    """

    name: str
    model: FlowConfig | NeuralODEConfig
    shape: tuple[int, int, int]
    parameters: int
    reason: str = ""
    built: int | None = None  # parameters of the model that ``cnf`` builds, where they differ
    outputs: int = 0  # number of outputs of a predictor; 0 for a density

    @property
    def count(self) -> int:
        """Number of parameters of the model that ``cnf`` builds."""
        return self.parameters if self.built is None else self.built


def _published() -> Iterator[Published]:
    one = FFJORD.change(blocks=1)
    for data, shape, single, two in (
        ("MNIST", MNIST, 400_323, 800_646),
        ("CIFAR-10, CelebA 32", CIFAR, 679_441, 1_358_882),
    ):
        yield Published(f"FFJORD concat {data}, one block", one, shape, single)
        yield Published(f"FFJORD concat {data}, two blocks", FFJORD, shape, two)
    for layer, mnist, cifar in (
        ("ignore", 391_512, 666_184),
        ("concatsquash", 394_449, 670_603),
        ("squash", 402_281, 682_387),
        ("concatcoord", 417_945, 705_955),
        ("blend", 783_019, 1_332_361),
        # the released hyper layer ignores its last outputs; here they are the bias, so the count is the same
        ("hyper", 783_019, 1_332_361),
    ):
        for data, shape, parameters in (("MNIST", MNIST, mnist), ("CIFAR-10", CIFAR, cifar)):
            reason, built = (SQUASH, BUILT_SQUASH[shape]) if layer == "squash" else ("", None)
            yield Published(f"FFJORD {layer} {data}, one block", one.change(time_conditioning=layer), shape, parameters, reason, built)
    for data, shape, two, single in (
        ("MNIST", MNIST, 800_636, 400_318),
        ("CIFAR-10", CIFAR, 1_358_868, 679_434),
        ("ImageNet64", IMAGENET64, 1_996_116, 998_058),
        ("CelebA-HQ 256", CELEBAHQ256, 4_609_236, 2_304_618),
    ):
        yield Published(f"RNODE {data}, two blocks", RNODE, shape, two)
        yield Published(f"RNODE {data}, one block", RNODE.change(blocks=1), shape, single)
    for data, shape, parameters in (("MNIST", MNIST, 518_960), ("CIFAR-10", CIFAR, 1_286_352)):
        yield Published(
            f"RNODE squeeze_first {data}, two blocks", RNODE.change(squeeze_first=True), shape, parameters
        )
    for data, shape, concat, hyper in (
        ("MNIST", MNIST, 417_629, 4_556_169),
        ("CIFAR-10, CelebA 32", CIFAR, 820_815, 8_976_115),
    ):
        yield _affjord("concat", data, shape, concat)
        yield _affjord("hyper", data, shape, hyper)
        yield _affjord("both", data, shape, hyper)
    # the published counts for Tiny ImageNet are of nets with 10 outputs, not 200
    for data, shape, filters, plain, augment, augmented in (
        ("MNIST", MNIST, 92, 84_395, 5, 84_816),
        ("CIFAR-10", CIFAR, 125, 172_358, 10, 171_799),
        ("Tiny ImageNet", IMAGENET64, 164, 366_269, 5, 365_714),
    ):
        reason = "with 10 outputs; the 200 classes make it {:,}" if data == "Tiny ImageNet" else ""
        yield Published(f"NODE {data}", ANODE.change(hidden=(filters, filters)), shape, plain, reason.format(2_701_179), outputs=10)
        yield Published(f"ANODE {data}, p = {augment}", ANODE.change(augment=augment), shape, augmented, reason.format(6_591_824), outputs=10)


def _affjord(augmented_time: Literal["concat", "hyper", "both"], data: str, shape: tuple[int, int, int], parameters: int) -> Published:
    """Return a published AFFJORD model, with the terms by which our count differs.

    The released network has parts without effect, which ours omits. The paper concatenates z* to the first
    convolution's input, the released code zeros of its shape: the published count fits both, so "hyper" (the code) and
    "both" (the paper) are compared with the same one.
    """
    # channels of the blocks of a multiscale chain with one block per group
    scales = (min(shape[1:]) // 4).bit_length()  # halved while 4 pixels or more are left
    channels = [part for s in range(scales) for part in (shape[0] << s, shape[0] << s + 2)][:-1]
    n, c, k = len(channels), sum(channels), 20
    weights = 1 if augmented_time == "concat" else 11  # a full generator: 10 entries of a and a constant per weight
    terms = [
        (-weights * 9 * 64 * c, "weights of input channels that are " + ("z* in the paper, of x's shape" if augmented_time == "both" else "always zero")),
        (-weights * (9 * 64 + 1) * c, "outputs that are thrown away"),
        (-2 * n, "unused 1x1 convolutions"),
    ]
    if augmented_time == "both":
        terms.append((weights * 9 * 64 * k * n, f"a as {k} constant channels in their place"))
    if augmented_time != "concat":
        terms.append((-n * 4 * 220, "unused mixers"))
    else:
        terms.append((9 * k * (3 * 64 * n + c), f"the {k} channels of a, which the released layers leave out"))
    model = AFFJORD.change(augmented_time=augmented_time)
    reason = "; ".join(f"{number:+,} {what}" for number, what in terms)
    return Published(f"AFFJORD {augmented_time} {data}", model, shape, parameters, reason, parameters + sum(number for number, _ in terms))


PUBLISHED = tuple(_published())
"""Image models whose parameter count is known from the paper or by running the released code."""
