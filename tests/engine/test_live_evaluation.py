"""Evaluation while training: its values are an evaluator's, and training is the same to the bit."""

import gzip
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.engine import live_evaluation
from m3i_fast.engine.checkpoint import checkpoints
from m3i_fast.engine.evaluator import build_averaged, build_untrained, load_objective
from m3i_fast.engine.live_evaluation import (
    LiveEvaluation,
    UnreadableRowsError,
    left_as_it_is,
    prompts_of,
    why_no_prompts,
)
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.run.random_state import random_state
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation import chosen_rows
from m3i_fast.evaluation.chosen_rows import choose_rows
from m3i_fast.evaluation.live_figures import NUM_NEIGHBOURS
from m3i_fast.evaluation.probes.knn import TEMPERATURE
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import ROW
from m3i_fast.pipelines.loader import evaluation_batches
from tests.engine.live_work import SHARDS, fail, work
from tests.shared.engine.small_run import saved_tensors, small_run
from tests.shared.engine.two_ranks import NUM_RANKS, run_of_adamw
from tests.shared.ranks import start_ranks

EVALUATED = (
    *("knn_top1", "knn_top1_ema", "zero_shot_top1"),
    *("classifier_top1", "classifier_top5"),
)
RECALLS = tuple(
    f"{way}_recall_at_{k}" for way in ("caption_to_image", "image_to_caption") for k in (1, 5)
)


def rows_of(run: Path, *, evaluated: bool) -> list[dict[str, Any]]:
    rows = read_jsonl(run / "metrics.jsonl")
    return [row for row in rows if ("evaluate/seconds" in row) == evaluated]


def assert_same_training(a: Path, b: Path) -> None:
    """Weights, moments, buffers, generators, losses and norms, bit for bit."""
    first, second = saved_tensors(a), saved_tensors(b)
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    free = ("time/", "throughput/", "efficiency/", "host/", "gpu/", "memory/")
    logged = [
        [
            {k: v for k, v in row.items() if not k.startswith(free)}
            for row in rows_of(run, evaluated=False)
        ]
        for run in (a, b)
    ]
    assert logged[0] == logged[1] and len(logged[0]) > 0


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without evaluations and one with them, at steps that are logged, and that are not."""
    folder = tmp_path_factory.mktemp("runs")
    cfg = small_run(dataset, num_steps=12, checkpoint_every=4, num_threads=1)
    Trainer(cfg, folder / "without").train()
    Trainer(replace(cfg, evaluate_every=4), folder / "with").train()
    return folder


def test_training_is_the_same_to_the_bit(runs: Path) -> None:
    assert_same_training(runs / "without", runs / "with")
    states = [
        json.loads((run / "checkpoints" / "step_00000012" / "state" / name).read_text())
        for run in (runs / "without", runs / "with")
        for name in [next((run / "checkpoints" / "step_00000012" / "state").iterdir()).name]
    ]
    assert states[0]["random"] == states[1]["random"]


def test_values_are_rows_of_their_own_in_every_sink(runs: Path) -> None:
    found = rows_of(runs / "with", evaluated=True)
    assert [row["step"] for row in found] == [4, 8, 12]
    names = {f"evaluate/{name}" for name in (*EVALUATED, *RECALLS, "seconds", "skipped")}
    for row in found:
        assert row.keys() == names | {"step"}
        assert all(0 <= row[f"evaluate/{name}"] <= 1 for name in (*EVALUATED, *RECALLS))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "with" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("evaluate/knn_top1")] == [4, 8, 12]


def test_the_last_values_are_those_of_the_saved_model(runs: Path) -> None:
    """kNN by scikit-learn with DINO's weights, recall by a sort, of the checkpoint's own model."""
    cfg = TrainConfig.load(runs / "with" / "config.json")
    trained = load_objective(runs / "with", cfg)
    logged = rows_of(runs / "with", evaluated=True)[-1]
    for suffix, model in (("", trained), ("_ema", build_averaged(trained, cfg))):
        (bank, of_bank, *_), (rows, label, *_) = (
            embedded(cfg, split, model) for split in ("train", "heldout")
        )
        bank, of_bank = bank[of_bank >= 0], of_bank[of_bank >= 0]
        known = label >= 0
        voter = KNeighborsClassifier(
            n_neighbors=min(NUM_NEIGHBOURS, len(bank)),
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
        ).fit(bank, of_bank)
        expected = voter.score(rows[known], label[known])
        assert logged[f"evaluate/knn_top1{suffix}"] == pytest.approx(expected, abs=1e-9)
    _, _, image, text, captioned = embedded(cfg, "heldout", trained)
    image, text = image[captioned], text[captioned]
    similar = text @ image.T
    for way, table in (("caption_to_image", similar), ("image_to_caption", similar.T)):
        order = (-table).argsort(1, kind="stable")
        for k in (1, 5):
            share = np.mean([row in order[row, :k] for row in range(len(order))])
            assert logged[f"evaluate/{way}_recall_at_{k}"] == pytest.approx(share, abs=1e-9)


def test_classes_by_prompts_are_those_of_open_clips_tokens(runs: Path) -> None:
    """As open_clip classifies: its tokens of the prompts, its metric, the checkpoint's model."""
    cfg = TrainConfig.load(runs / "with" / "config.json")
    manifest = read_manifest(cfg.data.path)
    merges = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode()
    kept = "\n".join(merges.split("\n")[: manifest.tokenizer.num_merges + 1])
    tokenizer = open_clip.SimpleTokenizer(
        io.BytesIO(gzip.compress(kept.encode())), context_length=manifest.tokenizer.context_length
    )
    ids = tokenizer([f"a photo of a {name}." for name in manifest.class_names])
    ours = prompts_of(manifest.class_names, manifest.tokenizer)
    assert torch.equal(ours.token_ids, ids) and torch.equal(ours.num_tokens, (ids > 0).sum(1))
    trained = load_objective(runs / "with", cfg)
    text = trained.embed_captions(ids, (ids > 0).sum(1)).numpy()
    _, label, image, *_ = embedded(cfg, "heldout", trained)
    known = label >= 0
    best = (image[known] @ text.T).argmax(1)
    logged = rows_of(runs / "with", evaluated=True)[-1]
    assert logged["evaluate/zero_shot_top1"] == accuracy_score(label[known], best)


def test_the_classifier_is_that_of_the_loaded_model(runs: Path) -> None:
    """As `m3i_fast.load` classifies the same views, counted by scikit-learn."""
    cfg = TrainConfig.load(runs / "with" / "config.json")
    model = m3i_fast.load(runs / "with", device="cpu")
    logits, label = [], []
    for batch in evaluation_batches(
        cfg.data.path,
        "heldout",
        image_size=cfg.vision.image_size,
        batch_size=64,
        representatives_only=True,
    ):
        logits.append(model.classify(batch.global_views[0]))
        label.append(batch.label)
    scores, known = torch.cat(logits).numpy(), torch.cat(label).numpy() >= 0
    labels = torch.cat(label).numpy()[known]
    logged = rows_of(runs / "with", evaluated=True)[-1]
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores[known], k=k, labels=range(scores.shape[1]))
        assert logged[f"evaluate/classifier_top{k}"] == pytest.approx(expected, abs=1e-9)


def embedded(cfg: TrainConfig, split: str, model: Any) -> tuple[np.ndarray, ...]:
    """Features, labels, and with captions embeddings of pictures and captions."""
    columns: list[list[Tensor]] = []
    for batch in evaluation_batches(
        cfg.data.path,
        split,
        image_size=cfg.vision.image_size,
        batch_size=64,
        representatives_only=True,
    ):
        tokens, image = model.embed_images(batch.global_views[0])
        row = [tokens.mean(1), batch.label]
        if image is not None:
            row += [image, model.embed_captions(batch.token_ids, batch.num_tokens)]
            row.append(batch.num_tokens > 0)
        columns.append(row)
    return tuple(torch.cat(each).numpy() for each in zip(*columns, strict=True))


def test_a_resumed_run_goes_on_with_the_schedule(runs: Path, dataset: Path, tmp_path: Path) -> None:
    cfg = TrainConfig.load(runs / "with" / "config.json")

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 5:
            trainer._stop.signal = 10

    trainer = Trainer(cfg, tmp_path / "run")
    assert trainer.train(stop).step < 8
    Trainer(cfg, tmp_path / "run", resume=True).train()
    assert_same_training(runs / "with", tmp_path / "run")
    first, second = (rows_of(run, evaluated=True) for run in (runs / "with", tmp_path / "run"))
    for row in (*first, *second):
        del row["evaluate/seconds"]
    assert first == second


def test_a_resume_may_evaluate_otherwise(runs: Path, tmp_path: Path) -> None:
    cfg = TrainConfig.load(runs / "with" / "config.json")
    Trainer(replace(cfg, num_steps=12, evaluate_every=0), tmp_path / "run").train()
    again = replace(cfg, num_steps=14, evaluate_every=7, evaluate_pictures=9)
    Trainer(again, tmp_path / "run", resume=True, new_num_steps=True).train()
    assert [row["step"] for row in rows_of(tmp_path / "run", evaluated=True)] == [14]
    assert TrainConfig.load(tmp_path / "run" / "config.json").evaluate_every == 7


def test_the_time_of_an_evaluation_is_in_no_other_figure(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that takes a minute by the clock leaves the throughput as it is."""
    moved = 0.0
    clock = __import__("time").monotonic
    monkeypatch.setattr("time.monotonic", lambda: clock() + moved)

    def measure(*_: object) -> dict[str, float]:
        nonlocal moved
        moved += 60.0
        return {"evaluate/knn_top1": 0.5}

    monkeypatch.setattr(LiveEvaluation, "measure", measure)
    cfg = small_run(dataset, num_steps=6, log_every=3, evaluate_every=2)
    Trainer(cfg, tmp_path / "run").train()
    rates = [row["throughput/img_s"] for row in rows_of(tmp_path / "run", evaluated=False)]
    assert all(3 * 8 / rate < 30 for rate in rates)
    found = rows_of(tmp_path / "run", evaluated=True)
    assert [row["step"] for row in found] == [2, 4, 6]
    assert all(60 <= row["evaluate/seconds"] < 90 for row in found)


def test_the_best_checkpoint_may_be_that_of_an_evaluation(dataset: Path, tmp_path: Path) -> None:
    cfg = small_run(
        dataset, num_steps=6, log_every=3, checkpoint_every=2, evaluate_every=2,
        keep_best="+evaluate/knn_top1", keep_checkpoints=1,
    )  # fmt: skip
    trainer = Trainer(cfg, tmp_path / "run")
    trainer.train()
    last = rows_of(tmp_path / "run", evaluated=True)[-1]["evaluate/knn_top1"]
    assert trainer.log.score == -last
    with pytest.raises(
        ValueError, match="keep_best: expected one of .*evaluate/knn_top1.*knn_top2"
    ):
        Trainer(replace(cfg, keep_best="+evaluate/knn_top2"), tmp_path / "typo").train()


@pytest.mark.distributed
def test_two_ranks_measure_what_one_does_and_none_waits_for_ever(
    dataset: Path, tmp_path: Path
) -> None:
    """By DDP and FSDP2, at an odd number of pictures, and training stays the same to the bit."""
    cfg = replace(run_of_adamw(dataset), num_steps=6, evaluate_every=3, evaluate_pictures=11)
    Trainer(cfg, tmp_path / "one").train()
    start_ranks(work, (cfg, tmp_path), NUM_RANKS)
    expected = rows_of(tmp_path / "one", evaluated=True)
    for shard in SHARDS:
        assert_same_training(tmp_path / f"without-{shard}", tmp_path / f"with-{shard}")
        of_ranks = [torch.load(tmp_path / f"values-{shard}-{rank}.pt") for rank in range(NUM_RANKS)]
        for each in sum(of_ranks, []):
            del each["evaluate/seconds"]
        assert of_ranks[0] == of_ranks[1] and len(of_ranks[0]) == 2
        for ours, theirs in zip(of_ranks[0], expected, strict=True):
            assert ours == {name: theirs[name] for name in ours}


# ---- What cannot be read, and what cannot be told ------------------------------------------------


def corrupt(data: Path, split: str, row: int) -> int:
    """Damage the picture of a row of a split's table; return the row."""
    entry = np.fromfile(data / f"{split}.samples", ROW)[row]
    shard = data / read_manifest(data).splits[split].shards[entry["shard"]].file
    content = bytearray(shard.read_bytes())
    begin = int(entry["offset"]) + 812  # past what is looked at when the split is opened
    content[begin : begin + 64] = bytes(64)
    shard.write_bytes(content)
    return row


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "data"))


def test_a_picture_that_cannot_be_decoded_is_left_out_and_counted(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = small_run(copied, num_steps=2, evaluate_every=1)
    evaluation = LiveEvaluation(cfg, World(torch.device("cpu")))
    assert evaluation._bank is not None
    chosen = (
        ("train", int(evaluation._bank.rows[3])),
        ("heldout", int(evaluation._queries.rows[0])),
    )
    for split, row in chosen:
        corrupt(copied, split, row)
    objective = build_untrained(cfg)
    values = evaluation.measure(objective, objective)
    assert values["evaluate/skipped"] == 2 == caplog.text.count("SKIPPED in evaluations")
    assert 0 <= values["evaluate/knn_top1"] <= 1
    assert evaluation.measure(objective, objective) == values
    embedded = evaluation._embed(objective, evaluation._bank)
    assert set(embedded["position"].tolist()) == set(evaluation._bank.rows) - {chosen[0][1]}
    assert "text" not in embedded


@pytest.mark.parametrize("every", [2, 4])
def test_a_run_whose_evaluation_fails_is_saved_and_can_go_on(
    every: int, copied: Path, tmp_path: Path
) -> None:
    """At the last step, and at one at which no checkpoint is due."""
    cfg = small_run(copied, num_steps=4, checkpoint_every=4, evaluate_every=every)
    cfg = replace(cfg, data=replace(cfg.data, max_skipped=0, batch_size=2), log_every=1)
    trainer = Trainer(cfg, tmp_path / "run")
    assert trainer.evaluation is not None
    corrupt(copied, "heldout", int(trainer.evaluation._queries.rows[0]))
    with pytest.raises(UnreadableRowsError, match="rank 0: data.max_skipped: .* corrupt sample"):
        trainer.train()
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").step == every
    again = replace(cfg, evaluate_every=0, keep_best="")
    assert Trainer(again, tmp_path / "run", resume=True).train().step == 4


@pytest.mark.distributed
def test_ranks_fail_and_save_together(copied: Path, tmp_path: Path) -> None:
    """With sharded weights, where one rank cannot decode a picture of its share."""
    cfg = replace(run_of_adamw(copied), num_steps=4, checkpoint_every=4, evaluate_every=2)
    cfg = replace(cfg, data=replace(cfg.data, max_skipped=0))
    chosen = choose_rows(replace(cfg.data, split="heldout"), cfg.evaluate_pictures)
    own = chosen.of_rank(1, NUM_RANKS, 1)
    others = chosen.of_rank(0, NUM_RANKS, cfg.data.batch_size)
    corrupt(copied, "heldout", next(row for row in own.tolist() if row not in others))
    start_ranks(fail, (cfg, tmp_path), NUM_RANKS)
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in range(NUM_RANKS)]
    assert errors[0] == errors[1] and errors[0].startswith("evaluation, rank 1: data.max_skipped")
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").step == 2


def test_every_batch_of_an_evaluation_has_one_shape(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled model is compiled anew for another one."""
    cfg = small_run(dataset, num_steps=2, evaluate_every=1, evaluate_pictures=13)
    objective = build_untrained(cfg)
    shapes: list[torch.Size] = []
    embed = objective.embed_images
    monkeypatch.setattr(
        objective, "embed_images", lambda views: shapes.append(views.shape) or embed(views)
    )
    LiveEvaluation(cfg, World(torch.device("cpu"))).measure(objective, objective)
    assert len(shapes) > 2 and set(shapes) == {shapes[0]}


def test_a_bank_of_one_class_is_refused_and_missing_classes_are_told(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the first shards of a bucket whose tars are in the order of their classes."""
    table = np.fromfile(copied / "train.samples", ROW)
    good = np.flatnonzero((table["label"] >= 0) & (table["sample_id"] == table["group_id"]))
    by_class = good[table["label"][good].argsort(kind="stable")]
    monkeypatch.setattr(chosen_rows, "good_rows", ordered(chosen_rows.good_rows, by_class))
    monkeypatch.setattr(chosen_rows, "shards_url", lambda path: "s3://bucket")
    cfg = small_run(copied, num_steps=2, evaluate_every=1, evaluate_pictures=2)
    with pytest.raises(ValueError, match="--evaluate-pictures: expected pictures of two classes"):
        LiveEvaluation(cfg, World(torch.device("cpu")))
    enough = int((table["label"][by_class] == table["label"][by_class[0]]).sum()) + 1
    caplog.set_level("INFO")
    LiveEvaluation(replace(cfg, evaluate_pictures=enough), World(torch.device("cpu")))
    assert "others of 2 classes" in caplog.text
    assert "so kNN cannot get them right: raise --evaluate-pictures" in caplog.text


def ordered(good_rows: Any, by_class: np.ndarray) -> Any:
    """good_rows with those of the training split in the order of their classes."""

    def rows(table: Any, **options: Any) -> np.ndarray:
        own = good_rows(table, **options)
        return by_class if set(by_class) <= set(own) and len(table) > len(by_class) else own

    return rows


# ---- Parts ---------------------------------------------------------------------------------------


def test_classes_that_are_numbers_have_no_prompts() -> None:
    assert "data pack and data index take" in why_no_prompts(["n01440764", "n01443537"])
    assert "called 0, 1 and so on" in why_no_prompts(["0", "1", "2"])
    assert why_no_prompts(["n01440764", "apple_pie"]) == ""


def test_prompts_alone_are_enough_to_evaluate(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run on captions alone, with a labelled split: kNN has no bank, retrieval no captions."""
    cfg = small_run(copied, num_steps=2, evaluate_every=1)
    monkeypatch.setattr(live_evaluation, "_choose_bank", lambda data, most: None)
    manifest = live_evaluation.manifest_at(cfg.data)
    heldout = replace(manifest.split("heldout"), num_captions=0)
    without = replace(manifest, splits=manifest.splits | {"heldout": heldout})
    monkeypatch.setattr(live_evaluation, "manifest_at", lambda data: without)
    caplog.set_level("INFO")
    monkeypatch.setattr(live_evaluation, "_classifier_of", lambda cfg, manifest: "")
    evaluation, objective = LiveEvaluation(cfg, World(torch.device("cpu"))), build_untrained(cfg)
    values = evaluation.measure(objective, objective)
    assert values.keys() == {"evaluate/zero_shot_top1", "evaluate/skipped"}
    assert f"zero-shot by prompts of {len(manifest.class_names)} classes" in caplog.text
    monkeypatch.setattr(live_evaluation, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="evaluate_every: expected split heldout"):
        LiveEvaluation(cfg, World(torch.device("cpu")))
    assert "pip install" in why_no_prompts(["cat"])


def test_modes_and_generators_are_put_back_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(3))
    model[1].eval()
    before = random_state()
    with pytest.raises(KeyError), left_as_it_is(model):
        assert not model.training
        torch.rand(3), np.random.rand(3)
        raise KeyError
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert random_state() == before


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "200")
    yield


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluate-split", "train"], "--evaluate-split: expected another split than data.split"),
        (["--evaluate-split", "absent"], "split: expected one of"),
        (["--evaluate-data", "nowhere"], "nowhere"),
        (["--data.mixture", "x:train:1"], "--evaluate-data: expected a data set to evaluate on"),
        (
            ["--evaluate-every", "0", "--keep-best", "evaluate/knn_top1"],
            "--evaluate-every: expected at least 1 with keep_best",
        ),
    ],
)
@pytest.mark.usefixtures("quiet")
def test_what_cannot_be_evaluated_is_refused_before_the_run(
    flags: list[str],
    message: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "demo", "--out", str(out), f"--data.path={dataset}", "--device=cpu"]
    assert main([*arguments, "--evaluate-every", "2", *flags]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()
