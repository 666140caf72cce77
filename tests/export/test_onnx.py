"""onnxruntime computes what a loaded model does, from the same pictures."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.inference.graphs.folder import save_graphs
from m3i_fast.inference.graphs.formats import OPSET, write_onnx
from m3i_fast.inference.graphs.modules import ImageGraph, capture
from m3i_fast.ops import dcnv3
from tests.export.models_to_export import (
    ARCHITECTURES,
    FAST_AND_SLOW,
    assert_same,
    expected_of,
    make_model,
    pixels_for,
)
from tests.shared.engine.small_run import TEXT, as_clip, small_run
from tests.shared.ops.dcnv3_cases import Config, make

PAGE = Path(__file__).parents[2] / "docs/start/deploy.md"


def trained(cfg: TrainConfig, out: Path) -> Path:
    cfg = replace(cfg, num_steps=1, log_every=1, checkpoint_every=1, num_threads=1)
    Trainer(cfg, out).train()
    return out


def run_graph(file: Path, inputs: Tensor) -> dict[str, Any]:
    """Return the outputs of a file by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {given.name: inputs.numpy()}), strict=True))


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(small_run(dataset), tmp_path_factory.mktemp("onnx") / "run")


@pytest.fixture(scope="module")
def model(run: Path) -> m3i_fast.Model:
    return m3i_fast.load(run, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "demo-onnx"
    assert main(["export", str(run), str(out), "--to", "onnx"]) == 0
    return out


# ---- Encoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAST_AND_SLOW)
def test_onnxruntime_computes_the_tokens(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    assert save_graphs(model, tmp_path / "out", "onnx") == ["image.onnx", "preprocess.json"]
    for count in (1, 2, 5):
        pixels = pixels_for(model, count)
        assert_same(run_graph(tmp_path / "out" / "image.onnx", pixels), expected_of(model, pixels))
    stored = onnx.load(tmp_path / "out" / "image.onnx")
    assert {node.domain for node in stored.graph.node} == {""}
    assert not stored.functions
    assert [(opset.domain, opset.version) for opset in stored.opset_import] == [("", OPSET)]
    (given,) = stored.graph.input
    size = model.transform.preprocessing.size
    shape = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert (given.name, shape) == ("pixels", ["batch", 3, size, size])
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    samples = sum(node.op_type == "GridSample" for node in stored.graph.node)
    assert samples == (sum(ARCHITECTURES[architecture].depths) if "intern" in architecture else 0)


class Convolution(nn.Module):
    """The operator by itself as a graph of x, with the same offsets and mask for every image."""

    input_names, output_names = ("x",), ("out",)
    offset: Tensor
    mask: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        (self.x, offset, mask), _ = make(config)
        self.register_buffer("offset", offset)
        self.register_buffer("mask", mask)
        self.options = config.options

    def example(self) -> Tensor:
        return self.x.repeat(2, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = (of.repeat(x.shape[0], 1, 1, 1) for of in (self.offset, self.mask))
        return dcnv3(x, offset, mask, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": (3, 5), "stride": (2, 1), "padding": (2, 3), "dilation": (1, 2)},
        {"remove_center": True, "softmax": True, "offset_scale": 0.7},
        {"kernel": (2, 4), "padding": (0, 2), "reach": 5.0},
    ],
)
def test_the_convolution_has_all_its_options(options: dict[str, Any], tmp_path: Path) -> None:
    graph = Convolution(Config(batch=1, **options))
    write_onnx(capture(graph), graph, tmp_path / "op.onnx")  # type: ignore[arg-type]
    x = torch.randn(3, *graph.x.shape[1:])
    got = run_graph(tmp_path / "op.onnx", x)
    assert_same(got, {"out": graph(x)})


def test_large_weights_go_to_a_file_beside(tmp_path: Path) -> None:
    model = make_model("vit")
    graph = ImageGraph(model)
    write_onnx(capture(graph), graph, tmp_path / "image.onnx", one_file=10_000)
    assert (tmp_path / "image.onnx.data").stat().st_size > 50_000
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    pixels = pixels_for(model, 2)
    assert_same(run_graph(moved / "image.onnx", pixels), expected_of(model, pixels))


# ---- Heads and texts of a run --------------------------------------------------------------------


def test_the_heads_are_those_of_the_run(model: m3i_fast.Model, folder: Path) -> None:
    for count in (1, 3):
        pixels = pixels_for(model, count)
        expected = expected_of(model, pixels)
        assert list(expected) == ["tokens", "pooled", "image_embedding", "logits"]
        assert_same(run_graph(folder / "image.onnx", pixels), expected)


def test_texts_are_embedded_alike_however_long(model: m3i_fast.Model, folder: Path) -> None:
    texts = ["a red apple", "", "one " * 40, "The Ship &amp; the sea", "snowman"]
    ids = model.tokenizer(texts)
    for rows in (ids, ids[2:3], ids[:1]):
        expected = {"text_embedding": model.encode_text(rows)}
        if len(rows) > 1:
            assert_same(run_graph(folder / "text.onnx", rows), expected)
        got = torch.from_numpy(run_graph(folder / "text.onnx", rows)["text_embedding"])
        torch.testing.assert_close(got, expected["text_embedding"], rtol=0, atol=1e-4)
    garbage = ids.clone()
    garbage[0, (ids[0] == 0)] = 7  # after the end
    same = run_graph(folder / "text.onnx", garbage)["text_embedding"]
    np.testing.assert_allclose(same, run_graph(folder / "text.onnx", ids)["text_embedding"])


@pytest.mark.parametrize("mlp", ["quick_gelu", pytest.param("gelu_tanh", marks=pytest.mark.matrix)])
def test_towers_as_clips_compute_the_same(mlp: Any, dataset: Path, tmp_path: Path) -> None:
    """A norm before the blocks, causal texts that are read at their end, a head of one layer."""
    run = trained(as_clip(small_run(dataset), mlp), tmp_path / "run")
    model = m3i_fast.load(run, device="cpu", dtype=torch.float32)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "onnx"]) == 0
    pixels = pixels_for(model, 3)
    assert_same(run_graph(tmp_path / "out" / "image.onnx", pixels), expected_of(model, pixels))
    ids = model.tokenizer(["a red apple", "", "one " * 40, "The Ship &amp; the sea", "snowman"])
    expected = {"text_embedding": model.encode_text(ids)}
    assert_same(run_graph(tmp_path / "out" / "text.onnx", ids), expected)
    garbage = ids.clone()
    garbage[ids == 0] = 7  # after the end
    assert_same(run_graph(tmp_path / "out" / "text.onnx", garbage), expected)


def test_what_goes_in_and_comes_out_is_told(model: m3i_fast.Model, folder: Path) -> None:
    told = json.loads((folder / "preprocess.json").read_text())
    made = model.transform.preprocessing
    assert (told["size"], told["filter"], told["antialias"]) == (made.size, "cubic", True)
    assert (told["mean"], told["std"]) == ([*made.mean], [*made.std])
    assert told["normalised_in_graph"] is True
    assert told["class_names"] == [*model.class_names]
    assert told["context_length"] == TEXT.context_length
    assert told["end_token"] == model.tokenizer("a")[0].max()
    assert told["logit_scale"] == pytest.approx(model.logit_scale.item())
    assert told["logit_bias"] is None


def test_the_example_of_the_docs_computes_the_features(
    model: m3i_fast.Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy, Pillow and onnxruntime alone, from files of pictures of any size and mode."""
    (tmp_path / "pictures").mkdir()
    draw = np.random.default_rng(0)
    smooth = draw.integers(0, 256, (9, 7, 3), np.uint8)
    pictures = {
        "a.png": Image.fromarray(smooth).resize((131, 90), Image.Resampling.BICUBIC),
        "b.png": Image.fromarray(draw.integers(0, 256, (20, 21), np.uint8)),  # grown
        "c.png": Image.fromarray(draw.integers(0, 256, (model.transform.preprocessing.size,) * 2)
                                 .astype(np.uint8)),
        "d.jpg": Image.fromarray(smooth).resize((300, 411)),
    }  # fmt: skip
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, picture in pictures.items():
        options = {"exif": turned} if name == "d.jpg" else {}
        picture.save(tmp_path / "pictures" / name, **options)
    shutil.copytree(folder, tmp_path / "demo-onnx")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"runs it .*?-->\n```python\n(import json.*?)```", PAGE.read_text(), re.S)
    imports = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imports == {"json", "pathlib", "numpy", "onnxruntime", "PIL"}
    found: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    opened = [Image.open(tmp_path / "pictures" / name) for name in sorted(pictures)]
    assert torch.equal(torch.from_numpy(found["pixels"]), model.transform.views(opened))
    assert_same(found["outputs"], expected_of(model, model.transform.views(opened)))
    normalised = torch.stack([model.transform(picture) for picture in opened])
    torch.testing.assert_close(
        torch.from_numpy(found["vectors"]), model(normalised), rtol=0, atol=1e-4
    )
    for picture, pixels in zip(opened, found["pixels"], strict=True):
        upright = ImageOps.exif_transpose(picture).convert("RGB")
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        square = upright.crop((left, top, left + side, top + side))
        by_pillow = square.resize(pixels.shape[1:], Image.Resampling.BICUBIC)
        apart = np.asarray(by_pillow).transpose(2, 0, 1).astype(int) - pixels
        assert abs(apart).max() <= 2
    best = model.classify(opened).argmax(1)
    assert found["classes"] == [model.class_names[i] for i in best]


# ---- The verb ------------------------------------------------------------------------------------


def test_the_average_and_runs_without_captions_have_no_texts(
    run: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "ema"
    caplog.set_level(logging.INFO)
    assert main(["export", str(run), str(out), "--to", "onnx", "--which", "ema"]) == 0
    assert "no texts: the moving average has no heads" in " ".join(capsys.readouterr().out.split())
    assert not [r for r in caplog.records if r.name.startswith("onnx")]  # hundreds of details
    average = m3i_fast.load(run, which="ema", device="cpu", dtype=torch.float32)
    pixels = pixels_for(average, 2)
    assert_same(run_graph(out / "image.onnx", pixels), expected_of(average, pixels))
    assert sorted(path.name for path in out.iterdir()) == ["image.onnx", "preprocess.json"]

    cfg = small_run(dataset)
    terms = tuple(term for term in cfg.objective.terms if term.target != "caption")
    cfg = replace(cfg, objective=replace(cfg.objective, terms=terms))
    other = trained(cfg, tmp_path / "no captions")
    assert main(["export", str(other), str(tmp_path / "out"), "--to", "onnx"]) == 0
    assert "trained no captions" in " ".join(capsys.readouterr().out.split())
    loaded = m3i_fast.load(other, device="cpu", dtype=torch.float32)
    expected = expected_of(loaded, pixels_for(loaded, 2))
    assert list(expected) == ["tokens", "pooled", "logits"]
    torch.manual_seed(1)
    pixels = pixels_for(loaded, 3)
    assert_same(run_graph(tmp_path / "out" / "image.onnx", pixels), expected_of(loaded, pixels))
    assert "logit_scale" not in json.loads((tmp_path / "out" / "preprocess.json").read_text())


def test_without_its_libraries_their_extra_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "onnx"]) == 2
    assert 'onnxscript is not installed: pip install "m3i-fast[onnx]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_device_is_for_what_is_compiled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [str(run), str(tmp_path / "out")]
    assert main(["export", *out, "--to", "onnx", "--device", "cuda"]) == 2
    assert "--device: expected with --to aoti alone, got --to onnx" in capsys.readouterr().err
