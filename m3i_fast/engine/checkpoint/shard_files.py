"""Files of a checkpoint: torch's distributed checkpoint over safetensors, a file a rank.

torch plans which rank writes which shard of which tensor, and reads the shards again on any number
of ranks. Its own writer of safetensors copies all bytes while it holds the GIL (1.1 s for 512 MiB,
`m3i-fast bench checkpoint`), which stops a training step, so the same files are written here.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from m3i_fast.durable_files import Digest, make_directories, sync, write_durably

PARTS = ("model", "optimizer")  # folders; a tensor's key begins with the name of its folder
STATE = "state"
MANIFEST = "manifest.json"
VERSION = 1
SUFFIX = ".safetensors"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Content:
    """What one rank writes; keys of tensors are `model/NAME` or `optimizer/NAME/FIELD`."""

    tensors: Mapping[str, Tensor]
    """The live tensors; torch plans by their sharding, and their values are not read."""
    values: Mapping[str, Tensor]
    """The values under the same keys: this rank's local shard of each, on any device."""
    state: dict[str, Any]
    """State of this rank; JSON-able."""


def write_shards(
    directory: Path,
    content: Content,
    *,
    step: int,
    group: dist.ProcessGroup | None,
    commit: Callable[[], None],
) -> None:
    """Create `directory`, write all files into it, then call `commit` on the first rank.

    All ranks of `group` call this. An error on any rank is raised on all of them, and nothing is
    committed.
    """
    planner, writer = _Planner(content.values), _Writer(directory, content.state, step, commit)
    if group is None:
        planner.set_up_planner(dict(content.tensors), is_coordinator=True)
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
        writer.finish(metadata, [writer.write_data(plan, planner).wait()])
        return
    try:
        dcp.save(dict(content.tensors), storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:  # derives from BaseException alone
        reasons = (f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items())
        raise OSError(f"step {step}: no checkpoint written: {'; '.join(reasons)}") from None


class _Planner(DefaultSavePlanner):
    """Plans by the live tensors and resolves to the values of their copies."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values = values

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the copied value of a planned tensor."""
        return self._values[index.fqn]


class _Writer(StorageWriter):
    """Writes the files of this rank, and on the first rank the directories and the manifest."""

    def __init__(
        self, directory: Path, state: dict[str, Any], step: int, commit: Callable[[], None]
    ) -> None:
        self._directory, self._state, self._step, self._commit = directory, state, step, commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no state to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Create the directories and name each rank's files, on the first rank, before writing."""
        make_directories(self._directory)
        for folder in (*PARTS, STATE):
            (self._directory / folder).mkdir()
        names = [f"{rank + 1:05d}-of-{len(plans):05d}" for rank in range(len(plans))]
        return [replace(plan, storage_data=n) for plan, n in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files durably; the results hold their size and SHA-256."""
        written: dict[str, Digest] = {}
        for part in PARTS:
            items = [item for item in plan.items if item.index.fqn.startswith(f"{part}/")]
            if items:
                name = f"{part}/{plan.storage_data}{SUFFIX}"
                chunks = _safetensors(items, planner)
                written[name] = write_durably(self._directory / name, chunks)
        name = f"{STATE}/{plan.storage_data}.json"
        written[name] = write_durably(self._directory / name, [json.dumps(self._state).encode()])
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [WriteResult(MetadataIndex(name), d.size, d) for name, d in written.items()]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest on the first rank, after all ranks have written, and commit."""
        files = {r.index.fqn: asdict(r.storage_data) for rank in results for r in rank}
        manifest = {
            "version": VERSION,
            "step": self._step,
            "num_ranks": len(results),
            "files": dict(sorted(files.items())),
        }
        write_durably(self._directory / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        for folder in (*PARTS, STATE, ""):
            sync(self._directory / folder)
        self._commit()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any id: the directory is given to the constructor."""
        return True


def _safetensors(items: list[WriteItem], planner: SavePlanner) -> Iterator[bytes | memoryview]:
    """Yield a file's bytes: the header, then one tensor after another."""
    # The widest types first, as safetensors' own writer does: all stay aligned.
    items = sorted(items, key=lambda i: (-_data(i).properties.dtype.itemsize, i.index.fqn))
    header: dict[str, Any] = {}
    offsets, end = {}, 0
    for item in items:
        name, data = item.index.fqn.partition("/")[2], _data(item)
        dtype, shape = data.properties.dtype, list(data.chunk.sizes)
        if dtype not in _DTYPES:
            raise ValueError(
                f"{name}: expected a dtype that safetensors has a name for, got {dtype}"
            )
        if name in header:
            raise ValueError(f"{name}: expected one shard of it on a rank, got several")
        begin, end = end, end + data.chunk.sizes.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        offsets[name] = {"saved_offsets": list(data.chunk.offsets)}
    header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0"}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor) and tensor.shape == _data(item).chunk.sizes
        yield memoryview(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # type: ignore[arg-type]
        )


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None, item
    return item.tensor_data


# ---- Reading -------------------------------------------------------------------------------------


_DAMAGED = (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors that torch raises for a header that differs from those it writes."""


class Shards:
    """The tensors in safetensors files, each whole in one file or sharded over several."""

    def __init__(self, files: Sequence[Path], path: Path) -> None:
        """Read the headers; raise ValueError naming what is damaged.

        path: names several files in errors.
        """
        self.path, self._files = files[0] if len(files) == 1 else path, files
        try:
            stored = _Reader(files).read_metadata().state_dict_metadata
        except _DAMAGED as error:
            raise ValueError(f"{self.path}: damaged: {error!r}") from None
        self.sizes, self.dtypes = {}, {}
        for name, entry in stored.items():
            assert isinstance(entry, TensorStorageMetadata), name
            self.sizes[name], self.dtypes[name] = entry.size, entry.properties.dtype

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill every target in place, a DTensor's local shard alone, without another rank's help.

        Raises ValueError naming the tensor with both shapes, or the file that is damaged.
        """
        for name, target in targets.items():
            if self.sizes[name] != target.shape:
                raise ValueError(
                    f"{self.path}: {name}: expected {list(target.shape)}, got "
                    f"{list(self.sizes[name])}"
                )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with warnings.catch_warnings():  # of reading without other ranks, which is intended
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                reader = _Reader(self._files)
                dcp.load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:  # derives from BaseException alone
            reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
            raise ValueError(f"{self.path}: damaged: {reasons}") from None

    def read(self, prefix: str | tuple[str, ...] = "") -> dict[str, Tensor]:
        """Return the whole tensors whose names begin with `prefix`, or one of them, on the CPU."""
        tensors = {
            name: torch.empty(size, dtype=self.dtypes[name])
            for name, size in self.sizes.items()
            if name.startswith(prefix)
        }
        self.read_into(tensors)
        return tensors


class _Reader(dcp.HuggingFaceStorageReader):
    """torch's reader, restricted to given files; torch's own reads all that end in .safetensors."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__("")
        self.fs = _TheseFiles(files)


class _TheseFiles(FileSystem):
    """A file system in which every directory lists the given files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """List the given files."""
        return [str(file) for file in self._files]
