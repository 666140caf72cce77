"""Files of weights that we write, read by safetensors and by other users of the machine."""

from __future__ import annotations

import os
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import safetensors.torch
import torch

from m3i_fast import durable_files
from m3i_fast.export.weight_files import read_weights, write_weights


def test_a_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    """A folder that is uploaded or shared can be read there: safetensors' own file is 0600."""
    before = os.umask(0o027)
    try:
        write_weights(tmp_path / "a.safetensors", {"a": torch.arange(3)}, of="a test")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_not_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_weights(tmp_path / "absent" / "a.safetensors", {"a": torch.zeros(1)})
    assert not any(tmp_path.iterdir())


def test_a_torchscript_archive_is_named_and_its_remedy_works(tmp_path: Path) -> None:
    """OpenAI's own files of CLIP are such."""
    file = tmp_path / "ViT-B-32.pt"
    torch.jit.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2)).save(file)
    with pytest.raises(
        ValueError, match="got a TorchScript archive, which holds a program"
    ) as told:
        read_weights(file)
    remedy = str(told.value).rpartition(": ")[2].replace("weights.pt", str(tmp_path / "weights.pt"))
    exec(remedy, {"torch": torch})
    assert set(read_weights(tmp_path / "weights.pt")) == {"weight", "bias"}


def test_a_compressed_file_may_not_unpack_to_more_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, packed = tmp_path / "stored.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(2**19)}, stored)  # 2 MiB
    with ZipFile(stored) as source, ZipFile(packed, "w", ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < 10_000 and read_weights(packed)["a"].shape == (2**19,)
    monkeypatch.setattr(durable_files, "MOST_UNPACKED", 2**20)
    told = r"packed\.pt: unpacks to 0\.00 GiB or more, expected at most 0\.00: .* torch\.save"
    with pytest.raises(durable_files.UnpacksToTooMuch, match=told):
        read_weights(packed)
    assert set(read_weights(stored)) == {"a"}  # as large as its file: nothing is hidden
