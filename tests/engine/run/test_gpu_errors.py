"""Errors of a GPU that end a run say what to do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.config import ParallelConfig, TrainConfig
from m3i_fast.engine.parallel.accumulation import expect_additive
from m3i_fast.engine.run.gpu_errors import explained_gpu_errors, lighter
from m3i_fast.flags import read_flags
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes import demo, demo_method, recipes
from tests.shared.engine.packed_run import packed_run

NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB"
FLAGS = re.compile(r"((?:--\S+(?: [^-\s]\S*| -1)? ?)+):")


@pytest.mark.parametrize("name", recipes())
def test_every_way_to_need_less_is_one_that_the_config_takes(name: str) -> None:
    cfg = recipes()[name]()
    ways = lighter(cfg)
    assert len(ways) >= 2
    for way in ways:
        found = FLAGS.match(way)
        assert found, way
        typed = found[1].split()
        changed = read_flags(TrainConfig, typed, prog="train", default=cfg)
        assert changed != cfg, way


def test_a_batch_in_parts_is_the_same_batch() -> None:
    cfg = demo_method("mim") if "mim" in METHODS else demo()
    cfg = replace(cfg, data=replace(cfg.data, batch_size=32))
    (way,) = (way for way in lighter(cfg) if "batch-size" in way)
    if "accumulate" in way:
        assert way.startswith("--data.batch-size 16 --parallel.accumulate 2:")
    else:
        assert way.startswith("--data.batch-size 16: another run")


def test_memory_that_is_used_up_names_the_flags(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=re.escape(NO_MEMORY)) as raised:  # noqa: SIM117
        with explained_gpu_errors(demo(), tmp_path):
            raise torch.OutOfMemoryError(NO_MEMORY)
    for way in (*lighter(demo()), "m3i-fast plan", "no checkpoint yet"):
        assert way in str(raised.value)


def test_another_error_of_the_gpu_names_the_checkpoint_to_continue_from(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(RuntimeError) as raised, explained_gpu_errors(demo(), tmp_path):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors")
    text = str(raised.value)
    assert text.startswith("CUDA error: unspecified launch failure\n") and "kernel err" not in text
    assert f"step 4: --resume continues {tmp_path}" in text and "m3i-fast doctor" in text


def test_any_other_error_stays_as_it_is(tmp_path: Path) -> None:
    error = RuntimeError("sample 3 is corrupt")
    with pytest.raises(RuntimeError) as raised, explained_gpu_errors(demo(), tmp_path):
        raise error
    assert raised.value is error


def test_a_budget_of_tokens_is_halved() -> None:
    cfg = packed_run(Path("nowhere"), "supervised")
    half = cfg.data.max_tokens_per_batch // 2
    ways = lighter(cfg)
    assert ways[0] == (
        f"--data.max-tokens-per-batch {half} --parallel.accumulate 2: as many tokens a step, in "
        f"parts of {half}"
    )
    assert not any("batch-size" in way or "chunk" in way for way in ways)
    (way, *_) = lighter(packed_run(Path("nowhere"), "clip"))
    assert way.startswith(f"--data.max-tokens-per-batch {half}: another run")


def test_a_budget_that_cannot_be_added_up_asks_for_a_smaller_one(tmp_path: Path) -> None:
    cfg = packed_run(tmp_path, "clip", parallel=ParallelConfig(accumulate=2))
    with pytest.raises(ValueError, match=r"set a smaller --data\.max-tokens-per-batch"):
        expect_additive(cfg, torch.nn.Identity())
