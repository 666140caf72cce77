"""Published InternImage files as the start of an encoder: what is taken, left out, new, refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.models import internimage as sizes
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.export.internimage import Layout, load_internimage, save_internimage, to_layout
from m3i_fast.export.internimage_weights import internimage_weights
from m3i_fast.export.weight_files import read_weights, tensors_in
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.recipes import demo_internimage, shrink
from tests.shared.engine.small_run import TEXT, small_run
from tests.shared.official_internimage import seeded_state

# InternImage-T and InternImage-H, smaller
T = sizes.internimage_t(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), num_classes=5)
H = sizes.internimage_h(
    **{"channels": 16, "depths": (1, 1, 7, 1), "groups": (1, 2, 4, 8), "num_classes": 5},
    level2_post_norm_block_ids=(5,),
    token_dim=32,
    pooled_dim=16,
)
LAYOUTS: dict[str, Callable[[InternImage], dict[str, Any]]] = {
    "classification": lambda model: to_layout(model, "classification"),
    "detection": lambda model: {
        **to_layout(model, "detection"),
        "meta": {"epoch": 3},
    },
    "huggingface": lambda model: to_layout(model, "huggingface"),
}


def make(cfg: InternImageConfig) -> InternImage:
    model = InternImage(cfg)
    model.load_state_dict(seeded_state(model))
    return model.eval()


def encoder_of(cfg: InternImageConfig, **changes: Any) -> InternImageConfig:
    """The encoder that is trained on: a projector, and no head."""
    return replace(cfg, num_classes=0, use_clip_projector=True, **changes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stem_and_stages_of_every_layout_are_taken(layout: str) -> None:
    model = make(T)
    cfg = encoder_of(T, token_dim=32, pool_heads=2, pooled_dim=16)
    weights = internimage_weights(tensors_in(LAYOUTS[layout](model)), cfg)
    encoder = InternImage(cfg)
    encoder.load_state_dict(weights.tensors, strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(
            encoder.eval().forward_stages(images), model.forward_stages(images), strict=True
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert weights.architecture == "internimage_t"
    new = {name.split(".")[0] for name in weights.new}
    assert new == {"dcnv3_head_x3", "dcnv3_head_x4", "clip_projector", "fc_norm"}
    prefix = {"classification": "", "detection": "backbone.", "huggingface": "model."}[layout]
    name = "levels.3.blocks.0.dcn.mask.weight"
    assert weights.sources[name] == prefix + name
    left = {name.removeprefix(prefix).split(".")[0] for name in weights.left_out}
    assert left == (set() if layout == "detection" else {"conv_head", "head"})


def test_the_projector_of_h_and_g_is_taken_as_well() -> None:
    model = make(H)
    cfg = encoder_of(H)
    half = {name: value.half() for name, value in to_layout(model, "huggingface").items()}
    weights = internimage_weights(half, cfg)
    assert not weights.new and {name.split(".")[1] for name in weights.left_out} == {"head"}
    encoder = InternImage(cfg)
    encoder.load_state_dict(weights.tensors)
    images = torch.randn(1, 3, 64, 64)
    widened = load_internimage(half, cfg).eval()
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images), widened(images))


def test_a_detectors_heads_are_left_out(tmp_path: Path) -> None:
    content = to_layout(make(T), "detection")
    content["state_dict"]["bbox_head.fc.weight"] = torch.ones(2, 2)
    torch.save(content, tmp_path / "detector.pth")
    state = tensors_in(read_weights(tmp_path / "detector.pth"))
    assert internimage_weights(state, encoder_of(T)).left_out == ["bbox_head.fc.weight"]


PUBLISHED = {
    name: getattr(sizes, f"internimage_{name}") for name in ("t", "s", "b", "l", "xl", "h", "g")
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_is_known(name: str) -> None:
    with torch.device("meta"):
        state = InternImage(PUBLISHED[name]()).state_dict()
    weights = internimage_weights(state, encoder_of(PUBLISHED[name]()))
    assert weights.architecture == f"internimage_{name}"
    assert bool(weights.new) == (name not in ("h", "g"))


def test_another_size_is_refused_with_the_flags_of_the_nearest() -> None:
    with torch.device("meta"):
        state = InternImage(sizes.internimage_b()).state_dict()
    with pytest.raises(ValueError) as error:
        internimage_weights(state, encoder_of(sizes.internimage_s()))
    said = str(error.value)
    assert "channels 80, groups (5, 10, 20, 40), got a file nearest to internimage_b" in said
    assert said.endswith("add --vision.channels 112 --vision.groups 7 14 28 56")


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({"depths": (1, 1, 1, 1)}, "--vision.depths 1 1 2 1"),
        ({"mlp_ratio": 2.0}, "--vision.mlp-ratio 4.0"),
        ({"layer_scale": 0.1}, "--vision.layer-scale None"),
        ({"post_norm": True}, "--vision.no-post-norm"),
        ({"dw_kernel_size": 5}, "--vision.dw-kernel-size None"),
        ({"center_feature_scale": True}, "--vision.no-center-feature-scale"),
        (
            {"level2_post_norm": True, "level2_post_norm_block_ids": (1,)},
            "--vision.no-level2-post-norm --vision.level2-post-norm-block-ids None",
        ),
    ],
)
def test_each_field_that_differs_has_its_flag(changed: dict[str, Any], flags: str) -> None:
    state = make(T).state_dict()
    with pytest.raises(ValueError) as error:
        internimage_weights(state, encoder_of(T, **changed))
    assert str(error.value).endswith(f": add {flags}"), error.value


def test_what_a_file_does_not_say_is_expected_as_of_the_published_size() -> None:
    with torch.device("meta"):
        state = InternImage(sizes.internimage_l()).state_dict()
    with pytest.raises(ValueError, match="internimage_l, offset_scale 2.0: add --vision.offset-"):
        internimage_weights(state, encoder_of(sizes.internimage_l(), offset_scale=1.0))
    with torch.device("meta"):
        state = InternImage(sizes.internimage_g()).state_dict()
    with pytest.raises(ValueError, match="add --vision.pool-heads 16"):
        internimage_weights(state, encoder_of(sizes.internimage_g(), pool_heads=8))


def test_another_projector_is_refused_where_the_file_has_one() -> None:
    with pytest.raises(ValueError, match="add --vision.token-dim 32 --vision.pooled-dim 16"):
        internimage_weights(make(H).state_dict(), encoder_of(H, token_dim=64, pooled_dim=32))


def test_a_file_of_no_internimage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected the names of InternImage.* got a"):
        internimage_weights({"a": torch.ones(2)}, encoder_of(T))
    torn = {n: v for n, v in make(T).state_dict().items() if "levels.2.blocks.1.norm2" not in n}
    with pytest.raises(ValueError, match=r"missing: levels\.2\.blocks\.1\.norm2\.0\.weight"):
        internimage_weights(torn, encoder_of(T))


# ---- Runs ----------------------------------------------------------------------------------------


def config(dataset: Path) -> TrainConfig:
    cfg = shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT)
    return replace(cfg, num_steps=1, checkpoint_every=1, num_threads=1)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    Trainer(config(dataset), out).train()
    return out


@pytest.mark.parametrize("layout", ["classification", "detection", "huggingface"])
def test_a_run_is_written_by_verb_and_begins_another(
    layout: Layout, run: Path, dataset: Path, tmp_path: Path
) -> None:
    import m3i_fast

    file = tmp_path / ("model.safetensors" if layout == "huggingface" else "model.pth")
    words = ["export", str(run), str(file), "--to", "internimage", "--layout", layout]
    assert main(words) == 0
    encoder = m3i_fast.load(run, device="cpu").encoder
    other = file.with_stem("other")
    assert isinstance(encoder, InternImage)
    save_internimage(encoder, other, layout)
    assert other.read_bytes() == file.read_bytes() or layout != "huggingface"
    trainer = Trainer(
        replace(config(dataset), init=f"internimage:{file}", seed=5), tmp_path / "run"
    )
    began: dict[str, Tensor] = trainer.objective.encoder.state_dict()
    assert trainer.initial is not None
    taken = trainer.initial.weights.tensors
    assert bool(trainer.initial.weights.new) == (layout == "detection")
    for name, value in encoder.state_dict().items():
        if name in taken:
            assert torch.equal(began[name], value), name
    trainer.close()


def test_wrong_requests_are_refused(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["export", *words]) == 2
        return " ".join(capsys.readouterr().err.split())

    out = str(tmp_path / "model.pth")
    assert "--layout: expected with --to internimage alone, got --to safetensors" in refused(
        str(run), out, "--to", "safetensors", "--layout", "detection"
    )
    said = refused(str(run), out, "--to", "internimage", "--layout", "huggingface")
    assert "expected a name that ends in .safetensors for the huggingface layout" in said
    plain = tmp_path / "plain"
    Trainer(replace(small_run(dataset, num_steps=1), num_threads=1), plain).train()
    said = refused(str(plain), out, "--to", "internimage")
    assert "expected a run with an InternImage, got ViT" in said
    assert not Path(out).exists()
