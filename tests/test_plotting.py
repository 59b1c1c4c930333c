"""Pictures: what they show is what the flow says, nothing is cropped, and files are written whole."""

import re

import numpy as np
import pytest
import torch
from conftest import slow
from PIL import Image

import cnf
from cnf import plotting
from cnf.config import FlowConfig, SolverConfig
from cnf.errors import CheckpointError, ConfigError
from cnf.models import build
from cnf.plotting import canvas, curves, features, motion, plane, samples
from cnf.random import Noise
from cnf.solvers import FixedGrid
from cnf.transforms import Logit, Standardize


@pytest.fixture(scope="module")
def flow():
    return ready(build(FlowConfig.of(hidden=(8,), blocks=2), SolverConfig(), (2,)))


@pytest.fixture(scope="module")
def image_flow():
    flow = build(FlowConfig.of(hidden=(8,), alpha=0.05), SolverConfig(), (1, 4, 4), levels=17)
    flow.fit_statistics(torch.randint(0, 17, (200, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    return ready(flow)


def ready(flow):
    generator = torch.Generator().manual_seed(0)
    for p in flow.parameters():
        p.data += 0.4 * torch.randn(p.shape, generator=generator)
    for block in flow.blocks:
        block.eval_solver = FixedGrid("rk4", 4)
    return flow.eval()


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn; at the end nothing in it may be cropped or lie on its neighbour."""
    drawn = []

    def remember(width, height):
        drawn.append(canvas.new_figure(width, height))
        return drawn[-1]

    for module in (curves, features, motion, plane, samples):
        if hasattr(module, "new_figure"):
            monkeypatch.setattr(module, "new_figure", remember)
    yield drawn
    for figure in drawn:
        figure.canvas.draw()
        whole = [axis.get_tightbbox() for axis in figure.axes]  # with titles, labels and ticks
        for i, a in enumerate(whole):
            assert a.x0 > -1 and a.y0 > -1 and a.x1 < figure.bbox.x1 + 1 and a.y1 < figure.bbox.y1 + 1, "cropped"
            for b in whole[i + 1 :]:
                assert not a.overlaps(b.padded(-1)), "overlap"


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def points(n=400, scale=1.0):
    return scale * torch.randn(n, 2, generator=torch.Generator().manual_seed(1))


def test_image_grid(tmp_path):
    for channels, levels in ((1, 17), (3, 256)):
        images = torch.randint(0, levels, (7, channels, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        path = plotting.image_grid(images, tmp_path / "grid.png", columns=3, levels=levels)
        found = pixels(path)
        assert found.shape == (3 * 45 + 5, 3 * 65 + 5, 3)  # tenfold, and half a pixel of grey around each
        for i, image in enumerate(images):
            tile = found[i // 3 * 45 + 5 : i // 3 * 45 + 45, i % 3 * 65 + 5 : i % 3 * 65 + 65]
            truth = (image.float() * 255 / (levels - 1)).round().int().permute(1, 2, 0).expand(4, 6, 3)
            assert np.array_equal(tile, truth.numpy().repeat(10, 0).repeat(10, 1))
        # floats are the grey levels that they stand for
        floats = (images.float() + 0.7) / levels
        assert np.array_equal(pixels(plotting.image_grid(floats, tmp_path / "f.png", columns=3, levels=levels)), found)
    outside = torch.tensor([-3.0, 7.0]).reshape(1, 1, 1, 2)
    tile = pixels(plotting.image_grid(outside, tmp_path / "o.png"))[16:-16, 16:-16]
    assert (tile[:, :32] == 0).all() and (tile[:, 32:] == 255).all()
    assert pixels(plotting.image_grid(torch.rand(2, 2, 8, 8), tmp_path / "two.png")).shape[2] == 3  # two channels: their mean


def test_samples_beside_images(tmp_path, figures):
    data = torch.randint(0, 17, (9, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plotting.samples_beside_data((data.float() + 0.3) / 17, data, tmp_path / "a.png", levels=17)
    left, right = figures[0].axes
    assert [a.get_title() for a in (left, right)] == ["data", "samples"]
    assert np.array_equal(left.images[0].get_array(), right.images[0].get_array())
    plotting.samples_beside_data(data, None, tmp_path / "b.png", levels=17)
    assert [a.get_title() for a in figures[1].axes] == ["samples"]


def test_samples_beside_points(tmp_path, figures):
    data, drawn = points(), points() + 0.1
    plotting.samples_beside_data(drawn, data, tmp_path / "a.png")
    left, right = figures[0].axes
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert np.allclose(left.collections[0].get_offsets(), data) and np.allclose(right.collections[0].get_offsets(), drawn)
    low, high = data.min(0).values, data.max(0).values
    assert left.get_xlim()[0] < low[0] and left.get_xlim()[1] > high[0] and left.get_ylim()[1] > high[1]
    assert left.get_aspect() == 1
    # two columns of different units fill the frame all the same
    plotting.samples_beside_data(drawn * torch.tensor([1.0, 1e4]), None, tmp_path / "b.png", columns=("length", "mass"))
    (axis,) = figures[1].axes
    assert axis.get_aspect() == "auto" and (axis.get_xlabel(), axis.get_ylabel()) == ("length", "mass")


@pytest.mark.parametrize(("dim", "dtype"), [(1, torch.float32), (5, torch.float64), slow(14, torch.float32)])
def test_samples_beside_tables(tmp_path, figures, dim, dtype):
    data = torch.randn(500, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)
    data[:, 0] = 2.5  # a constant column is drawn, too
    names = tuple(f"quantity {i}" for i in range(dim))
    plotting.samples_beside_data(data + 0.1, data, tmp_path / "a.png", columns=names)
    plotting.samples_beside_data(data, None, tmp_path / "b.png")
    titles = [a.get_title() for a in figures[0].axes if a.axison]
    assert titles == list(names[:12])
    assert [a.get_title() for a in figures[1].axes if a.axison] == [f"column {i}" for i in range(min(dim, 12))]
    legend = [t.get_text() for t in figures[0].axes[0].get_legend().get_texts()]
    assert sorted(legend) == ["data", "samples"]


def test_density(tmp_path, figures, flow):
    data = 5 + points(900)
    plotting.density_2d(flow, data, tmp_path / "a.png", resolution=30)
    left, right, bar = figures[0].axes
    values = np.asarray(right.images[0].get_array())
    x0, x1, y0, y1 = right.images[0].get_extent()
    assert x0 < data[:, 0].min() and x1 > data[:, 0].max() and y0 < data[:, 1].min() and y1 > data[:, 1].max()
    row, column = 21, 4  # row = second coordinate
    point = torch.tensor([[x0 + (column + 0.5) * (x1 - x0) / 30, y0 + (row + 0.5) * (y1 - y0) / 30]])
    assert np.isclose(values[row, column], float(flow.log_prob(point.float()).detach().exp()), rtol=1e-4)
    counts = np.asarray(left.images[0].get_array())
    assert np.isclose(counts.sum() * (x1 - x0) * (y1 - y0) / counts.size, 1)  # a density, as the model's is
    assert left.images[0].get_clim() == right.images[0].get_clim() and left.images[0].get_clim()[0] == 0
    assert bar.get_ylabel() == "density p(x)"
    plotting.density_2d(flow, data, tmp_path / "b.png", extent=2.0, resolution=10)
    assert tuple(figures[1].axes[1].images[0].get_extent()) == (-2, 2, -2, 2)
    assert not np.asarray(figures[1].axes[0].images[0].get_array()).any()  # no data there


def test_vector_field(tmp_path, figures, flow):
    plotting.vector_field_2d(flow, tmp_path / "a.png", times=3)
    panels = figures[0].axes[:6]
    assert [a.get_title() for a in panels] == [f"block {b}, t = {t}" for b in (1, 2) for t in ("0.00", "0.50", "1.00")]
    quivers = [a.collections[0] for a in panels]
    assert len({q.get_clim() for q in quivers}) == 1 and len({q.scale for q in quivers}) == 1
    at = torch.from_numpy(np.stack([quivers[4].X, quivers[4].Y], 1)).float()
    v = flow.blocks[1].field(torch.tensor(0.5), at).detach().numpy()
    assert np.allclose(quivers[4].get_array(), np.hypot(*v.T), rtol=1e-4, atol=1e-6)
    assert np.allclose(np.arctan2(quivers[4].V, quivers[4].U), np.arctan2(*v.T[::-1]), atol=1e-4)
    still = build(FlowConfig.of(hidden=(4,)), SolverConfig(), (2,))  # f = 0 everywhere
    plotting.vector_field_2d(still, tmp_path / "b.png", times=2)
    assert np.isfinite(figures[1].axes[0].collections[0].U).all()


def test_trajectories(tmp_path, figures, flow):
    data = points(30)
    plotting.trajectories_2d(flow, data, tmp_path / "a.png", n=10)
    axis, bar = figures[0].axes
    lines, *ends = axis.collections
    start, end = (c.get_offsets() for c in ends)
    pieces = np.array(lines.get_segments()).reshape(39, 10, 2, 2)  # one for each time and point, coloured by the time
    assert np.allclose(np.diff(lines.get_array().reshape(39, 10), axis=1), 0) and bar.get_ylabel() == "time t / T"
    assert np.allclose(pieces[1:, :, 0], pieces[:-1, :, 1]) and np.allclose(pieces[-1, :, 1], end)
    assert np.allclose(end, flow.encode(data[:10]).detach(), atol=1e-4)
    assert np.allclose(start, flow.transform.transforms[0](data[:10]).value, atol=1e-6)
    assert np.allclose(pieces[0, :, 0], start, atol=1e-6)
    (legend,) = figures[0].legends
    figures[0].canvas.draw()
    assert not legend.get_window_extent().overlaps(axis.get_window_extent())  # it hides no point


def test_a_mixture_as_base_goes_on_to_a_standard_normal(tmp_path, figures):
    """The map of one Gaussian's points is x -> S^(-1/2) (x - m); a field that is zero is left out."""
    base = cnf.bases.GaussianMixture(2, 1)
    with torch.no_grad():
        base.means.copy_(torch.tensor([[1.0, -0.5]]))
        base.lower.fill_(0.4)
    roots, axes = torch.linalg.eigh(base.covariances[0].detach())
    white = axes @ torch.diag(roots**-0.5) @ axes.T
    for scale in (0.0, 0.3):
        field = cnf.fields.MLP(2, (8,), zero_init=not scale)
        flow = cnf.Flow(cnf.CNF(field), (2,), base=base).eval()
        plotting.trajectories_2d(flow, data := points(30), tmp_path / "a.png", n=20)
        start, end = (c.get_offsets() for c in figures[-1].axes[0].collections[1:])
        assert np.allclose(start, data[:20])
        latent = flow.encode(data[:20]).detach()
        assert torch.allclose(latent, data[:20], atol=1e-6) == (not scale)
        assert np.allclose(end, (latent - base.means.detach()) @ white, atol=1e-4)
    plotting.vector_field_2d(flow, tmp_path / "b.png", times=2)
    assert len([axis for axis in figures[-1].axes if axis.get_title()]) == 4  # two blocks


def frames_of(path):
    with Image.open(path) as picture:
        assert picture.format == "GIF" and picture.info["loop"] == 0
        out = []
        for i in range(picture.n_frames):
            picture.seek(i)
            out.append((np.asarray(picture.convert("RGB")).astype(int), picture.info["duration"]))
    return out


def test_gif_of_points(tmp_path, flow, figures):
    frames = frames_of(plotting.flow_gif(flow, tmp_path / "a.gif", n=50, frames=4))
    assert [d for _, d in frames] == [80, 80, 80, 1500]
    assert len({f.shape for f, _ in frames}) == 1
    (axis,) = figures[0].axes
    x = flow.rsample(50, noise=Noise(0, "sample"))
    arrived, trails, dots = axis.collections
    assert np.allclose(dots.get_offsets(), flow.transform.transforms[0](x).value.detach(), atol=1e-5)
    assert np.allclose(arrived.get_offsets(), dots.get_offsets()) and len(trails.get_segments()) == 50
    assert axis.get_title() == "from noise (0) to data (1): 1.00"
    assert axis.images[0].get_array().sum() > 0 and axis.get_xlabel() and axis.get_ylabel()
    context = torch.eye(2)[torch.arange(6) % 2]
    conditional = ready(build(FlowConfig.of(hidden=(4,)), SolverConfig(), (2,), context_dim=2))
    assert len(frames_of(plotting.flow_gif(conditional, tmp_path / "b.gif", n=6, frames=3, context=context))) == 3


def test_gif_of_images(tmp_path, image_flow):
    frames = frames_of(plotting.flow_gif(image_flow, tmp_path / "a.gif", n=9, frames=3, seed=4))
    assert len(frames) == 3
    x = image_flow.sample(9, noise=Noise(4, "sample"))
    truth = pixels(plotting.image_grid(x, tmp_path / "a.png"))
    assert np.abs(frames[-1][0] - truth).max() <= 4  # the last frame is the sample, up to a grey level or two
    z = image_flow.encode(image_flow.rsample(9, noise=Noise(4, "sample")))
    logit, whiten = image_flow.transform.transforms[1:3]
    noise = pixels(plotting.image_grid(logit.inverse(whiten.inverse(z).value).value.detach(), tmp_path / "z.png"))
    assert np.abs(frames[0][0] - noise).max() <= 4


@pytest.mark.parametrize("options", [{}, {"squeeze_first": True, "preprocess": "standardize"}, {"architecture": "stack", "squeeze_first": True}])
def test_gif_of_a_flow_with_squeezes(tmp_path, options):
    """Multiscale flows and stacks on the squeezed image: from all the latent's entries, each in its place, to the sample."""
    settings = {"architecture": "multiscale", "field": "conv", "hidden": (3,), "preprocess": "logit", "alpha": 0.05}
    torch.manual_seed(0)
    flow = ready(build(FlowConfig.of(**settings | options), SolverConfig(), (3, 8, 8), levels=256))
    for block in flow.blocks:
        block.eval_solver = FixedGrid("rk4", 8)
    frames = frames_of(plotting.flow_gif(flow, tmp_path / "a.gif", n=4, frames=5, seed=4))
    assert len(frames) == 5
    x = flow.rsample(4, noise=Noise(4, "sample"))
    way = flow.trajectory(x, torch.linspace(0, 1, 5))
    assert way.shape == (5, 4, 3, 8, 8)
    before = [leaf for leaf in flow.transform.transforms if isinstance(leaf, Logit | Standardize)]
    for frame, points in ((frames[-1][0], x), (frames[0][0], way[-1]), (frames[2][0], way[2])):
        for leaf in reversed(before) if points is not x else ():
            points = leaf.inverse(points).value
        truth = pixels(plotting.image_grid(points.detach(), tmp_path / "a.png"))
        assert frame.shape == truth.shape
        assert np.abs(frame - truth).mean() < 8  # a GIF has 256 colours


def test_gif_refuses(tmp_path, flow):
    with pytest.raises(ConfigError, match="frames must be at least 2, got 1"):
        plotting.flow_gif(flow, tmp_path / "a.gif", frames=1)
    with pytest.raises(ConfigError, match=r"got event shape \(3,\)"):
        plotting.flow_gif(build(FlowConfig(), SolverConfig(), (3,)), tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_learning_curves(tmp_path, figures):
    rows = [{"step": s, "nll": 3 + 50 / s**2, "nfe": 16, "nfe_backward": 0} for s in range(1, 101)]
    rows[49]["validation"], rows[99]["validation"] = 3.2, float("inf")
    plotting.learning_curves(rows, tmp_path / "a.png", unit="bits/dim")
    top, bottom = figures[0].axes
    assert top.get_ylabel() == "bits/dim" and bottom.get_xlabel() == "step"
    labels = [[t.get_text() for t in a.get_legend().get_texts()] for a in (top, bottom)]
    assert labels == [["training batch", "validation (averaged weights)"], ["training, forward"]]
    assert np.array_equal(top.lines[1].get_xydata(), [[50, 3.2]])
    low, high = top.get_ylim()
    assert low < 3.005 and 3.2 < high < 20  # the first steps do not squeeze the rest
    for row in rows:
        row["nfe_backward"] = 30
    plotting.learning_curves(rows, tmp_path / "b.png", unit="nats")
    assert len(figures[1].axes[1].lines) == 2
    matching = [{"step": s, "nll": 3.0, **({"validation": 3.5, "validation_nfe": 90 + s} if s % 5 == 0 else {})} for s in range(1, 21)]
    plotting.learning_curves(matching, tmp_path / "e.png", unit="bits/dim")  # whose steps solve nothing
    (solved,) = figures[2].axes[1].lines
    assert np.array_equal(solved.get_xydata(), [[5, 95], [10, 100], [15, 105], [20, 110]]) and solved.get_label() == "validation"
    residual = [{"step": s, "loss": 1 / s, "nfe": 0, "nfe_backward": 0, "validation": 2 / s, "validation_nfe": 0} for s in (1, 2)]
    plotting.learning_curves(residual, tmp_path / "f.png", unit="nats", name="loss")
    assert len(figures[3].axes) == 1 and figures[3].axes[0].get_xlabel() == "step"
    rows[99]["validation"] = 40.0  # however bad, a validation is seen; flow matching's error has a panel of its own
    error = [{"step": s, "loss": 1 / s} for s in (1, 2)]
    plotting.learning_curves([*rows, *error], tmp_path / "g.png", unit="nats")
    top, middle, _ = figures[4].axes
    assert top.get_ylim()[1] > 40 and np.array_equal(middle.lines[0].get_xydata(), [[1, 1], [2, 0.5]]) and middle.get_ylabel() == "loss"
    plotting.learning_curves([], tmp_path / "c.png", unit="nats")  # a run stopped before its first row
    plotting.learning_curves([{"step": 10, "skipped": 3}], tmp_path / "d.png", unit="nats")


def test_files_are_written_whole(tmp_path, monkeypatch):
    path = plotting.image_grid(torch.rand(4, 1, 4, 4), tmp_path / "a.png")
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        plotting.image_grid(torch.rand(9, 1, 4, 4), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


# -- models that predict -----------------------------------------------------------------------------------------


def test_principal_axes_are_scikit_learns():
    from sklearn.decomposition import PCA

    from cnf.plotting.features import _space

    states = np.random.default_rng(0).normal(size=(3, 40, 5)) * [3, 2, 1, 0.5, 0.1]
    points, names = _space(states)
    pca = PCA(3).fit(states.reshape(-1, 5))
    expected = pca.transform(states.reshape(-1, 5)).reshape(3, 40, 3)
    distances = [np.linalg.norm(each.reshape(-1, 1, 3) - each.reshape(1, -1, 3), axis=2) for each in (points, expected)]
    assert np.allclose(*distances, atol=1e-9) and points[0].std(0)[2] <= points[0].std(0)[:2].min()  # the same space, turned
    shares = [int(re.search(r"\d+", name.split("(")[1])[0]) for name in names]
    assert abs(sum(shares) - 100 * pca.explained_variance_ratio_.sum()) < 2
    assert _space(states[..., :2])[1] == ("$x_1$", "$x_2$")


def test_the_boundary_is_where_the_model_has_it(tmp_path):
    from cnf.neural_ode import residual_net

    net = residual_net(2, 2, hidden=2, blocks=1)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.head.weight[0, 0], net.head.weight[1, 0] = 50.0, -50.0  # class 0 where x_1 > 0
    x = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    path = plotting.decision_boundary(net, x, torch.tensor([1, 0]), tmp_path / "b.png", classes=("right", "left"), resolution=50)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    shades = ((132, 180, 214), (255, 185, 122))  # of both classes where the model is certain
    blue, orange = (np.argwhere(np.abs(pixels - np.array(c)).sum(2) < 8) for c in shades)
    assert len(blue) > 1000 and len(orange) > 1000
    assert blue[:, 1].min() >= orange[:, 1].max() - 2


def test_a_continuous_target_has_its_histograms_too(tmp_path, figures):
    from cnf.neural_ode import anode_mlp

    x = torch.linspace(-1, 1, 50)[:, None]
    plotting.feature_evolution(anode_mlp(1).eval(), x, x[:, 0].sin(), tmp_path / "a.png", times=2)
    assert [sum(bar.get_height() for bar in axis.patches) for axis in figures[0].axes] == [50, 50]


def adaptive(shape, outputs=1):
    """A model whose end times differ."""
    from cnf.neural_ode import anode_conv, anode_mlp

    torch.manual_seed(0)
    model = anode_conv(shape, 4, outputs, adaptive_depth=True) if len(shape) == 3 else anode_mlp(*shape, 4, outputs, adaptive_depth=True)
    with torch.no_grad():
        model.depth[-1].weight.normal_()
    return model.eval()


def test_the_learned_depth_is_the_models(tmp_path, figures):
    model, x = adaptive((1,)), torch.linspace(-1, 1, 50)[:, None]
    plotting.learned_depth(model, x, x[:, 0].sign(), tmp_path / "a.png")
    (curve,) = figures[-1].axes[0].lines
    line = torch.tensor(np.ravel(curve.get_xdata()))[:, None]
    assert line.min() < -1 and line.max() > 1
    ends = model.end_time(line).detach()
    assert ends.std() > 0.01 and np.allclose(np.ravel(curve.get_ydata()), ends, atol=1e-6)
    dots = figures[-1].axes[0].collections[0].get_offsets()
    assert np.allclose(dots[:, 1], model.end_time(x).detach(), atol=1e-6)

    model, x = adaptive((2,), 3), torch.randn(60, 2)
    plotting.learned_depth(model, x, torch.arange(60) % 3, tmp_path / "b.png", classes=("a", "b", "c"), resolution=7)
    (image,) = figures[-1].axes[0].images
    left, right, bottom, top = image.get_extent()
    ends = model.end_time(torch.tensor([[left, bottom], [right, bottom], [right, top]])).detach()
    values = np.asarray(image.get_array())  # rows from below
    assert np.allclose([values[0, 0], values[0, -1], values[-1, -1]], ends, atol=1e-5) and ends.std() > 0.01

    model, x = adaptive((1, 4, 4), 2), torch.rand(30, 1, 4, 4)
    plotting.learned_depth(model, x, torch.arange(30) % 2, tmp_path / "c.png", classes=("a", "b"))
    bars, ends = figures[-1].axes[0].patches, model.end_time(x)
    assert sum(bar.get_height() for bar in bars) == 30
    assert min(bar.get_x() for bar in bars) <= ends.min() and max(bar.get_x() + bar.get_width() for bar in bars) >= ends.max()
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"}


def test_paths_end_at_their_own_depth(tmp_path, figures):
    model, x = adaptive((1,)), torch.linspace(-1, 1, 6)[:, None]
    plotting.paths_1d(model, x, x[:, 0].sign(), tmp_path / "a.png")
    paths = [line for line in figures[-1].axes[0].lines if len(line.get_xdata()) > 1]
    assert np.allclose([path.get_xdata()[-1] for path in paths], model.end_time(x).detach(), atol=1e-6)
    assert np.allclose([path.get_ydata()[0] for path in paths], x[:, 0])
    assert np.allclose([path.get_ydata()[-1] for path in paths], model.predict(x).features[:, 0].detach(), atol=2e-3)


def test_pictures_of_predictors_refuse_what_they_cannot_show(tmp_path):
    from cnf.neural_ode import anode_mlp, residual_net

    with pytest.raises(ConfigError, match=r"one or two dimensions.* got event shape \(3,\)"):
        plotting.decision_boundary(residual_net(3), torch.zeros(4, 3), torch.zeros(4), tmp_path / "a.png")
    with pytest.raises(ConfigError, match="times must be at least 2 panels, got 1"):
        plotting.feature_evolution(anode_mlp(2), torch.zeros(4, 2), torch.zeros(4), tmp_path / "a.png", times=1)
    with pytest.raises(ConfigError, match=r"model must have adaptive depth"):
        plotting.learned_depth(anode_mlp(2), torch.zeros(4, 2), torch.zeros(4), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_corner_plot_spans_the_data_and_names_columns(tmp_path, monkeypatch):
    """Samples far outside stretch no axis; every axis spans the data's quantiles, in the column's units."""
    drawn = []
    monkeypatch.setattr("cnf.plotting.tables.save_figure", lambda figure, path: drawn.append(figure) or path)
    data = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 1e-3])
    plotting.corner_plot(data * 50, data, tmp_path / "corner.png", columns=("a", "b", "c"))
    axes = drawn[0].axes
    assert len(axes) == 9 and [axis.get_xlabel() for axis in axes[6:]] == ["a", "b", "c"]
    for j, scale in enumerate((1.0, 100.0, 1e-3)):
        low, high = axes[6 + j].get_xlim()
        assert 4.5 * scale < high - low < 8 * scale
    data[:, 1] = (data[:, 1] / 50).exp()  # a long tail: its decades
    plotting.corner_plot(data, data, tmp_path / "corner.png", columns=("a", "b", "c"))
    axis = drawn.pop().axes[7]
    assert axis.get_xlabel() == "log10 b" and 3.5 < axis.get_xlim()[1] - axis.get_xlim()[0] < 7
    plotting.calibration_plot(torch.linspace(0, 1, 400), tmp_path / "pit.png")
    heights = [patch.get_height() for patch in drawn[1].axes[0].patches if 0.2 < patch.get_height() < 5 and patch.get_width() < 0.5]
    assert len(heights) == 10 and all(abs(h - 1) < 0.05 for h in heights)
