"""Training as a person runs it: it learns, stops, resumes bit for bit, and refuses what is
wrong."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.cli.train import TrainCommand
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.internimage import internimage_demo
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.losses import builders
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.observe.stages import STAGES
from m3i_fast.ops import reference
from m3i_fast.recipes import demo
from tests.shared.engine.small_run import TEXT, assert_same_run, saved_tensors, small_run


@pytest.fixture(scope="module")
def whole_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(small_run(dataset), out).train()
    return out


def _command(cfg: TrainConfig, out: Path, *arguments: str) -> list[str]:
    config = out.with_suffix(".json")
    cfg.save(config)
    return ["train", "--config", str(config), "--out", str(out), *arguments]


def _start(cfg: TrainConfig, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "m3i_fast.cli", *_command(cfg, out)])


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path.name}"
        assert time.monotonic() < deadline, f"waited for {path}"
        time.sleep(0.005)


def test_a_name_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cfg: expected a TrainConfig, .*, got 'demo'$"):
        m3i_fast.train("demo", tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_run_learns_and_leaves_its_files(whole_run: Path, dataset: Path) -> None:
    rows = read_jsonl(whole_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert {"loss/intra", "loss/inter", "loss/category", "loss/caption"} <= rows[0].keys()
    assert {"monitor/target_rank", "throughput/img_s", "optim/lr"} <= rows[0].keys()
    terms = ("intra", "inter", "category", "caption", "total")
    stages = {*STAGES, *(f"loss.{name}" for name in terms)} - {"loss", "replay"}
    assert {key for key in rows[1] if key.startswith("time/")} == {f"time/{s}_ms" for s in stages}
    assert TrainConfig.load(whole_run / "config.json") == small_run(dataset)
    assert (whole_run / "env.json").exists() and any((whole_run / "tensorboard").iterdir())
    assert [c.step for c in checkpoint.checkpoints(whole_run / "checkpoints")] == [25, 30]


class _OperatorClock(TorchDispatchMode):
    """Time of which a second passes with each of torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.now_s += 1.0
        return func(*args, **(kwargs or {}))

    def read_s(self) -> float:
        return self.now_s


def test_stages_sum_to_the_time_of_a_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _OperatorClock()
    for module in ("observe.stages", "engine.run.log"):
        name = f"m3i_fast.{module}.time"
        fake = SimpleNamespace(perf_counter=clock.read_s, monotonic=clock.read_s)
        monkeypatch.setattr(name, fake)
    with clock:
        # A save belongs to no step.
        cfg = small_run(dataset, num_steps=10, checkpoint_every=10)
        Trainer(cfg, tmp_path / "run").train()
    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    outside = {"time/log_ms", "time/ckpt_ms"}  # the steps of a throughput end before them
    named = sum(row[key] for key in row if key.startswith("time/") and key not in outside)
    # What is outside of all of them adds metrics to their means, 43 of 1,832 operators.
    assert 0.96 < named / (1000 * 8 / row["throughput/img_s"]) <= 1


def test_the_fused_likelihood_trains_as_the_plain_one(
    whole_run: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def plain(*arguments: Any, **options: Any) -> torch.Tensor:
        assert options.pop("process_group", None) is None
        options.pop("equal_sizes", None)  # of ranks, and there is one
        calls.append(options.keys())
        return reference.boltzmann(*arguments, **options)

    monkeypatch.setattr(builders, "boltzmann", plain)
    Trainer(small_run(dataset), tmp_path / "plain").train()
    assert {tuple(options) for options in calls} == {("targets",), ("bias", "row_ids", "col_ids")}
    for ours, theirs in zip(
        read_jsonl(whole_run / "metrics.jsonl"),
        read_jsonl(tmp_path / "plain" / "metrics.jsonl"),
        strict=True,
    ):
        losses = {name: value for name, value in theirs.items() if name.startswith("loss/")}
        # The optimisers divide by the size of a gradient: a last place grows with the steps.
        assert {name: ours[name] for name in losses} == pytest.approx(losses, rel=5e-3)


def test_kill_9_in_mid_epoch_and_resume_equals_the_whole_run(
    whole_run: Path, dataset: Path, tmp_path: Path
) -> None:
    cfg, out = small_run(dataset), tmp_path / "killed"
    process = _start(cfg, out)
    _wait_for(out / "checkpoints" / "step_00000010", process)
    with pytest.raises(FileExistsError, match=f"process {process.pid} on .* is training in it"):
        Trainer(cfg, out, resume=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    at = checkpoint.latest(out / "checkpoints").step
    trainer = Trainer(cfg, out, resume=True)
    assert at < 30 and trainer.step == at and at % trainer.loader.steps_per_epoch
    trainer.train()
    assert_same_run(whole_run, out)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_saves_and_resume_equals_the_whole_run(
    number: int, code: int, whole_run: Path, dataset: Path, tmp_path: Path
) -> None:
    cfg, out = small_run(dataset), tmp_path / "interrupted"
    process = _start(cfg, out)
    _wait_for(out / "checkpoints" / "step_00000005", process)
    process.send_signal(number)
    assert process.wait() == code
    assert main(_command(cfg, out, "--resume")) == 0
    first, second = saved_tensors(whole_run), saved_tensors(out)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_out_of_time_saves_and_is_told_from_one_that_is_done(
    dataset: Path, tmp_path: Path
) -> None:
    cfg, out = small_run(dataset), tmp_path / "short"
    assert main(_command(cfg, out, "--max-hours", "1e-9")) == 75
    assert checkpoint.latest(out / "checkpoints").step == 1
    assert main(_command(cfg, out, "--resume", "--max-hours", "9")) == 0
    with pytest.raises(ValueError, match="max_hours: expected > 0, got -1"):
        TrainCommand(config=cfg, out=out, max_hours=-1)


def test_another_seed_is_another_run(whole_run: Path, dataset: Path, tmp_path: Path) -> None:
    Trainer(small_run(dataset, seed=1), tmp_path / "other").train()
    first, second = saved_tensors(whole_run), saved_tensors(tmp_path / "other")
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


def test_what_cannot_be_resumed_is_named(whole_run: Path, dataset: Path, tmp_path: Path) -> None:
    cfg = small_run(dataset)
    with pytest.raises(FileExistsError, match="--resume"):
        Trainer(cfg, whole_run)
    with pytest.raises(FileNotFoundError, match="no run in"):
        Trainer(cfg, tmp_path / "absent", resume=True)
    other = replace(cfg, optim=replace(cfg.optim, lr=9.0))
    with pytest.raises(ValueError, match=rf"optim\.lr: {cfg.optim.lr} != 9\.0"):
        Trainer(other, whole_run, resume=True)


def test_data_of_another_kind_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_classes: expected 9.*got 10"):
        Trainer(small_run(dataset, num_classes=10), tmp_path / "a")
    text = replace(TEXT, vocab_size=900)
    with pytest.raises(ValueError, match=r"text\.vocab_size: expected 814.*got 900"):
        Trainer(small_run(dataset, text=text), tmp_path / "b")


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    trainer = Trainer(small_run(dataset), tmp_path / "run")
    with torch.no_grad():
        trainer.objective.encoder.pos_embed.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss/intra"):
        trainer.train()
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints") == []


def test_the_command_line_names_what_it_does_not_know(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "m3i_vit_x_h100"]) == 2
    assert "Did you mean m3i_vit_" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "demo", "--optim.lrr", "1"]) == 2
    assert "unknown flag --optim.lrr. Did you mean --optim.lr?" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "Did you mean train?" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "demo", "--out", str(tmp_path), "--data.path", str(tmp_path / "no")]) == 2
    assert "m3i-fast data openmoji" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "vision",
    [
        vit_demo(image_size=32, dim=32, depth=10, num_heads=2, drop_path_rate=0.2),
        internimage_demo(
            image_size=32,
            channels=16,
            depths=(1, 1, 7, 1),
            groups=(1, 2, 4, 8),
            token_dim=32,
            drop_path_rate=0.2,
        ),
    ],
    ids=["vit", "internimage"],
)
def test_every_rate_of_stochastic_depth_is_compiled(
    vision: VisionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More graphs than torch allows a function by itself."""
    quick = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    cfg = demo()
    mixing = replace(cfg.objective.mixing, mode="joint")
    cfg = replace(
        cfg,
        vision=vision,
        data=replace(cfg.data, global_views=replace(cfg.data.global_views, size=32)),
        objective=replace(cfg.objective, mixing=mixing),
        compile=True,
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        encoder = build_objective(cfg).encoder
        encoder.encode_cells(torch.randn(2, 3, 32, 32)).sum().backward()
    torch._dynamo.reset()
