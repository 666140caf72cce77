"""Which compiled modules are loaded, and what is said where they are missing."""

from __future__ import annotations

import pytest
import torch

from m3i_fast.ops import library


def load(monkeypatch: pytest.MonkeyPatch, *, built: set[str], cuda: str | None) -> list[str]:
    loaded: list[str] = []
    monkeypatch.setattr(library, "find_spec", lambda name: name if name in built else None)
    monkeypatch.setattr(library, "import_module", loaded.append)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    library._load()
    return loaded


CPU, CUDA = "m3i_fast._C", "m3i_fast._C_cuda"


def test_cuda_kernels_are_loaded_where_torch_has_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, built={CPU, CUDA}, cuda="13.0") == [CPU, CUDA]


def test_cuda_kernels_stay_away_from_a_cpu_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, built={CPU, CUDA}, cuda=None) == [CPU]


def test_cuda_kernels_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, built={CPU}, cuda="13.0") == [CPU]


def test_missing_build_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ImportError,
        match=r"m3i_fast\._C: expected the compiled operators, got none; .*: pip install .* -e \.",
    ):
        load(monkeypatch, built=set(), cuda=None)
