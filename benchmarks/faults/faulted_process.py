"""A training process to which something happens: the real command line in a fork, and a fault.

A fork of a server that has imported everything starts in a moment; a kill of it is a kill.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pkgutil
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import m3i_fast.pipelines.graph.dali_backend  # noqa: F401
from m3i_fast.benchmarks.faults.failing_files import FaultyFiles
from m3i_fast.durable_files import write_atomically
from m3i_fast.engine.checkpoint.checkpoints import tensors_of
from m3i_fast.engine.train_step import ForwardPass, TrainStep

Fault = tuple[str, dict[str, Any]]  # a name of INSIDE and its options
STEPS = "m3i_fast.engine.train_step.TrainStep.__call__"
# Where a step can be caught.
PHASES = {
    "start": "m3i_fast.engine.train_step.build_objective",
    "data": "m3i_fast.pipelines.loader.Loader.__next__",
    "targets": "m3i_fast.objectives.objective.MutualInformation.encode_targets",
    "inputs": "m3i_fast.objectives.objective.MutualInformation.encode_inputs",
    "loss": "m3i_fast.objectives.objective.MutualInformation.forward",
    "backward": "torch.Tensor.backward",
    "optimiser": "m3i_fast.engine.optim.optimizers.Optimizers.step",
    "logging": "m3i_fast.observe.metrics.JsonlSink.log",
    "saving": "m3i_fast.engine.checkpoint.saver.Saver.save",
    "writing": "m3i_fast.engine.checkpoint.saver.Saver._write",
}


def live(
    arguments: list[str], log: Path, environment: dict[str, str], inside: Sequence[Fault]
) -> None:
    """Run `m3i-fast train ARGUMENTS` with these faults in this process; exit with its code."""
    os.environ.update(environment)
    with log.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    with ExitStack() as stack:
        for name, options in inside:
            stack.enter_context(INSIDE[name](**options))
        sys.argv = ["m3i-fast", "train", *arguments]
        try:  # what stands around the run goes on after its exit
            runpy.run_module("m3i_fast.cli", run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    sys.exit(code)


def _before(target: str, call: int, action: Callable[[], object]) -> AbstractContextManager[object]:
    """Do `action` just before the `call`-th call of `target`, a dotted name."""
    real, calls = pkgutil.resolve_name(target), 0

    @functools.wraps(real)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return real(*arguments, **options)

    return mock.patch(target, wrapper)


def send(*, number: int, phase: str, call: int) -> AbstractContextManager[object]:
    """Send this process a signal: SIGTERM as schedulers do, SIGKILL, or SIGSTOP to hang."""
    return _before(PHASES[phase], call, lambda: os.kill(os.getpid(), number))


@contextmanager
def not_a_number(*, step: int) -> Iterator[None]:
    """Make the loss of one step of this rank NaN, and so its gradients."""
    real, calls = ForwardPass.forward, 0

    def forward(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, metrics = real(*arguments, **options)
        return (loss * float("nan"), metrics) if calls == step else (loss, metrics)

    with mock.patch.object(ForwardPass, "forward", forward):
        yield


def undone(*, step: int) -> AbstractContextManager[object]:
    """Take one step, and restore model and optimiser from copies made before it."""
    real, calls = TrainStep.__call__, 0

    def take(train_step: TrainStep, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != step:
            return real(train_step, *arguments, **options)
        tensors = tensors_of(train_step.objective, train_step.optimizer)
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        metrics = real(train_step, *arguments, **options)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])
        return metrics

    return mock.patch.object(TrainStep, "__call__", take)


def dump(*, path: Path) -> AbstractContextManager[object]:
    """Write, before the first step, digests of all that was loaded."""
    real = TrainStep.__call__

    def take(train_step: TrainStep, *arguments: Any, **options: Any) -> Any:
        if not path.exists():
            loaded = digests(tensors_of(train_step.objective, train_step.optimizer))
            write_atomically(path, json.dumps(loaded).encode())
        return real(train_step, *arguments, **options)

    return mock.patch.object(TrainStep, "__call__", take)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return digests of each tensor's type, shape and bytes."""
    digest_by_name = {}
    for name, tensor in tensors.items():
        content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        facts = f"{tensor.dtype} {list(tensor.shape)} ".encode()
        digest_by_name[name] = hashlib.sha256(facts + content).hexdigest()
    return digest_by_name


def pause(*, step: int, until: Path) -> AbstractContextManager[object]:
    """Wait at a step until the file `until` is there."""

    def wait() -> None:
        until.with_suffix(".asked").touch()
        while not until.exists():
            time.sleep(0.05)

    return _before(STEPS, step, wait)


@contextmanager
def clock(*, step: int, seconds: float) -> Iterator[None]:
    """Make the time of day jump."""
    real, jump = time.time, 0.0

    def leap() -> None:
        nonlocal jump
        jump = seconds

    with mock.patch("time.time", lambda: real() + jump), _before(STEPS, step, leap):
        yield


def files(*, root: Path, **options: Any) -> AbstractContextManager[object]:
    return FaultyFiles(root, **options)


@contextmanager
def count(*, root: Path, path: Path) -> Iterator[None]:
    """Note the operations that change files: [kind, path] of each."""
    root.mkdir()
    with FaultyFiles(root) as files:
        yield
    path.write_text(json.dumps([[each.kind, each.path] for each in files.operations]))


INSIDE: dict[str, Callable[..., AbstractContextManager[object]]] = {
    "send": send,
    "nan": not_a_number,
    "undone": undone,
    "dump": dump,
    "pause": pause,
    "clock": clock,
    "files": files,
    "count": count,
}
