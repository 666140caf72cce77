"""A run exported for open_clip, which loads the folder by itself: embeddings, ids and pixels."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from skimage import data
from torch import Tensor

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.terms import Caption
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.annotations.tokenizer_json import tokenizer_files
from m3i_fast.recipes import demo_internimage, shrink
from tests.shared.engine.small_run import TEXT, small_run

CAUSAL = replace(TEXT, attention="causal")
TEXTS = ["a red heart", "Two GREEN trees, &amp; a dog's tail!?", "x" * 90, "", "naïve café 12345"]


def trained(cfg: TrainConfig, out: Path) -> Path:
    cfg = replace(cfg, num_steps=1, log_every=1, checkpoint_every=1, num_threads=1)
    Trainer(cfg, out).train()
    return out


def config(dataset: Path, *, hidden: int = 0, likelihood: str = "boltzmann") -> TrainConfig:
    cfg = small_run(dataset)
    assert isinstance(cfg.vision, ViTConfig)
    terms = tuple(
        replace(term, likelihood=likelihood) if term.target == "caption" else term
        for term in cfg.objective.terms
    )
    objective = replace(cfg.objective, head_hidden_dim=hidden, terms=terms)
    vision = replace(cfg.vision, class_token=True)
    return replace(cfg, vision=vision, text=CAUSAL, objective=objective)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config(dataset, likelihood="sigmoid"), tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "folder"
    assert main(["export", str(run), str(out), "--to", "open_clip"]) == 0
    return out


@torch.no_grad()
def test_open_clip_computes_the_embeddings(run: Path, folder: Path) -> None:
    ours = m3i_fast.load(run, device="cpu")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    images = torch.randn(3, 3, 32, 32)
    for normalize in (False, True):
        torch.testing.assert_close(
            theirs.encode_image(images, normalize=normalize),
            ours.encode_image(images, normalize=normalize),
            **{"rtol": 0, "atol": 1e-4},
        )
    ids = ours.tokenizer(TEXTS)
    for normalize in (False, True):
        torch.testing.assert_close(
            theirs.encode_text(ids, normalize=normalize),
            ours.encode_text(ids, normalize=normalize),
            **{"rtol": 0, "atol": 1e-4},
        )
    assert ours.logit_bias is not None
    assert torch.equal(theirs.logit_scale, ours.logit_scale)
    assert torch.equal(theirs.logit_bias, ours.logit_bias)
    assert theirs.context_length == 24 and theirs.vocab_size == 814


def test_the_folder_may_be_moved(folder: Path, tmp_path: Path) -> None:
    said = (folder / "open_clip_config.json").read_text()
    assert str(folder.parent) not in said
    moved = tmp_path / "moved"
    moved.symlink_to(folder)
    model = open_clip.create_model(f"local-dir:{moved}")
    assert model.visual.image_size == (32, 32)


@torch.no_grad()
def test_its_tokenizer_is_the_runs(run: Path, folder: Path) -> None:
    """The same ids up to the end, whatever the text, and by that the same embeddings."""
    ours = m3i_fast.load(run, device="cpu")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    names = list(json.loads((run / "data.json").read_text())["class_names"])
    texts = [
        *TEXTS,
        *names,
        "<start_of_text> a <end_of_text> b",
        "日本語 ’ — “x” 🙂",
        "it's we'll I'D",
    ]
    got, expected = tokenizer(texts), ours.tokenizer(texts)
    for text, row, ids in zip(texts, got, expected, strict=True):
        length = len(ours.tokenizer.encode(text))
        assert row[:length].tolist() == ids[:length].tolist(), text
        assert set(row[length:].tolist()) <= {813}, text
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    torch.testing.assert_close(theirs.encode_text(got), ours.encode_text(texts), rtol=0, atol=1e-4)


def test_all_of_clips_merges_need_no_file() -> None:
    """Then open_clip's own tokenizer has the vocabulary; fewer merges are in tokenizer.json."""
    fewer = Tokenizer(300, context_length=24)
    files = tokenizer_files(fewer)
    model = files["tokenizer.json"]["model"]
    assert len(model["vocab"]) == 814 and len(model["merges"]) == 300
    assert model["merges"][:2] == [["i", "n"], ["t", "h"]]
    whole = Tokenizer(context_length=24)
    assert whole.vocab_size == 49408
    own = open_clip.SimpleTokenizer(context_length=24)
    assert torch.equal(own(TEXTS), whole(TEXTS))


# ---- Pictures ------------------------------------------------------------------------------------


def stored(picture: Image.Image, image_format: str, **options: Any) -> Image.Image:
    """A picture as it is opened from a file."""
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def turned(picture: Image.Image) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    return stored(picture, "JPEG", quality=95, exif=exif)


def with_alpha(picture: Image.Image) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(picture.size)
    picture = picture.copy()
    picture.putalpha(ramp)
    return stored(picture, "PNG")


PHOTO = Image.fromarray(data.coffee())  # 600 x 400
SQUARE = Image.fromarray(data.astronaut())  # 512 x 512
GRAY = Image.fromarray(data.camera())  # 512 x 512
# name: picture, largest and mean difference in levels of 255
PICTURES: dict[str, tuple[Image.Image, int, float]] = {
    "square": (stored(SQUARE, "PNG"), 1, 0.1),
    "square jpeg": (stored(SQUARE, "JPEG", quality=90), 1, 0.1),
    "gray": (stored(GRAY, "PNG"), 1, 0.1),
    "small": (stored(SQUARE.resize((20, 20)), "PNG"), 1, 0.1),
    "of its size": (stored(SQUARE.resize((32, 32)), "PNG"), 0, 0.0),
    "landscape": (stored(PHOTO, "JPEG", quality=90), 12, 0.1),
    # resized to 32 x 47 before it is cut, half a pixel elsewhere
    "portrait": (stored(PHOTO.crop((0, 0, 267, 400)), "PNG"), 115, 7.7),
}
# What open_clip's transform leaves to the caller, that is, to `upright_rgb`.
OTHERWISE = {
    "turned": turned(PHOTO),
    "palette": stored(SQUARE.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "transparent": with_alpha(SQUARE),
}


def upright_rgb(picture: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(picture).convert("RGB")


def levels(normalised: Tensor) -> Tensor:
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (normalised * std + mean) * 255


@pytest.fixture(scope="module")
def transforms(run: Path, folder: Path) -> tuple[Any, Any]:
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return m3i_fast.load(run, device="cpu").transform, theirs


@pytest.mark.parametrize("name", PICTURES)
def test_its_transform_prepares_pictures_alike(name: str, transforms: tuple[Any, Any]) -> None:
    ours, theirs = transforms
    picture, largest, mean = PICTURES[name]
    difference = (levels(ours(picture)) - levels(theirs(picture))).abs()
    assert difference.max() <= largest + 0.01
    assert difference.mean() <= mean + 0.001


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_its_transform_does_otherwise(name: str, transforms: tuple[Any, Any]) -> None:
    """It turns no picture as EXIF says, and resizes palettes and transparency before colours."""
    ours, theirs = transforms
    picture = OTHERWISE[name]
    expected = levels(ours(picture))
    assert (levels(theirs(picture)) - expected).abs().max() > 20
    difference = (levels(theirs(upright_rgb(picture))) - expected).abs()
    assert difference.max() <= (12 if name == "turned" else 1) + 0.01


# ---- Refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused(
    run: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*words: str) -> str:
        assert main(["export", *words, "--to", "open_clip"]) == 2
        return " ".join(capsys.readouterr().err.split())

    out = str(tmp_path / "out")
    assert "--which: expected with --to timm, hf, internimage" in refused(
        str(run), out, "--which", "ema"
    )
    plain = trained(small_run(dataset), tmp_path / "plain")
    said = refused(str(plain), out)
    assert "--objective.head-hidden-dim 0 --vision.class-token" in said
    assert "--text.attention causal" in said
    other = trained(
        shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT), tmp_path / "other"
    )
    assert "expected a run with a ViT, got InternImage" in refused(str(other), out)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert 'pip install "m3i-fast[shards]"' in refused(str(run), out)
    assert not Path(out).exists()


# ---- Both ways -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_run_that_begins_from_the_folder_has_both_towers(
    dataset: Path, folder: Path, tmp_path: Path
) -> None:
    cfg = replace(config(dataset), init=f"open_clip:{folder}", seed=5)
    trainer = Trainer(cfg, tmp_path / "run")
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    images = torch.randn(2, 3, 32, 32)
    cells = trainer.objective.encoder.eval().encode_cells(images)
    pooled = cells.mean(1) @ theirs.visual.proj
    torch.testing.assert_close(pooled, theirs.encode_image(images), rtol=0, atol=1e-5)
    (term,) = trainer.objective.terms_of(Caption)
    ids = torch.tensor([[812, 5, 9, 813] + [0] * 20])
    torch.testing.assert_close(
        term.text_encoder.eval()(ids, torch.tensor([4])),
        theirs.encode_text(ids),
        **{"rtol": 0, "atol": 1e-5},
    )
    assert trainer.initial is not None and trainer.initial.text is not None
    rows = {row[0]: row[1:] for row in trainer.initial.rows()}
    assert rows["text_encoder.projection.weight"] == ("text_projection", "as it is")
    trainer.close()
    said = json.loads((tmp_path / "run" / "init.json").read_text())
    assert said["text"]["taken"]["norm.weight"]["from"] == "ln_final.weight"
