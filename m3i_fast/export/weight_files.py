"""Files of weights: others' are read without running any code of theirs, ours are safetensors."""

from __future__ import annotations

import pickle
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from m3i_fast.durable_files import expect_unpacked, replaced_atomically

WEIGHTS = "model.safetensors"
"""Name of the file in a folder that is written for timm, or for `m3i_fast.load`."""
CONTAINERS = ("model", "module", "state_dict", "teacher")
"""Keys below which training programs put the weights of a checkpoint."""
MAX_NAMED = 20


def read_weights(path: Path) -> Mapping[str, Any]:
    """Return what a file of weights holds, on the CPU: .safetensors, else of torch.save.

    The latter is read with weights_only=True. Raises FileNotFoundError where there is no such file,
    and ValueError for one that is damaged or holds more than tensors and plain values, such as a
    TorchScript archive.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of weights, found none")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _expect_plain_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected tensors and plain values only; if you trust it, write what "
            f"torch.load(..., weights_only=False) returns to a .safetensors file: {error}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path}: expected a file of weights, got a damaged one: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def _expect_plain_archive(path: Path) -> None:
    """Raise ValueError for a zip archive of TorchScript, or one that unpacks to too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        return  # torch.load reads other files, or names what is wrong
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise ValueError(
            f"{path}: expected tensors by name, got a TorchScript archive, which holds a "
            "program too (OpenAI's own files of CLIP are such); if you trust it, write its "
            f"weights to a file: torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), "
            "'weights.pt')"
        )
    unpacked = sum(member.file_size for member in members)
    expect_unpacked(path, unpacked, None, "write it anew with torch.save, which does not compress")


def write_weights(path: Path, tensors: Mapping[str, Tensor], **more: str) -> None:
    """Write tensors by name to a file of safetensors, which is whole or absent.

    more: what its metadata say besides that the tensors are torch's. Raises OSError where the disk
    is full.
    """
    with replaced_atomically(path) as temporary:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # that of any file; safetensors' is 0600
        try:
            safetensors.torch.save_file(dict(tensors), temporary, metadata={"format": "pt", **more})
        except SafetensorError as error:
            raise OSError(f"{path}: not written: {error}") from error
        temporary.chmod(mode)


def tensors_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file by name, from the first of `CONTAINERS` where it has one.

    Raises ValueError naming what is no tensor.
    """
    for container in CONTAINERS:
        if isinstance(content.get(container), Mapping):
            content = content[container]
            break
    other = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"weights: expected tensors by name, got others: {some(other)}")
    return dict(content)


def some(names: Any) -> str:
    """Return names, the first ones of many, as text."""
    named = list(names)
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return ", ".join(named[:MAX_NAMED]) + more
