"""What the data decide is taken from their manifest, and refused where a person says otherwise."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig, differences
from m3i_fast.engine.checkpoint.checkpoints import latest
from m3i_fast.engine.run.data_fields import expect_data, take_data_fields
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.opened.mixture import read_described
from m3i_fast.recipes import demo, recipes
from tests.shared.pipelines.data import TOKENIZER, encode_image, info, sample, smooth_picture

VIEWS = ("--data.global-views.size=32", "--vision.image-size=32")
SMALL = (
    *VIEWS,
    *("--num-steps=2", "--data.batch-size=4", "--data.num-threads=1"),
    *("--vision.depth=1", "--text.depth=1", "--text.dim=64", "--text.num-heads=2"),
    *("--objective.decoder.dim=32", "--objective.decoder.depth=1"),
    *("--objective.decoder.num-heads=2", "--objective.head-hidden-dim=32", "--device=cpu"),
    *("--objective.mixing.mask-block=1",),
)


def packed(out: Path, **changes: Any) -> Path:
    """Pack eight pictures of 3 classes and a vocabulary of 521, or with changes of `info`."""
    labels = {} if changes.get("class_names", True) else {"label": -1}
    samples = [sample(i, encode_image(smooth_picture(i, 40, 48)), **labels) for i in range(8)]
    return write_dataset(out, {"train": samples}, info(**changes), seed=0, samples_per_shard=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("own") / "pictures")


def on(path: Path, recipe: str = "vit_s") -> TrainConfig:
    cfg = recipes()[recipe]()
    return replace(cfg, data=replace(cfg.data, path=path))


def _train(path: Path, out: Path, *more: str) -> int:
    return main(["train", "vit_s", f"--data.path={path}", f"--out={out}", *SMALL, *more])


def test_a_recipe_trains_on_pictures_of_three_classes_without_a_flag(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"
    assert _train(pictures, out) == 0
    cfg = TrainConfig.load(out / "config.json")
    assert cfg.num_classes == 3
    assert (cfg.text.vocab_size, cfg.text.context_length) == (521, 12)
    [told] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("from ")]
    assert told == (
        f"from {pictures}/manifest.json: num_classes 3 (in place of 1000), text.vocab_size 521 "
        "(in place of 49408), text.context_length 12 (in place of 77)"
    )
    assert _train(pictures, out, "--resume") == 0  # its config is the run's again
    assert main(["train", "--config", str(out / "config.json"), "--out", f"{tmp_path}/again"]) == 0
    assert TrainConfig.load(tmp_path / "again" / "config.json") == cfg


@pytest.mark.parametrize(
    ("flags", "expected", "got"),
    [
        (["--num-classes=4"], ["--num-classes: expected 3"], ["got 4"]),
        (["--num_classes", "1000"], ["--num-classes: expected 3"], ["got 1000"]),
        (
            ["--text.vocab-size=9", "--text.context-length", "13"],
            ["--text.vocab-size: expected 521", "--text.context-length: expected 12"],
            ["got 9", "got 13"],
        ),
    ],
    ids=str,
)
def test_a_flag_that_contradicts_the_data_is_refused(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: Sequence[str],
    expected: Sequence[str],
    got: Sequence[str],
) -> None:
    out = tmp_path / "run"
    assert _train(pictures, out, *flags) == 2
    said = capsys.readouterr().err
    for ours, theirs in zip(expected, got, strict=True):
        assert f"{ours} as {pictures}/manifest.json says, {theirs}: leave the flag out" in said
    assert not out.exists()


def test_a_flag_that_agrees_with_the_data_is_taken(pictures: Path) -> None:
    typed = {"--num-classes"}
    cfg = replace(on(pictures), num_classes=3)
    assert take_data_fields(cfg, typed) == take_data_fields(on(pictures))
    with pytest.raises(ValueError, match=r"--num-classes: expected 3 .*got 1000"):
        take_data_fields(on(pictures), typed)


def test_what_the_data_do_not_decide_stays(pictures: Path) -> None:
    changed = differences(on(pictures), take_data_fields(on(pictures)))
    names = [line.split(":")[0] for line in changed]
    assert names == ["num_classes", "text.vocab_size", "text.context_length"]


@pytest.mark.parametrize(
    ("absent", "changes", "trained"),
    [
        ("category", {"label": -1}, ["intra", "inter", "caption"]),
        ("caption", {"captions": ()}, ["intra", "inter", "category"]),
    ],
)
def test_a_term_that_the_data_do_not_support_is_off(
    absent: str,
    changes: dict[str, Any],
    trained: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    pictures = [encode_image(smooth_picture(i, 40, 48)) for i in range(8)]
    samples = [sample(i, picture, **changes) for i, picture in enumerate(pictures)]
    path, out = tmp_path / "data", tmp_path / "run"
    write_dataset(path, {"train": samples}, info(), seed=0, samples_per_shard=8)
    assert _train(path, out) == 0
    cfg = TrainConfig.load(out / "config.json")
    assert [term.name for term in cfg.objective.active_terms] == trained
    [told] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("terms: ")]
    assert told.startswith(f"terms: {', '.join(trained)}; off: {absent} (no ")
    assert not any("learns nothing" in r.getMessage() for r in caplog.records)
    stored = latest(out / "checkpoints").shards("model").sizes
    assert not any(f"terms.{absent}." in key for key in stored)
    assert _train(path, out, "--resume") == 0
    assert _train(path, tmp_path / "other", f"--objective.terms.{absent}.weight=2") == 2
    assert f"--objective.terms.{absent}.weight: expected 0 as" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    unresolved = replace(cfg, objective=on(path).objective)
    with pytest.raises(ValueError, match=f"objective.terms.{absent}.weight: expected 0 as"):
        expect_data(unresolved, read_manifest(path))


def test_a_recipe_of_which_the_data_support_no_term_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "unlabelled", class_names=())
    with pytest.raises(ValueError, match=r"objective\.terms: expected data with classes for cat"):
        take_data_fields(on(path, "demo_supervised"))


def test_captions_written_word_by_word_need_captions_too(tmp_path: Path) -> None:
    samples = [sample(i, encode_image(smooth_picture(i, 40, 48)), captions=()) for i in range(8)]
    path = write_dataset(tmp_path / "bare", {"train": samples}, info(), seed=0, samples_per_shard=8)
    active = take_data_fields(on(path, "demo_siglip2")).objective.active_terms
    assert active and not {"caption", "caption_tokens"} & {term.target for term in active}


def test_the_demos_recipes_are_resolved_to_themselves(tmp_path: Path) -> None:
    """Their values are those of the data that they are written for."""
    classes, tokenizer = tuple("abcdefghi"), replace(TOKENIZER, vocab_size=1014, context_length=24)
    path = packed(tmp_path / "openmoji", class_names=classes, tokenizer=tokenizer)
    for name, make in recipes().items():
        cfg = make()
        if name.startswith("demo") and not cfg.columns:  # drawings have none: LocCa's regions
            cfg = replace(cfg, data=replace(cfg.data, path=path))
            assert differences(cfg, take_data_fields(cfg)) == []


def test_a_trainer_refuses_a_config_that_was_not_resolved(pictures: Path) -> None:
    manifest = read_manifest(pictures)
    with pytest.raises(ValueError, match=r"num_classes: expected 3 .*manifest\.json says, got 9; "):
        expect_data(demo(data=pictures), manifest)
    expect_data(take_data_fields(demo(data=pictures)), manifest)


def test_what_a_manifest_says_that_no_model_has_names_the_file(tmp_path: Path) -> None:
    path = packed(tmp_path / "data")
    raw = json.loads((path / "manifest.json").read_text())
    raw["tokenizer"]["vocab_size"] = 0
    (path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"manifest\.json: .*vocab_size: expected 1 to .*, got 0"):
        take_data_fields(on(path))


def test_a_mixture_decides_with_all_its_classes(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = packed(tmp_path / "other", class_names=("c", "d", "e"))
    cfg = on(tmp_path / "absent")
    mixture = (f"{pictures}:train:0.7", f"{other}:train:0.3")
    cfg = take_data_fields(replace(cfg, data=replace(cfg.data, mixture=mixture)))
    assert cfg.num_classes == 5  # a, b, c and d, e
    assert (cfg.text.vocab_size, cfg.text.context_length) == (521, 12)
    assert f"from {pictures}/manifest.json and {other}/manifest.json: num_classes 5" in caplog.text
    expect_data(cfg, read_described(cfg.data))
    with pytest.raises(ValueError, match="data.mixture: expected a loader of 2 data sets, got one"):
        expect_data(cfg, read_manifest(pictures))
    with pytest.raises(ValueError, match="num_classes: expected 5 as .*manifest.json and .*got 4"):
        expect_data(replace(cfg, num_classes=4), read_described(cfg.data))
