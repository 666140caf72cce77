"""torch.export and AOTInductor compute what a loaded model does, with our operators kept."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.engine.trainer import Trainer
from m3i_fast.inference.graphs.folder import save_graphs
from m3i_fast.recipes import demo_internimage, shrink
from tests.export.models_to_export import (
    FAST_AND_SLOW,
    assert_same,
    expected_of,
    make_model,
    pixels_for,
)
from tests.shared.engine.small_run import TEXT, as_clip, small_run

PAGE = Path(__file__).parents[2] / "docs/start/deploy.md"


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = small_run(dataset, num_steps=1, log_every=1, checkpoint_every=1, num_threads=1)
    out = tmp_path_factory.mktemp("torch-export") / "run"
    Trainer(cfg, out).train()
    return out


def operators(program: torch.export.ExportedProgram) -> set[str]:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return {str(node.target) for node in calls if str(node.target).startswith("m3i.")}


@pytest.mark.parametrize("architecture", FAST_AND_SLOW)
def test_the_exported_program_computes_the_tokens(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    written = save_graphs(model, tmp_path / "out", "torch-export")
    assert written == ["image.pt2", "preprocess.json"]
    program = torch.export.load(tmp_path / "out" / "image.pt2")
    expected = {"m3i.dcnv3.default"} if architecture.startswith("intern") else set()
    assert operators(program) == expected
    image = program.module()
    for count in (1, 2, 5):
        pixels = pixels_for(model, count)
        assert_same(image(pixels), expected_of(model, pixels))


def test_a_run_is_exported_with_its_heads_and_texts(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo-pt2"
    assert main(["export", str(run), str(out), "--to", "torch-export"]) == 0
    names = ["image.pt2", "preprocess.json", "text.pt2"]
    assert sorted(path.name for path in out.iterdir()) == names
    model = m3i_fast.load(run, device="cpu", dtype=torch.float32)
    pixels = pixels_for(model, 3)
    ids = model.tokenizer(["a red apple", "one " * 40, ""])
    expected = expected_of(model, pixels)
    assert list(expected) == ["tokens", "pooled", "image_embedding", "logits"]
    assert_same(torch.export.load(out / "image.pt2").module()(pixels), expected)
    text = torch.export.load(out / "text.pt2").module()
    assert_same(text(ids), {"text_embedding": model.encode_text(ids)})

    torch.save({"pixels": pixels, "tokens": expected["tokens"]}, tmp_path / "expected.pt")
    alone = """
import sys
import torch

program = torch.export.load("demo-pt2/image.pt2")
kept = torch.load("expected.pt", weights_only=True)
tokens = program.module()(kept["pixels"])["tokens"]
torch.testing.assert_close(tokens, kept["tokens"], rtol=0, atol=1e-4)
assert not [name for name in sys.modules if name.startswith("m3i_fast")]
"""
    done = subprocess.run(
        [sys.executable, "-c", alone], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_towers_as_clips_compute_the_same(dataset: Path, tmp_path: Path) -> None:
    cfg = as_clip(small_run(dataset, num_steps=1, log_every=1, checkpoint_every=1, num_threads=1))
    Trainer(cfg, tmp_path / "run").train()
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--to", "torch-export"]) == 0
    model = m3i_fast.load(tmp_path / "run", device="cpu", dtype=torch.float32)
    pixels = pixels_for(model, 3)
    image = torch.export.load(out / "image.pt2").module()
    assert_same(image(pixels), expected_of(model, pixels))
    text = torch.export.load(out / "text.pt2").module()
    for texts in (["a red apple", "", "one " * 40, "snowman"], ["a red apple", "a ship"]):
        ids = model.tokenizer(texts)
        assert_same(text(ids), {"text_embedding": model.encode_text(ids)})


def test_what_cannot_be_compiled_here_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run), str(tmp_path / "out"), "--to", "aoti"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*words, "--device", "cuda"]) == 2
    assert "--device cuda: expected a GPU to compile for" in capsys.readouterr().err
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):  # monkeypatch would leave none behind
        assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "expected a C++ compiler" in said and "--to torch-export needs none" in said
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # below that of the weights
    try:
        assert main(["export", str(run), str(out), "--to", "torch-export"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


# ---- AOTInductor ---------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize(
    "architecture", ["dinov3", pytest.param("internimage_h", marks=pytest.mark.nightly)]
)
def test_the_package_computes_the_tokens(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = make_model(architecture)
    assert save_graphs(model, tmp_path / "out", "aoti") == ["image.pt2", "preprocess.json"]
    compiled = torch._inductor.aoti_load_package(str(tmp_path / "out" / "image.pt2"))
    for count in (1, 2, 5):
        pixels = pixels_for(model, count)
        assert_same(compiled(pixels), expected_of(model, pixels))


@pytest.mark.matrix
def test_the_example_of_the_docs_runs_on_a_run_of_internimage(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cfg = shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT)
    cfg = replace(cfg, num_steps=1, log_every=1, checkpoint_every=1, num_threads=1)
    Trainer(cfg, tmp_path / "run").train()
    for to, folder in {"torch-export": "demo-pt2", "aoti": "demo-aoti"}.items():
        assert main(["export", "run", folder, "--to", to]) == 0
    (code,) = re.findall(
        r"runs it .*?-->\n```python\n(import torch\n.*?)```", PAGE.read_text(), re.S
    )
    size = cfg.vision.image_size
    assert "128, 128" in code and size != 128
    found: dict[str, Any] = {}
    exec(compile(code.replace("128, 128", f"{size}, {size}"), str(PAGE), "exec"), found)
    model = m3i_fast.load("run", device="cpu", dtype=torch.float32)
    pixels = pixels_for(model, 3)
    for name in ("image", "compiled"):
        assert_same(found[name](pixels), expected_of(model, pixels))
    text = torch._inductor.aoti_load_package("demo-aoti/text.pt2")
    ids = model.tokenizer(["a red apple", "one " * 40])
    assert_same(text(ids), {"text_embedding": model.encode_text(ids)})
    shutil.rmtree(tmp_path / "demo-aoti")
