"""Ranks and scripts, forked from a process that has imported torch; a rank's rows."""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import fields
from multiprocessing import forkserver, util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from m3i_fast.pipelines.batch import Batch

ROOT = Path(__file__).resolve().parents[2]
# Before any test has changed it.
ENVIRONMENT = dict(os.environ)
IMPORTED = ("torch._dynamo", "torch.distributed.fsdp", "m3i_fast.engine.trainer", "pytest")


def part(batch: Batch, rank: int, num_ranks: int) -> Batch:
    """A rank's rows."""

    def rows(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(rows, value))
        if isinstance(value, Mapping):
            return {name: rows(values) for name, values in value.items()}
        size = len(value) // num_ranks
        return value[rank * size : (rank + 1) * size]

    return Batch(**{field.name: rows(getattr(batch, field.name)) for field in fields(Batch)})


def start_ranks(
    work: Callable[..., None], arguments: tuple[object, ...], num_ranks: int, *, join: bool = True
) -> mp.ProcessContext:
    """Call `work(rank, *arguments)` in new processes, by torch's `start_processes`.

    A rank begins with the state of a new Python process, and with this process's environment.
    Variables that a library reads on import have the values from before the tests.
    join: wait for all ranks, and raise the error of the first one that fails.
    """
    connect = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _SERVER.connect_to_new_process
    try:
        begin = (work, arguments, dict(os.environ))
        context = mp.start_processes(
            _begin, begin, nprocs=num_ranks, join=False, start_method="forkserver"
        )
    finally:
        forkserver.connect_to_new_process = connect
    while join and not context.join():
        pass
    return context


def run_script(script: Path, *arguments: str, folder: Path | None = None) -> str:
    """Run a Python file as a program, in a new process and this folder; return what it prints.

    Raises torch's ProcessException if it fails. It is forked, with torch imported, as a rank is.
    """
    with TemporaryDirectory() as scratch:
        output = Path(scratch) / "output.txt"
        start_ranks(_run_script, (script, arguments, folder or Path.cwd(), output), 1)
        return output.read_text()


def _run_script(
    rank: int, script: Path, arguments: tuple[str, ...], folder: Path, output: Path
) -> None:
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    with output.open("w") as file, redirect_stdout(file):
        runpy.run_path(str(script), run_name="__main__")


def _begin(
    rank: int, work: Callable[..., None], arguments: tuple[object, ...], environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # noqa: NPY002
    torch.default_generator.seed()  # at random, as in a new process
    assert torch.get_num_threads() == int(ENVIRONMENT["OMP_NUM_THREADS"])
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1  # a thread is lost in a fork
    assert not dist.is_initialized() and not torch.cuda.is_initialized()
    work(rank, *arguments)


class _Server(forkserver.ForkServer):
    """The process that ranks are forked from. It ends with the one that tests.

    It is not multiprocessing's own server, which packing data starts with other modules.
    """

    def ensure_running(self) -> None:
        if self._forkserver_address is not None:
            return
        alive, self._forkserver_alive_fd = os.pipe()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # the kernel chooses a name
            listener.listen()
            numbers = (listener.fileno(), alive)
            program = f"from {__name__} import serve; serve{(*numbers, os.getpid())}"
            process = subprocess.Popen(
                [sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, pass_fds=numbers
            )
            self._forkserver_address = listener.getsockname()
        os.close(alive)

        def stop() -> None:
            process.terminate()
            process.wait()

        util.Finalize(None, stop, exitpriority=0)


_SERVER = _Server()


def serve(listener: int, alive: int, parent: int) -> None:
    """Fork a rank for each connection. listener, alive: file descriptors."""
    mp._prctl_pr_set_pdeathsig(signal.SIGTERM)
    if os.getppid() != parent:
        return
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a rank's collector does not copy the pages of these modules
    forkserver.main(listener, alive, [])
