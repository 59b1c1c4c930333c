"""Training by others: the loss modules under DDP, FSDP2, Lightning, accelerate, skorch, LBFGS and mixed precision.

Run as a script with a name and a folder, this file is a pair of processes that trains one batch by DDP or FSDP2.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import cnf
from cnf.fields import MLP
from cnf.losses import FlowMatching, NegativeLogLikelihood
from cnf.transforms import Sequential, Standardize

KINDS = {"likelihood": NegativeLogLikelihood, "matching": FlowMatching}


def flow_of(dtype=torch.float64, solver=None):
    torch.manual_seed(0)
    block = cnf.CNF(MLP(2, (8, 8), context_dim=1), None, solver or cnf.FixedGrid("rk4", 3))
    return cnf.Flow(Sequential([Standardize(torch.zeros(2), torch.ones(2)), block]), (2,)).to(dtype)


def data(rows=64, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(rows, 1, generator=generator, dtype=dtype)
    return c + 0.5 * torch.randn(rows, 2, generator=generator, dtype=dtype), c


def noise_of(kind, rank=0, rows=64):
    return cnf.Noise(0, "train", start=rank * (rows // 2), total=rows) if kind == "matching" else None


def rank_of_a_pair(kind, wrapper, folder):
    """Three steps of SGD on half of the rows each; rank 0 leaves the whole weights."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    module = KINDS[kind](flow_of()).train()
    if wrapper == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    else:
        wrapped = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    x, c = (v[rank * 32 : (rank + 1) * 32] for v in data())
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(x, c, noise_of(kind, rank)).mean().backward()
        optimizer.step()
    weights = {name.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in wrapped.named_parameters()}
    if rank == 0:
        torch.save({name: p.detach() for name, p in weights.items()}, Path(folder) / "weights.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind, wrapper, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(sys.path)}
    pair = [subprocess.Popen([sys.executable, __file__, kind, wrapper, str(tmp_path)], env=given | {"RANK": str(r)}) for r in range(2)]
    assert [process.wait(120) for process in pair] == [0, 0]
    module = KINDS[kind](flow_of()).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(*data(), noise_of(kind)).mean().backward()
        optimizer.step()
    found = torch.load(tmp_path / "weights.pt")
    assert set(found) == {name for name, _ in module.named_parameters()}
    for name, p in module.named_parameters():
        assert torch.allclose(found[name], p, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision(kind):
    module, (x, c) = KINDS[kind](flow_of(torch.float32)), data(dtype=torch.float32)
    noise = noise_of(kind)
    scaler = torch.amp.GradScaler("cpu")
    plain = module(x, c, noise)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x, c, noise)
    assert loss.dtype == torch.float32 and 0 < float((loss - plain).detach().abs().max()) < 0.2
    optimizer = torch.optim.SGD(module.parameters(), 1e-2)
    scaler.scale(loss.mean()).backward()
    scaler.step(optimizer)
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in module.parameters())


def test_lbfgs():
    """A linear conditional Gaussian, to its closed form: closures that are called many times see the same loss."""
    flow, (x, c) = flow_of(), data(200)
    flow.fit_statistics(x)
    loss = NegativeLogLikelihood(flow)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x, c).mean()
        value.backward()
        return value

    first, last = optimizer.step(closure).detach(), closure().detach()
    truth = -torch.distributions.Normal(c, 0.5).log_prob(x).sum(1).mean()
    assert float(first - last) > 0.3 and abs(float(last - truth)) < 0.1


class Mean(torch.nn.Module):
    def forward(self, losses, target):
        return losses.mean()


@pytest.mark.slow
def test_skorch():
    skorch = pytest.importorskip("skorch", reason="skorch is not installed")
    x, c = data(256, torch.float32)
    net = skorch.NeuralNet(NegativeLogLikelihood(flow_of(torch.float32)), Mean, lr=0.01, optimizer=torch.optim.Adam, max_epochs=4, batch_size=64, verbose=0, train_split=None)
    net.fit({"x": x, "context": c}, None)
    course = net.history[:, "train_loss"]
    assert course[-1] < course[0]
    assert net.predict({"x": x, "context": c}).shape == (256,)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    module, pairs = FlowMatching(flow_of(torch.float32)), torch.utils.data.TensorDataset(*data(dtype=torch.float32))
    wrapped, optimizer, loader = accelerator.prepare(module, torch.optim.Adam(module.parameters(), 1e-2), torch.utils.data.DataLoader(pairs, 32))
    before = [p.detach().clone() for p in module.parameters()]
    for x, c in loader:
        accelerator.backward(wrapped(x, c).mean())
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))
    assert accelerator.unwrap_model(wrapped).flow is module.flow


@pytest.mark.slow
@pytest.mark.parametrize("by", [[], ["--likelihood"]])
def test_lightning(by):
    """The example, which comes near to the truth."""
    pytest.importorskip("pytorch_lightning", reason="lightning is not installed")
    spec = importlib.util.spec_from_file_location("example", Path(__file__).parents[2] / "examples/lightning.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(["--steps", "300", *by]) < 1.2


if __name__ == "__main__":
    rank_of_a_pair(*sys.argv[1:])
