"""Each encoder's features and transform are those of the library that it is from."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from PIL import Image

import m3i_fast
from m3i_fast.config import TrainConfig
from m3i_fast.engine.evaluator import build_untrained
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.trainer import Trainer
from m3i_fast.measuring.encoders.encoder import Encoder, EncoderSettings
from m3i_fast.measuring.encoders.offline import expect_cached
from m3i_fast.measuring.encoders.opening import open_encoder
from m3i_fast.measuring.encoders.ours import RunEncoder
from m3i_fast.measuring.features import ExtractionSettings, extract
from m3i_fast.measuring.source import SourceSettings, read_source
from m3i_fast.objectives.terms import Caption
from m3i_fast.recipes import demo_internimage, shrink
from tests.measuring.pictures import COLOURS, TIMM, clip_folder, picture, timm_file
from tests.shared.engine.small_run import TEXT, as_clip, small_run

PICTURES = [picture(colour, seed, (90, 60)) for seed, colour in enumerate(COLOURS.values())]
SETTINGS = EncoderSettings(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measuring") / "run"
    cfg = replace(small_run(dataset), num_steps=1, log_every=1, num_threads=1)
    Trainer(replace(cfg, checkpoint_every=1), out).train()
    return out


def inputs(encoder: Encoder, pictures: list[Image.Image] = PICTURES) -> torch.Tensor:
    return torch.stack([encoder.transform(one) for one in pictures])


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_run_has_the_features_of_load(run: Path) -> None:
    encoder = open_encoder(str(run), SETTINGS)
    model = m3i_fast.load(run, device="cpu", dtype=torch.float32)
    features = encoder.encode_pictures(inputs(encoder))
    assert torch.equal(features["mean_1"], model(PICTURES))
    assert torch.equal(features["image"], model.encode_image(PICTURES))
    assert torch.equal(encoder.encode_texts(["a cat", "sun"]), model.encode_text(["a cat", "sun"]))
    depth = len(model.encoder.blocks)
    layers = [name for name in features if name.startswith("mean_")]
    assert len(layers) == min(depth, 4)
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    if depth > 1:  # the layer below, by a model without the last block
        model.encoder.blocks = model.encoder.blocks[:-1]
        close(features["mean_2"], model(PICTURES))


def test_patch_tokens_of_a_run_are_loads(run: Path) -> None:
    encoder = open_encoder(str(run), SETTINGS)
    model = m3i_fast.load(run, device="cpu", dtype=torch.float32)
    found = encoder.patch_tokens
    assert found is not None and encoder.trainable is not None
    side = found.side
    views = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    assert torch.equal(found.encode(found.normalise(views)), model.forward_features(views))
    assert found.num_prefix == model.num_prefix_tokens


def test_a_causal_run_embeds_texts_as_load_does(dataset: Path, tmp_path: Path) -> None:
    """By evaluate's extraction and alone, whatever stands beside a text in its batch."""
    cfg = as_clip(replace(small_run(dataset), num_steps=1, log_every=1, num_threads=1))
    Trainer(replace(cfg, checkpoint_every=1), tmp_path / "run").train()
    encoder = open_encoder(str(tmp_path / "run"), SETTINGS)
    model = m3i_fast.load(tmp_path / "run", device="cpu", dtype=torch.float32)
    texts = ["a cat", "one " * 40, "the ship and the sea", "sun"]
    expected = torch.cat([model.encode_text(text) for text in texts])
    close(encoder.encode_texts(texts), expected)
    caption = model.caption
    assert caption is not None
    ids = model.tokenizer("a cat")  # by the text encoder alone: start, two words and end
    (counted,) = (ids != 0).sum(1).tolist()
    close(caption.text_encoder(ids[:, :counted], torch.tensor([counted])), expected[:1])

    lines = ["file,caption"]
    for number, (one, text) in enumerate(zip(PICTURES * 2, texts, strict=False)):
        one.save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{text}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    given = SourceSettings(
        path=tmp_path / "table.csv",
        caption_columns=("caption",),
        split="train",
        cache_dir=tmp_path / "cache",
    )
    source = read_source(given)
    settings = ExtractionSettings(cache_dir=tmp_path / "cache", batch_size=3, workers=0)
    found = extract(encoder, source, source.measured, World(torch.device("cpu")), settings)
    kept = [model.encode_text(text) for text in source.measured.captions]
    assert len(kept) == len(lines) - 1 > 2
    close(torch.from_numpy(found.rows("text")[np.arange(len(kept))]), torch.cat(kept))


def test_the_digest_follows_the_config_of_texts(run: Path) -> None:
    """The weights of two kinds of attention are alike when they are drawn."""
    model = m3i_fast.load(run, device="cpu", dtype=torch.float32)
    assert model.caption is not None
    before = RunEncoder("run", model, "").digest
    encoder = model.caption.text_encoder
    encoder.cfg = replace(encoder.cfg, attention="causal")
    assert RunEncoder("run", model, "").digest != before


def test_an_untrained_run_is_what_the_run_started_from(run: Path) -> None:
    trained = open_encoder(str(run), SETTINGS)
    encoder = open_encoder(f"random:{run}", SETTINGS)
    assert trained.digest != encoder.digest
    objective = build_untrained(TrainConfig.load(run / "config.json"))
    weights = objective.encoder.state_dict()
    for name, weight in encoder._model.encoder.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(weight, weights[name]), name
    (caption,) = objective.terms_of(Caption)
    head = encoder._model.caption.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(head[name], value) for name, value in caption.state_dict().items())


def test_an_internimage_has_its_mean_and_embeddings(dataset: Path, tmp_path: Path) -> None:
    cfg = shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT)
    cfg = replace(cfg, num_steps=1, log_every=1, num_threads=1, checkpoint_every=1)
    Trainer(cfg, tmp_path / "run").train()
    encoder = open_encoder(str(tmp_path / "run"), SETTINGS)
    model = m3i_fast.load(tmp_path / "run", device="cpu", dtype=torch.float32)
    features = encoder.encode_pictures(inputs(encoder))
    assert set(features) == {"mean_1", "image"}
    assert torch.equal(features["mean_1"], model(PICTURES))


def test_a_model_of_timm_has_its_own_features_and_transform(tmp_path: Path) -> None:
    file = timm_file(tmp_path)
    encoder = open_encoder(f"timm:{TIMM},checkpoint={file}", SETTINGS)
    model = timm.create_model(TIMM, checkpoint_path=str(file)).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    expected = torch.stack([transform(one) for one in PICTURES])
    assert torch.equal(inputs(encoder), expected)
    features = encoder.encode_pictures(expected)
    kinds = ("class", "mean")
    assert {f"{kind}_{layer}" for kind in kinds for layer in range(1, 5)} == set(features)
    with torch.no_grad():
        tokens = model.forward_features(expected)
        blocks = list(model.blocks)
        model.blocks = torch.nn.Sequential(*blocks[:-3])
        below = model.forward_features(expected)
    close(features["class_1"], tokens[:, 0])
    close(features["mean_1"], tokens[:, model.num_prefix_tokens :].mean(1))
    close(features["class_4"], below[:, 0])
    with pytest.raises(ValueError, match="expected an encoder with a text tower"):
        encoder.encode_texts(["a"])


def test_a_convolution_of_timm_has_what_its_head_reads(tmp_path: Path) -> None:
    file = timm_file(tmp_path, "test_resnet")
    encoder = open_encoder(f"timm:test_resnet,checkpoint={file}", SETTINGS)
    model = timm.create_model("test_resnet", checkpoint_path=str(file), num_classes=1000).eval()
    model.reset_classifier(0)
    features = encoder.encode_pictures(inputs(encoder))
    assert set(features) == {"mean_1"}
    with torch.no_grad():
        close(features["mean_1"], model(inputs(encoder)))


def test_a_model_of_open_clip_has_both_towers(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    encoder = open_encoder(f"open_clip:{folder}", SETTINGS)
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    expected = torch.stack([transform(one) for one in PICTURES])
    assert torch.equal(inputs(encoder), expected)
    features = encoder.encode_pictures(expected)
    tokenizer = open_clip.get_tokenizer(name)
    with torch.no_grad():
        close(features["image"], model.encode_image(expected))
        close(encoder.encode_texts(["a cat"]), model.encode_text(tokenizer(["a cat"])))
        close(features["class_1"] @ model.visual.proj, features["image"])
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert {"class_4", "mean_4"} <= set(features)


def test_pixels_are_the_squares_means() -> None:
    encoder = open_encoder("pixels", SETTINGS)
    flat = Image.new("RGB", (100, 60), (255, 0, 51))
    features = encoder.encode_pictures(inputs(encoder, [flat]))["mean_1"]
    assert features.shape == (1, 432)
    close(features.reshape(3, 144).mean(1), torch.tensor([1.0, 0, 0.2]))


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    file = timm_file(tmp_path)
    spec = f"timm:{TIMM},checkpoint={file}"
    first, again = open_encoder(spec, SETTINGS).digest, open_encoder(spec, SETTINGS).digest
    assert first == again
    weights = safetensors.torch.load_file(file)
    weights["norm.bias"][0] += 1e-3
    safetensors.torch.save_file(weights, file)
    assert open_encoder(spec, SETTINGS).digest != first


def test_wrong_names_say_what_to_type(tmp_path: Path) -> None:
    def refused(spec: str) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            open_encoder(spec, SETTINGS)
        return str(error.value)

    assert "Did you mean test_vit" in refused("timm:test_vitt")
    assert "expected a file of weights, got none" in refused("timm:test_vit,checkpoint=absent")
    assert "expected its weights to be named once" in refused("open_clip:ViT-B-32")
    assert "Did you mean ViT-B-32" in refused("open_clip:ViT-B-322,pretrained=openai")
    assert "MODEL: expected a run, a checkpoint" in refused("runs/absent")
    assert "unknown option which" in refused("timm:test_vit,which=ema")
    assert "unknown option checkpoint" in refused("pixels,checkpoint=file")
    (tmp_path / "bare").mkdir()
    assert "expected weights in the folder" in refused(f"open_clip:{tmp_path / 'bare'}")


@pytest.mark.parametrize("allow", [False, True])
def test_the_hub_is_kept_to_its_cache_unless_asked(
    allow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = []

    def create(*_: object, **__: object) -> None:
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError("no weights")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for spec in ("timm:test_vit", "open_clip:ViT-B-32,pretrained=laion2b_s34b_b79k"):
        with pytest.raises(ValueError, match="no weights; name a file of weights") as error:
            open_encoder(spec, replace(SETTINGS, allow_download=allow))
        assert ("--allow-download" in str(error.value)) is not allow
    assert offline == [not allow] * 2
    assert constants.HF_HUB_OFFLINE is False


def test_weights_at_a_url_alone_have_to_lie_in_the_folder(tmp_path: Path) -> None:
    source = {"url": "https://example.org/models/weights.pt"}
    with pytest.raises(FileNotFoundError, match=r"its weights lie at https.*no .*weights\.pt"):
        expect_cached(source, tmp_path, hub_key="hub")
    expect_cached({**source, "hub": "name/of"}, tmp_path, hub_key="hub")
    (tmp_path / "weights.pt").touch()
    expect_cached(source, tmp_path, hub_key="hub")


def test_the_digest_of_a_folder_follows_its_config_and_tokenizer(tmp_path: Path) -> None:
    """Of the same weights and transform."""
    folder = clip_folder(tmp_path / "clip")
    file = folder / "open_clip_config.json"
    content = json.loads(file.read_text())
    digests = [open_encoder(f"open_clip:{folder}", SETTINGS).digest]
    moved = folder.rename(tmp_path / "moved")
    assert open_encoder(f"open_clip:{moved}", SETTINGS).digest == digests[0]
    file = moved / file.name
    content["model_cfg"]["quick_gelu"] = True
    file.write_text(json.dumps(content))
    digests.append(open_encoder(f"open_clip:{moved}", SETTINGS).digest)
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "whitespace"}
    file.write_text(json.dumps(content))
    digests.append(open_encoder(f"open_clip:{moved}", SETTINGS).digest)
    assert len(set(digests)) == 3


def test_the_digest_of_a_folder_of_timm_follows_its_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    folder.mkdir()
    timm_file(tmp_path).rename(folder / "model.safetensors")
    digests = set()
    for heads in (2, 4):
        known = {"num_classes": 1000, "input_size": [3, 160, 160]}
        config = {"architecture": TIMM, "model_args": {"num_heads": heads}, "pretrained_cfg": known}
        (folder / "config.json").write_text(json.dumps(config))
        digests.add(open_encoder(f"timm:{folder}", SETTINGS).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    "wrong",
    [{"model_args": {"name": "x"}}, {"architecture": [1]}, {"model_args": {"depth": 10**7}}],
)
def test_a_folder_of_timm_with_fields_of_wrong_types_is_refused(
    wrong: dict[str, object], tmp_path: Path
) -> None:
    timm_file(tmp_path).rename(tmp_path / "model.safetensors")
    config = {"architecture": TIMM, "pretrained_cfg": {"num_classes": 1000}}
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(ValueError, match=f"^timm:{re.escape(str(tmp_path))}: not opened: "):
        open_encoder(f"timm:{tmp_path}", SETTINGS)


def test_the_digest_of_a_run_follows_its_heads_and_tokenizer(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for spec in ("{}", "random:{}"):
        digests = {open_encoder(spec.format(run), SETTINGS).digest}
        config, record = copy / "config.json", copy / "data.json"
        before = config.read_text(), record.read_text()
        stored = json.loads(before[0])
        stored["text"]["norm_eps"] = 0.01
        config.write_text(json.dumps(stored))
        digests.add(open_encoder(spec.format(copy), SETTINGS).digest)
        config.write_text(before[0])
        fingerprint = json.loads(before[1])["tokenizer"]["fingerprint"]
        record.write_text(before[1].replace(fingerprint, "0" * 64))
        digests.add(open_encoder(spec.format(copy), SETTINGS).digest)
        record.write_text(before[1])
        assert len(digests) == 3, spec


def test_weights_of_another_gelu_are_refused() -> None:
    expected = "expected open_clip:ViT-B-32-quickgelu,pretrained=openai"
    with pytest.raises(ValueError, match=f"QuickGELU, which ViT-B-32 has not: {expected}"):
        open_encoder("open_clip:ViT-B-32,pretrained=openai", SETTINGS)
    with pytest.raises(ValueError, match=r"cache|not opened"):  # no weights here
        open_encoder("open_clip:ViT-B-32-quickgelu,pretrained=openai", SETTINGS)
