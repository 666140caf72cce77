"""The sum over terms: who is asked what, what reaches whom, and that each term learns."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.objective.objective import Term
from m3i_fast.objectives.monitors import feature_std, rankme
from m3i_fast.objectives.step_context import Encoded
from tests.shared.small_objective import (
    NUM_CLASSES,
    VISION,
    build_model,
    draw_small_mix,
    loss_of,
    make_batch,
    make_config,
)


@pytest.mark.parametrize("mode", ["own_image", "joint", "none"])
def test_total_is_the_weighted_sum(mode: str) -> None:
    cfg = make_config(mode)
    cfg = replace(
        cfg,
        terms=tuple(replace(t, weight=w) for t, w in zip(cfg.terms, (0.5, 2, 1, 3), strict=True)),
    )
    batch = make_batch()
    total, metrics = loss_of(build_model(cfg), batch, draw_small_mix(cfg, batch))
    expected = sum(t.weight * metrics[f"loss/{t.name}"] for t in cfg.terms)
    torch.testing.assert_close(total, expected)
    assert all(float(metrics[f"loss/{t.name}"]) > 0 for t in cfg.terms)


def test_asking_a_fraction_is_asking_those_inputs_alone() -> None:
    batch = make_batch()
    whole, half = make_config(only="inter"), make_config(only="inter")
    half = replace(half, mixing=replace(half.mixing, dense_fraction=0.5))
    model, mix = build_model(whole), draw_small_mix(whole, batch)
    asked = [0, 1, 4, 5]  # of four inputs of two images the first two
    some = replace(
        mix, num_asked=2, own_query=mix.own_query[asked], other_query=mix.other_query[asked]
    )
    other = [2, 3, 6, 7]
    rest = replace(
        mix,
        num_asked=2,
        members=mix.members[2:],
        choice=mix.choice[2:],
        sample=mix.sample[other],
        token_index=mix.token_index[other],
        own_query=mix.own_query[other],
        other_query=mix.other_query[other],
    )
    without = replace(whole, terms=tuple(replace(t, regulariser=_plain(t)) for t in whole.terms))
    model = build_model(without)  # the decorrelation term is no mean over inputs
    losses = [loss_of(model, batch, m)[0] for m in (mix, some, rest)]
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2)
    assert loss_of(build_model(half), batch, draw_small_mix(half, batch))[0] > 0


def _plain(term: Term) -> str:
    return "stop_gradient" if term.is_dense else term.regulariser


@pytest.mark.parametrize("mode", ["own_image", "joint"])
def test_the_other_image_is_seen_only_where_attention_is_joint(mode: str) -> None:
    cfg = make_config(mode)
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    (before,) = model.encode_inputs(batch, mix).views
    changed = batch.global_views[0].clone()
    changed[mix.members[:, 1]] = 0
    changed_batch = replace(batch, global_views=(changed, batch.global_views[1]))
    (after,) = model.encode_inputs(changed_batch, mix).views
    firsts, seconds = slice(0, len(mix.members)), slice(len(mix.members), None)
    assert torch.equal(before[firsts], after[firsts]) == (mode == "own_image")
    assert not torch.equal(before[seconds], after[seconds])


def test_tokens_are_those_of_the_image_alone() -> None:
    """Mixing on pixels and sorting by image equals encoding the visible patches of each image by
    itself."""
    cfg = make_config()
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    (mixed,) = model.encode_inputs(batch, mix).views
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    for image in range(8):
        pixels = batch.global_views[0][mix.sample[image]].float() / 255
        whole = model.encoder.embed(((pixels - mean) / std)[None])
        alone = model.encoder.encode(whole[:, mix.token_index[image]])
        torch.testing.assert_close(mixed[image], alone[0], atol=1e-4, rtol=1e-4)


def test_dense_targets_are_features_of_the_asked_images_view() -> None:
    cfg = make_config()
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    targets = model.encode_targets(batch, mix)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    assert targets.rows == {("momentum", 0): "first", ("momentum", 1): "last"}
    for view, rows in ((0, mix.members[:, 0]), (1, mix.members[:, 1])):
        images = (batch.global_views[view][rows].float() / 255 - mean) / std
        found = targets.tokens["momentum", view]
        assert not found.requires_grad
        torch.testing.assert_close(found, model.encoder(images), atol=1e-4, rtol=1e-4)


def test_dense_terms_are_siameseims_of_normalised_targets() -> None:
    """(mean_n |p_n - t_n|^2 + 0.02 mean_n p_n^T C p_n) / D, with all products of two rows."""
    cfg = make_config()
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    with torch.no_grad():  # an untrained encoder's tokens are normalised as they come
        for parameter in model.target_encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    predictions: list[Tensor] = []
    decoder = model.decoders["features_momentum"]
    decoder.register_forward_hook(lambda *call: predictions.extend(z.detach() for z in call[-1]))
    encoded, targets = model.encode_inputs(batch, mix), model.encode_targets(batch, mix)
    metrics = model(encoded, targets, batch, mix, monitor=True)[1]
    raws = (
        targets.tokens["momentum", 0].gather(1, _index(mix.own_query[:4])),
        targets.tokens["momentum", 1].gather(1, _index(mix.other_query[4:])),
    )
    for name, z_hat, raw in zip(("intra", "inter"), predictions, raws, strict=True):
        p, t = z_hat.flatten(0, 1), F.layer_norm(raw, (VISION.dim,)).flatten(0, 1)
        spread = (p @ torch.cov(t.T, correction=0) @ p.T).diagonal().mean()
        expected = ((p - t).square().sum(1).mean() + 0.02 * spread) / VISION.dim
        torch.testing.assert_close(metrics[f"loss/{name}"], expected)
        cosine = F.cosine_similarity(p, t).mean()
        torch.testing.assert_close(metrics[f"monitor/{name}_cosine"], cosine)
    tokens = F.layer_norm(targets.tokens["momentum", 1], (VISION.dim,))
    torch.testing.assert_close(metrics["monitor/target_std"], feature_std(tokens.mean(1)))
    torch.testing.assert_close(metrics["monitor/target_rank"], rankme(tokens))
    seen = F.layer_norm(encoded.views[0][4:].detach(), (VISION.dim,))  # the same images
    cosine = F.cosine_similarity(seen.mean(1), tokens.mean(1)).mean()
    torch.testing.assert_close(metrics["monitor/target_alignment"], 2 - 2 * cosine)


def _index(query: Tensor) -> Tensor:  # [A, Q] -> [A, Q, C]
    return query[..., None].expand(-1, -1, VISION.dim)


def test_what_is_not_annotated_is_not_asked() -> None:
    """Images without class or caption change neither term, whatever they hold there."""
    batch = make_batch()
    for only, missing in (("category", batch.label == -1), ("caption", batch.num_tokens == 0)):
        cfg = make_config(only=only)
        model, mix = build_model(cfg), draw_small_mix(cfg, batch)
        encoded = model.encode_inputs(batch, mix)
        noise = encoded.views[0].clone()
        noise[missing[mix.sample]] = 7.0
        first, _ = model(encoded, model.encode_targets(batch, mix), batch, mix)
        second, _ = model(Encoded((noise,)), model.encode_targets(batch, mix), batch, mix)
        assert torch.equal(first, second) and float(first) > 0


@pytest.mark.parametrize("wrong", [-5, -2, 2**40, 2**32 - 1])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_class_out_of_range_is_not_taken_for_none(wrong: int, everywhere: bool) -> None:
    """Only -1 says that a picture has no class."""
    batch = make_batch()
    label = torch.full_like(batch.label, -1)
    label[slice(None) if everywhere else slice(3, 4)] = wrong
    cfg = make_config(only="category")
    with pytest.raises(RuntimeError, match=f"targets: expected rows .* got {wrong} in place"):
        loss_of(build_model(cfg), replace(batch, label=label), draw_small_mix(cfg, batch))


def test_variants_of_one_concept_are_positives() -> None:
    cfg = make_config(only="caption")
    batch, model = make_batch(), build_model(cfg)
    mix = draw_small_mix(cfg, batch)
    apart, _ = loss_of(model, batch, mix)
    together, _ = loss_of(model, replace(batch, group_id=torch.zeros(8, dtype=torch.int64)), mix)
    assert not torch.equal(apart, together)


@pytest.mark.parametrize("only", ["intra", "inter", "category", "caption"])
def test_a_term_alone_learns_and_builds_nothing_else(only: str) -> None:
    cfg = make_config(only=only)
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    names = {".".join(name.split(".")[:2]) for name, _ in model.named_parameters()}
    assert ("decoders.features_momentum" in names) == (only in ("intra", "inter"))
    assert ("target_encoder.encoder" in names) == (only in ("intra", "inter"))
    assert (f"terms.{only}" in names) == (only in ("category", "caption"))
    assert not any(name.startswith("terms.") and name != f"terms.{only}" for name in names)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(25):
        loss, _ = loss_of(model, batch, mix)
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    for average, _ in model.momentum_pairs():
        assert all(p.grad is None for p in average.parameters())


@pytest.mark.parametrize("only", ["inter", "category", "caption"])
def test_local_views_are_asked_as_well(only: str) -> None:
    cfg = make_config(only=only)
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    rng = torch.Generator().manual_seed(2)
    local = torch.randint(0, 256, (8, 3, 16, 16), generator=rng, dtype=torch.uint8)
    boxes = torch.cat([batch.boxes, batch.boxes[:, :1] * torch.tensor([1, 1, 0.5, 0.5, 1])], 1)
    with_local = replace(batch, local_views=(local,), boxes=boxes)
    encoded = model.encode_inputs(with_local, mix)
    assert encoded.local[0].shape == (8, 4, VISION.dim)
    without, _ = loss_of(model, batch, mix)
    loss, _ = loss_of(model, with_local, mix)
    assert not torch.equal(loss, without)
    if only == "inter":  # the mean of both inputs' terms, where a local view equals its input
        whole = replace(cfg, mixing=replace(cfg.mixing, mode="none"), decoder=cfg.decoder)
        model, mix = build_model(whole), draw_small_mix(whole, batch)
        same = replace(batch, local_views=batch.global_views[:1], boxes=batch.boxes[:, [0, 1, 0]])
        torch.testing.assert_close(loss_of(model, same, mix)[0], loss_of(model, batch, mix)[0])


@pytest.mark.parametrize("num_queries", [0, 3])
def test_blank_cells_are_not_asked(num_queries: int) -> None:
    """The right half of every view is paper with a little noise: half of the 16 cells."""
    cfg = make_config("joint")
    mixing = replace(cfg.mixing, num_queries=num_queries, min_contrast=8)
    cfg, batch = replace(cfg, mixing=mixing), make_batch()
    for view in batch.global_views:
        view[..., 16:] = 250 + view[..., 16:] % 6
    model, mix = build_model(cfg), draw_small_mix(cfg, batch)
    asked: list[Tensor] = []
    for name in ("intra", "inter"):
        term = model.terms[name]
        inner = term._query
        term._query = lambda *args, inner=inner: asked.append(inner(*args)) or asked[-1]
    total, _ = loss_of(model, batch, mix)
    total.backward()
    intra, inter = asked
    assert intra.shape == (4, num_queries or 8) and inter.shape == (4, num_queries or 16)
    assert bool((intra % 4 < 2).all()) and bool((inter % 4 < 2).all())
    shown = mix.token_index[:4]
    assert not bool((intra[:, :, None] == shown[:, None, :]).any())
    if not num_queries:  # every one with a content, others in their place
        assert all(set(row) == {0, 1, 4, 5, 8, 9, 12, 13} for row in inter.tolist())


def test_temperatures_are_clamped_in_place() -> None:
    model = build_model(make_config())
    with torch.no_grad():
        model.terms["caption"].log_scale.fill_(9.0)
        model.terms["category"].log_scale.fill_(-1.0)
    model.finish_step()
    assert float(model.terms["caption"].log_scale.exp()) == pytest.approx(100.0)
    assert float(model.terms["category"].log_scale.exp()) == pytest.approx(1.0)


@pytest.mark.parametrize("only", ["category", "caption"])
def test_a_batch_without_members_costs_nothing_and_breaks_nothing(only: str) -> None:
    cfg = make_config()
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    empty = {
        "category": replace(batch, label=torch.full((8,), -1)),
        "caption": replace(batch, num_tokens=torch.zeros(8, dtype=torch.int64)),
    }[only]
    called: list[object] = []
    model.terms[only].head.register_forward_hook(lambda *call: called.append(call))
    total, metrics = loss_of(model, empty, mix)
    total.backward()
    assert not called
    assert float(metrics[f"members/{only}"]) == float(metrics[f"loss/{only}"]) == 0
    others = [name for name in ("intra", "inter", "category", "caption") if name != only]
    assert all(float(metrics[f"members/{name}"]) > 0 for name in others)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_blended_pictures_are_asked_for_both_categories_by_their_share() -> None:
    """mixup's cross-entropy with soft labels, arXiv 1710.09412."""
    cfg = make_config("blend", only="category")
    model, batch = build_model(cfg), make_batch()
    batch = replace(batch, label=torch.arange(8) % NUM_CLASSES)
    mix = draw_small_mix(cfg, batch)
    total, metrics = loss_of(model, batch, mix)
    assert mix.share is not None
    term, encoded = model.terms["category"], model.encode_inputs(batch, mix)
    z_hat = term.embed(encoded.views[0][:4])
    logits = term.log_scale.exp() * z_hat @ F.normalize(term.embedding, dim=-1).T
    first, second = (
        F.one_hot(batch.label[rows], NUM_CLASSES).float() for rows in mix.members.unbind(1)
    )
    soft = mix.share[:, None] * first + (1 - mix.share[:, None]) * second
    torch.testing.assert_close(total, F.cross_entropy(logits, soft))
    assert float(metrics["members/category"]) == 8


@pytest.mark.parametrize("num_images", [2, 3, 4])
@pytest.mark.parametrize("mode", ["own_image", "joint"])
def test_several_images_share_an_input(mode: str, num_images: int) -> None:
    cfg = make_config(mode)
    cfg = replace(cfg, mixing=replace(cfg.mixing, num_images=num_images, num_queries=0))
    batch = make_batch(12)
    model, mix = build_model(cfg), draw_small_mix(cfg, batch)
    encoded = model.encode_inputs(batch, mix)
    assert encoded.views[0].shape == (12, 16 // num_images, VISION.dim)
    total, metrics = model(encoded, model.encode_targets(batch, mix), batch, mix)
    total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    asked = {name: float(metrics[f"members/{name}"]) for name in ("intra", "inter")}
    assert asked == {"intra": 12 // num_images, "inter": 12 // num_images}


def test_members_are_counted() -> None:
    cfg = make_config()
    model, batch = build_model(cfg), make_batch()
    metrics = loss_of(model, batch, draw_small_mix(cfg, batch))[1]
    expected = {"intra": 4, "inter": 4, "category": 5, "caption": 6}  # of eight, two to an input
    assert {name: float(metrics[f"members/{name}"]) for name in expected} == expected


def test_balanced_terms_pull_alike_on_the_encoder() -> None:
    """A label's as if all of the batch had one: 5 of 8 have a category, 6 a caption."""
    cfg = replace(make_config(), balance=BalanceConfig(mode="gradient_norm"))
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    with torch.no_grad():  # at its start it says hardly anything of its input
        for parameter in model.decoders.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    encoded, targets = model.encode_inputs(batch, mix), model.encode_targets(batch, mix)
    model(encoded, targets, batch, mix, measure=True)
    metrics = model(encoded, targets, batch, mix, monitor=True)[1]
    norms = []
    for name in ("intra", "inter", "category", "caption"):
        alone = replace(
            cfg,
            balance=BalanceConfig(),
            terms=tuple(replace(t, weight=float(t.name == name)) for t in cfg.terms),
        )
        single = build_model(alone)
        single.load_state_dict(model.state_dict(), strict=False)
        found = single.encode_inputs(batch, mix)
        loss, _ = single(found, targets, batch, mix)
        (grad,) = torch.autograd.grad(loss, found.views)
        share = {"category": 5 / 8, "caption": 6 / 8}.get(name, 1.0)
        norms.append(float(grad.norm() * metrics[f"weight/{name}"]) / share**0.5)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-3)


def test_monitors_come_only_when_asked() -> None:
    cfg = make_config()
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    encoded, targets = model.encode_inputs(batch, mix), model.encode_targets(batch, mix)
    quiet, loud = (model(encoded, targets, batch, mix, monitor=m)[1] for m in (False, True))
    assert not any(name.startswith("monitor/") for name in quiet)
    assert {"monitor/target_std", "monitor/target_rank", "monitor/inter_cosine"} <= set(loud)
