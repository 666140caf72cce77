"""Metrics of a run: means on the device, and the files that rows are written to."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import scalar

from m3i_fast.durable_files import make_directories, read_file, write_atomically
from m3i_fast.json_files import parse_json

logger = logging.getLogger(__name__)

_NUMBERS = itertools.count()  # number a process's event files


Ended = Literal["complete", "stopped", "failed"]
"""How a run ended: at its last step, by a signal or a limit of time, by an error."""


class Sink(Protocol):
    """A place that logged rows are written to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the row of a step."""

    def close(self) -> None:
        """Write what is pending and close."""


class JsonlSink:
    """Writes metrics.jsonl: one JSON object a logged step.

    Rows after `start_step`, from before a resume or rollback, are dropped first.
    """

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        kept = (
            [row for row in read_jsonl(path) if row["step"] <= start_step] if path.exists() else []
        )
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Writes a TensorBoard event file in `directory`, one record a logged step.

    torch's SummaryWriter reopens its file at every flush, in a thread whose errors are only
    printed. Here a full disk is an OSError of `log`.
    """

    def __init__(self, directory: Path, *, start_step: int = 0) -> None:
        make_directories(directory)
        # TensorBoard reads files in the order of their names.
        name = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS):06}"
        self._file = (directory / f"events.out.tfevents.{name}").open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if start_step:  # TensorBoard drops what earlier files have of this step and later ones
            self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of a step as scalars."""
        summary = Summary()
        for name, value in values.items():
            summary.MergeFrom(scalar(name, value))
        self._write(step=step, summary=summary)

    def _write(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


METRICS_ROW = {"step": int, str: float}


def read_jsonl(path: Path, shape: Any = METRICS_ROW) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, or of a file of another shape (`json_files`).

    Lines that are damaged, for instance by a crash or a power cut, are left out with a warning.
    """
    rows = []
    for number, line in enumerate(read_file(path).split(b"\n")[:-1], start=1):
        try:
            rows.append(parse_json(line, shape, f"{path}:{number}"))
        except ValueError as error:
            logger.warning("%s; the line is left out", error)
    return rows


Curves = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Steps [N] and values [N] of every logged name."""


def read_curves(path: Path) -> Curves:
    """Read a metrics.jsonl by name, line by line, in 16 bytes a value: runs may have gigabytes.

    Damaged lines are left out with a warning, and so is a last line that is still being written.
    """
    columns: dict[str, tuple[array[float], array[float]]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = parse_json(line, METRICS_ROW, f"{path}:{number}")
            except ValueError as error:
                logger.warning("%s; the line is left out", error)
                continue
            step = row.pop("step")
            for name, value in row.items():
                steps, values = columns.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(value)
    return {n: (np.array(steps), np.array(values)) for n, (steps, values) in columns.items()}


def last_step(path: Path) -> int:
    """Return the step of the last whole row of a metrics.jsonl; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 2**20, 0))  # rows are some kilobytes long
        rows = file.read().split(b"\n")[:-1]
    for row in reversed(rows):
        try:
            return int(parse_json(row, METRICS_ROW, str(path))["step"])
        except ValueError:
            continue
    return 0


class DeviceMeans:
    """Running means of scalar tensors, kept on their device until `read` copies all at once.

    device: of the sums. over_ranks: returns the mean of a tensor over the ranks, all of which read
    at the same steps. gather: returns a host value of every rank, in the order of the ranks.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ) -> None:
        self._device, self._over_ranks, self._gather = device, over_ranks, gather
        # By the names of a step's metrics: their sums and, last, the count. One addition a step.
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor], skip: Tensor | None = None) -> None:
        """Add the values of a step unless `skip` [] is 1."""
        row = torch.stack([value.detach().float() for value in values.values()])
        row = torch.cat([row, row.new_ones(1)])
        if skip is not None:
            row = torch.where(skip > 0, 0.0, row)
        names = tuple(values)
        self._sums[names] = self._sums[names] + row if names in self._sums else row

    def read(self) -> dict[str, float]:
        """Return the means since the last `reset`, with one host synchronisation.

        A name that some ranks lack, as the spread over pictures of a rank that had one, is the mean
        over the others. Names without a value since then are left out.
        """
        groups = list(dict.fromkeys(itertools.chain.from_iterable(self._gather(list(self._sums)))))
        if not groups:
            return {}
        rows = [
            self._sums[names]
            if names in self._sums
            else torch.zeros(len(names) + 1, device=self._device)
            for names in groups
        ]
        flat = iter(self._over_ranks(torch.cat(rows)).tolist())
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for names in groups:
            row = [next(flat) for _ in range(len(names) + 1)]
            for name, value in zip(names, row, strict=False):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0.0) + row[-1]
        return {name: value / counts[name] for name, value in sums.items() if counts[name]}

    def reset(self) -> None:
        """Begin new means."""
        self._sums.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Return names, sums and count of each group; JSON-able. This is a host synchronisation."""
        return [
            {"names": list(names), "sums": sums[:-1].tolist(), "count": int(sums[-1])}
            for names, sums in self._sums.items()
        ]

    def load_state_dict(self, state: list[dict[str, Any]] | Mapping[str, list[float]]) -> None:
        """Restore the state; older checkpoints hold sum and count by name."""
        groups: list[dict[str, Any]] = (
            [{"names": [name], "sums": [s], "count": count} for name, (s, count) in state.items()]
            if isinstance(state, Mapping)
            else state
        )
        self._sums = {
            tuple(group["names"]): torch.tensor(
                [*group["sums"], group["count"]], dtype=torch.float32, device=self._device
            )
            for group in groups
        }
