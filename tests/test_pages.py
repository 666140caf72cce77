"""The README's Python is run as it stands there, and links of README and docs lead somewhere."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from PIL import Image

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.verify import verify
from tests.test_new_method import SMALL

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


@pytest.fixture
def namespace(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks leave behind, each run after the other."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        Path("pictures", name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(Path("pictures", name, f"{i}.png"))
    assert main(["train", "demo", "--out", "runs/demo", f"--data.path={dataset}", *SMALL]) == 0
    found: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(README), "exec"), found)
    return found


def test_the_python_of_the_readme_does_what_it_says(namespace: dict[str, Any]) -> None:
    train = verify(Path("data/pets"), decode=True).splits["train"]
    assert (train.num_samples, train.num_captions, train.num_labels) == (6, 6, 6)
    model, cells, embedding = (namespace[name] for name in ("model", "cells", "embedding"))
    assert cells.shape == (8, 64, model.encoder.dim)
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(8))
    a, b = (namespace[name].detach() for name in "ab")
    torch.testing.assert_close(namespace["loss"].detach(), ClipLoss()(a, b, torch.tensor(10.0)))
    assert namespace["a"].grad.abs().sum() > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert links or page != README
