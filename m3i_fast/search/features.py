"""What a model makes of each picture, computed once and kept by the digest of weights and pictures.

Legend: N pictures, B of a batch, S pixels of the encoder's side, M cells of its grid, C width of a
token, E width of an embedding, K classes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import m3i_fast
from m3i_fast.durable_files import make_directories, remove_directory, sync
from m3i_fast.export.weight_files import write_weights
from m3i_fast.inference.model import Model
from m3i_fast.pipelines.threads import start_pool
from m3i_fast.search.pictures import Pictures, decode

logger = logging.getLogger(__name__)

VERSION = 2  # of the files below
STATE = "state.safetensors"
SAVED_EVERY_S = 15.0
MOST_NAMED = 5  # unreadable pictures in the log


@dataclass(frozen=True, slots=True)
class Described:
    """What a model makes of a batch of pictures, on the CPU."""

    cells: Tensor  # [B, M, C] fp32, the tokens of the grid
    mean: Tensor  # [B, C] fp32
    image: Tensor | None  # [B, E] fp32, in the space of captions
    logits: Tensor | None  # [B, K] fp32


@dataclass(frozen=True, slots=True)
class Features:
    """The features of all pictures, mapped into memory from their files."""

    mean: NDArray[np.float32]  # [N, C], the mean token, of evaluation's kNN
    image: NDArray[np.float32] | None  # [N, E], embeddings in the space of captions
    guess: NDArray[np.int32] | None  # [N], the class that the model guesses
    probability: NDArray[np.float32] | None  # [N], of that guess
    readable: NDArray[np.bool_]  # [N], with finite features; all else of another picture is 0
    position_mean: Tensor  # [M, C] fp32, the mean token of all pictures at each cell


def describe(model: Model, views: Tensor) -> Described:  # [B, 3, S, S] uint8
    """Run the encoder once, and its heads where it has them.

    The values are those of `forward_features`, `forward`, `encode_image` and `classify`.
    """
    tokens = model.forward_features(views)
    cells, image, logits = tokens[:, model.num_prefix_tokens :], None, None
    dtype = model.compute_dtype
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        summary = model.encoder.summarise(cells)
        if model.caption is not None:
            image = model.caption.project(summary).float().cpu()
        if model.category is not None:
            logits = model.category.logits(summary).float().cpu()
    return Described(cells.float().cpu(), model.forward_head(tokens).cpu(), image, logits)


def view_of(model: Model, content: bytes) -> Tensor:  # -> [1, 3, S, S] uint8
    """Decode a picture and cut what the encoder sees of it; raises as `decode`."""
    pixels = torch.from_numpy(decode(content)).permute(2, 0, 1)
    return model.transform.views([pixels])


def cached_features(
    model: Model,
    pictures: Pictures,
    cache_dir: Path,
    *,
    batch_size: int = 64,
    num_threads: int = 1,
    tell: Callable[[int, int], object] = lambda done, total: None,
) -> Features:
    """Return the features of all pictures, and compute those that are not in the cache.

    They are kept in a folder of `cache_dir`, which is written beside and renamed when it is whole;
    a process that was killed leaves what it had computed up to the last few seconds, and the next
    one goes on there. tell: called with the number of pictures that are done, and of all. Raises
    FileExistsError where another process computes them, OSError where the disk is full, and
    ValueError where no picture can be read.
    """
    folder = cache_dir.expanduser() / "search" / _digest(model, pictures)
    if not folder.is_dir():
        make_directories(folder.parent.absolute())
        partial = folder.with_name(f".{folder.name}.partial")
        with _locked(partial):
            if not folder.is_dir():  # another process may have ended meanwhile
                _compute(model, pictures, partial, batch_size, num_threads, tell)
                os.rename(partial, folder)
                sync(folder.parent)
    return _read(folder, len(pictures.label))


def _digest(model: Model, pictures: Pictures) -> str:
    """Hash what the features depend on: config, weights, preprocessing, arithmetic, pictures."""
    made = {
        "version": VERSION,
        "m3i_fast": m3i_fast.__version__,
        "encoder": str(model.encoder.cfg),
        "preprocessing": asdict(model.transform.preprocessing),
        "compute_dtype": str(model.compute_dtype),
        "pictures": pictures.digest,
    }
    hashed = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hashed.update(content.numpy())
    return hashed.hexdigest()[:32]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and lock it up to the end of the block, or of the process."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FileExistsError(
            f"{folder}: another process computes these features: wait for its end, or name another "
            "--cache-dir"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


# ---- Computing -----------------------------------------------------------------------------------


def _compute(
    model: Model,
    pictures: Pictures,
    folder: Path,
    batch_size: int,
    num_threads: int,
    tell: Callable[[int, int], object],
) -> None:
    total, size = len(pictures.label), model.transform.preprocessing.size
    black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    columns, token_sum = _columns(model, black, [black])
    refused: list[str] = []
    with _Files(folder, total, columns, token_sum) as files:
        tell(files.num_rows, total)
        for found in _batches(model, pictures, files.num_rows, batch_size, num_threads):
            refused += [each for each in found if isinstance(each, str)]
            columns, token_sum = _columns(model, black, found)
            finite = columns["readable"].tolist()
            refused += [
                f"picture {files.num_rows + i}: its features are not finite"
                for i, each in enumerate(found)
                if isinstance(each, Tensor) and not finite[i]
            ]
            files.append(columns, token_sum)
            tell(files.num_rows, total)
    for line in refused[:MOST_NAMED]:
        logger.warning("left out: %s", line)
    if files.num_readable == 0:
        remove_directory(folder)
        raise ValueError(f"none of {total:,} pictures can be used; {'; '.join(refused[:1])}")


def _batches(
    model: Model, pictures: Pictures, start: int, batch_size: int, num_threads: int
) -> Iterator[list[Tensor | str]]:
    """Yield the views of the pictures from row `start` on, or why there is none of one.

    Threads read and decode a batch ahead.
    """
    total = len(pictures.label)
    pool = start_pool(num_threads, "m3i-pictures")
    waiting: deque[list[Future[Tensor | str]]] = deque()
    try:
        for first in range(start, total, batch_size):
            rows = range(first, min(first + batch_size, total))
            waiting.append([pool.submit(_view, model, pictures, row) for row in rows])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _view(model: Model, pictures: Pictures, row: int) -> Tensor | str:
    try:
        return view_of(model, pictures.read(row))
    except (ValueError, OSError) as error:
        return f"picture {row}: {error}"


def _columns(
    model: Model, black: Tensor, found: list[Tensor | str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the columns of a batch, and the sum of its tokens at each cell, [M, C] fp64."""
    readable = torch.tensor([isinstance(each, Tensor) for each in found])
    views = [each if isinstance(each, Tensor) else black for each in found]
    made = describe(model, torch.cat(views))
    for values in (made.cells, made.mean, made.image, made.logits):
        if values is not None:
            readable &= values.flatten(1).isfinite().all(1)
    columns = {"mean": made.mean}
    if made.image is not None:
        columns["image"] = made.image
    if made.logits is not None:
        probability, guess = made.logits.softmax(-1).max(-1)
        columns |= {"guess": guess.int(), "probability": probability}
    for values in columns.values():
        values[~readable] = 0
    return {**columns, "readable": readable}, made.cells[readable].double().sum(0)


class _State(NamedTuple):
    """What the files hold."""

    rows: int
    readable: int
    token_sum: Tensor  # [M, C] fp64, of the readable pictures


class _Files:
    """A file of .npy a column, to which rows are appended, and how many of them are on the disk."""

    def __init__(
        self, folder: Path, total: int, columns: dict[str, Tensor], token_sum: Tensor
    ) -> None:
        """Open the files, and go on after the rows that an earlier process has saved.

        columns, token_sum: of any batch, for their shapes and types.
        """
        self._folder, self._saved_at = folder, time.monotonic()
        likes = {name: values.numpy() for name, values in columns.items()}
        headers = {name: _header(total, like) for name, like in likes.items()}
        ends = {name: (len(headers[name]), like[0].nbytes) for name, like in likes.items()}
        self._state = self._resumed(ends, token_sum)
        self._files = {}
        for name, (header, row) in ends.items():
            file = self._files[name] = (folder / f"{name}.npy").open(
                "r+b" if self.num_rows else "wb"
            )
            file.write(headers[name])
            file.truncate(header + self.num_rows * row)
            file.seek(0, os.SEEK_END)

    @property
    def num_rows(self) -> int:
        """Return how many rows every file has."""
        return self._state.rows

    @property
    def num_readable(self) -> int:
        """Return how many of them are of pictures that could be read."""
        return self._state.readable

    def _resumed(self, ends: dict[str, tuple[int, int]], token_sum: Tensor) -> _State:
        """Return what an earlier process has saved of the files with these headers and rows."""
        none = _State(0, 0, torch.zeros_like(token_sum))
        try:
            state = load_file(self._folder / STATE)
            rows, readable = state["counts"].tolist()
            for name, (header, row) in ends.items():
                if (self._folder / f"{name}.npy").stat().st_size < header + rows * row:
                    return none
        except (OSError, SafetensorError, KeyError, ValueError):
            return none  # no process has saved anything here
        return _State(rows, readable, state["token_sum"])

    def append(self, columns: dict[str, Tensor], token_sum: Tensor) -> None:
        """Append the rows of a batch; they are on the disk some seconds later."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(columns[name].numpy()).data)
        before, readable = self._state, columns["readable"]
        self._state = _State(  # at once, as Ctrl-C may come at any time
            before.rows + len(readable),
            before.readable + int(readable.sum()),
            before.token_sum + token_sum,
        )
        if time.monotonic() - self._saved_at > SAVED_EVERY_S:
            self._save()

    def _save(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        counts = torch.tensor([self.num_rows, self.num_readable])
        state = {"counts": counts, "token_sum": self._state.token_sum}
        write_weights(self._folder / STATE, state)
        self._saved_at = time.monotonic()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Save what was appended, also after Ctrl-C, and close the files."""
        try:
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self._save()
        finally:
            for file in self._files.values():
                file.close()


def _header(total: int, like: NDArray[Any]) -> bytes:
    """Return the header of a .npy file of `total` rows like these."""
    described = {
        "descr": np.lib.format.dtype_to_descr(like.dtype),
        "fortran_order": False,
        "shape": (total, *like.shape[1:]),
    }
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


# ---- Reading -------------------------------------------------------------------------------------


def _read(folder: Path, total: int) -> Features:
    """Map the columns into memory; ValueError where they are damaged."""

    def column(name: str) -> NDArray[Any] | None:
        if not (folder / f"{name}.npy").exists():
            return None
        # Copied where it is written, which nothing does: torch takes no array that is read-only.
        found: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="c")
        if len(found) != total:
            raise ValueError(f"{name}: expected {total} rows, got {len(found)}")
        return found

    try:
        state = load_file(folder / STATE)
        mean, readable = column("mean"), column("readable")
        if mean is None or readable is None:
            raise ValueError("mean.npy or readable.npy is missing")
        return Features(
            mean=mean,
            image=column("image"),
            guess=column("guess"),
            probability=column("probability"),
            readable=readable,
            position_mean=(state["token_sum"] / state["counts"][1]).float(),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{folder}: damaged: {error}; remove the folder, and the features are computed again"
        ) from error
