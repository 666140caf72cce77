"""Runs that begin from weights: of timm's files, of other runs, on one rank and on two."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig, clip_b16, dinov2_s, dinov3_s_plus
from m3i_fast.durable_files import digest
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.initial_weights import read_initial
from m3i_fast.engine.trainer import Trainer
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.terms import Caption
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from m3i_fast.recipes import demo_internimage, shrink
from tests.engine.init_work import NUM_RANKS, begun, work
from tests.shared.engine.small_run import TEXT, as_clip, small_run
from tests.shared.ranks import start_ranks

# DINOv3's ViT-S+ at the demo's size: rotary, SwiGLU, registers, biases without keys.
VISION = dinov3_s_plus(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)
VISION_CLIP = clip_b16(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_small_plus_patch16_dinov3_qkvb",
        **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        num_classes=3,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dinov3.safetensors"
    save_file(model.state_dict(), path)
    return path


SMALL_TIMM = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "num_classes": 3,
}


def config(dataset: Path, init: str, vision: ViTConfig = VISION) -> TrainConfig:
    return replace(small_run(dataset, num_steps=2, vision=vision), init=init)


def encoder_of(run: Path) -> dict[str, Tensor]:
    return checkpoint.latest(run / "checkpoints").shards("model").read("encoder.")


def test_a_run_begins_with_timms_features(
    dataset: Path, model: Any, file: Path, tmp_path: Path
) -> None:
    trainer = Trainer(config(dataset, f"timm:{file}"), tmp_path / "run")
    images = torch.randn(2, 3, 32, 32)
    encoder = trainer.objective.encoder
    expected = model.forward_features(images)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    cells = trainer.objective.target_encoder(images)  # the average begins there, too
    torch.testing.assert_close(cells, expected[:, 5:], atol=1e-5, rtol=1e-5)
    trainer.train()
    said = json.loads((tmp_path / "run" / "init.json").read_text())
    assert said["source"] == f"timm:{file}" and said["sha256"] == digest(file).sha256
    assert said["nearest_architecture"] == "dinov3_s_plus"
    assert sorted(said["left_out"]) == ["head.bias", "head.weight"] and said["new"] == []
    gate = said["taken"]["blocks.1.layernorm_mlp.fc1_weight"]
    assert gate["from"] == "blocks.1.mlp.fc1_g.weight + blocks.1.mlp.fc1_x.weight"


def test_a_folder_of_timm_tells_how_pixels_are_normalised(tmp_path: Path) -> None:
    """timm's own ViTs mostly by 0.5; the features are of the same picture."""
    torch.manual_seed(2)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL_TIMM).eval()
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    save_for_hf(model, tmp_path, model_args=SMALL_TIMM)
    vision = ViTConfig(
        image_size=32, patch_size=8, dim=32, depth=2, num_heads=2, class_token=True, norm_eps=1e-6
    )
    found = read_initial(f"timm:{tmp_path}", vision).weights
    encoder = build_encoder(vision)
    encoder.load_state_dict(found.tensors)
    picture = torch.rand(2, 3, 32, 32)
    ours, theirs = (
        (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3))
    )
    torch.testing.assert_close(encoder(ours), model.forward_features(theirs), atol=1e-4, rtol=1e-4)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(ValueError, match=r"--init timm:.*expected mean and std of pixels in"):
        read_initial(f"timm:{tmp_path}", vision)


def test_a_folder_of_timm_tells_which_gelu_and_eps_it_has(tmp_path: Path) -> None:
    """Weights and their shapes are those of any other ViT."""
    torch.manual_seed(3)
    name = "vit_base_patch16_clip_quickgelu_224"
    model = timm.create_model(name, **SMALL_TIMM).eval()
    save_for_hf(model, tmp_path, model_args=SMALL_TIMM)
    sizes = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2}
    vision = ViTConfig(**sizes, class_token=True, pre_norm=True)
    with pytest.raises(ValueError, match=r"--vision.mlp quick_gelu --vision.norm-eps 1e-05"):
        read_initial(f"timm:{tmp_path}", vision)
    vision = replace(vision, mlp="quick_gelu", norm_eps=1e-5)
    encoder = build_encoder(vision)
    encoder.load_state_dict(read_initial(f"timm:{tmp_path}", vision).weights.tensors)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    own_mean, own_std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    picture = torch.rand(2, 3, 32, 32)
    expected = model.forward_features((picture - mean) / std)
    found = encoder((picture - own_mean) / own_std)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_folder_of_a_model_that_ours_cannot_be_is_refused(tmp_path: Path) -> None:
    config = {"architecture": "eva02_tiny_patch14_224", "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="plain or DINOv3's, got eva02_tiny_patch14_224, a Eva"):
        read_initial(f"timm:{tmp_path}", VISION)
    config |= {"architecture": "vit_tiny_patch16_224", "model_args": {"no_such": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vit_tiny_patch16_224: timm makes no such model"):
        read_initial(f"timm:{tmp_path}", VISION)
    for wrong, told in (
        ({"model_args": {"patch_size": 0}}, "timm makes no such model of {'patch_size': 0}"),
        ({"model_args": {"checkpoint_path": "other.pth"}}, "expected no checkpoint_path"),
        ({"model_args": {"depth": 10**7}}, "expected depth of 1 to 1024, got 10000000; .*DEPTHS"),
        ({"architecture": "resnet18", "model_args": {"layers": [1, 10**7]}}, "layers of 1 to"),
        ({"architecture": "vit_small_patch16_18x2_224", "model_args": {}}, "one attention and one"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=told):
            read_initial(f"timm:{tmp_path}", VISION)


def test_a_run_begins_from_a_folder_of_transformers(dataset: Path, tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**sizes, image_size=48, patch_size=8)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "folder")
    vision = dinov2_s(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)
    cfg = config(dataset, f"hf:{tmp_path / 'folder'}", vision)
    trainer = Trainer(cfg, tmp_path / "run")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # which resamples its positions as we do
        expected = theirs(images).last_hidden_state
    torch.testing.assert_close(trainer.objective.encoder(images), expected, atol=1e-5, rtol=1e-5)
    assert trainer.initial is not None
    rows = {row[0]: row[1:] for row in trainer.initial.rows()}
    assert rows["pos_embed"] == (
        "embeddings.position_embeddings",
        "6 x 6 -> 4 x 4 patches, antialiased bicubic",
    )
    trainer.train()
    said = json.loads((tmp_path / "run" / "init.json").read_text())
    assert said["source"] == f"hf:{tmp_path / 'folder'}"
    assert said["sha256"] == digest(tmp_path / "folder" / "model.safetensors").sha256
    with pytest.raises(ValueError, match="--init hf:.*nearest to .*add --vision.depth 2"):
        Trainer(replace(cfg, vision=replace(vision, depth=1)), tmp_path / "other")


def test_a_run_begins_with_both_towers_of_transformers_clip(dataset: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig
    from transformers import CLIPModel as TheirClip

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    text = {"num_hidden_layers": 1, "vocab_size": 814, "max_position_embeddings": 24}
    theirs = TheirClip(
        CLIPConfig(
            text_config=sizes | text | {"eos_token_id": 813},
            vision_config=sizes | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
            projection_dim=32,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "folder")
    cfg = as_clip(config(dataset, f"hf:{tmp_path / 'folder'}", VISION_CLIP))
    trainer = Trainer(cfg, tmp_path / "run")
    assert trainer.initial is not None and trainer.initial.text is not None
    (caption,) = trainer.objective.terms_of(Caption)
    ids = torch.randint(1, 812, (3, 24))
    counts = torch.tensor([3, 24, 9])
    place = torch.arange(24)
    ids = ids.masked_fill(place == counts[:, None] - 1, 813).masked_fill(
        place >= counts[:, None], 0
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.get_text_features(ids).pooler_output
        got = caption.text_encoder(ids, counts)
        tokens = theirs.vision_model(images).last_hidden_state
        normed = theirs.vision_model.post_layernorm(tokens)
        features = trainer.objective.encoder(images)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features, normed, atol=1e-5, rtol=1e-5)
    trainer.close()
    said = json.loads((tmp_path / "run" / "init.json").read_text())
    source = said["text"]["taken"]["projection.weight"]["from"]
    assert source == "text_projection.weight" and "without_text" not in said
    assert sorted(said["left_out"]) == ["logit_scale", "visual_projection.weight"]


def test_a_resume_does_not_read_the_file(dataset: Path, model: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "weights.pth", tmp_path / "run"
    torch.save(model.state_dict(), path)
    cfg = config(dataset, f"timm:{path}")
    Trainer(replace(cfg, num_steps=2), out).train()
    path.unlink()
    trainer = Trainer(replace(cfg, num_steps=3), out, resume=True, new_num_steps=True)
    assert trainer.initial is None and trainer.train().step == 3
    assert TrainConfig.load(out / "config.json").init == f"timm:{path}"
    with pytest.raises(FileNotFoundError, match=r"weights\.pth: expected a file of weights"):
        Trainer(cfg, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("spec", "typed"),
    [
        ("timm:vit_tiny_patch16_224", "timm.create_model('vit_tiny_patch16_224', pretrained=True)"),
        ("hf:facebook/dinov2-base", "hf download facebook/dinov2-base --local-dir facebook/"),
        ("dinov2:absent.pth", "absent.pth: expected a file of weights, found none"),
        ("run:absent", "no run in absent: expected"),
    ],
)
def test_a_source_that_is_not_there_says_what_to_type(spec: str, typed: str) -> None:
    with pytest.raises(FileNotFoundError) as refused:
        read_initial(spec, VISION)
    said = str(refused.value)
    assert said.startswith(f"--init {spec}: ") and typed in said


def test_a_run_begins_from_another_run_of_other_sizes(dataset: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    absolute = replace(VISION, position="absolute", patch_size=4)
    Trainer(config(dataset, "", absolute), first).train()
    smaller = replace(absolute, patch_size=8, num_registers=0, key_bias=True)
    trainer = Trainer(config(dataset, f"run:{first}", smaller), second)
    assert trainer.initial is not None
    rows = {row[0]: row[1:] for row in trainer.initial.rows()}
    assert rows["pos_embed"][1] == "8 x 8 -> 4 x 4 patches, antialiased bicubic"
    assert rows["patch_embed.weight"][1] == "4 x 4 -> 8 x 8 pixels, pseudo-inverse"
    assert rows["-"] == ("encoder.register_tokens", "left out")
    weights, saved = trainer.objective.encoder.state_dict(), encoder_of(first)
    assert torch.equal(weights["blocks.1.proj.weight"], saved["encoder.blocks.1.proj.weight"])
    trainer.close()
    average = checkpoint.latest(first / "checkpoints").encoder("ema")
    found = read_initial(f"run:{first},which=ema", absolute).weights
    torch.testing.assert_close(found.tensors, average, rtol=0, atol=0)
    assert found.sources["norm.weight"] == "target_encoder.encoder.norm.weight"
    assert not torch.equal(average["norm.weight"], saved["encoder.norm.weight"])


def test_a_run_without_a_moving_average_has_none_to_begin_from(
    dataset: Path, tmp_path: Path
) -> None:
    cfg = config(dataset, "")
    terms = METHODS["supervised"].terms
    cfg = replace(cfg, objective=replace(cfg.objective, terms=terms))
    Trainer(cfg, tmp_path / "run").train()
    with pytest.raises(ValueError, match=r"no term of that run reads a moving average; leave ,wh"):
        read_initial(f"run:{tmp_path / 'run'},which=ema", VISION)
    with pytest.raises(ValueError, match="init: which: expected trained or ema, got 'best'"):
        replace(cfg, init="run:runs/first,which=best")


def test_an_internimage_begins_from_a_run_of_its_config_alone(
    dataset: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    cfg = shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT)
    Trainer(cfg, first).train()
    trainer = Trainer(replace(cfg, init=f"run:{first}", seed=5), tmp_path / "second")
    saved = encoder_of(first)
    for name, value in trainer.objective.encoder.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"]), name
    trainer.close()
    wider = replace(cfg, vision=replace(cfg.vision, token_dim=64), init=f"run:{first}")
    with pytest.raises(ValueError, match=r"theirs != ours.*token_dim: 32 != 64"):
        Trainer(wider, tmp_path / "third")


@pytest.fixture(scope="module")
def ranks(dataset: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    cfg = replace(config(dataset, f"timm:{file}"), num_threads=1)
    cfg = replace(cfg, optim=replace(cfg.optim, matrices="adamw"))
    torch.save(begun(cfg, folder / "alone"), folder / "alone.pt")
    start_ranks(work, (cfg, folder), NUM_RANKS)
    return folder


@pytest.mark.parametrize("shard", [1, -1])
def test_two_ranks_begin_as_one(shard: int, ranks: Path) -> None:
    """DDP and FSDP2: every weight of encoder and average, and what a step makes of them."""
    alone = torch.load(ranks / "alone.pt", weights_only=True)
    for rank in range(NUM_RANKS):
        found = torch.load(ranks / f"{shard}-{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            if name.startswith("begun/"):
                assert torch.equal(found[name], value), name
            else:
                torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3)


def test_the_verb_prints_where_each_weight_is_from(
    dataset: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    config(dataset, f"timm:{file}").save(path)
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "blocks.*.layernorm_mlp.fc1_weight" in said and "left out" in said
    assert main(["train", "--config", str(path), "--init", "nowhere:model"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    known = "timm:FILE_OR_FOLDER, dinov2:FILE, dinov3:FILE, open_clip:FILE_OR_FOLDER, hf:FOLDER"
    known += ", internimage:FILE, run:DIR[,which=ema]"
    assert f"init: expected one of {known}, got 'nowhere:model'" in said
    other = ["--vision.dim", "64", "--out", str(tmp_path / "other")]
    assert main(["train", "--config", str(path), *other]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "got a file nearest to dinov3_s" in said and "add --vision.dim 32" in said


def test_weights_that_are_new_are_warned_of(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    headless = timm.create_model(
        "vit_small_patch16_224", class_token=False, global_pool="", **sizes
    )
    save_file(headless.state_dict(), tmp_path / "headless.safetensors")
    vision = ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2, class_token=True)
    cfg = config(dataset, f"timm:{tmp_path / 'headless.safetensors'}", vision)
    with caplog.at_level(logging.WARNING):
        Trainer(cfg, tmp_path / "run").close()
    assert "has no class_token: the features are not those of its model" in caplog.text


def test_an_internimage_takes_no_file_of_a_vit(dataset: Path) -> None:
    with pytest.raises(ValueError, match="run:DIR or internimage:FILE with an InternImage, got"):
        replace(demo_internimage(), init="timm:file")
    with pytest.raises(ValueError, match="run:DIR or a file of a ViT with a ViT, got"):
        config(dataset, "internimage:file")


def test_a_text_tower_that_is_another_network_is_left_out_and_told(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of open_clip's: its image tower is taken, its texts by another network are not."""
    vision = clip_b16(image_size=32, patch_size=8, dim=64, depth=2, num_heads=1)
    torch.manual_seed(0)
    model = CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 64, "layers": 2},  # type: ignore[arg-type]
        text_cfg={"context_length": 24, "vocab_size": 814, "width": 64, "heads": 1, "layers": 1},  # type: ignore[arg-type]
    ).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    cfg = config(dataset, f"open_clip:{tmp_path / 'clip.pt'}", vision)
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(cfg, tmp_path / "run")
    assert "the text encoder begins from its initial values: expected a text tower" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = trainer.objective.encoder.eval()(images)[:, 0] @ model.visual.proj
        torch.testing.assert_close(pooled, model.encode_image(images), atol=1e-5, rtol=1e-5)
    assert trainer.initial is not None and trainer.initial.text is None
    *_, last = trainer.initial.rows()
    assert (
        last[:2] == ("-", "text tower") and "add --text.dim 64 --text.attention causal" in last[2]
    )
    trainer.close()
    said = json.loads((tmp_path / "run" / "init.json").read_text())
    assert "text" not in said and said["without_text"] in last[2]

    asked = replace(cfg, text=replace(cfg.text, attention="causal"))
    with pytest.raises(ValueError, match="the text tower does not fit: .* add --text.dim 64"):
        Trainer(asked, tmp_path / "asked")


# ---- Configs of others ---------------------------------------------------------------------------

WRONG = ("x", None, [1], [[1], [2]], {"name": "x"}, 10**400)


def _timm_folder(folder: Path) -> ViTConfig:
    torch.manual_seed(2)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL_TIMM)
    save_for_hf(model, folder, model_args=SMALL_TIMM)
    sizes = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2}
    return ViTConfig(**sizes, class_token=True, norm_eps=1e-6)


def _clip_folder(folder: Path) -> ViTConfig:
    from transformers import CLIPConfig
    from transformers import CLIPModel as TheirClip

    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    tower = sizes | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    text = sizes | {"num_hidden_layers": 1, "vocab_size": 30, "max_position_embeddings": 24}
    made = CLIPConfig(text_config=text, vision_config=tower, projection_dim=32)
    TheirClip(made).save_pretrained(folder)
    sizes_of_ours = {"class_token": True, "pre_norm": True, "norm_eps": 1e-5, "mlp": "quick_gelu"}
    return replace(VISION_CLIP, **sizes_of_ours)  # type: ignore[arg-type]


def _fields(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield (*path, name)
        yield from _fields(value, (*path, name))


def _with(tree: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    first, *rest = path
    return {**tree, first: _with(tree[first], tuple(rest), value) if rest else value}


FILES = {"timm": ("config.json",), "hf": ("config.json", "preprocessor_config.json")}


@pytest.mark.parametrize(("scheme", "make"), [("timm", _timm_folder), ("hf", _clip_folder)])
def test_a_config_with_fields_of_wrong_types_is_refused_in_a_sentence(
    scheme: str, make: Callable[[Path], ViTConfig], tmp_path: Path
) -> None:
    vision, spec, refused = make(tmp_path), f"{scheme}:{tmp_path}", 0
    pixels = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    read_initial(spec, vision)  # as it is, it is good
    for file in FILES[scheme]:
        config = json.loads((tmp_path / file).read_text())
        for path, wrong in itertools.product(_fields(config), WRONG):
            (tmp_path / file).write_text(json.dumps(_with(config, path, wrong)))
            try:
                read_initial(spec, vision)
            except (ValueError, FileNotFoundError) as error:
                assert str(error).startswith(f"--init {spec}: ")
                refused += 1
        (tmp_path / file).write_text(json.dumps(config))
    assert refused > 20
