"""Metrics of a run: means on the device, and sinks."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import scalar

from m3i_fast.durable_files import make_directories, read_file, write_atomically
from m3i_fast.json_files import parse_json

logger = logging.getLogger(__name__)

_NUMBERS = itertools.count()  # of a process's event files


class Sink(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """metrics.jsonl: one object a logged step.

    A resume first drops the rows after the step it continues from.
    """

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        kept = (
            [row for row in read_jsonl(path) if row["step"] <= start_step] if path.exists() else []
        )
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """A TensorBoard event file in `directory`, a record a logged step.

    torch's SummaryWriter opens its file anew at every flush, in a thread whose errors are a
    traceback; here a full disk is an OSError of `log`.
    """

    def __init__(self, directory: Path, *, start_step: int = 0) -> None:
        make_directories(directory)
        name = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._file = (directory / f"events.out.tfevents.{name}").open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if start_step:  # TensorBoard drops what earlier files have of this step and later ones
            self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        summary = Summary()
        for name, value in values.items():
            summary.MergeFrom(scalar(name, value))
        self._write(step=step, summary=summary)

    def _write(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


METRICS_ROW = {"step": int, str: float}


def read_jsonl(path: Path, shape: Any = METRICS_ROW) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, or of one of another shape (`json_files`).

    Lines that a crash, a power cut or something else spoilt are left out with a warning.
    """
    rows = []
    for number, line in enumerate(read_file(path).split(b"\n")[:-1], start=1):
        try:
            rows.append(parse_json(line, shape, f"{path}:{number}"))
        except ValueError as error:
            logger.warning("%s; the line is left out", error)
    return rows


class DeviceMeans:
    """Running means of scalar tensors, on their device until `read` copies all at once.

    device: where a loaded state goes. over_ranks: replaces a tensor by its mean over the ranks, all
    of which read at the same steps.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self._device, self._over_ranks = device, over_ranks
        # Sums and, last, their number, of all metrics that came together: one addition a step.
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor], skip: Tensor | None = None) -> None:
        """Values of a step, left out if `skip` [] is 1; the same on all ranks."""
        found = torch.stack([value.detach().float() for value in values.values()])
        found = torch.cat([found, found.new_ones(1)])
        if skip is not None:
            found = torch.where(skip > 0, 0.0, found)
        names = tuple(values)
        self._sums[names] = self._sums[names] + found if names in self._sums else found

    def read(self) -> dict[str, float]:
        """Means since the last `reset` of what has any. The one host synchronisation."""
        if not self._sums:
            return {}
        flat = iter(self._over_ranks(torch.cat(list(self._sums.values()))).tolist())
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for names in self._sums:
            row = [next(flat) for _ in range(len(names) + 1)]
            for name, value in zip(names, row, strict=False):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0.0) + row[-1]
        return {name: value / counts[name] for name, value in sums.items() if counts[name]}

    def reset(self) -> None:
        self._sums.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """JSON-able: names, sums and how many of each group. A host synchronisation."""
        return [
            {"names": list(names), "sums": sums[:-1].tolist(), "count": int(sums[-1])}
            for names, sums in self._sums.items()
        ]

    def load_state_dict(self, state: list[dict[str, Any]] | Mapping[str, list[float]]) -> None:
        """Older checkpoints hold sum and count by name."""
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
