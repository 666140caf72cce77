"""What frozen teachers say of every picture, kept on the disk.

A folder holds one teacher's tokens of one view of each row of a data set, in files of some hundred
rows. Its name is a digest of all that the tokens follow from: the teacher's weights, the view, the
data and the arithmetic. A file is written beside and renamed, so that what is there is whole, and a
start that was stopped goes on where it was. Legend: B rows, N cells, C width of a token.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from m3i_fast.config import TrainConfig
from m3i_fast.durable_files import (
    make_directories,
    replaced_atomically,
    write_atomically,
    write_durably,
)
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.precision.attention import choose_attention
from m3i_fast.engine.precision.cpu_products import fast_cpu_products
from m3i_fast.engine.precision.fp8 import forward_context
from m3i_fast.engine.teacher import Teacher
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.objectives.targets import autocast_dtype, normalise_views
from m3i_fast.pipelines.loader import Loader
from m3i_fast.terminal import make_console, progress_bar

FORMAT = 1
ROWS_A_FILE = 512
"""294 MiB of ViT-B/16's tokens at 224 pixels, in fp32."""
FACTS = "features.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """Tokens of all rows of a data set, read from a folder by memory maps."""

    folder: Path
    num_rows: int
    num_cells: int
    dim: int
    dtype: torch.dtype
    _files: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def bytes_a_row(self) -> int:
        """Return the bytes of a row's tokens."""
        return self.num_cells * self.dim * self.dtype.itemsize

    @property
    def num_files(self) -> int:
        """Return how many files hold the rows."""
        return -(-self.num_rows // ROWS_A_FILE)

    def path(self, number: int) -> Path:
        """Return the file that holds the rows from `number` * ROWS_A_FILE on."""
        return self.folder / f"{number:06d}.bin"

    def rows_of(self, number: int) -> NDArray[np.int64]:
        """Return the rows that a file holds."""
        first = number * ROWS_A_FILE
        return np.arange(first, min(first + ROWS_A_FILE, self.num_rows))

    def take(self, rows: NDArray[np.int64]) -> Tensor:  # [B] -> [B, N, C]
        """Read the tokens of rows of the table, in their dtype, on the CPU.

        Raises FileNotFoundError or ValueError, which names it, for a file that is missing or of
        another size.
        """
        tokens = torch.empty(len(rows), self.num_cells, self.dim, dtype=self.dtype)
        into = tokens.view(torch.uint8).view(len(rows), -1).numpy()
        files = rows // ROWS_A_FILE
        for number in np.unique(files):
            of_file = files == number
            into[of_file] = self._open(int(number))[rows[of_file] % ROWS_A_FILE]
        return tokens

    def _open(self, number: int) -> NDArray[np.uint8]:  # [rows, bytes]
        if number not in self._files:
            path, shape = self.path(number), (len(self.rows_of(number)), self.bytes_a_row)
            if path.stat().st_size != shape[0] * shape[1]:
                raise ValueError(
                    f"objective.teacher_cache: expected {shape[0] * shape[1]} bytes, got "
                    f"{path.stat().st_size} in {path}: delete it, and it is written anew"
                )
            self._files[number] = np.memmap(path, np.uint8, "r", shape=shape)
        return self._files[number]


def cache_teachers(
    cfg: TrainConfig,
    teachers: Mapping[str, ImageEncoder],
    loader: Loader,
    world: World,
    arithmetic: Arithmetic,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, CachedFeatures]:
    """Fill the folders of the teachers in use where rows are missing, and open them.

    To be called by every rank, before the first batch: each writes every `world.size`th file, into
    a folder that all ranks see. teachers: by `Term.target_encoder`. on_progress: called with each
    batch that was encoded, and every second while other ranks are waited for.
    """
    assert cfg.objective.teacher_cache is not None
    root, found = Path(cfg.objective.teacher_cache), {}
    for name, teacher in teachers.items():
        assert isinstance(teacher, Teacher)
        found[name] = _folder_of(root, cfg, teacher, loader, world, arithmetic)
        products = fast_cpu_products(world.device, arithmetic.compute_dtype)
        attention = choose_attention(cfg, arithmetic, world.device).context()
        with forward_context(arithmetic, world.device), products, attention:
            _fill(found[name], teacher, loader, world, name, on_progress)
        world.wait_for_all(on_progress)
        for number in range(found[name].num_files):
            if not found[name].path(number).is_file():
                raise FileNotFoundError(
                    f"objective.teacher_cache: expected a folder that all ranks see, rank "
                    f"{world.rank} does not find {found[name].path(number)}"
                )
    return found


def _folder_of(
    root: Path,
    cfg: TrainConfig,
    teacher: Teacher,
    loader: Loader,
    world: World,
    arithmetic: Arithmetic,
) -> CachedFeatures:
    view = cfg.data.global_views
    blank = torch.zeros(1, 3, view.size, view.size, dtype=torch.uint8, device=world.device)
    with forward_context(arithmetic, world.device):
        tokens = encode(teacher, blank)
    decoder = "cpu" if world.device.type == "cpu" else f"gpu, exact {cfg.data.exact_decode}"
    facts: dict[str, Any] = {
        "format": FORMAT,
        "teacher": teacher.identity,
        "weights": digest_of_weights(teacher),
        "view": {"size": view.size, "interpolation": view.interpolation, "crop": "centre square"},
        "data": {"digest": loader.digest, "split": cfg.data.split, "rows": loader.num_rows},
        "decoder": decoder,
        "computes_in": str(arithmetic.compute_dtype),
        "attention": choose_attention(cfg, arithmetic, world.device).kernel,
        "tokens": [tokens.shape[1], tokens.shape[2], str(tokens.dtype)],
        "rows_a_file": ROWS_A_FILE,
    }
    text = json.dumps(facts, sort_keys=True, indent=2)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
    make_directories(folder)
    if world.is_main and not (folder / FACTS).is_file():
        write_atomically(folder / FACTS, text.encode())
    return CachedFeatures(
        folder, loader.num_rows, tokens.shape[1], tokens.shape[2], dtype=tokens.dtype
    )


def encode(teacher: ImageEncoder, views: Tensor) -> Tensor:  # [B, 3, S, S] uint8 -> [B, N, C]
    """Encode views as a step does (`MutualInformation.encode_targets`)."""
    rows = torch.arange(len(views), device=views.device)
    return teacher.encode_cells(normalise_views(views, rows, autocast_dtype(views.device.type)))


def digest_of_weights(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, with names, dtypes and shapes."""
    hashed = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _fill(
    stored: CachedFeatures,
    teacher: Teacher,
    loader: Loader,
    world: World,
    name: str,
    on_progress: Callable[[], None],
) -> None:
    own = range(world.rank, stored.num_files, world.size)
    missing = [number for number in own if not stored.path(number).is_file()]
    if not missing:
        return
    rows = np.concatenate([stored.rows_of(number) for number in missing])
    gib = stored.num_rows * stored.bytes_a_row / 2**30
    logger.info("teacher %s: %d rows into %s, %.2f GiB in all", name, len(rows), stored.folder, gib)
    doing = f"teacher {name} of {len(rows)} pictures"
    console = make_console(stderr=True)
    with progress_bar(doing, len(rows), console=console) if world.is_main else nullcontext() as bar:
        current, into = missing[0], _empty(stored, missing[0])
        following = iter(missing[1:])
        for batch in loader.fixed_views(rows):
            at = batch.position.numpy()
            tokens = encode(teacher, batch.global_views[0]).contiguous().cpu().view(torch.uint8)
            for number in np.unique(at // ROWS_A_FILE):
                while current != number:  # a file's last row was written, or all of them are bad
                    _store(stored.path(current), into)
                    current = next(following)
                    into = _empty(stored, current)
                of_file = at // ROWS_A_FILE == number
                into[at[of_file] % ROWS_A_FILE] = tokens.flatten(1).numpy()[of_file]
            on_progress()
            if bar is not None:
                bar(len(at))
        _store(stored.path(current), into)
        for number in following:
            _store(stored.path(number), _empty(stored, number))


def _empty(stored: CachedFeatures, number: int) -> NDArray[np.uint8]:  # [rows, bytes]
    """Return the tokens of a file's rows as zeros, which those of bad rows stay: none is read."""
    return np.zeros((len(stored.rows_of(number)), stored.bytes_a_row), np.uint8)


def _store(path: Path, rows: NDArray[np.uint8]) -> None:
    with replaced_atomically(path) as temporary:
        write_durably(temporary, [rows.data.cast("B")])
