"""Runs on data with named columns: what the config is told, resumes, mixtures, loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import m3i_fast
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.engine.run.data_fields import expect_data, take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.opened.mixture import read_described
from m3i_fast.recipes import demo, shrink
from tests.shared.annotated import TERMS, objective
from tests.shared.engine.small_run import assert_same_run
from tests.shared.pipelines.data import encode_image, info, sample, smooth_picture

TOKENIZER = Tokenizer(num_merges=50, context_length=12)
COLUMNS = (
    ColumnInfo(name="tags", kind="labels", names=("red", "big", "old"), size=2),
    ColumnInfo(name="sizes", kind="numbers", names=("height", "weight"), size=2),
    ColumnInfo(name="alt", kind="text", size=12),
    ColumnInfo(name="genus", kind="class", names=("cat", "dog")),
    ColumnInfo(name="objects", kind="regions", size=2),
)


def values_of(index: int) -> dict[str, Any]:
    values = {
        "tags": [index % 3],
        "sizes": [index * 2.0, None if index % 2 else -float(index)],
        "alt": TOKENIZER.encode(f"picture {index}").tolist(),
        "genus": index % 2,
        "objects": [((0.1, 0.1, 0.9, 0.9), TOKENIZER.encode(f"number {index}").tolist())]
        * (index % 3),
    }
    return {name: value for n, (name, value) in enumerate(values.items()) if index % 4 != n}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("runs") / "data", COLUMNS)


def packed(out: Path, columns: tuple[ColumnInfo, ...], number: int = 12) -> Path:
    samples = [
        sample(
            i,
            encode_image(smooth_picture(i, 24, 32)),
            captions=(TOKENIZER.encode(f"a picture of {i}"),) if i % 3 else (),
            columns=values_of(i) if columns else {},
        )
        for i in range(number)
    ]
    about = info(columns=columns, tokenizer=TOKENIZER.info)
    return write_dataset(out, {"train": samples}, about, seed=0, samples_per_shard=8)


def config(path: Path, **changes: Any) -> TrainConfig:
    """Every term of annotations, with captions in parallel and views of two sizes."""
    text = TextConfig(vocab_size=9, context_length=9, dim=32, depth=1, num_heads=2, embed_dim=32)
    cfg = shrink(demo(), path=path, num_classes=9, text=text)
    return replace(
        cfg,
        objective=objective(mode="own_image", parallel=0.5),
        num_steps=4,
        num_threads=1,
        **changes,
    )


def test_a_run_trains_on_columns_and_goes_on(path: Path, tmp_path: Path) -> None:
    cfg = take_data_fields(config(path))
    assert [(c.name, c.num_names, c.size) for c in cfg.columns] == [
        ("tags", 3, 2), ("sizes", 2, 2), ("alt", 0, 12), ("genus", 2, 1),
        ("objects", 0, 2),
    ]  # fmt: skip
    known = [v[0] for i in range(12) if (v := values_of(i).get("sizes"))]
    assert cfg.columns[1].mean[0] == pytest.approx(np.mean(known))
    assert cfg.columns[1].std[0] == pytest.approx(np.std(known))
    whole = Trainer(cfg, tmp_path / "whole")
    whole.train()
    rows = [row for row in read_jsonl(tmp_path / "whole" / "metrics.jsonl") if "loss/total" in row]
    assert all(any(row[f"loss/{name}"] > 0 for row in rows) for name in TERMS)
    assert {"monitor/tokens_accuracy", "monitor/tags_hit", "monitor/sizes_r2"} <= {*rows[0]}
    part = Trainer(cfg, tmp_path / "part")

    def stop(step: int, _: object) -> None:
        part._stop.signal = 10 if step == 2 else None

    assert part.train(stop).step == 2
    Trainer(cfg, tmp_path / "part", resume=True).train()
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    model = m3i_fast.load(tmp_path / "whole")
    assert model.caption is not None and model.category is None  # of the data set's classes


def test_what_the_data_do_not_have_is_refused(path: Path, tmp_path: Path) -> None:
    plain = packed(tmp_path / "plain", ())
    told = r"term 'tags': expected a column 'tags' of labels, got no columns in .*plain/manifest"
    with pytest.raises(ValueError, match=told + r".*--objective.terms.tags.column"):
        take_data_fields(config(plain))
    cfg = config(path)
    terms = tuple(
        replace(t, column="genus") if t.name == "sizes" else t for t in cfg.objective.terms
    )
    with pytest.raises(ValueError, match=r"column 'genus' of numbers, got tags \(labels\), sizes"):
        take_data_fields(replace(cfg, objective=replace(cfg.objective, terms=terms)))
    told = take_data_fields(cfg)
    other = replace(told.columns[1], mean=(0.0, 0.0))
    wrong = replace(told, columns=(told.columns[0], other, *told.columns[2:]))
    with pytest.raises(ValueError, match="columns: expected tags .* with sizes and statistics as"):
        expect_data(wrong, read_manifest(path))


def test_a_mixture_has_the_statistics_of_all_its_samples(path: Path, tmp_path: Path) -> None:
    other = packed(tmp_path / "other", COLUMNS, number=9)
    plain = packed(tmp_path / "plain", ())
    parts = tuple(f"{where}:train:1" for where in (path, other, plain))
    cfg = config(path)
    cfg = take_data_fields(replace(cfg, data=replace(cfg.data, mixture=parts)))
    expect_data(cfg, read_described(cfg.data))
    values = [v for n in (12, 9) for i in range(n) if (v := values_of(i).get("sizes"))]
    [sizes] = [column for column in cfg.columns if column.name == "sizes"]
    assert sizes.mean == pytest.approx(np.nanmean(np.array(values, float), 0))
    assert sizes.std == pytest.approx(np.nanstd(np.array(values, float), 0))
    trainer = Trainer(cfg, tmp_path / "run")
    trainer.train()
