"""A GPU of compute capability 9.0, as far as Transformer Engine's constructors ask for one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
)


@pytest.fixture(autouse=True)
def gpu_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of the device, and nothing that would compute on it."""
    answers = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_properties": H100,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
