"""A run as a folder of transformers: features, texts, logits, pixels and card, loaded by it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
from transformers.image_utils import load_image

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.engine.evaluator import evaluate
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.recipes import demo_internimage, demo_method, shrink
from tests.shared.engine.small_run import TEXT, as_clip, small_run

pytestmark = pytest.mark.usefixtures("offline")

TEXTS = ["a red apple", "It\u2019s the ship &amp; the sea", "", "one " * 40]


def trained(cfg: TrainConfig, out: Path) -> Path:
    cfg = replace(cfg, num_steps=2, log_every=1, checkpoint_every=2, num_threads=1)
    Trainer(cfg, out).train()
    return out


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(small_run(dataset), tmp_path_factory.mktemp("transformers") / "run")


@pytest.fixture(scope="module")
def model(run: Path) -> m3i_fast.Model:
    return m3i_fast.load(run, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def both(run: Path, dataset: Path) -> Path:
    """The export of both encoders."""
    out = run.parent / "both"
    write_evaluation(run, step=2, sha256=read_manifest(dataset).digest)
    assert main(["export", str(run), str(out), "--to", "hf", "--license", "cc-by-4.0"]) == 0
    return out


def write_evaluation(run: Path, *, step: int, sha256: str) -> None:
    said = {
        "knn_top1": {"trained": 0.51237, "chance": 0.01},
        "held_out_concepts": 9,
        "evaluated": {
            "step": step,
            "split": "heldout",
            "data": {"name": "openmoji", "sha256": sha256},
        },
    }
    (run / "evaluation.json").write_text(json.dumps(said))


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(40, 61), (64, 33), (9, 12), (32, 32), (47, 90)]
    shades = [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    made = [Image.fromarray(shade) for shade in shades]
    made += [made[0].convert("L"), made[1].convert("P")]
    alpha = made[4].convert("RGBA")
    alpha.putalpha(Image.fromarray(generator.integers(0, 256, (47, 90), np.uint8)))
    turned = made[0].copy()
    turned.getexif()[0x0112] = 6
    return [*made, alpha, turned]


# ---- Pictures ------------------------------------------------------------------------------------


def test_pixels_are_those_of_our_transform(model: m3i_fast.Model, both: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(both)
    assert processor.backend == "torchvision"
    for picture in pictures():
        theirs = processor(images=load_image(picture), return_tensors="pt")
        expected = model.transform(picture)
        torch.testing.assert_close(theirs["pixel_values"][0], expected, rtol=0, atol=1e-5)
    by_pillow = AutoImageProcessor.from_pretrained(both, backend="pil")
    level = 1 / (255 * min(model.transform.preprocessing.std))
    for picture in pictures():
        theirs = by_pillow(images=load_image(picture), return_tensors="pt")
        expected = model.transform(picture)
        found = torch.as_tensor(theirs["pixel_values"][0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1.01 * level)


def test_what_load_image_does_is_not_done_by_the_processor(
    model: m3i_fast.Model, both: Path
) -> None:
    """It ignores EXIF and lays transparency on white, for which the card calls load_image."""
    processor = AutoImageProcessor.from_pretrained(both)
    *_, transparent, turned = pictures()
    white = Image.new("RGBA", transparent.size, "white")
    for picture, instead in (
        (transparent, Image.alpha_composite(white, transparent).convert("RGB")),
        (turned, Image.fromarray(np.asarray(turned))),
    ):
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        assert (theirs - model.transform(picture)).abs().max() > 0.5
        torch.testing.assert_close(theirs, model.transform(instead), rtol=0, atol=1e-5)
    assert 'load_image("picture.jpg")' in (both / "README.md").read_text()


# ---- Both encoders -------------------------------------------------------------------------------


@torch.no_grad()
def test_both_encoders_are_those_of_the_run(model: m3i_fast.Model, both: Path) -> None:
    theirs, said = AutoModel.from_pretrained(both, trust_remote_code=True, output_loading_info=True)
    assert not any(said.values()), said
    assert type(theirs).__name__ == "M3IModel" and not theirs.training
    processor = AutoProcessor.from_pretrained(both, trust_remote_code=True)
    assert type(processor).__name__ == "CLIPProcessor"
    given = [load_image(picture) for picture in pictures()]
    inputs = processor(images=given, text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    image = theirs.get_image_features(inputs["pixel_values"]).pooler_output
    text = theirs.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(image, model.encode_image(pictures()), rtol=0, atol=1e-4)
    torch.testing.assert_close(text, model.encode_text(TEXTS), rtol=0, atol=1e-4)
    assert torch.equal(theirs.logit_scale, model.logit_scale)
    output = theirs(**inputs)
    cosines = model.encode_image(pictures(), True) @ model.encode_text(TEXTS, True).T
    expected = model.logit_scale.exp() * cosines
    assert expected.std() > 1e-3
    torch.testing.assert_close(output.logits_per_image, expected, rtol=0, atol=1e-4)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    alone = theirs(pixel_values=inputs["pixel_values"])
    tokens = model.forward_features(pictures())
    torch.testing.assert_close(alone.last_hidden_state, tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.pooler_output, model(pictures()), rtol=0, atol=1e-4)


@torch.no_grad()
def test_texts_need_no_mask(model: m3i_fast.Model, both: Path) -> None:
    theirs = AutoModel.from_pretrained(both, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(both, trust_remote_code=True)
    ids = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    expected = model.encode_text(TEXTS)
    for given in (ids, model.tokenizer(TEXTS)):  # padded with the end, and with 0
        got = theirs.get_text_features(given).pooler_output
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at most 24 tokens, got 42: pass truncation=True"):
        theirs.get_text_features(tokenizer(TEXTS[-1:], return_tensors="pt")["input_ids"])


def test_a_run_as_clip_is_exported(dataset: Path, tmp_path: Path) -> None:
    """A norm before the blocks, QuickGELU, texts read at their end, and a head of one layer."""
    cfg = as_clip(small_run(dataset))
    run = trained(cfg, tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "as clip"), "--to", "hf"]) == 0
    ours = m3i_fast.load(run, device="cpu", dtype=torch.float32)
    theirs = AutoModel.from_pretrained(tmp_path / "as clip", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "as clip", trust_remote_code=True)
    given = [load_image(picture) for picture in pictures()]
    inputs = processor(images=given, text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    cosines = ours.encode_image(pictures(), True) @ ours.encode_text(TEXTS, True).T
    with torch.no_grad():
        got = theirs(**inputs).logits_per_image
    torch.testing.assert_close(got, ours.logit_scale.exp() * cosines, rtol=0, atol=1e-4)


def test_a_pipeline_of_transformers_takes_the_folder(model: m3i_fast.Model, both: Path) -> None:
    classify = transformers.pipeline(
        "zero-shot-image-classification", model=str(both), trust_remote_code=True
    )
    picture, labels = pictures()[0], ["an apple", "a ship"]
    found = classify(picture, candidate_labels=labels, hypothesis_template="a drawing of {}")
    texts = [f"a drawing of {label}" for label in labels]
    cosines = model.encode_image(picture, True) @ model.encode_text(texts, True).T
    expected = (model.logit_scale.exp() * cosines).softmax(-1)[0]
    scores = {row["label"]: row["score"] for row in found}
    torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), expected)


def test_the_bias_of_a_sigmoid_is_kept(dataset: Path, tmp_path: Path) -> None:
    cfg = small_run(dataset)
    terms = tuple(
        replace(term, likelihood="sigmoid") if term.target == "caption" else term
        for term in cfg.objective.terms
    )
    run = trained(replace(cfg, objective=replace(cfg.objective, terms=terms)), tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "hf"]) == 0
    theirs = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ours = m3i_fast.load(run, device="cpu")
    assert ours.logit_bias is not None and torch.equal(theirs.logit_bias, ours.logit_bias)
    ids, pixels = ours.tokenizer(TEXTS), torch.randn(2, 3, 32, 32)
    image, text = ours.encode_image(pixels, True), ours.encode_text(TEXTS, True)
    expected = ours.logit_scale.exp() * image @ text.T + ours.logit_bias
    with torch.no_grad():
        got = theirs(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert ".sigmoid()" in (tmp_path / "out" / "README.md").read_text()


# ---- The image encoder alone ---------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--image-only"], ["--which", "ema"]])
def test_an_image_encoder_needs_no_code_of_the_folder(
    run: Path, tmp_path: Path, words: list[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--to", "hf", *words]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    which: Any = "ema" if "ema" in words else "trained"
    ours = m3i_fast.load(run, which=which, device="cpu", dtype=torch.float32)
    theirs, said = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(said.values()) and type(theirs).__name__ == "IJepaModel"
    inputs = AutoImageProcessor.from_pretrained(out)(images=pictures()[1], return_tensors="pt")
    with torch.no_grad():
        tokens = theirs(**inputs).last_hidden_state
    torch.testing.assert_close(tokens, ours.forward_features(pictures()[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens.mean(1), ours(pictures()[1]), rtol=0, atol=1e-4)


def test_an_internimage_with_captions_is_exported(dataset: Path, tmp_path: Path) -> None:
    cfg = shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT)
    run = trained(cfg, tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "hf"]) == 0
    ours = m3i_fast.load(run, device="cpu", dtype=torch.float32)
    theirs = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    pixels = torch.stack([ours.transform(picture) for picture in pictures()[:3]])
    with torch.no_grad():
        image = theirs.get_image_features(pixels).pooler_output
        text = theirs.get_text_features(ours.tokenizer(TEXTS)).pooler_output
    torch.testing.assert_close(image, ours.encode_image(pixels), rtol=0, atol=1e-4)
    torch.testing.assert_close(text, ours.encode_text(TEXTS), rtol=0, atol=1e-4)


# ---- Card and refusals ---------------------------------------------------------------------------


def test_the_card_says_what_the_run_is(run: Path, both: Path, dataset: Path) -> None:
    card = (both / "README.md").read_text()
    front = card.split("---")[1]
    import yaml

    said = yaml.safe_load(front)
    assert said["license"] == "cc-by-4.0" and said["library_name"] == "transformers"
    assert said["pipeline_tag"] == "zero-shot-image-classification"
    assert said["training_data"][0]["sha256"] == read_manifest(dataset).digest
    assert "| `knn_top1` | 0.5124 | - | - | - | 0.01 |" in card
    assert "Of these weights, after step 2, on split heldout of openmoji (SHA-256 " in card
    assert "| method | M3I" in card and "| steps | 2 of 2 |" in card
    assert "a sum of bounds of the mutual information" in card
    assert "The code in the folder is m3i-fast's, under Apache-2.0." in card
    assert "The tokenizer's merges are the first ones of CLIP's, under MIT." in card
    assert str(run) not in card and "trust_remote_code=True" in card


@pytest.mark.parametrize(
    "command",
    [
        "m3i-fast train vit_b --data.path /secret/place --out runs/a",
        "m3i-fast train vit_b --data.path '/secret/my place' --out runs/a",
        "m3i-fast train vit_b --data.path /secret/o'neill --out runs/a",  # as older versions wrote
    ],
)
def test_the_recipe_and_what_a_run_began_from_are_told_without_paths(
    command: str, run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    environment = json.loads((copy / "env.json").read_text())
    environment["command"] = command
    (copy / "env.json").write_text(json.dumps(environment))
    cfg = TrainConfig.load(copy / "config.json")
    replace(cfg, init="timm:/secret/weights.pth").save(copy / "config.json")
    said = {"sha256": "0" * 64, "nearest_architecture": "vit_b"}
    (copy / "init.json").write_text(json.dumps(said))
    out = tmp_path / "out"
    assert main(["export", str(copy), str(out), "--to", "hf", "--image-only"]) == 0
    card = (out / "README.md").read_text()
    assert "| recipe | vit_b |" in card and "secret" not in card
    assert f"| began from | weights of timm, vit_b, SHA-256 {'0' * 64} |" in card


@pytest.mark.parametrize(
    ("step", "own_data", "told"),
    [
        (1, True, "has figures of step 1 on split heldout of openmoji (SHA-256 "),
        (2, False, "has figures of step 2 on split heldout of openmoji (SHA-256 000"),
        (None, True, "does not say of which step and data its figures are"),
    ],
)
def test_figures_of_another_step_or_data_set_are_not_this_models(
    step: int | None, own_data: bool, told: str, run: Path, dataset: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    digest = read_manifest(dataset).digest if own_data else "0" * 64
    write_evaluation(copy, step=step, sha256=digest)  # type: ignore[arg-type]
    assert main(["export", str(copy), str(tmp_path / "out"), "--to", "hf", "--image-only"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert told in card and "0.5124" not in card


def test_an_older_checkpoint_has_its_own_step_and_an_evaluation_says_its(
    dataset: Path, tmp_path: Path
) -> None:
    cfg = replace(small_run(dataset), num_steps=3, log_every=1, checkpoint_every=1, num_threads=1)
    Trainer(replace(cfg, keep_checkpoints=3), tmp_path / "run").train()
    evaluate(tmp_path / "run", baselines=False)
    said = json.loads((tmp_path / "run" / "evaluation.json").read_text())["evaluated"]
    assert (said["step"], said["split"]) == (3, "heldout")
    assert said["data"] == {"name": "openmoji", "sha256": read_manifest(dataset).digest}

    def card_of(weights: Path, out: Path) -> str:
        assert main(["export", str(weights), str(out), "--to", "hf", "--image-only"]) == 0
        return (out / "README.md").read_text()

    newest = card_of(tmp_path / "run", tmp_path / "newest")
    assert "| steps | 3 of 3 |" in newest and "Of these weights, after step 3" in newest
    older = card_of(tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "older")
    assert "| steps | 2 of 3 |" in older and "These weights are of step 2" in older


def test_the_lines_of_the_card_run(both: Path, tmp_path: Path, monkeypatch: Any) -> None:
    card = (both / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(both))
    monkeypatch.chdir(tmp_path)
    pictures()[0].save("picture.jpg")
    scope: dict[str, Any] = {}
    exec(compile(lines, "card", "exec"), scope)
    assert scope["output"].logits_per_image.shape == (1, 2)


def test_what_cannot_be_exported_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["export", *words]) == 2
        return " ".join(capsys.readouterr().err.split())

    out = str(tmp_path / "out")
    said = refused(str(run), out, "--to", "timm", "--license", "mit")
    assert "--license: expected with --to hf alone" in said
    assert f"no run in {tmp_path}: expected" in refused(str(tmp_path), out, "--to", "hf")
    assert not Path(out).exists()


def test_a_run_without_captions_is_an_image_encoder(dataset: Path, tmp_path: Path) -> None:
    cfg = shrink(demo_method("supervised"), path=dataset, num_classes=9, text=TEXT)
    run = trained(cfg, tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == "IJepaModel"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "licence of the weights is not stated" in card and "license:" not in card
    assert "The run has no evaluation." in card
    assert "M3I pre-training" not in card and "trained by m3i-fast: " in card
    assert "supervised" in card.split("\n## Use")[0].lower()
