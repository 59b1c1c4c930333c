"""Two processes are one: gradients, training, evaluation and samples of a pair equal those of a single process.

Run as a script with a folder, this file is the pair: it forks two processes for each scene and leaves what they found.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from trainers import average, monitor, training

from cnf import distributed
from cnf._utils.output import speaks
from cnf.cli import sample_main
from cnf.config import DataConfig, FlowConfig, RunConfig, SolverConfig, TrainConfig
from cnf.data import DataSplits
from cnf.distributed import SINGLE_PROCESS, Group, join
from cnf.distributed import group as group_module
from cnf.errors import CheckpointError, CNFError, ConfigError, SolverError, TrainingError
from cnf.evaluation import check, evaluate
from cnf.evaluation import rank as ranking
from cnf.fields import MLP
from cnf.flow import Flow
from cnf.losses import Likelihood, Supervised, assess
from cnf.neural_ode import anode_mlp
from cnf.ode.continuous import CNF
from cnf.ode.divergence import Hutchinson
from cnf.random import Noise
from cnf.runs import RunInfo, write_config
from cnf.solvers import Adaptive, FixedGrid
from cnf.training import Interrupted
from cnf.training.batches import Batches

GENERATOR = torch.Generator().manual_seed(3)
POINTS = (torch.randn(90, 2, generator=GENERATOR) * torch.tensor([0.3, 1.0]) + torch.tensor([2.0, 0.0])).double()
DATA = DataSplits("points", "table", POINTS[:50], POINTS[50:70], POINTS[70:])
SOLVERS = {
    "direct": FixedGrid("rk4", 3),
    "checkpoint": FixedGrid("rk4", 3, gradient="checkpoint"),
    "adjoint": Adaptive("dopri5", 1e-10, 1e-10, gradient="adjoint"),
}
ROWS = 7  # 3 and 4


def info(**train):
    given = {"steps": 12, "batch_size": 17, "warmup": 3, "lr": 0.01, "validate_every": 4, "solver_check_every": 3, "kinetic": 0.01}
    solver = SolverConfig.of(grid_steps=2, divergence="hutchinson", steer=0.25)
    train = given | {"solver_check_tolerance": 1e-9, "max_grid_steps": 4} | train
    config = RunConfig("points", DataConfig(), FlowConfig.of(hidden=(8,), zero_init=False), solver, TrainConfig.of(**train))
    return RunInfo(config, (2,), None, 0, (), ("column 0", "column 1"))


def trainer(folder, group, *, resume=False, **options):
    folder.mkdir(exist_ok=True)
    settings = info(**options)
    if group.main:
        write_config(folder, settings)
    return training(settings, DATA, folder, resume=resume, quiet=True, group=group)


def outcome(run):
    """Weights, and every figure of the run."""
    names = ("step", "skipped", "best", "best_step", "worse")
    return {
        "weights": run.model.state_dict(),
        "ema": average(run).state_dict(),
        "best_weights": run.state.best_weights,
        "numbers": {n: float(getattr(run.state, n)) for n in names} | {"refinements": float(monitor(run).refinements)},
    }


def gradients(kind, group):
    """Terms and gradients of a joint batch of seven."""
    torch.manual_seed(0)
    block = CNF(MLP(2, hidden=(6,)), Hutchinson(), SOLVERS[kind], steer=0.3, learn_end_time=True)
    flow = Flow(block, (2,)).double().train()
    flow.idle = torch.nn.Parameter(torch.ones(3))
    objective = Likelihood(flow, kinetic=0.1)
    rows = group.share(ROWS)
    x = POINTS[:ROWS][rows]
    terms, _ = objective.evaluate(x, None, Noise(0, step=2, start=rows.start, total=ROWS))
    terms["loss"].mean().backward()
    figures = torch.stack([t.detach().mean() for t in terms.values()])
    figures, failure = group.all_reduce_gradients(flow.parameters(), len(x) / ROWS, figures)
    assert failure == "" and flow.idle.grad is None
    return {"figures": figures, **{n: p.grad for n, p in flow.named_parameters() if p.grad is not None}}


def scores(group):
    """A likelihood, its checks, a ranking and a prediction, in batches of four."""
    torch.manual_seed(0)
    flow = Flow(CNF(MLP(2, hidden=(6,)), Hutchinson()), (2,)).double().eval()
    options = {"seed": 5, "batch_size": 4, "group": group}
    found = evaluate(flow, POINTS[:11], draws=3, index=torch.arange(100, 111), **options)
    checked = check(flow, POINTS[:11], **options)
    ranked = ranking(flow, POINTS[:11], **options)
    model = anode_mlp(2, outputs=3, augment=1).double().eval()
    targets = torch.eye(3, dtype=torch.float64)[torch.arange(11) % 3]
    predicted = assess(model, POINTS[:11], targets, "classification", batch_size=4, group=group)
    rows = group.share(ROWS)
    noise = Noise(0, step=1, start=rows.start, total=ROWS)
    watched = Likelihood(flow.train()).solver_error(POINTS[:ROWS][rows], None, noise, group=group)
    guessed = Supervised(model.train(), "classification").solver_error(
        POINTS[:ROWS][rows], targets[:ROWS][rows], None, group=group
    )
    return {
        "log_prob": found.log_prob, "figures": [found.mean, found.standard_error, found.noise_standard_error, found.nfe],
        "check": list(dataclasses.astuple(checked)), "order": ranked.names, "outputs": predicted.outputs,
        "prediction": [predicted.mean, predicted.accuracy, predicted.nfe], "watch": [watched, guessed],
    }  # fmt: skip


def sample(folder):
    """Samples of a run, in batches of four."""
    from cnf.cli import sample as module

    module.BATCH_NUMBERS = 8
    out = folder.parent / f"sample-{os.environ.get('WORLD_SIZE', 1)}.npz"
    assert sample_main([str(folder), "-n", "19", "--seed", "4", "--out", str(out), "--trajectory"]) == 0
    return out


# -- the pair ----------------------------------------------------------------------------------------------------


def failing(monkeyed, step, fail):
    """Let the objective call ``fail`` at that step."""
    real = monkeyed.objective.evaluate

    def evaluate(*given):
        if monkeyed.state.step == step:
            fail()
        return real(*given)

    monkeyed.objective.evaluate = evaluate


def refuse():
    raise SolverError("too stiff")


def scene_equal(rank, folder):
    """Everything that a single process is compared with."""
    found = {}
    with join("cpu") as group:
        found["gradients"] = {kind: gradients(kind, group) for kind in SOLVERS}
        found["scores"] = scores(group)
        run = trainer(folder / "pair", group)
        assert run.run() == "steps"
        found["training"] = outcome(run)

        # rank 1 is asked to stop, after rank 0 had to skip a batch
        run = trainer(folder / "stopped", group)
        real = run.update

        def update():
            if rank == 1 and run.state.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return real()

        run.update = update
        try:
            run.run()
        except Interrupted as stop:
            found["interrupted"] = [stop.number, stop.step]

        run = trainer(folder / "skipped", group, steps=4)
        if rank == 1:
            failing(run, 2, refuse)
        run.say = lambda line: said.append(line)
        said = []
        run.run()
        found["skipped"] = [run.state.skipped, said]

        run = trainer(folder / "infinite", group, steps=4)
        real = run.objective.evaluate

        def evaluate(*given):
            terms, stats = real(*given)
            factor = float("nan") if rank == 1 and run.state.step == 2 else 1.0
            return {name: factor * value for name, value in terms.items()}, stats

        run.objective.evaluate = evaluate
        run.run()
        found["infinite"] = [run.state.skipped, bool(torch.cat([p.flatten() for p in run.model.parameters()]).isfinite().all())]

        # each has a clock of its own
        run = trainer(folder / "timed", group, steps=10_000, max_time=0.3)
        found["timed"] = [run.run(), run.state.step]

        try:
            with group.together():
                if rank == 1:
                    refuse()
        except SolverError as error:
            found["together"] = str(error)
        for name, call in (
            ("first", lambda: group.on_rank0(lambda: (_ for _ in ()).throw(ConfigError("no folder")))),
            ("agree", lambda: group.check_same({"a": 1, "the data": f"version {rank}"})),
            ("turn", lambda: group.rank0_first(lambda: (folder / "turns").open("a").write(str(rank)))),
        ):
            try:
                call()
            except CNFError as error:
                found[name] = str(error)
    torch.set_default_dtype(torch.float32)
    torch.save(found, folder / f"found-{rank}.pt")


def scene_sample(rank, folder):
    """sample.py, which joins and leaves on its own."""
    sample(folder / "pair")


def endless(rank, folder, fail, victim):
    run = trainer(folder, GROUPS[-1], steps=10**6, validate_every=10**6)
    if rank == victim:
        failing(run, 3, fail)
    run.run()


GROUPS = []


def dying(rank, folder, fail, victim=1):
    from cnf.cli.exits import guard

    def run():
        with join("cpu") as group:
            GROUPS.append(group)
            endless(rank, folder, fail, victim)
        return 0

    return guard(run)


def scene_killed(rank, folder):
    return dying(rank, folder / "killed", lambda: os.kill(os.getpid(), signal.SIGKILL))


def scene_headless(rank, folder):
    return dying(rank, folder / "headless", lambda: os.kill(os.getpid(), signal.SIGKILL), victim=0)


def scene_frozen(rank, folder):
    return dying(rank, folder / "frozen", lambda: os.kill(os.getpid(), signal.SIGSTOP))


def scene_failed(rank, folder):
    def fail():
        raise CheckpointError("the disk is full")

    return dying(rank, folder / "failed", fail)


SCENES = {
    "equal": scene_equal, "sample": scene_sample, "killed": scene_killed, "headless": scene_headless, "frozen": scene_frozen,
    "failed": scene_failed,
}  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def play(name, folder):
    """Fork the pair for one scene; exit codes, seconds, and what was said."""
    from cnf.distributed import heartbeat

    heartbeat.INTERVAL, heartbeat.GRACE, started = 0.1, 0.5, time.monotonic()
    heartbeat.SILENCE = 1.5 if name == "frozen" else 40.0
    port, pids = free_port(), []
    for rank in range(2):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
                }  # fmt: skip
                log = os.open(folder / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                torch.set_default_dtype(torch.float64)
                code = SCENES[name](rank, folder) or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    codes = [os.waitpid(pids[0], 0)[1]]
    if name == "frozen":
        os.kill(pids[1], signal.SIGKILL)
    codes.append(os.waitpid(pids[1], 0)[1])
    return {
        "codes": [os.waitstatus_to_exitcode(c) for c in codes], "seconds": time.monotonic() - started,
        "said": [(folder / f"{name}-{rank}.log").read_text() for rank in range(2)],
    }  # fmt: skip


def main(folder):
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports much, here once for all
    (folder / "played.json").write_text(json.dumps({name: play(name, folder) for name in SCENES}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "played.json").read_text())


@pytest.fixture(scope="module")
def found(pair):
    folder, played = pair
    assert played["equal"]["codes"] == [0, 0], played["equal"]["said"]
    return folder, [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]


# -- what they found ---------------------------------------------------------------------------------------------


def close(one, other, tolerance=1e-6):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key], tolerance)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    else:
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", SOLVERS)
def test_gradient_of_two_ranks_is_that_of_the_joint_batch(found, kind, double):
    whole = gradients(kind, SINGLE_PROCESS)
    assert len(whole) > 4
    for one in found[1]:
        close(one["gradients"][kind], whole, 1e-6 if kind == "adjoint" else 1e-12)
    assert all(torch.equal(v, found[1][1]["gradients"][kind][k]) for k, v in found[1][0]["gradients"][kind].items())


def test_gradient_is_weighed_by_rows(double):
    """The plain mean of the ranks' gradients, three rows against four, is another."""
    whole = gradients("direct", SINGLE_PROCESS)
    halves = [gradients("direct", _Half(rank, 2)) for rank in range(2)]
    name = "transform.sqrt_end_time"
    assert 3 / 7 * halves[0][name] + 4 / 7 * halves[1][name] == pytest.approx(float(whole[name]), rel=1e-12)
    assert (halves[0][name] + halves[1][name]) / 2 != pytest.approx(float(whole[name]), rel=1e-4)


class _Half(Group):
    """One rank that nobody answers."""

    def all_reduce_gradients(self, parameters, share, figures, failure=""):
        return figures, failure


def test_evaluation_of_two_ranks_is_that_of_one_to_the_last_bit(found, double):
    alone = scores(SINGLE_PROCESS)
    for one in found[1]:
        for name in alone.keys() - {"watch"}:
            same = torch.equal(one["scores"][name], alone[name]) if name in ("log_prob", "outputs") else one["scores"][name] == alone[name]
            assert same, name
        close(one["scores"]["watch"], alone["watch"], 1e-9)


def test_training_of_two_ranks_is_that_of_one(found, tmp_path, double):
    folder, both = found
    run = trainer(tmp_path / "alone", SINGLE_PROCESS)
    run.run()
    alone = outcome(run)
    assert alone["numbers"]["refinements"] > 0
    for one in both:
        close(one["training"], alone)

    def rows(where):
        lines = (where / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert len(rows(folder / "pair")) == len(rows(tmp_path / "alone")) > 3
    for one, other in zip(rows(folder / "pair"), rows(tmp_path / "alone"), strict=True):
        close(one, other)


def test_one_writes(found):
    folder, _ = found
    names = {path.name for path in (folder / "pair").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "model.safetensors", "tensorboard", "trainer.pt", "trainer.previous.pt"}
    assert len(list((folder / "pair" / "tensorboard").iterdir())) == 1


def test_a_signal_to_one_stops_all_and_one_process_goes_on(found, tmp_path, double):
    folder, both = found
    assert [one["interrupted"] for one in both] == [[signal.SIGTERM, 6]] * 2
    resumed = trainer(folder / "stopped", SINGLE_PROCESS, resume=True)
    assert resumed.state.step == 6
    resumed.run()
    for one in both:
        close(outcome(resumed), one["training"])


def test_a_batch_that_fails_on_one_is_skipped_by_all(found):
    for count, said in (one["skipped"] for one in found[1]):
        assert count == 1 and said[0] == "step 2: batch skipped: rank 1: too stiff"
    assert [one["infinite"] for one in found[1]] == [[1, True]] * 2


def test_time_is_up_for_all_at_once(found):
    zero, one = (found[1][rank]["timed"] for rank in range(2))
    assert zero == one and zero[0] == "max_time" and zero[1] < 10_000


def test_errors_and_decisions_are_shared(found):
    folder, both = found
    for one in both:
        assert one["together"] == "rank 1: too stiff" and one["first"] == "no folder"
        assert "the data is version 1 on rank 1, but version 0 on rank 0" in one["agree"]
    assert (folder / "turns").read_text() == "01"


def test_samples_of_two_ranks_are_those_of_one(pair, found, monkeypatch, double):
    folder, played = pair
    monkeypatch.setattr("cnf.cli.sample.BATCH_NUMBERS", 8)
    assert played["sample"]["codes"] == [0, 0], played["sample"]["said"]
    with np.load(sample(folder / "pair")) as alone, np.load(folder / "sample-2.npz") as two:
        assert alone["samples"].shape == (19, 2)
        for name in alone.files:
            assert np.allclose(alone[name], two[name], rtol=0, atol=1e-6), name
    assert "19 samples" in played["sample"]["said"][0] and played["sample"]["said"][1] == ""


@pytest.mark.parametrize(
    ("scene", "code", "words"),
    [
        ("killed", -signal.SIGKILL, "is lost"),
        ("headless", -signal.SIGKILL, "is lost"),
        ("frozen", -signal.SIGKILL, "is lost"),
        ("failed", 1, "failed: the disk is full"),
    ],
)
def test_the_end_of_one_is_the_end_of_all_and_named(pair, scene, code, words):
    played = pair[1][scene]
    assert played["codes"] == ([code, 1] if scene == "headless" else [1, code]), played["said"]
    assert played["seconds"] < 30
    who, told = ("rank 0 (pid", played["said"][1]) if scene == "headless" else ("rank 1 (pid", played["said"][0])
    assert who in told and words in told
    if scene == "failed":
        assert "rank 1: the disk is full" in played["said"][1]


# -- the programs ------------------------------------------------------------------------------------------------

TOY = ["--data", "8gaussians", "--toy-sizes", "120", "40", "60", "--batch-size", "33", "--validate-every", "4", "--grid-steps", "2",
       "--hidden", "8", "--divergence", "hutchinson", "--noise-samples", "3"]  # fmt: skip


def program(*words, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *torchrun, *map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(running, code=0):
    out, errors = running.communicate(timeout=240)
    assert running.returncode == code, (running.returncode, out, errors)
    return out, errors


def result(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_programs_under_torchrun(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    train = ["train_density.py", "ffjord-toy", *TOY, "--steps", "8", "--out"]
    out, _ = ended(program(*train, two, processes=2))
    ended(program(*train, one))
    assert out.count("over 60 items") == 1 and (two / "plots" / "density.png").is_file()
    close(result(two / "result.json")["nats"], result(one / "result.json")["nats"], 1e-4)  # float32

    # a run of two goes on as one, and is scored and drawn from by either, to the last bit
    ended(program("train_density.py", "--resume", "--out", two, "--steps", "10"))
    ended(program("train_density.py", "--resume", "--out", two, "--steps", "12", processes=2))
    assert result(two / "result.json")["steps"] == 12
    for processes in (1, 2):
        scored = ["--per-item", tmp_path / f"items-{processes}.npz", "--check"]
        ended(program("train_density.py", "--evaluate", two, *scored, processes=processes))
        drawn = tmp_path / f"drawn-{processes}.npz"
        ended(program("sample.py", two, "-n", "9000", "--out", drawn, processes=processes))
    for name in ("items", "drawn"):
        with np.load(tmp_path / f"{name}-1.npz") as alone, np.load(tmp_path / f"{name}-2.npz") as both:
            for key in alone.files:
                assert np.array_equal(alone[key], both[key]), (name, key)
    alone, both = (result(two / f"evaluation-{number}.json") for number in (1, 2))
    # the integral's probes are torch's own
    assert {k for k in alone if alone[k] != both[k]} <= {"evaluation_seconds", "config", "integral"}

    # wrong usage is said once
    _, errors = ended(program(*train, two, processes=2), 1)
    assert errors.count("is not empty") == 1


def children(pid):
    """The processes that ``pid`` started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def trained(folder, running):
    """Wait for the first checkpoint."""
    while not (folder / "trainer.pt").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)


@pytest.mark.slow
def test_torchrun_stops_and_loses_one(tmp_path):
    train = ["train_density.py", "ffjord-toy", *TOY, "--steps", "1000000", "--out"]
    running = program(*train, tmp_path / "stopped", processes=2)
    trained(tmp_path / "stopped", running)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert errors.count("interrupted; everything up to step") == 1
    state = torch.load(tmp_path / "stopped" / "trainer.pt", weights_only=True)
    assert f"up to step {state['numbers']['step']} is saved" in errors

    running = program(*train, tmp_path / "lost", processes=2)
    trained(tmp_path / "lost", running)
    workers = children(running.pid)
    if not workers:
        running.kill()
        pytest.skip("the system does not list a process's children")
    killed, started = workers[-1], time.monotonic()
    os.kill(killed, signal.SIGKILL)
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - started < 60 and running.returncode
    assert f"(pid {killed} on" in errors and "is lost" in errors


# -- without a pair ----------------------------------------------------------------------------------------------


def test_ranks_share_every_batch_and_its_noise():
    images = torch.randint(0, 255, (23, 1, 2, 2), dtype=torch.uint8, generator=GENERATOR)
    context = torch.arange(23.0)[:, None]
    data = DataSplits("images", "image", images, images, images, levels=256, train_context=context, flip=True)
    cpu = torch.device("cpu")
    alone = Batches(data, 10, 0, cpu)
    ranks = [Batches(data, 10, 0, cpu, Group(rank, 3)) for rank in range(3)]
    for step in (0, 1, 5):
        x, c, noise = alone(step)
        parts = [one(step) for one in ranks]
        assert [len(p[0]) for p in parts] == [3, 3, 4]
        assert torch.equal(torch.cat([p[0] for p in parts]), x) and torch.equal(torch.cat([p[1] for p in parts]), c)
        whole = noise.child(1).draw("probe", "normal", (2, 10, 4), batch_dim=1)
        drawn = [p[2].child(1).draw("probe", "normal", (2, len(p[0]), 4), batch_dim=1) for p in parts]
        assert torch.equal(torch.cat(drawn, 1), whole)
        assert len({float(p[2].draw("end_time", "uniform", (), batch_dim=None)) for p in parts}) == 1
    with pytest.raises(ConfigError, match=r"10 rows, fewer than the 11 processes"):
        Batches(data, 10, 0, cpu, Group(0, 11))


def test_environments_that_torchrun_did_not_make(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK=''"):
        distributed.launched()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert distributed.launched() == (1, 2) and not speaks()
    with pytest.raises(ConfigError, match="MASTER_ADDR"), join("cpu"):
        pass
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--device must be cpu or cuda"), join("cuda:1"):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_not_waited_for_for_hours(monkeypatch, rank):
    from cnf.distributed import launch

    monkeypatch.setattr(launch, "COMING", timedelta(seconds=0.3))
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's
    for name, value in (("WORLD_SIZE", 3), ("RANK", rank), ("LOCAL_RANK", rank), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", agent.port),
                        ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", rank)):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    others = ", ".join(str(r) for r in range(3) if r != rank)
    with pytest.raises(TrainingError, match=rf"rank {others} of 3 did not join within 0\.3 s: .* reaches 127\.0\.0\.1:{agent.port}"), join("cpu"):
        pass


def test_too_many_figures_are_refused():
    with pytest.raises(ConfigError, match="40 terms"):
        Group(0, 2).all_reduce_gradients([torch.ones(1)], 0.5, torch.zeros(40))
    assert group_module.FIGURES < 40


def test_the_all_reduce_that_the_document_reckons_with(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    seconds = scaling.all_reduce_seconds(1_996_116, 64, 25e9, 10e-6)
    assert seconds == pytest.approx(126 * (4 * 1_996_116 / (64 * 25e9) + 10e-6), rel=1e-12)
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"= {1e3 * seconds:.1f} ms" in text and scaling.markdown(scaling.expected(), scaling.EXPECTED) in text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
