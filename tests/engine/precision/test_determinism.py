"""One flag for the same bits at every run: what it sets, what it refuses, and that runs work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine.precision.determinism import expect_deterministic
from m3i_fast.engine.trainer import Trainer
from m3i_fast.recipes import demo, recipes, shrink
from tests.shared.engine.small_run import TEXT

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    cuda = torch.backends.cuda
    efficient, cudnn = cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(cudnn)


def _config(dataset: Path, cfg: TrainConfig) -> TrainConfig:
    return replace(
        shrink(cfg, path=dataset, num_classes=9, text=TEXT), deterministic=True, num_threads=1
    )


@pytest.mark.parametrize("recipe", ["demo", "demo_internimage"])
def test_a_run_has_only_operations_that_repeat(recipe: str, dataset: Path, tmp_path: Path) -> None:
    ends = []
    for name in ("first", "second"):
        trainer = Trainer(_config(dataset, recipes()[recipe]()), tmp_path / name)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert [os.environ[n] for n in NAMES] == [":4096:8", "0", "Ring"]
        trainer.train()
        ends.append(trainer.objective.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_a_run_without_it_sets_nothing(dataset: Path, tmp_path: Path) -> None:
    trainer = Trainer(replace(_config(dataset, demo()), deterministic=False), tmp_path / "run")
    assert not torch.are_deterministic_algorithms_enabled()
    assert not any(name in os.environ for name in NAMES)
    trainer.run.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
        ("NCCL_ALGO", "Tree"),
    ],
)
def test_an_environment_against_it_is_refused(
    name: str, value: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"--deterministic: expected {name}=.*got {value}"):
        Trainer(_config(dataset, demo()), tmp_path / "run")
    assert not torch.are_deterministic_algorithms_enabled() and os.environ[name] == value
    assert not (tmp_path / "run").exists()


def test_views_whose_positions_are_resampled_are_refused_on_a_gpu() -> None:
    gpu, cfg = torch.device("cuda"), demo()
    assert cfg.data.local_views is not None
    with pytest.raises(ValueError, match=r"data\.local_views\.size = .*--data\.local-views none"):
        expect_deterministic(cfg, gpu)
    expect_deterministic(cfg, torch.device("cpu"))
    expect_deterministic(replace(cfg, data=replace(cfg.data, local_views=None)), gpu)
    expect_deterministic(recipes()["demo_internimage"](), gpu)


def test_attention_by_cudnn_is_refused() -> None:
    cfg = demo()
    cfg = replace(cfg, vision=replace(cfg.vision, attention="cudnn"))
    with pytest.raises(ValueError, match=r"vision\.attention"):
        expect_deterministic(cfg, torch.device("cpu"))
