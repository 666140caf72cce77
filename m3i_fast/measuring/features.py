"""Features of a split by one encoder, in files: computed in pieces, resumed, shared by ranks.

A split's folder in the cache holds `mean_L.npy`, `class_L.npy` [N, C], `image.npy` [N, E] and
`text.npy` [M, E], and of the rows `label.npy`, `group.npy`, `picture.npy` [N, 16] uint8 (a digest
of the picture's bytes), `valid.npy` [N] bool (decoded) and `caption_row.npy` [M]. Until it is
whole, pieces of `PIECE_ROWS` rows lie in a folder beside it, which a later start goes on with.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.durable_files import (
    created_whole,
    make_directories,
    remove_directory,
    replaced_atomically,
    write_atomically,
)
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.evaluation.feature_rows import FileRows, Index
from m3i_fast.json_files import read_json
from m3i_fast.measuring.decoding import DIGEST_BYTES, PictureBatch, decoded_batches
from m3i_fast.measuring.encoders.encoder import Encoder
from m3i_fast.measuring.source import Source, Split

FORMAT = 2
PIECE_ROWS = 1024
META = "meta.json"
_IMAGE, _TEXT = "picture", "text"  # kinds of pieces

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SplitFeatures:
    """The features of a split, read from its folder."""

    folder: Path
    split: Split

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the features of pictures, such as mean_1."""
        return tuple(read_json(self.folder / META)["features"])

    @cached_property
    def faults(self) -> dict[str, str]:
        """Why pictures could not be decoded, by name."""
        return dict(read_json(self.folder / META)["faults"])

    def rows(self, name: str) -> FileRows:
        """Return the rows of one feature, without reading them."""
        return FileRows(self.folder / f"{name}.npy")

    def column(self, name: str) -> NDArray[Any]:
        """Read label, group, picture, valid or caption_row."""
        return np.asarray(np.load(self.folder / f"{name}.npy", allow_pickle=False))

    @cached_property
    def labelled(self) -> Index:
        """Rows that were decoded and have a label."""
        return np.flatnonzero(self.column("label") >= 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionSettings:
    """How features are computed."""

    cache_dir: Path
    batch_size: int = 64
    workers: int = 0


def extract(
    encoder: Encoder,
    source: Source,
    split: Split,
    world: World,
    settings: ExtractionSettings,
    advance: Callable[[int], None] = lambda number: None,
) -> SplitFeatures:
    """Compute the features of a split, or those of its pieces that are not there yet.

    Each rank computes every world.size-th piece; they meet in the files of the cache, which all
    ranks have to see. Pieces are batched alike whatever the number of ranks, so their bits do not
    depend on it. advance: is told the rows of this rank that are done. Raises ValueError where no
    picture can be decoded, where a feature is not finite, and where a rank does not see the pieces
    of another.
    """
    folder = feature_folder(encoder, source, split, settings)
    with _locked(folder) if world.is_main else nullcontext():
        return _extract(encoder, source, split, folder, world, settings, advance)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second start that asks for the same features waiting until they are there.

    A file system without locks keeps no two starts apart.
    """
    make_directories(folder.parent)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield


def _extract(
    encoder: Encoder,
    source: Source,
    split: Split,
    folder: Path,
    world: World,
    settings: ExtractionSettings,
    advance: Callable[[int], None],
) -> SplitFeatures:
    is_there = world.gather((folder / META).is_file())[0]  # as the first rank sees it
    if not is_there:
        parts = folder.with_name(f"{folder.name}.pieces")
        make_directories(parts)
        _compute_pictures(encoder, source, split, parts, world, settings, advance)
        _compute_texts(encoder, split, parts, world, settings)
        world.wait_for_all()
        if world.is_main:
            _join(encoder, source, split, parts, folder)
            remove_directory(parts)
    else:
        advance(num_rows(split, world))
    world.wait_for_all()
    return SplitFeatures(folder, split)


def feature_folder(
    encoder: Encoder, source: Source, split: Split, settings: ExtractionSettings
) -> Path:
    """Return where the features of a split lie, by all that they depend on."""
    key = [FORMAT, encoder.digest, str(encoder.dtype), source.split_digest(split)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return settings.cache_dir.expanduser() / "features" / f"{split.name}-{digest[:24]}"


# ---- Pieces --------------------------------------------------------------------------------------


def _pieces(num: int) -> list[range]:
    return [range(start, min(start + PIECE_ROWS, num)) for start in range(0, num, PIECE_ROWS)]


def _piece_file(parts: Path, kind: str, number: int) -> Path:
    return parts / f"{kind}_{number:08d}.npz"


def _missing(parts: Path, kind: str, num: int, world: World) -> list[int]:
    """Return the pieces that this rank has to compute."""
    mine = range(world.rank, len(_pieces(num)), world.size)
    return [number for number in mine if not _piece_file(parts, kind, number).is_file()]


def num_rows(split: Split, world: World) -> int:
    """Return how many rows of a split this rank computes."""
    return sum(map(len, _pieces(len(split))[world.rank :: world.size]))


def _compute_pictures(
    encoder: Encoder,
    source: Source,
    split: Split,
    parts: Path,
    world: World,
    settings: ExtractionSettings,
    advance: Callable[[int], None],
) -> None:
    pieces = _pieces(len(split))
    missing = _missing(parts, _IMAGE, len(split), world)
    advance(num_rows(split, world) - sum(len(pieces[number]) for number in missing))
    batches = [(number, rows) for number in missing for rows in _batches(pieces[number], settings)]
    decoded = decoded_batches(
        source,
        split,
        encoder.transform,
        [rows for _, rows in batches],
        workers=settings.workers,
    )
    pairs = zip(batches, decoded, strict=True)
    for number, of_piece in groupby(pairs, key=lambda pair: pair[0][0]):
        columns = [_encode(encoder, batch) for _, batch in of_piece]
        names = sorted(set().union(*columns))
        piece = {
            name: np.concatenate([column[name] for column in columns if name in column])
            for name in names
        }
        _write(_piece_file(parts, _IMAGE, number), piece)
        advance(len(pieces[number]))


def _batches(piece: range, settings: ExtractionSettings) -> list[range]:
    size = settings.batch_size
    return [piece[start : start + size] for start in range(0, len(piece), size)]


def _encode(encoder: Encoder, batch: PictureBatch) -> Arrays:
    """Return the features of a batch, its rows, digests and faults, as arrays."""
    found: Arrays = {
        "row": batch.rows,
        "digest_row": np.array([*batch.digests], dtype=np.int64),
        "digest": np.frombuffer(b"".join(batch.digests.values()), np.uint8).reshape(
            -1, DIGEST_BYTES
        ),
        "fault_row": np.array([*batch.faults], dtype=np.int64),
        "fault": np.array([*batch.faults.values()], dtype=np.str_),
    }
    if len(batch.rows):
        for name, tensor in encoder.encode_pictures(batch.pictures).items():
            found[name] = _finite(encoder, name, tensor)
    return found


def _finite(encoder: Encoder, name: str, tensor: Tensor) -> NDArray[np.float32]:
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{encoder.name}: {name}: expected finite features, got NaN or infinity")
    values: NDArray[np.float32] = tensor.float().cpu().numpy()
    return values


def _compute_texts(
    encoder: Encoder, split: Split, parts: Path, world: World, settings: ExtractionSettings
) -> None:
    """Embed every different caption once: equal captions have equal embeddings."""
    if not encoder.has_text:
        return
    texts = _different(split.captions)
    pieces = _pieces(len(texts))
    for number in _missing(parts, _TEXT, len(texts), world):
        batches = _batches(pieces[number], settings)
        embedded = [
            _finite(encoder, "text", encoder.encode_texts([texts[i] for i in rows]))
            for rows in batches
        ]
        _write(_piece_file(parts, _TEXT, number), {"text": np.concatenate(embedded)})


def _different(captions: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(captions))


def _write(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    with replaced_atomically(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]


def _read_pieces(
    parts: Path, kind: str, num: int
) -> Iterator[tuple[range, Mapping[str, NDArray[Any]]]]:
    """Yield the pieces of a kind in order; ValueError for one that this rank does not see."""
    for number, rows in enumerate(_pieces(num)):
        file = _piece_file(parts, kind, number)
        if not file.is_file():
            raise ValueError(
                f"--cache-dir: expected a folder that all ranks see, got one without {file}"
            )
        with np.load(file, allow_pickle=False) as stored:
            yield rows, stored  # an array of it is read when it is asked for


# ---- The whole -----------------------------------------------------------------------------------


def _join(encoder: Encoder, source: Source, split: Split, parts: Path, folder: Path) -> None:
    """Write the folder of a split from its pieces, one after another."""
    num = len(split)
    valid, digests = np.zeros(num, dtype=np.bool_), np.zeros((num, DIGEST_BYTES), dtype=np.uint8)
    widths: dict[str, int] = {}
    faults: dict[str, str] = {}
    known = {"row", "digest", "digest_row", "fault", "fault_row"}
    for _, piece in _read_pieces(parts, _IMAGE, num):
        valid[piece["row"]] = True
        digests[piece["digest_row"]] = piece["digest"]
        for row, fault in zip(piece["fault_row"].tolist(), piece["fault"].tolist(), strict=True):
            faults[split.items[row].name] = fault
        new_names = [name for name in piece if name not in known and name not in widths]
        widths |= {name: piece[name].shape[1] for name in new_names}
    if not valid.any():
        name, fault = next(iter(faults.items()))
        raise ValueError(
            f"{split.name}: expected a picture that can be decoded, got none of {num}; the first: "
            f"{name}: {fault}"
        )
    with created_whole(folder) as new:
        for name, width in widths.items():
            _write_rows(new / f"{name}.npy", num, width, _whole_pieces(parts, num, name, width))
        captions = np.flatnonzero(valid[split.caption_row])
        if encoder.has_text and len(captions):
            _write_texts(new, split, captions, parts)
        columns = {
            "label": np.where(valid, split.label, -1),
            "group": split.group,
            "picture": digests,
            "valid": valid,
            "caption_row": split.caption_row[captions],
        }
        for name, column in columns.items():
            np.save(new / f"{name}.npy", column)
        meta = {
            "format": FORMAT,
            "encoder": encoder.name,
            "encoder_digest": encoder.digest,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "data": str(source.options.path),
            "data_digest": source.split_digest(split),
            "split": split.name,
            "rows": num,
            "features": sorted(widths),
            "faults": faults,
        }
        write_atomically(new / META, (json.dumps(meta, indent=2) + "\n").encode())


def _whole_pieces(parts: Path, num: int, name: str, width: int) -> Iterator[NDArray[np.float32]]:
    """Yield one feature piece by piece, with zeros for the rows that could not be decoded."""
    for rows, piece in _read_pieces(parts, _IMAGE, num):
        whole = np.zeros((len(rows), width), dtype=np.float32)
        if name in piece:
            whole[piece["row"] - rows.start] = piece[name]
        yield whole


def _write_texts(new: Path, split: Split, captions: Index, parts: Path) -> None:
    """Write text.npy, a row a caption, of the embeddings of the different captions."""
    texts = _different(split.captions)
    number = {text: i for i, text in enumerate(texts)}
    place = np.array([number[split.captions[i]] for i in captions], dtype=np.int64)
    blocks = (piece["text"] for _, piece in _read_pieces(parts, _TEXT, len(texts)))
    first = next(blocks)
    width = first.shape[1]

    def all_blocks() -> Iterator[NDArray[np.float32]]:
        yield first
        yield from blocks

    different = new / "different_texts.npy"
    _write_rows(different, len(texts), width, all_blocks())
    rows = FileRows(different)
    starts = range(0, len(place), PIECE_ROWS)
    gathered = (rows[place[start : start + PIECE_ROWS]] for start in starts)
    _write_rows(new / "text.npy", len(place), width, gathered)
    different.unlink()


def _write_rows(file: Path, num: int, width: int, blocks: Iterator[NDArray[np.float32]]) -> None:
    """Write an array [num, width] fp32 as .npy, block by block."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (num, width)}
    with file.open("wb") as opened:
        np.lib.format.write_array_header_1_0(opened, header)
        for block in blocks:
            opened.write(np.ascontiguousarray(block, dtype="<f4").tobytes())
