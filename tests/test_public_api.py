"""The names of `m3i_fast`: imported where they are used, and typed for who uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import m3i_fast

ROOT = Path(__file__).resolve().parent.parent
LAZY = """
import sys
import m3i_fast
assert set(m3i_fast.__all__) <= set(dir(m3i_fast))
loaded = [name for name in sys.modules if name.split(".")[0] in ("torch", "numpy")]
loaded += [name for name in sys.modules if name.startswith("m3i_fast.")]
assert not loaded, loaded
assert m3i_fast.ops.boltzmann.__name__ == "boltzmann"
"""
USER = """
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import m3i_fast
from m3i_fast import ops
from m3i_fast.recipes import demo, demo_method, recipes

model: m3i_fast.Model = m3i_fast.load("runs/demo", which="ema", device="cpu", dtype=torch.bfloat16)
image: torch.Tensor = model.encode_image([Image.open("apple.png")], normalize=True)
image = model.encode_image(Image.open("apple.png"))
text: torch.Tensor = model.encode_text(["a red apple"], normalize=True)
features: torch.Tensor = model.forward_features(torch.zeros(1, 3, 64, 64))
pixels: torch.Tensor = model.transform(Image.open("apple.png"))
ids: torch.Tensor = model.tokenizer(["a red apple"])
names: tuple[str, ...] = model.class_names
loss: torch.Tensor = m3i_fast.ops.boltzmann(image, text, torch.tensor(10.0))
dense: torch.Tensor = ops.gaussian(image, text, normalise=True)
config: m3i_fast.TrainConfig = recipes()["vit_s"]()
config = demo(data=Path("data/mine"), seed=1)
config = replace(demo_method("clip"), num_steps=config.num_steps + 1)
outcome: m3i_fast.Outcome = m3i_fast.train(config, "runs/mine")
version: str = m3i_fast.__version__
step: int = outcome.step
"""
WRONG = {
    'm3i_fast.load("runs/demo", which="best")': "arg-type",
    'm3i_fast.load("runs/demo").encode_text(3)': "arg-type",
    "numbers: tuple[int, ...] = model.class_names": "assignment",
    "m3i_fast.lode": "attr-defined",
    "demo(seed=None)": "arg-type",
    "ops.boltzmann(image, text)": "call-arg",
    "recipes()[3]": "index",
}


def test_importing_the_package_imports_nothing_else() -> None:
    subprocess.run([sys.executable, "-c", LAZY], check=True)


def test_each_public_name_is_there_and_no_other() -> None:
    for name in m3i_fast.__all__:
        assert getattr(m3i_fast, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'm3i_fast' has no attribute 'lode'"):
        m3i_fast.lode  # noqa: B018


@pytest.mark.matrix
def test_a_users_file_is_typed_strictly(tmp_path: Path) -> None:
    """Laid out as it is installed, with the marker by which type checkers read it."""
    package = tmp_path / "site" / "m3i_fast"
    package.mkdir(parents=True)
    for entry in [*(ROOT / "m3i_fast").iterdir(), ROOT / "pipelines", ROOT / "benchmarks"]:
        (package / entry.name).symlink_to(entry)
    assert (package / "py.typed").is_file()
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(USER)
    bad.write_text(USER + "".join(f"{line}\n" for line in WRONG))
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", good, bad],
        cwd=tmp_path,
        env={"MYPYPATH": "site", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    found = [line for line in checked.stdout.splitlines() if ": error:" in line]
    assert all(line.startswith("bad.py:") for line in found), checked.stdout
    assert [line.rpartition("[")[2].rstrip("]") for line in found] == [*WRONG.values()], found
