"""The ledger: what benchmarks measured, one JSON object a line of results/SUBJECT.jsonl.

`row.schema.json` describes a row; README "Results" points at rows. Files only ever grow.

A subject's figures are settings and measurements: rows whose settings are equal measured the same
thing (`settings_of`), and of equal machine class they can be compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3i_fast.benchmarks.ledger.machine import machine, machine_class, versions
from m3i_fast.benchmarks.ledger.schema import complaints
from m3i_fast.observe.environment import NULL_RUNTIME, environment, is_null_runtime

if TYPE_CHECKING:  # `make gpu` has no cattrs, which configs need
    from m3i_fast.config import TrainConfig

logger = logging.getLogger(__name__)

SCHEMA = 2
Row = dict[str, Any]


def results_dir() -> Path:
    """Return the ledger's folder: M3I_RESULTS of the environment, else benchmarks/results.

    That is the checkout's, which an installed package looks for below the current folder.
    """
    if named := os.environ.get("M3I_RESULTS"):
        return Path(named)
    return _ledger()


def _ledger() -> Path:
    here = Path(__file__).resolve().parent.parent
    return (here if (here.parent / ".git").exists() else Path("benchmarks")) / "results"


# ---- Writing -------------------------------------------------------------------------------------


def append_row(
    subject: str,
    figures: Mapping[str, Any],
    *,
    config: TrainConfig | None = None,
    telemetry: Mapping[str, Any] | None = None,
    command: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Append one row to the subject's ledger and return the file; `command` is this process's.

    Appended by one write: rows of several processes do not mix. A row that is not as
    row.schema.json says, or that JSON cannot hold (NaN and infinity among it), is a ValueError
    and is not written; so is a row of a process on the null CUDA runtime in the checkout's ledger.
    """
    if not subject.isidentifier():
        raise ValueError(f"subject: expected letters, digits and underscores, got {subject!r}")
    path = (folder or results_dir()) / f"{subject}.jsonl"
    if is_null_runtime() and path.parent.resolve() == _ledger().resolve():
        raise ValueError(
            f"{path}: expected a measurement, got figures of the {NULL_RUNTIME}, which computes "
            "nothing; --no-record leaves the row out, M3I_RESULTS names another folder"
        )
    row = make_row(subject, figures, config=config, telemetry=telemetry, command=command)
    try:
        line = json.dumps(row, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"figures of {subject}: expected finite JSON values, {error}") from error
    if wrong := list(complaints(json.loads(line))):
        raise ValueError(f"a row of {subject} is not as the ledger's schema: {'; '.join(wrong)}")
    _append(path, (line + "\n").encode())
    logger.info("appended a row to %s", path)
    return path


def make_row(
    subject: str,
    figures: Mapping[str, Any],
    *,
    config: TrainConfig | None = None,
    telemetry: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Row:
    """Return a row of this process, checkout and machine."""
    here = asdict(environment())
    commit, dirty = _commit(here["commit"])
    measured_on = machine(here["cpu"], here["num_cores"])
    row: Row = {
        "schema": SCHEMA,
        "run_id": run_id(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "subject": subject,
        "commit": commit,
        "dirty": dirty,
        "command": command or _this_command(),
        "machine": measured_on,
        "machine_class": machine_class(measured_on),
        "versions": versions(),
        "figures": dict(figures),
    }
    if config is not None:
        row["config"] = json.loads(config.to_json())
        text = json.dumps(row["config"], sort_keys=True)
        row["config_hash"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    if telemetry is not None:
        row["telemetry"] = dict(telemetry)
    return row


@cache
def run_id() -> str:
    """Return the sixteen hex digits that the rows of this process share."""
    return uuid.uuid4().hex[:16]


def _append(path: Path, line: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, line)
    finally:
        os.close(descriptor)
    if written != len(line):
        raise OSError(f"{path}: expected to append {len(line)} bytes, wrote {written}")


def _commit(described: str | None) -> tuple[str | None, bool]:
    return (described or "").removesuffix("-dirty") or None, (described or "").endswith("-dirty")


def _this_command() -> str:
    """As typed, of absolute paths the last part: `python -m module ...` or `program ...`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else None
    program = ["python", "-m", module] if module else [Path(sys.argv[0]).name]
    folders = re.compile(r"(?<![^=,:])/(?:[^/\s]+/)+")  # of an argument, or of an option's value
    return shlex.join([*program, *(folders.sub(".../", argument) for argument in sys.argv[1:])])


# ---- Reading -------------------------------------------------------------------------------------


def subjects(folder: Path | None = None) -> list[str]:
    """Return the subjects that have a ledger."""
    return sorted(path.stem for path in (folder or results_dir()).glob("*.jsonl"))


def read_rows(subject: str, *, folder: Path | None = None) -> Iterator[Row]:
    """Yield the subject's rows, oldest first; none without a ledger.

    Raises ValueError for a line that is no row, or of another layout, with its number.
    """
    path = (folder or results_dir()) / f"{subject}.jsonl"
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            schema = row["schema"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a row of the ledger, {error}") from error
        if schema != SCHEMA:
            raise ValueError(f"{path}:{number}: expected schema {SCHEMA}, got {schema}")
        yield row


def commit_of(row: Row) -> str:
    """Return `0123abcd`, with `-dirty` after it where files were changed; or `a wheel`."""
    return (row["commit"] or "a wheel") + ("-dirty" if row.get("dirty") else "")


# ---- What a row measured -------------------------------------------------------------------------

# Numbers that are results; all other figures of one value are settings.
MEASURED = re.compile(
    r"_ms$|_s$|_share$|^seconds$|_seconds$|_loss$|_nats$|^effective_rank$|_slowdown$|_top1$|_concepts$"
    r"|^(num_steps|stops_at|hfu|resumed|collapsed|recovered|weights_equal|campaign|trial|where)$"
    r"|^(registers|(spill|shared)_bytes|blocks_per_multiprocessor|current|dropped|chosen)$"
)


def settings_of(row: Row) -> dict[str, Any]:
    """Return the figures that say what was measured: sizes, dtype, device, threads."""
    return {
        name: value
        for name, value in row["figures"].items()
        if not MEASURED.search(name) and not isinstance(value, dict | list)
    }


def newest(rows: Iterator[Row] | list[Row], **settings: Any) -> Row | None:
    """Return the last row with these figures; None without one."""
    last = None
    for row in rows:
        if all(row["figures"].get(name) == value for name, value in settings.items()):
            last = row
    return last
