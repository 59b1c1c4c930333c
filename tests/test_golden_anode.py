"""The released ANODE models' numbers: field, features, logits and gradients, and every published count."""

import pytest
import torch
from test_golden import close, files, read, substate

from cnf.neural_ode import anode_conv, anode_mlp
from cnf.solvers import Adaptive, FixedGrid

LAYERS = {"conv": ("conv1", "conv2", "conv3"), "mlp": ("fc1", "fc2", "fc3")}


def ours(name):
    """The reference's parameter under our name."""
    for layers in LAYERS.values():
        for i, layer in enumerate(layers):
            name = name.replace(f"odeblock.odefunc.{layer}.", f"fields.0.layers.{i}.core.")
    return name.replace("linear_layer.", "head.")


def model_of(data, meta):
    c = meta["config"]
    common = {"time_dependent": c["time_dependent"], "nonlinearity": c["nonlinearity"]}
    if c["kind"] == "conv":
        model = anode_conv(tuple(c["data_shape"]), c["hidden"], c["output_dim"], c["augment_dim"], **common)
    else:
        model = anode_mlp(c["data_shape"][0], c["hidden"], c["output_dim"], c["augment_dim"], **common)
    assert sum(p.numel() for p in model.parameters()) == meta["parameters"]
    model.double().load_state_dict({ours(k): v for k, v in substate(data).items()})
    return model


def solved(model, data, solver):
    model.solver = solver
    outputs, features, stats = model.train().predict(data["x"])
    return outputs, features, stats


@pytest.mark.parametrize("path", files("g_anode"))
def test_anode(path):
    data, meta = read(path)
    model = model_of(data, meta)
    t = torch.tensor(meta["config"]["field_t"], dtype=torch.float64)
    close(model.fields[0](t, data["field/state"]), data["field/f"], 1e-12)
    if "pixels" in data:  # grey levels become k / 255
        model.levels = 256
        close(model.numbers(data["pixels"].to(torch.uint8)), data["x"], 1e-15)

    outputs, features, stats = solved(model, data, FixedGrid("rk4", 4))
    close(features, data["rk4/features"], 1e-11)
    close(outputs, data["rk4/logits"], 1e-11)
    assert stats.nfe == 16
    loss = (outputs * data["loss_weight"]).mean()
    assert abs(loss.item() - float(data["rk4/loss"])) < 1e-11 * max(1, abs(loss.item()))
    loss.backward()
    gradients = {ours(k): v for k, v in substate(data, "rk4/grad/").items()}
    parameters = dict(model.named_parameters())
    assert len(gradients) >= len(parameters) - 1
    for name, expected in gradients.items():
        close(parameters[name].grad, expected, 1e-9)

    # relu has kinks, where no high order is reached: half of the reference's own 1,000 steps
    relu = meta["config"]["nonlinearity"] == "relu"
    with torch.no_grad():
        tight = FixedGrid("rk4", 500) if relu else Adaptive("dopri5", 1e-10, 1e-10)
        outputs, features, _ = solved(model, data, tight)
    assert float((features - data["exact/features"]).abs().max()) < (1e-7 if relu else 1e-9)
    assert float((outputs - data["exact/logits"]).abs().max()) < (1e-7 if relu else 1e-9)
    with torch.no_grad():
        outputs, features, _ = solved(model, data, Adaptive("dopri5", 1e-8, 1e-8))
    feature_error, logit_error = (5e-6, 2e-6) if relu else (1e-7, 6e-8)
    assert float((features - data["features"]).abs().max()) < 3 * feature_error
    assert float((outputs - data["logits"]).abs().max()) < 3 * logit_error


@pytest.mark.parametrize(("shape", "filters", "augment", "outputs", "time", "count"), [
    ((1, 28, 28), 92, 0, 10, False, 84_395),
    ((1, 28, 28), 92, 0, 10, True, 85_316),
    ((1, 28, 28), 64, 5, 10, False, 84_816),
    ((1, 28, 28), 64, 5, 10, True, 85_462),
    ((3, 32, 32), 125, 0, 10, False, 172_358),
    ((3, 32, 32), 125, 0, 10, True, 173_611),
    ((3, 32, 32), 64, 10, 10, False, 171_799),
    ((3, 32, 32), 64, 10, 10, True, 172_452),
    ((3, 64, 64), 164, 0, 10, False, 366_269),
    ((3, 64, 64), 64, 5, 10, False, 365_714),
    ((3, 64, 64), 164, 0, 200, False, 2_701_179),
    ((3, 64, 64), 164, 0, 200, True, 2_702_822),
    ((3, 64, 64), 64, 5, 200, False, 6_591_824),
    ((3, 64, 64), 64, 5, 200, True, 6_592_472),
])  # fmt: skip
def test_published_counts(shape, filters, augment, outputs, time, count):
    with torch.device("meta"):
        model = anode_conv(shape, filters, outputs, augment, time_dependent=time)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("dim", "augment", "time", "count"), [
    (1, 0, True, 1187), (1, 0, False, 1155), (1, 5, True, 1517), (1, 5, False, 1485),
    (2, 0, True, 1253), (2, 0, False, 1221), (2, 5, True, 1583), (2, 5, False, 1551),
])  # fmt: skip
def test_published_toy_counts(dim, augment, time, count):
    model = anode_mlp(dim, 32, 1, augment, time_dependent=time)
    assert sum(p.numel() for p in model.parameters()) == count
