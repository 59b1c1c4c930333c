"""The posterior of two parameters on a box by sbi's NPE, with its calibration.

    pip install 'cnf[sbi]'
    python examples/posterior.py --simulations 2000
"""

from __future__ import annotations

import argparse

import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform

from cnf.contrib.sbi import build_cnf


def simulate(theta: torch.Tensor) -> torch.Tensor:
    """Return noisy measurements (N, 3) of an amplitude and a rate (N, 2)."""
    times = torch.tensor([0.5, 1.0, 2.0])
    return theta[:, :1] * torch.exp(-theta[:, 1:] * times) + 0.05 * torch.randn(len(theta), 3)


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    prior = BoxUniform(torch.tensor([0.0, 0.0]), torch.tensor([2.0, 3.0]))
    theta = prior.sample((options.simulations,))
    trainer = NPE(prior, density_estimator=build_cnf(prior=prior, hidden=(64, 64)), show_progress_bars=False)
    trainer.append_simulations(theta, simulate(theta)).train(max_num_epochs=options.epochs)
    truth = torch.tensor([[1.0, 1.0]])
    samples = trainer.build_posterior().sample((1000,), x=simulate(truth), show_progress_bars=False)
    print(f"true {truth[0].tolist()}; posterior mean {samples.mean(0).tolist()}, standard deviation {samples.std(0).tolist()}")
    return samples


if __name__ == "__main__":
    main()
