"""A loaded model computes what evaluation measures and what training compares, without the data."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.durable_files import digest
from m3i_fast.engine.evaluator import build_averaged, load_objective
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.feature_extraction import collect_features
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.objectives.terms import Category
from m3i_fast.ops import boltzmann
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import demo_internimage, demo_method, shrink
from tests.shared.engine.small_run import TEXT, saved_tensors, small_run


def trained(cfg: TrainConfig, out: Path, *, steps: int = 1) -> Path:
    cfg = replace(cfg, num_steps=steps, log_every=1, num_threads=1)
    Trainer(replace(cfg, checkpoint_every=1, keep_checkpoints=steps), out).train()
    return out


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(small_run(dataset), tmp_path_factory.mktemp("loading") / "run", steps=4)


@pytest.fixture(scope="module")
def model(run: Path) -> m3i_fast.Model:
    return m3i_fast.load(run, device="cpu")


@pytest.fixture(scope="module")
def batch(run: Path, dataset: Path) -> Batch:
    """Held-out pictures as evaluation reads them."""
    size = TrainConfig.load(run / "config.json").vision.image_size
    return next(evaluation_batches(dataset, "heldout", image_size=size, batch_size=64))


@pytest.fixture(scope="module")
def pictures(dataset: Path) -> list[Image.Image]:
    """The same pictures, opened by Pillow from the shards' bytes."""
    opened = []
    for shard in read_manifest(dataset).split("heldout").shards:
        with tarfile.open(dataset / shard.file) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    file = tar.extractfile(member)
                    assert file is not None
                    opened.append(Image.open(io.BytesIO(file.read())))
    return opened


def config_of(run: Path) -> TrainConfig:
    return TrainConfig.load(run / "config.json")


# ---- Pictures ------------------------------------------------------------------------------------


def test_the_pixels_are_those_of_evaluation(
    model: m3i_fast.Model, batch: Batch, pictures: list[Image.Image]
) -> None:
    views = batch.global_views[0]
    assert len(views) == len(pictures) > 3
    assert torch.equal(model.transform.views(pictures), views)


def test_embeddings_are_those_of_evaluation_bit_for_bit(
    run: Path, model: m3i_fast.Model, batch: Batch, pictures: list[Image.Image]
) -> None:
    objective, views = load_objective(run, config_of(run)), batch.global_views[0]
    tokens, embedded = objective.embed_images(views)
    assert embedded is not None and embedded.std(0).min() > 0  # of different pictures
    for given in (pictures, views, torch.stack([model.transform(p) for p in pictures])):
        assert torch.equal(model.encode_image(given, normalize=True), embedded)
        assert torch.equal(model.forward_features(given)[:, model.num_prefix_tokens :], tokens)
    raw = model.encode_image(pictures)
    torch.testing.assert_close(raw / raw.norm(dim=-1, keepdim=True), embedded)
    assert not torch.allclose(raw, embedded)
    for one in (pictures[0], views[0], model.transform(pictures[0])):
        embedded_one = model.encode_image(image=one, normalize=True)
        torch.testing.assert_close(embedded_one, embedded[:1], rtol=0, atol=1e-6)
    of_list = model.encode_image([model.transform(p) for p in pictures], normalize=True)
    assert torch.equal(of_list, embedded)


def test_the_vector_is_that_of_the_knn_and_the_probe(
    run: Path, model: m3i_fast.Model, batch: Batch
) -> None:
    objective = load_objective(run, config_of(run))
    measured = collect_features(
        [batch], objective.embed_images, objective.embed_captions, torch.device("cpu")
    )
    assert torch.equal(model(batch.global_views[0]), measured.encoder)
    text = model.encode_text(batch.token_ids[batch.num_tokens > 0], normalize=True)
    assert torch.equal(text, measured.text[batch.num_tokens > 0])


def test_logits_are_those_that_the_category_term_trains(
    run: Path, model: m3i_fast.Model, batch: Batch
) -> None:
    views, labels = batch.global_views[0], batch.label
    views, labels = views[labels >= 0], labels[labels >= 0]
    assert len(labels) > 1
    logits = model.classify(views)
    assert logits.shape == (len(views), len(model.class_names))
    objective = load_objective(run, config_of(run))
    (term,) = objective.terms_of(Category)
    with torch.no_grad():
        summary = objective.encoder.summarise(objective.embed_images(views)[0])
        loss = boltzmann(
            term.embed(summary),
            torch.nn.functional.normalize(term.embedding, dim=-1),
            term.log_scale.exp(),
            targets=labels,
        )
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, labels), loss)


def test_bfloat16_is_that_of_autocast(run: Path, batch: Batch) -> None:
    views = batch.global_views[0]
    objective = load_objective(run, config_of(run))
    with torch.autocast("cpu", torch.bfloat16):
        _, embedded = objective.embed_images(views)
    model = m3i_fast.load(run, device="cpu", dtype=torch.bfloat16)
    got = model.encode_image(views, normalize=True)
    assert got.dtype == torch.float32 and torch.equal(got, embedded)
    assert not torch.equal(got, m3i_fast.load(run, device="cpu").encode_image(views, True))


def test_bfloat16_rounds_no_logits(run: Path, batch: Batch) -> None:
    views = batch.global_views[0]
    objective = load_objective(run, config_of(run))
    (term,) = objective.terms_of(Category)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embedded = term.embed(objective.encoder.summarise(objective.embed_images(views)[0]))
    classes = torch.nn.functional.normalize(term.embedding.detach().double(), dim=-1)
    expected = term.log_scale.detach().double().exp() * embedded.double() @ classes.T
    logits = m3i_fast.load(run, device="cpu", dtype=torch.bfloat16).classify(views)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    whole = m3i_fast.load(run, device="cpu", dtype=torch.float32).classify(views)
    assert 1e-5 < (logits - whole).abs().max() < 0.05 * whole.abs().max()  # of the encoder alone


def test_timms_and_open_clips_calls_are_taken(model: m3i_fast.Model, batch: Batch) -> None:
    import inspect

    from open_clip.model import CLIP
    from timm.models.vision_transformer import VisionTransformer

    calls = [(CLIP, "encode_image"), (CLIP, "encode_text"), (VisionTransformer, "forward_head")]
    for theirs, name in calls:
        arguments = inspect.signature(getattr(theirs, name)).parameters
        assert [*inspect.signature(getattr(m3i_fast.Model, name)).parameters] == [*arguments]
    features = model.forward_features(x=batch.global_views[0])
    vector = model.forward_head(features, pre_logits=True)
    assert torch.equal(vector, model(batch.global_views[0]))


def test_the_bias_is_that_of_a_sigmoid(
    model: m3i_fast.Model, batch: Batch, dataset: Path, tmp_path: Path
) -> None:
    assert model.logit_bias is None
    cfg = small_run(dataset)
    terms = tuple(
        replace(term, likelihood="sigmoid") if term.target == "caption" else term
        for term in cfg.objective.terms
    )
    run = trained(replace(cfg, objective=replace(cfg.objective, terms=terms)), tmp_path / "run")
    of_sigmoid = m3i_fast.load(run, device="cpu")
    assert of_sigmoid.logit_bias is not None
    (stored,) = (
        value for name, value in saved_tensors(run).items() if name.endswith("caption.bias")
    )
    assert torch.equal(of_sigmoid.logit_bias, stored) and stored < -9


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(64, 64), r"expected \[B, 3, H, W\] floats, got \[64, 64\]"),
        (torch.zeros(64, 64, 3), r"expected \[B, 3, H, W\] floats, got \[1, 64, 64, 3\]"),
        (torch.zeros(2, 1, 64, 64), r"expected \[B, 3, H, W\] floats"),
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), r"expected \[B, 3, H, W\] uint8"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), r"uint8, got .* torch.int64"),
        ([torch.zeros(1, 9, 9, dtype=torch.uint8)], r"expected \[3, H, W\] uint8"),
        ([torch.zeros(3, 64, 64), Image.new("RGB", (9, 9))], "all of them or none"),
    ],
)
def test_what_is_no_picture_is_refused(model: m3i_fast.Model, wrong: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model(wrong)


def test_what_is_no_picture_at_all_is_refused(model: m3i_fast.Model) -> None:
    with pytest.raises(TypeError, match="expected a PIL image or a tensor .* got str"):
        model("apple.png")  # type: ignore[arg-type]


# ---- Texts ---------------------------------------------------------------------------------------

TEXTS = ["a red apple", "The  Ship &amp; the sea", "", "one " * 40, "☃ snowman"]


def test_the_tokenizer_is_open_clips_with_the_merges_of_the_data(
    model: m3i_fast.Model, dataset: Path, tmp_path: Path
) -> None:
    import gzip

    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    num_merges = read_manifest(dataset).tokenizer.num_merges
    assert num_merges == 300
    lines = gzip.open(default_bpe()).read().decode().split("\n")[: num_merges + 1]
    merges = tmp_path / "merges.txt.gz"
    merges.write_bytes(gzip.compress("\n".join(lines).encode()))
    theirs = SimpleTokenizer(str(merges), context_length=TEXT.context_length)
    assert torch.equal(model.tokenizer(TEXTS), theirs(TEXTS))
    assert torch.equal(model.tokenizer(TEXTS[0]), theirs(TEXTS[0]))


def test_texts_are_embedded_as_training_embeds_captions(run: Path, model: m3i_fast.Model) -> None:
    objective = load_objective(run, config_of(run))
    encoded = [model.tokenizer.encode(text) for text in TEXTS]  # as data are packed
    token_ids = torch.zeros(len(TEXTS), TEXT.context_length, dtype=torch.int32)
    for row, ids in zip(token_ids, encoded, strict=True):
        row[: len(ids)] = torch.from_numpy(ids)
    expected = objective.embed_captions(token_ids, torch.tensor([len(ids) for ids in encoded]))
    assert torch.equal(model.encode_text(TEXTS, normalize=True), expected)
    assert torch.equal(model.encode_text(model.tokenizer(TEXTS), normalize=True), expected)
    raw = model.encode_text("a red apple")
    assert raw.shape == (1, TEXT.embed_dim) and not torch.allclose(raw, expected[:1])
    torch.testing.assert_close(raw / raw.norm(), expected[:1])


def test_ids_without_an_end_are_refused(model: m3i_fast.Model) -> None:
    with pytest.raises(ValueError, match=r"an end in each row, 813, .*got \[2, 5\] torch.int64"):
        model.encode_text(torch.ones(2, 5, dtype=torch.int64))


# ---- Which weights -------------------------------------------------------------------------------


def test_the_average_is_the_encoder_alone(run: Path, batch: Batch) -> None:
    cfg, views = config_of(run), batch.global_views[0]
    averaged = build_averaged(load_objective(run, cfg), cfg)
    model = m3i_fast.load(run, which="ema", device="cpu")
    tokens = model.forward_features(views)[:, model.num_prefix_tokens :]
    assert torch.equal(tokens, averaged.embed_images(views)[0])
    assert not torch.allclose(model(views), m3i_fast.load(run, device="cpu")(views))
    for use in (model.encode_image, model.classify):
        with pytest.raises(ValueError, match="head, got none: the moving average has none"):
            use(views)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"which": "best"}, "which: expected trained or ema, got 'best'"),
        ({"dtype": torch.float16}, r"dtype: expected torch.float32, .*got torch.float16"),
    ],
)
def test_unknown_choices_are_refused(run: Path, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        m3i_fast.load(run, **arguments)  # type: ignore[arg-type]


def test_a_run_without_an_average_or_captions_says_so(dataset: Path, tmp_path: Path) -> None:
    cfg = shrink(demo_method("supervised"), path=dataset, num_classes=9, text=TEXT)
    run = trained(cfg, tmp_path / "run")
    with pytest.raises(ValueError, match="which: expected trained, since .*moving average"):
        m3i_fast.load(run, which="ema")
    model = m3i_fast.load(run, device="cpu")
    with pytest.raises(ValueError, match="caption head, got none: .*run trained no such term"):
        model.encode_text("an apple")
    assert model.classify(Image.new("L", (50, 40))).shape == (1, 9)


def test_a_run_on_data_without_captions_says_so(dataset: Path, tmp_path: Path) -> None:
    cfg = shrink(demo_method("supervised"), path=dataset, num_classes=9, text=TEXT)
    run = trained(cfg, tmp_path / "run")
    record = json.loads((run / "data.json").read_text())
    assert record["num_captioned"] > 0
    (run / "data.json").write_text(json.dumps(record | {"num_captioned": 0}))
    with pytest.raises(ValueError, match="got none: .*no such term, and its data had no captions"):
        m3i_fast.load(run, device="cpu").encode_text("an apple")


def test_an_internimage_is_loaded_alike(dataset: Path, tmp_path: Path) -> None:
    run = trained(shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT), tmp_path)
    model = m3i_fast.load(run, device="cpu")
    assert isinstance(model.encoder, InternImage) and model.num_prefix_tokens == 0
    views = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens, embedded = load_objective(run, config_of(run)).embed_images(views)
    assert torch.equal(model.forward_features(views), tokens)
    assert embedded is not None and torch.equal(model.encode_image(views, True), embedded)


def test_a_frozen_teacher_is_not_needed(run: Path, dataset: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(run, tmp_path / "teacher")
    cfg = small_run(dataset)
    terms = tuple(
        replace(term, encoder="frozen", standardise="none") if term.encoder == "momentum" else term
        for term in cfg.objective.terms
    )
    objective = replace(cfg.objective, terms=terms, teacher=str(teacher))
    student = trained(replace(cfg, objective=objective), tmp_path / "student")
    shutil.rmtree(teacher)
    views = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert m3i_fast.load(student, device="cpu").encode_image(views).isfinite().all()


def test_a_checkpoint_is_loaded_by_its_own_name(run: Path, batch: Batch) -> None:
    views = batch.global_views[0]
    named = (run / "checkpoints" / f"step_0000000{step}" for step in (2, 4))
    second, fourth, newest = (m3i_fast.load(at, device="cpu")(views) for at in (*named, run))
    assert torch.equal(fourth, newest) and not torch.equal(second, newest)


def test_checkpoints_go_before_a_file_of_weights_beside_them(
    run: Path, model: m3i_fast.Model, batch: Batch, tmp_path: Path
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    second = copied / "checkpoints" / "step_00000002"
    assert main(["checkpoint", "consolidate", str(second), str(copied / "model.safetensors")]) == 0
    views = batch.global_views[0]
    assert torch.equal(m3i_fast.load(copied, device="cpu")(views), model(views))


def test_what_is_no_run_or_is_damaged_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run in .*absent: expected"):
        m3i_fast.load(tmp_path / "absent")
    spoilt = shutil.copytree(run, tmp_path / "run")
    for weights in spoilt.glob("checkpoints/*/model/*.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    with pytest.raises(ValueError, match="no good checkpoint in .*SHA-256"):
        m3i_fast.load(spoilt)
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        m3i_fast.load(spoilt / "checkpoints" / "step_00000004")


# ---- Without the data ----------------------------------------------------------------------------


def moved(run: Path, out: Path, *, record: bool) -> Path:
    """The run on another machine, where its data are not."""
    shutil.copytree(run, out)
    cfg = config_of(run)
    replace(cfg, data=replace(cfg.data, path=out / "gone")).save(out / "config.json")
    if not record:
        (out / "data.json").unlink()
    return out


def test_a_run_needs_none_of_its_data(run: Path, model: m3i_fast.Model, tmp_path: Path) -> None:
    away = m3i_fast.load(moved(run, tmp_path / "run", record=True), device="cpu")
    assert away.class_names == model.class_names and len(away.class_names) == 9
    assert torch.equal(away.encode_text(TEXTS), model.encode_text(TEXTS))


def test_a_run_of_an_older_version_reads_its_data_or_is_told_where(
    run: Path, model: m3i_fast.Model, dataset: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(run, tmp_path / "older")
    (older / "data.json").unlink()
    assert m3i_fast.load(older, device="cpu").class_names == model.class_names
    away = moved(run, tmp_path / "away", record=False)
    lost = m3i_fast.load(away, device="cpu")
    picture = Image.new("RGB", (70, 60), "red")
    assert torch.equal(lost.encode_image(picture), model.encode_image(picture))
    for ask in (lambda: lost.class_names, lambda: lost.encode_text("an apple")):
        with pytest.raises(ValueError, match=r"no data\.json .*gone: .*load\(\.\.\., data=DIR\)"):
            ask()
    told = m3i_fast.load(away, device="cpu", data=dataset)
    assert torch.equal(told.encode_text(TEXTS), model.encode_text(TEXTS))
    other = openmoji.build(tmp_path / "other", limit=60, num_merges=200, context_length=24)
    with pytest.raises(ValueError, match=r"= \(9, 814, 24\), got \(9, 714, 24\) in .*other"):
        m3i_fast.load(away, data=other)


def renamed(dataset: Path, out: Path) -> Path:
    """The data set with its classes in another order, and equal sizes."""
    shutil.copytree(dataset, out)
    tree = json.loads((out / "manifest.json").read_text())
    tree["class_names"] = tree["class_names"][::-1]
    (out / "manifest.json").write_text(json.dumps(tree))
    return out


def test_other_data_of_the_same_sizes_are_refused(
    run: Path, model: m3i_fast.Model, dataset: Path, tmp_path: Path
) -> None:
    other = renamed(dataset, tmp_path / "other")
    first, last = model.class_names[0], model.class_names[-1]
    said = rf"data\.json, got others in .*other: class 0: expected '{first}', got '{last}'"
    with pytest.raises(ValueError, match=said):
        m3i_fast.load(run, data=other)
    assert m3i_fast.load(run, device="cpu", data=dataset).class_names == model.class_names

    older = moved(run, tmp_path / "older", record=False)
    digests = rf"digest {read_manifest(dataset).digest}, .* got {read_manifest(other).digest} in"
    with pytest.raises(ValueError, match=digests):
        m3i_fast.load(older, data=other)
    shutil.copytree(other, older / "gone")  # at the config's own path
    lost = m3i_fast.load(older, device="cpu")
    with pytest.raises(ValueError, match=digests):
        lost.class_names  # noqa: B018


def test_another_tokenizer_of_the_same_sizes_is_refused(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(dataset, tmp_path / "other")
    tree = json.loads((other / "manifest.json").read_text())
    tree["tokenizer"]["fingerprint"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="tokenizer: expected .* got .*0000"):
        m3i_fast.load(run, data=other)


def test_a_checkpoint_that_names_no_data_says_that_they_are_not_compared(
    run: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = moved(run, tmp_path / "older", record=False)
    for file in older.glob("checkpoints/*/state/*.json"):
        tree = json.loads(file.read_text())
        del tree["loader"]["dataset"]
        content = json.dumps(tree).encode()
        file.write_bytes(content)
        manifest = file.parent.parent / "manifest.json"
        named = json.loads(manifest.read_text())
        named["files"][f"state/{file.name}"] = asdict(digest(file))
        manifest.write_text(json.dumps(named))
    assert len(m3i_fast.load(older, device="cpu", data=dataset).class_names) == 9
    assert "does not say which data it was trained on" in caplog.text


# ---- As a module ---------------------------------------------------------------------------------


def test_it_is_frozen_and_can_be_trained_further(run: Path, batch: Batch) -> None:
    model, views = m3i_fast.load(run, device="cpu"), batch.global_views[0]
    assert not model.training and not model(views).requires_grad
    model.requires_grad_()
    model.encode_image(views).square().sum().backward()
    assert model.encoder.get_parameter("patch_embed.weight").grad is not None


def test_the_transform_can_be_pickled(model: m3i_fast.Model, pictures: list[Image.Image]) -> None:
    transform = pickle.loads(pickle.dumps(model.transform))
    assert torch.equal(transform(pictures[0]), model.transform(pictures[0]))


PICTURES_ALONE = """
import json, sys
import m3i_fast
import torch
model = m3i_fast.load(sys.argv[1], device="cpu")
model.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
print(json.dumps([name for name in sys.modules if "." not in name]))
"""


def test_a_model_and_its_tokenizer_can_be_pickled(
    model: m3i_fast.Model, pictures: list[Image.Image]
) -> None:
    """As workers of a service or of a DataLoader get them."""
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.encode_image(pictures), model.encode_image(pictures))
    texts = ["a red bird", "ship"]
    assert torch.equal(again.encode_text(texts), model.encode_text(texts))
    tokenizer = pickle.loads(pickle.dumps(model.tokenizer))
    assert torch.equal(tokenizer(texts), model.tokenizer(texts))


def test_the_defaults_of_a_process_change_nothing(
    run: Path, model: m3i_fast.Model, pictures: list[Image.Image]
) -> None:
    """What torch makes elsewhere, or in another dtype, where nothing says so."""
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        other = m3i_fast.load(run, device="cpu")
        assert {weight.dtype for weight in other.parameters()} == {torch.float32}
        embedded, of_texts = other.encode_image(pictures), other.encode_text(["a red bird"])
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(embedded, model.encode_image(pictures))
    assert torch.equal(of_texts, model.encode_text(["a red bird"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_may_be_cast(
    run: Path, model: m3i_fast.Model, pictures: list[Image.Image], dtype: torch.dtype
) -> None:
    cast = m3i_fast.load(run, device="cpu").to(dtype)
    for name in ("encode_image", "classify", "forward"):
        expected, found = (getattr(each, name)(pictures).double() for each in (model, cast))
        assert torch.cosine_similarity(found, expected).min() > 0.99, name
    assert (
        torch.cosine_similarity(
            cast.encode_text(["ship"]).double(), model.encode_text(["ship"]).double()
        ).min()
        > 0.99
    )


def test_pictures_need_no_library_but_torch_and_safetensors(run: Path) -> None:
    """Neither the tokenizer's, whose import takes seconds, nor the loader's or the trackers'."""
    command = [sys.executable, "-c", PICTURES_ALONE, str(run)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    imported = set(json.loads(done.stdout))
    assert {"torch", "safetensors", "m3i_fast"} <= imported
    unused = {"open_clip", "timm", "torchvision", "nvidia", "tensorboard", "wandb", "obstore"}
    assert not imported & unused
