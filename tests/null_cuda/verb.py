"""Verbs of `m3i-fast` on the null CUDA runtime, one after the other, with a real run's numbers.

    python -m tests.null_cuda.verb [--launched | --plain] [--order] [--no-replay]
                                   [--plant NAME:STEP] VERB ... [--then VERB ...]

Run in the environment of `scripts.null_cuda.environment`. Every operator is computed by the CPU
over the device's memory; with --launched the steps that have no monitors are launched alone, and
with --plain everything is. DALI links a CUDA runtime of its own and decodes on the CPU here: what
it decodes is copied to the device as a caller's own batches are. With --order races between streams
are collected; with --no-replay a step is never captured as a whole. The last line on standard
output is JSON: the exit codes of the verbs, and the races.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

ROOT = Path(__file__).resolve().parents[2]
sys.path.extend(map(str, (ROOT / ".venv").glob("lib/python*/site-packages")))  # DALI

from m3i_fast.benchmarks.launches.on_host import ComputeOnHost, as_launched  # noqa: E402
from m3i_fast.cli import main as run_verb  # noqa: E402
from m3i_fast.engine import step_graph  # noqa: E402
from m3i_fast.engine.train_step import ForwardPass, TrainStep  # noqa: E402
from m3i_fast.pipelines import loader  # noqa: E402


def sigterm(step: TrainStep) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def race(step: TrainStep) -> None:
    """A weight is written on another stream, for which the step does not wait."""
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        next(step.objective.parameters()).mul_(1)


def nan(step: TrainStep) -> None:
    """The loss of this step is not a number."""

    def spoil(module: Any, inputs: Any, out: tuple[Tensor, dict[str, Tensor]]) -> Any:
        hook.remove()
        return out[0] * float("nan"), {**out[1], "loss/total": out[1]["loss/total"] * float("nan")}

    (forward,) = (m for m in step.model.modules() if isinstance(m, ForwardPass))
    hook = forward.register_forward_hook(spoil)


def nan_once(step: TrainStep) -> Callable[[], None]:
    """A weight is not a number in this step, whether it is replayed or not."""
    weight = next(step.objective.parameters()).view(-1)[:1].detach()
    kept = weight.clone()
    weight.fill_(float("nan"))
    return lambda: weight.copy_(kept) and None


def nan_weight(step: TrainStep) -> None:
    """A weight is not a number from this step on."""
    with torch.no_grad():
        next(step.objective.parameters()).view(-1)[:1].fill_(float("nan"))


PLANTED: dict[str, Callable[[TrainStep], Callable[[], None] | None]] = {
    **{"sigterm": sigterm, "race": race, "nan": nan, "nan-once": nan_once},
    "nan-weight": nan_weight,
}


def decode_on_cpu() -> None:
    """Have the loader and the evaluation read without a GPU's decoder."""

    def without_gpu(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: call(*args, **{**options, "device_id": None})

    loader.Loader.__init__ = without_gpu(loader.Loader.__init__)  # type: ignore[method-assign]
    loader.evaluation_batches = without_gpu(loader.evaluation_batches)


def mark_steps(
    planted: dict[int, Callable[[TrainStep], Callable[[], None] | None]], *, computed: bool
) -> None:
    """Mark each step in the trace, plant what is to be found in it, and compute it or not."""
    mark, take = ctypes.CDLL(None).null_cuda_mark, TrainStep.__call__

    def marked(step: TrainStep, *batches: Any, monitor: bool = False) -> dict[str, Tensor]:
        mark(f"step {step.steps_taken}".encode())
        undo = planted.get(step.steps_taken, lambda _: None)(step)
        with nullcontext() if computed or monitor else as_launched():
            metrics = take(step, *batches, monitor=monitor)
        if undo is not None:
            undo()
        mark(b"between")
        return metrics

    TrainStep.__call__ = marked  # type: ignore[method-assign]


def split(words: list[str]) -> Iterator[list[str]]:
    """Yield the words of each verb."""
    while "--then" in words:
        at = words.index("--then")
        yield words[:at]
        words = words[at + 1 :]
    yield words


def main() -> None:
    """Run the verbs that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--launched", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--order", action="store_true")
    parser.add_argument("--no-replay", action="store_true")
    parser.add_argument("--plant", action="append", default=[])
    parser.add_argument("verbs", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    planted = {int(step): PLANTED[name] for name, step in (p.split(":") for p in asked.plant)}
    torch.backends.cudnn.enabled = False  # the null cuDNN has no engine of a convolution
    decode_on_cpu()
    mark_steps(planted, computed=not asked.launched)
    if asked.no_replay:
        step_graph.NUM_WARMUP = sys.maxsize
    races: list[str] = []
    with ExitStack() as modes:
        if asked.order:
            # Its import alone has torch call Python at every allocation and event.
            from m3i_fast.benchmarks.launches.stream_order import StreamOrder

            order = modes.enter_context(StreamOrder(ROOT))
            # torch ends a recomputation by an exception, which its calls at a free clear.
            modes.enter_context(set_checkpoint_early_stop(False))
            modes.callback(lambda: races.extend(sorted(set(map(str, order.races)))))
        if not asked.plain:
            modes.enter_context(ComputeOnHost())
        codes = [run_verb(words) for words in split(asked.verbs)]
    sys.stdout.write("\n" + json.dumps({"codes": codes, "races": races}) + "\n")


if __name__ == "__main__":
    main()
