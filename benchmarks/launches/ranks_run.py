"""Train a recipe on the ranks of a launch, spread in several ways, on the null CUDA runtime.

    m3i-fast launch --nproc-per-node N -m m3i_fast.benchmarks.launches.ranks_run RECIPE FOLDER
             --shards 1,-1 [--resume] [--plant FAULT] [TRAIN FLAGS]

Run in the environment of `scripts.null_cuda.environment`, with as many devices as ranks. For each
`parallel.shard` the recipe is trained for a few steps with real numbers, in FOLDER/shard_S; more
steps follow that are only launched, the last of them behind the mark "shard S steady". --resume
loads what stands there and takes no step. What was logged and what is saved goes to
FOLDER/found-N.json, by `parallel.shard`. --plant has the last rank do what others have to notice:
`skip` leaves out the guard's all-reduce, `kill` and `term` send itself a signal, each in step 1.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from argparse import ArgumentParser
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m3i_fast.benchmarks.core.random_batch import Repeated, draw_batch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost, as_launched
from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint.checkpoints import tensors_of
from m3i_fast.engine.guard.guard import Guard, Judgement
from m3i_fast.engine.parallel.local_shards import is_sharded
from m3i_fast.engine.parallel.ranks import World, join_world, leave_world
from m3i_fast.engine.trainer import Trainer
from m3i_fast.flags import read_flags
from m3i_fast.recipes import recipes

NUM_STEPS = 3
# In the first ten steps DDP waits, to time itself; FSDP2 is steady in the second one.
NUM_LAUNCHED = {True: 9, False: 2}
WHOLE_BATCH = 16  # of all ranks, so that a run may go on with another number of them


def for_ranks(cfg: TrainConfig, *, num_ranks: int = 1, shard: int = 1) -> TrainConfig:
    """Return the recipe on the device for a few steps, with AdamW, which may be sharded."""
    return replace(
        cfg,
        data=replace(cfg.data, batch_size=WHOLE_BATCH // num_ranks),
        optim=replace(cfg.optim, matrices="adamw"),
        parallel=replace(cfg.parallel, shard=shard),
        num_steps=NUM_STEPS,
        log_every=1,
        checkpoint_every=NUM_STEPS,
        num_classes=cfg.num_classes or 10,
        device="cuda",
    )


def mark(name: str) -> None:
    """Write a mark to the trace."""
    ctypes.CDLL(None).null_cuda_mark(name.encode())


def digests(trainer: Trainer) -> dict[str, str]:
    """Return a digest of the whole of every tensor that a checkpoint holds; a collective."""
    found = {}
    for name, tensor in tensors_of(trainer.objective, trainer.optimizer).items():
        whole: Any = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        content = whole.detach().cpu().contiguous().flatten().view(torch.uint8)
        found[name] = hashlib.sha256(content.numpy().tobytes()).hexdigest()
    return found


def launch_steps(trainer: Trainer, name: str) -> None:
    """Launch steps that compute nothing, the last one behind the mark."""
    with as_launched():
        for left in reversed(range(NUM_LAUNCHED[trainer.cfg.parallel.shard == 1])):
            trainer.train_step.steps_taken = 1  # none is due to be measured
            if not left:
                mark(name)
            trainer.next_step()
    mark("between")


def plant(fault: str, trainer: Trainer) -> None:
    """Make this rank, the last one, do in step 1 what the others have to notice."""
    judge = Guard.judge

    def judged(guard: Guard, *args: Any) -> Judgement:
        step = trainer.step
        if step == 1 and fault == "skip":
            alone = replace(trainer.world, group=None)
            guard._world, world = alone, guard._world
            try:
                return judge(guard, *args)
            finally:
                guard._world = world
        if step == 1:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[fault])
        return judge(guard, *args)

    Guard.judge = judged  # type: ignore[method-assign,assignment]


def run(
    cfg: TrainConfig, folder: Path, world: World, *, resume: bool, fault: str
) -> dict[str, Any]:
    """Train the config in the folder, or load what it holds.

    Return the metrics of every step, what is saved, and the signal that ended the run.
    """
    rows: list[dict[str, float]] = []
    with ComputeOnHost() if cfg.device == "cuda" else nullcontext():
        batch = draw_batch(cfg, seed=world.rank).to(world.device)
        trainer = Trainer(cfg, folder, data=Repeated(batch), resume=resume)
        if fault and world.rank == world.size - 1:
            plant(fault, trainer)
        stopped = None
        if resume:
            trainer.close()
        else:
            outcome = trainer.train(lambda step, values: rows.append({"step": step, **values}))
            stopped = outcome.signal
        found = {"rows": rows, "digests": digests(trainer), "signal": stopped}
        if not resume and stopped is None and cfg.device == "cuda":
            launch_steps(trainer, f"shard {cfg.parallel.shard} steady")
    return found


def main() -> int:
    """Run the recipe that the command line names; 75 where a signal ended it, as of `train`."""
    parser = ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--plant", choices=("skip", "kill", "term"), default="")
    args, flags = parser.parse_known_args()
    recipe, num_ranks = recipes()[args.recipe](), int(os.environ.get("WORLD_SIZE", "1"))
    torch.backends.cudnn.enabled = False  # the null cuDNN has no engines
    found, world = {}, None
    for shard in map(int, args.shards.split(",")):
        given = for_ranks(recipe, num_ranks=num_ranks, shard=shard)
        cfg = read_flags(TrainConfig, flags, prog=f"ranks_run {args.recipe}", default=given)
        world = world or join_world(torch.device(cfg.device))
        folder = args.folder / f"shard_{shard}"
        found[shard] = run(cfg, folder, world, resume=args.resume, fault=args.plant)
    assert world is not None
    if world.is_main:
        (args.folder / f"found-{world.size}.json").write_text(json.dumps(found))
    leave_world()
    return os.EX_TEMPFAIL if any(of_shard["signal"] for of_shard in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
