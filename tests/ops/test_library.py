"""Which compiled modules are loaded, and what is said where they are missing."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from m3i_fast.ops import add_layer_norm, dcnv3, gaussian, library


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


X = torch.ones(1, 4, 4, 8)
OPS = {
    "add_layer_norm": lambda x: add_layer_norm(x, None, torch.ones(8), torch.zeros(8))[1],
    "gaussian": lambda x: gaussian(x, torch.ones(1, 4, 4, 8)),
    "dcnv3": lambda x: dcnv3(
        x,
        torch.zeros(1, 4, 4, 18),
        torch.zeros(1, 4, 4, 9),
        groups=1,
        kernel_size=3,
        stride=1,
        padding=1,
        dilation=1,
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op: str) -> None:
    """Without a rule for it torch returns a tangent of zeros."""
    told = rf"{op}: expected to be differentiated by backward, got a tangent"
    with pytest.raises(RuntimeError, match=told):
        torch.func.jvp(OPS[op], (X,), (X,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=told):
        OPS[op](forward_ad.make_dual(X, X))
    with forward_ad.dual_level():
        assert OPS[op](X).isfinite().all()  # no tangent of its own
