"""Features are the model's own, whatever the source, and are computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import m3i_fast
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.dense.correspondence import position_means
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.recipes import demo_internimage, shrink
from m3i_fast.search import features as features_module
from m3i_fast.search.features import Features, cached_features, describe
from m3i_fast.search.index import Index
from m3i_fast.search.pictures import About, Pictures, decode, open_pictures
from tests.shared.engine.small_run import TEXT
from tests.shared.pipelines.data import encode_image, info, sample, smooth_picture


class Listed:
    """Pictures in memory, some of which may be unreadable, that count how often they are read."""

    name, digest, class_names, has_captions, notes = "listed", "d" * 64, (), False, ()

    def __init__(self, contents: list[bytes | None]) -> None:
        self.contents, self.reads = contents, [0] * len(contents)
        self.label = np.full(len(contents), -1)

    def read(self, row: int) -> bytes:
        self.reads[row] += 1
        content = self.contents[row]
        if content is None:
            raise OSError("Input/output error")
        return content

    def about(self, row: int) -> About:
        return About(str(row), ())


def drawn(number: int) -> list[bytes | None]:
    return [encode_image(smooth_picture(i, 40 + i % 3, 50)) for i in range(number)]


def equal(a: Features, b: Features) -> bool:
    pairs = [
        (a.mean, b.mean),
        (a.image, b.image),
        (a.guess, b.guess),
        (a.probability, b.probability),
        (a.readable, b.readable),
        (a.position_mean.numpy(), b.position_mean.numpy()),
    ]
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_features_are_those_that_evaluation_measures(
    model: m3i_fast.Model, pictures: Pictures, dataset: Path, tmp_path: Path
) -> None:
    """In the order of the splits' names, and of their tables."""
    found = cached_features(model, pictures, tmp_path, batch_size=16, num_threads=2)
    size = model.transform.preprocessing.size
    views = torch.cat(
        [
            batch.global_views[0]
            for split in ("heldout", "train")
            for batch in evaluation_batches(dataset, split, image_size=size, batch_size=16)
        ]
    )
    assert len(views) == len(found.mean) > 40 and found.readable.all()

    def close(values: object, expected: torch.Tensor) -> None:
        torch.testing.assert_close(torch.tensor(np.asarray(values)), expected, rtol=0, atol=1e-5)

    close(found.mean, model(views))
    close(found.image, model.encode_image(views))
    chances = model.classify(views).softmax(-1)
    close(found.probability, chances.max(-1).values)
    assert (torch.tensor(np.asarray(found.guess)) == chances.argmax(-1)).all()
    cells = model.forward_features(views)[:, model.num_prefix_tokens :]
    close(found.position_mean, position_means([cells]).float())


def test_one_pass_gives_what_the_models_own_calls_give(model: m3i_fast.Model) -> None:
    views = torch.randint(256, (3, 3, *[model.transform.preprocessing.size] * 2)).byte()
    found = describe(model, views)
    assert found.image is not None and found.logits is not None
    assert torch.equal(found.mean, model(views))
    assert torch.equal(found.image, model.encode_image(views))
    assert torch.equal(found.logits, model.classify(views))


def test_a_folder_has_the_features_of_the_same_pictures_packed(
    model: m3i_fast.Model, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for i, content in enumerate(drawn(5)):
        assert content is not None
        (tmp_path / "folder" / f"{i}.png").write_bytes(content)
    samples = [sample(i, content, captions=()) for i, content in enumerate(drawn(5))]
    out = tmp_path / "packed"
    write_dataset(out, {"train": samples}, info(), seed=0, samples_per_shard=9)
    rows = {}
    for path in (tmp_path / "folder", out):
        with open_pictures(path, None, tmp_path) as opened:
            found = cached_features(model, opened, tmp_path)
            names = [opened.about(row).name for row in range(5)]
            numbers = [int("".join(c for c in name if c.isdigit())) for name in names]
            rows[path.name] = found.mean[np.argsort(numbers)]
    np.testing.assert_allclose(rows["folder"], rows["packed"], rtol=0, atol=1e-6)
    assert np.ptp(rows["folder"], axis=0).max() > 1e-3  # of different pictures


def test_a_picture_without_finite_features_is_left_out(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the mean tokens of the others are theirs alone."""
    model = m3i_fast.load(run, device="cpu")
    listed = Listed(drawn(4))
    seen: list[int] = []

    def spoil(_: object, __: object, tokens: torch.Tensor) -> torch.Tensor:
        of_batch = torch.arange(len(seen), len(seen) + len(tokens))
        seen.extend(of_batch.tolist())
        return torch.where((of_batch == 3)[:, None, None], torch.nan, tokens)

    hook = model.encoder.register_forward_hook(spoil)
    found = cached_features(model, listed, tmp_path, batch_size=4)
    hook.remove()
    assert found.readable.tolist() == [True, True, False, True] and not found.mean[2].any()
    assert "left out: picture 2: its features are not finite" in caplog.text
    assert found.position_mean.isfinite().all()
    assert Index(found.mean).nearest(torch.from_numpy(found.mean[0]), 4)[0][0] == 0


# ---- The cache -----------------------------------------------------------------------------------


def test_features_are_computed_once(model: m3i_fast.Model, tmp_path: Path) -> None:
    listed, told = Listed(drawn(7)), list[tuple[int, int]]()
    tell = lambda done, total: told.append((done, total))  # noqa: E731
    first = cached_features(model, listed, tmp_path, batch_size=3, tell=tell)
    assert listed.reads == [1] * 7
    assert told == [(0, 7), (3, 7), (6, 7), (7, 7)]
    second = cached_features(model, listed, tmp_path, batch_size=3)
    assert equal(first, second) and listed.reads == [1] * 7
    (folder,) = (tmp_path / "search").iterdir()
    assert not folder.name.startswith(".")


def test_another_version_has_other_features(
    model: m3i_fast.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Listed(drawn(2))
    cached_features(model, listed, tmp_path)
    monkeypatch.setattr(m3i_fast, "__version__", "0.0.1", raising=False)
    cached_features(model, listed, tmp_path)
    assert listed.reads == [2, 2] and len([*(tmp_path / "search").iterdir()]) == 2


def test_other_weights_pictures_or_arithmetic_have_other_features(
    run: Path, model: m3i_fast.Model, tmp_path: Path
) -> None:
    listed = Listed(drawn(2))
    changed = m3i_fast.load(run, device="cpu")
    with torch.no_grad():
        next(changed.encoder.parameters()).view(-1)[0] += 1e-3
    others = Listed(drawn(2))
    others.digest = "e" * 64
    in_bf16 = m3i_fast.load(run, device="cpu", dtype=torch.bfloat16)
    told = m3i_fast.load(run, device="cpu")  # what its weights do not show
    told.encoder.cfg = replace(told.encoder.cfg, norm_eps=1e-3)
    for of in (model, changed, in_bf16, told):
        cached_features(of, listed, tmp_path)
    cached_features(model, others, tmp_path)
    assert len(list((tmp_path / "search").iterdir())) == 5
    cached_features(m3i_fast.load(run, device="cpu"), listed, tmp_path)
    assert len(list((tmp_path / "search").iterdir())) == 5


class Stopped(KeyboardInterrupt):
    """Ctrl-C, when so many pictures are done."""


@pytest.mark.parametrize("stop", [0, 4, 8])
@pytest.mark.parametrize("kind", [Stopped, OSError])
def test_what_was_computed_before_the_end_of_a_process_is_kept(
    stop: int,
    kind: type[BaseException],
    model: m3i_fast.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After Ctrl-C all of it; after an error up to what was saved last."""
    contents: list[bytes | None] = [*drawn(9)]
    contents[2] = None
    whole = cached_features(model, Listed(contents), tmp_path / "whole", batch_size=4)

    def tell(done: int, total: int) -> None:
        if done == stop:
            raise kind("stopped")

    monkeypatch.setattr(features_module, "SAVED_EVERY_S", 0.0 if kind is OSError else 1e9)
    cache = tmp_path / "cache"
    with pytest.raises(kind):
        cached_features(model, Listed(contents), cache, batch_size=4, tell=tell)
    (partial,) = (cache / "search").iterdir()
    assert partial.name.endswith(".partial")
    with (partial / "mean.npy").open("ab") as file:
        file.write(b"half a row of a batch that was cut off")
    again = Listed(contents)
    found = cached_features(model, again, cache, batch_size=4)
    assert equal(found, whole) and not partial.exists()
    assert again.reads == [0] * stop + [1] * (9 - stop)


@pytest.mark.parametrize("damage", ["state", "short", "no state"])
def test_damaged_remains_are_computed_anew(
    damage: str, model: m3i_fast.Model, tmp_path: Path
) -> None:
    contents = drawn(6)

    def tell(done: int, total: int) -> None:
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        cached_features(model, Listed(contents), tmp_path, batch_size=2, tell=tell)
    (partial,) = (tmp_path / "search").iterdir()
    state, mean = partial / "state.safetensors", partial / "mean.npy"
    if damage == "state":
        state.write_bytes(state.read_bytes()[:20])
    elif damage == "short":
        mean.write_bytes(mean.read_bytes()[:200])
    else:
        state.unlink()
    again = Listed(contents)
    found = cached_features(model, again, tmp_path, batch_size=2)
    assert again.reads == [1] * 6
    assert equal(found, cached_features(model, Listed(contents), tmp_path / "b", batch_size=2))


def test_a_damaged_cache_is_named(model: m3i_fast.Model, tmp_path: Path) -> None:
    cached_features(model, Listed(drawn(3)), tmp_path)
    (folder,) = (tmp_path / "search").iterdir()
    for name in ("mean.npy", "state.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept[:90])
        with pytest.raises(ValueError, match=rf"{folder.name}: damaged: .*; remove the folder"):
            cached_features(model, Listed(drawn(3)), tmp_path)
        (folder / name).write_bytes(kept)
    (folder / "readable.npy").unlink()
    with pytest.raises(ValueError, match=r"readable.npy is missing; remove the folder"):
        cached_features(model, Listed(drawn(3)), tmp_path)


def test_two_processes_do_not_write_the_same_files(model: m3i_fast.Model, tmp_path: Path) -> None:
    contents = drawn(4)

    def tell(done: int, total: int) -> None:
        if done == 2:
            with pytest.raises(FileExistsError, match="another process computes these features"):
                cached_features(model, Listed(contents), tmp_path)

    cached_features(model, Listed(contents), tmp_path, batch_size=2, tell=tell)


def test_pictures_that_cannot_be_read_are_left_out_and_named(
    model: m3i_fast.Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = drawn(5)
    contents[1], contents[3] = None, b"no picture"
    found = cached_features(model, Listed(contents), tmp_path, batch_size=2)
    assert found.readable.tolist() == [True, False, True, False, True]
    assert not found.mean[[1, 3]].any() and found.mean[[0, 2, 4]].any(axis=1).all()
    assert "picture 1: Input/output error" in caplog.text
    assert "picture 3: not a picture" in caplog.text
    alone = cached_features(model, Listed(contents[::2]), tmp_path / "b", batch_size=2)
    torch.testing.assert_close(found.position_mean, alone.position_mean)
    with pytest.raises(ValueError, match="none of 2 pictures can be used; picture 0: not a pict"):
        cached_features(model, Listed([b"no picture", None]), tmp_path / "c")
    assert list((tmp_path / "c" / "search").iterdir()) == []


def test_a_model_without_heads_has_features_alone(run: Path, tmp_path: Path) -> None:
    alone = m3i_fast.load(run, which="ema", device="cpu")
    found = cached_features(alone, Listed(drawn(2)), tmp_path)
    assert found.image is None and found.guess is None and found.probability is None
    views = alone.transform.views(
        [torch.from_numpy(decode(c)).permute(2, 0, 1) for c in drawn(2) if c]
    )
    np.testing.assert_allclose(found.mean, alone(views), rtol=0, atol=1e-6)


def test_an_internimage_is_described_alike(dataset: Path, tmp_path: Path) -> None:
    cfg = shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT)
    cfg = replace(cfg, num_steps=1, log_every=1, checkpoint_every=1, num_threads=1)
    Trainer(cfg, tmp_path / "run").train()
    model = m3i_fast.load(tmp_path / "run", device="cpu")
    assert isinstance(model.encoder, InternImage)
    views = torch.randint(256, (2, 3, *[model.transform.preprocessing.size] * 2)).byte()
    found = describe(model, views)
    assert found.image is not None and found.logits is not None
    assert torch.equal(found.cells, model.forward_features(views))
    assert torch.equal(found.image, model.encode_image(views))
    assert torch.equal(found.logits, model.classify(views))
