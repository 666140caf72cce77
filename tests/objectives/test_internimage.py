"""The objective with a convolutional encoder: joint mixing, one pooled vector, the same terms."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.config import TrainConfig
from m3i_fast.config.data import ViewConfig
from m3i_fast.config.models.internimage import internimage_demo, internimage_t
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, m3i
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.objectives.mixing import Mix, draw_mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.pipelines.batch import Batch
from m3i_fast.recipes import demo_internimage

VISION = internimage_demo(
    image_size=64,
    channels=16,
    depths=(1, 1, 1, 1),
    groups=(1, 2, 4, 8),
    token_dim=32,
    pooled_dim=24,
)
TEXT = TextConfig(vocab_size=50, context_length=6, dim=32, depth=1, num_heads=2, embed_dim=16)
B = 8


def config(mode: str = "joint", only: str | None = None, block: int = 2) -> ObjectiveConfig:
    return ObjectiveConfig(
        terms=tuple(replace(t, weight=float(only in (None, t.name))) for t in m3i()),
        mixing=MixingConfig(mode=mode, mask_block=block, num_queries=4),  # type: ignore[arg-type]
        decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
        head_hidden_dim=32,
    )


def build(cfg: ObjectiveConfig) -> MutualInformation:
    torch.manual_seed(0)
    return MutualInformation(cfg, vision=VISION, text=TEXT, num_classes=5)


def make_batch() -> Batch:
    def views(side: int) -> torch.Tensor:
        return torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8)

    corner, side = torch.rand(B, 3, 2) * 10, 20 + torch.rand(B, 3, 2) * 10
    return Batch(
        global_views=(views(64), views(64)),
        local_views=(views(32),),
        boxes=torch.cat([corner, side, torch.zeros(B, 3, 1)], -1),
        image_size=torch.full((B, 2), 40.0),
        token_ids=torch.randint(1, 50, (B, 6), dtype=torch.int32),
        num_tokens=torch.full((B,), 6),
        label=torch.arange(B) % 5,
        sample_id=torch.arange(B),
        group_id=torch.arange(B),
        position=torch.arange(B),
    )


def draw(cfg: ObjectiveConfig) -> Mix:
    return draw_mix(
        cfg.mixing,
        position=torch.arange(B),
        first_position=0,
        grid=4,
        context_length=6,
        seed=0,
        step=0,
        num_steps=1,
    )


@pytest.mark.parametrize("mode", ["joint", "none"])
@pytest.mark.parametrize("only", ["intra", "inter", "category", "caption"])
def test_each_term_learns_through_the_convolutions(mode: str, only: str) -> None:
    cfg = config(mode, only)
    model, batch = build(cfg), make_batch()
    mix = draw(cfg)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    losses = []
    for _ in range(25):
        encoded = model.encode_inputs(batch, mix)
        loss, _ = model(encoded, model.encode_targets(batch, mix), batch, mix)
        loss.backward()
        pools = only in ("category", "caption")
        for name, parameter in trained.items():
            pooling = name.startswith(("encoder.clip_projector", "encoder.fc_norm"))
            assert (parameter.grad is None) == (pooling and not pools), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_an_images_cells_are_its_own_of_the_mixed_input() -> None:
    cfg = config()
    model, batch = build(cfg).eval(), make_batch()
    mix = draw(cfg)
    encoded = model.encode_inputs(batch, mix)
    assert encoded.views[0].shape == (B, 8, 32) and encoded.local[0].shape == (B, 4, 32)
    # cells of stride 32 are whole: every 2 x 2 block of tokens shows one image
    masks = mix.choice == 0
    blocks = masks.unflatten(2, (2, 2)).unflatten(1, (2, 2))
    assert torch.equal(blocks.all(4).all(2), blocks.any(4).any(2))
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    for p, (first, second) in enumerate(mix.members.tolist()):
        shown = masks[p].repeat_interleave(16, 0).repeat_interleave(16, 1)
        picture = torch.where(shown, batch.global_views[0][first], batch.global_views[0][second])
        tokens = model.encoder.encode_cells(((picture.float() / 255 - mean) / std)[None])[0]
        for image, cells in ((p, masks[p]), (p + len(mix.members), ~masks[p])):
            torch.testing.assert_close(
                encoded.views[0][image], tokens[cells.flatten()], atol=1e-4, rtol=1e-4
            )


def test_heads_read_the_pooled_vector() -> None:
    model, batch = build(config()).eval(), make_batch()
    tokens, embedding = model.embed_images(batch.global_views[0])
    assert embedding is not None
    pooled = model.encoder.pool(tokens)  # type: ignore[operator]
    head = model.terms["caption"].head
    expected = head.output(torch.nn.functional.gelu(head.hidden(pooled)))
    torch.testing.assert_close(embedding, torch.nn.functional.normalize(expected, dim=-1))


def test_what_a_convolution_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mixing\.mode: expected joint, blend .* got own_image"):
        build(config("own_image"))
    with pytest.raises(ValueError, match=r"mask_block: expected a multiple of 2 .* got 1"):
        build(config(block=1))
    build(config("none", block=1))
    with pytest.raises(ValueError, match=r"vision\.use_clip_projector: expected True"):
        build_encoder(internimage_t(num_classes=0))
    with pytest.raises(ValueError, match=r"vision\.num_classes: expected 0"):
        build_encoder(internimage_t(use_clip_projector=True))


def test_a_run_names_what_does_not_fit(tmp_path: Path) -> None:
    cfg = demo_internimage()
    with pytest.raises(ValueError, match=r"data\.local_views\.size: .* 32, got 48"):
        replace(cfg, data=replace(cfg.data, local_views=ViewConfig(size=48)))
    mixing = replace(cfg.objective.mixing, mode="own_image")
    with pytest.raises(ValueError, match=r"objective\.mixing\.mode"):
        replace(cfg, objective=replace(cfg.objective, mixing=mixing))
    path = tmp_path / "config.json"
    path.write_text(cfg.to_json().replace('"offset_scale"', '"offset_skale"'))
    with pytest.raises(ValueError, match=r"config\.json.*offset_skale"):
        TrainConfig.load(path)
