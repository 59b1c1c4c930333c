"""Whole flows compiled by the user: custom fields are checked, and any number of rows works."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnf import CNF, Flow
from cnf.errors import ConfigError
from cnf.fields import MLP
from cnf.ode.divergence import Exact, Hutchinson
from cnf.solvers import FixedGrid

F64 = torch.float64


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, t, x):
        return self.last(self.first(torch.cat([x, t.expand(len(x), 1)], 1)).tanh())


class Mixing(Plain):
    def forward(self, t, x):
        return super().forward(t, x) + x.mean(0)


class Cut(Plain):
    """The part that is cut has a derivative of about a tenth of the other."""

    def forward(self, t, x):
        return 2 * super().forward(t, x.detach()) + x


class Random(Plain):
    def forward(self, t, x):
        return super().forward(t, x) + torch.randn_like(x)


class Normalised(Plain):
    def forward(self, t, x):
        return self.last(F.layer_norm(self.first(torch.cat([x, t.expand(len(x), 1)], 1)), (8,)).tanh())


def flow_of(field: nn.Module, divergence=None) -> Flow:
    torch.manual_seed(0)
    return Flow(CNF(field, divergence or Exact(), FixedGrid("rk4", 1)), (2,)).train()


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson()])
def test_a_small_part_without_gradient_is_refused(divergence):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="does not match its values"):
        flow_of(Cut(), divergence).log_prob(torch.randn(8, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [(Mixing, "other rows are next to it"), (Cut, "does not match its values"), (Random, "draws random numbers"), (Normalised, "reverse mode")],
)
def test_a_compiled_loss_checks_a_custom_field(kind, said):
    torch.manual_seed(0)
    flow, x = flow_of(kind()), torch.randn(8, 2)
    with pytest.raises(Exception, match=said):  # torch wraps errors of a trace in one of its own
        torch.compile(lambda x: -flow.log_prob(x).mean(), fullgraph=True, backend="aot_eager")(x)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [Exact(), Hutchinson()])
def test_a_compiled_loss_of_a_custom_field_has_the_gradient_of_the_plain_one(divergence):
    flow = flow_of(Plain().to(F64), divergence)
    compiled = torch.compile(lambda x: -flow.log_prob(x).mean(), fullgraph=True, backend="aot_eager")
    for rows in (4, 7, 5):
        x, found = torch.randn(rows, 2, dtype=F64), []
        for loss in (compiled, lambda x: -flow.log_prob(x).mean()):
            torch.manual_seed(rows)  # of the probe
            flow.zero_grad()
            loss(x).backward()
            found.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_loss_takes_any_number_of_rows():
    flow = flow_of(MLP(2, (8,)), Hutchinson())
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    for rows in (4, 5, 7):
        x, found = torch.randn(rows, 2), []
        for log_prob in (compiled, flow.log_prob):
            torch.manual_seed(rows)
            found.append(log_prob(x))
        torch.testing.assert_close(found[0], found[1])
