"""Two moons with PyTorch Lightning: a conditional flow by flow matching, with early stopping on a loss without noise.

    pip install 'cnf[data]' lightning
    python examples/lightning.py --steps 2000
"""

from __future__ import annotations

import argparse

import pytorch_lightning as lightning  # this file has the name of the package that holds it
import torch
from pytorch_lightning.callbacks import EarlyStopping
from sklearn.datasets import make_moons
from torch.utils.data import DataLoader, TensorDataset

import cnf
from cnf.fields import MLP
from cnf.losses import FlowMatching, NegativeLogLikelihood
from cnf.transforms import Sequential, Standardize


def moons(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points (N, 2) and their moon, one-hot (N, 2)."""
    x, label = make_moons(rows, noise=0.1, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.eye(2)[torch.tensor(label)]


class Moons(lightning.LightningModule):
    def __init__(self, flow: cnf.Flow, by_likelihood: bool = False, lr: float = 3e-3):
        super().__init__()
        self.loss = NegativeLogLikelihood(flow) if by_likelihood else FlowMatching(flow)
        self.lr = lr

    def training_step(self, batch, index):
        loss = self.loss(*batch).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        # the same times and noise at every validation
        loss = self.loss.validation_loss(*batch) if isinstance(self.loss, FlowMatching) else self.loss(*batch)
        self.log("validation", loss.mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--likelihood", action="store_true", help="train by likelihood instead")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0)
    train, validation, test = (moons(rows, seed) for seed, rows in enumerate((4000, 500, 1000)))
    flow = cnf.Flow(Sequential([Standardize(torch.zeros(2), torch.ones(2)), cnf.CNF(MLP(2, (64, 64), context_dim=2))]), (2,))
    flow.fit_statistics(train[0])
    trainer = lightning.Trainer(
        max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1,
        check_val_every_n_epoch=5, callbacks=[EarlyStopping("validation", patience=10)], enable_progress_bar=False,
    )  # fmt: skip
    loaders = (DataLoader(TensorDataset(*data), 256, shuffle=data is train) for data in (train, validation))
    trainer.fit(Moons(flow, options.likelihood), *loaders)
    with torch.no_grad():
        nats = float(-flow.eval().log_prob(*test).mean())
    print(f"test: {nats:.3f} nats; {len(flow(torch.eye(2)).sample((500,)).flatten(0, 1))} samples of both moons")
    return nats


if __name__ == "__main__":
    main()
