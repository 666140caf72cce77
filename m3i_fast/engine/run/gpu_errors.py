"""Errors of a GPU that end a run, with what its user can do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint.checkpoints import checkpoints
from m3i_fast.engine.parallel.accumulation import needs_whole_batch


@contextmanager
def explained_gpu_errors(cfg: TrainConfig, run_dir: Path) -> Iterator[None]:
    """Raise RuntimeError with the remedy in place of what torch raises of a GPU in the block.

    Of memory that is used up it names the flags by which this config needs less, and of any other
    error the checkpoint to continue from: after most of them no further work is done on the GPU in
    this process.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = "".join(f"\n  {way}" for way in lighter(cfg))
        raise RuntimeError(
            f"{_first_line(error)}\nThe run needs more memory than the GPU has. Any of these needs "
            f"less, and `m3i-fast plan` says how much:{ways}\n{_left_by(run_dir)}"
        ) from error
    except torch.AcceleratorError as error:
        raise RuntimeError(
            f"{_first_line(error)}\nThe GPU does no further work for this process. "
            f"{_left_by(run_dir)} If it happens again, `m3i-fast doctor` looks at the GPU, and "
            "with CUDA_LAUNCH_BLOCKING=1 in the environment the stacks of the error are those of "
            "the call that failed."
        ) from error


def lighter(cfg: TrainConfig) -> list[str]:
    """Return flags that train `cfg` in less memory of a GPU, each with what it does.

    Those that the config cannot take are left out. The ones of `parallel` may be added to a run
    that is resumed.
    """
    half, chunk = cfg.data.batch_size // 2, (cfg.parallel.chunk or cfg.data.batch_size) // 2
    ways = []
    if chunk and _allows(cfg, parallel=replace(cfg.parallel, chunk=chunk)):
        ways.append(
            f"--parallel.chunk {chunk}: encoders take {chunk} images at a time, their forward pass "
            "runs twice, and the loss is the same"
        )
    if cfg.data.any_shape:
        ways += _smaller_budget(cfg)
        half = 0
    times = 2 * cfg.parallel.accumulate
    divides = half and cfg.data.batch_size % 2 == 0 and not needs_whole_batch(cfg)
    if divides and _allows(cfg, parallel=replace(cfg.parallel, accumulate=times)):
        ways.append(
            f"--data.batch-size {half} --parallel.accumulate {times}: the same batch in parts of "
            f"{half}"
        )
    elif half:
        ways.append(f"--data.batch-size {half}: another run, with half the images in each step")
    if cfg.parallel.shard == 1 and _allows(cfg, parallel=replace(cfg.parallel, shard=-1)):
        ways.append("--parallel.shard -1: weights and moments are divided over the GPUs of the run")
    if cfg.cuda_graphs == "modules":
        ways.append("--cuda-graphs none: no graph keeps the activations of its call")
    elif cfg.cuda_graphs == "step":
        ways.append(
            "--cuda-graphs none: no graph keeps the memory of a step, beside that of the steps "
            "with monitors"
        )
    elif cfg.vision.activation_checkpointing != "full":
        ways.append(
            "--vision.activation-checkpointing full: the encoder's activations are computed again "
            "in the backward pass"
        )
    return ways


def _smaller_budget(cfg: TrainConfig) -> list[str]:
    """Return the flags of half a budget of tokens: in two batches a step, or in smaller steps."""
    half, times = cfg.data.max_tokens_per_batch // 2, 2 * cfg.parallel.accumulate
    if not _allows(cfg, data=replace(cfg.data, max_tokens_per_batch=half)):
        return []
    flag = f"--data.max-tokens-per-batch {half}"
    if needs_whole_batch(cfg):
        return [f"{flag}: another run, with half the tokens in each step"]
    return [f"{flag} --parallel.accumulate {times}: as many tokens a step, in parts of {half}"]


def _allows(cfg: TrainConfig, **changes: object) -> bool:
    """Return whether the config can be changed so."""
    try:
        replace(cfg, **changes)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def _left_by(run_dir: Path) -> str:
    """Say from where the run in the directory can be continued."""
    saved = checkpoints(run_dir / "checkpoints")
    if not saved:
        return f"{run_dir} has no checkpoint yet."
    return f"The last checkpoint is of step {saved[-1].step}: --resume continues {run_dir} from it."
