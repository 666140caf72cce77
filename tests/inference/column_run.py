"""A run that has learnt a class, labels and numbers of pictures of one colour each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.models.text import TextConfig
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.recipes import demo, shrink
from tests.shared.annotated import TERMS
from tests.shared.pipelines.data import encode_image, info, sample

COLUMNS = (
    ColumnInfo(name="paint", kind="class", names=("red", "green", "blue")),
    ColumnInfo(name="tones", kind="labels", names=("grey", "dark", "with_red"), size=3),
    ColumnInfo(name="light", kind="numbers", names=("percent", "kelvin"), size=2),
)


def colours(number: int) -> NDArray[np.uint8]:
    """[number, 3] colours, of which a third are most of red, of green, of blue."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 150, (number, 3))
    found[np.arange(number), np.arange(number) % 3] = rng.integers(180, 256, number)
    return found.astype(np.uint8)


def answers(colour: NDArray[np.uint8]) -> dict[str, Any]:
    """What columns say of a picture of one colour."""
    light = float(colour.mean() / 2.55)
    labels = [n for n, has in enumerate((False, light < 45, colour[0] > 100)) if has]
    return {"paint": int(colour.argmax()), "tones": labels, "light": [light, 6000 - 40 * light]}


def picture(colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.broadcast_to(colour, (32, 32, 3)).copy()


def trained(folder: Path) -> Path:
    """A run on pictures of one colour each, until it tells them apart."""
    samples = [
        sample(i, encode_image(picture(colour)), captions=(), label=-1, columns=answers(colour))
        for i, colour in enumerate(colours(96))
    ]
    path = write_dataset(
        folder / "data", {"train": samples}, info(columns=COLUMNS), seed=0, samples_per_shard=96
    )
    text = TextConfig(vocab_size=9, context_length=9, dim=32, depth=1, num_heads=2, embed_dim=32)
    cfg = shrink(demo(), path=path, num_classes=3, text=text)
    names = {"genus": "paint", "tags": "tones", "sizes": "light"}
    terms = tuple(
        replace(TERMS[name], name=column, column=column) for name, column in names.items()
    )
    cfg = replace(
        cfg,
        objective=replace(cfg.objective, terms=terms),
        data=replace(
            cfg.data,
            batch_size=16,
            global_views=replace(cfg.data.global_views, jitter_probability=0.0),
            local_views=None,
        ),
        optim=replace(cfg.optim, lr=0.01),
        num_steps=150,
        checkpoint_every=150,
        num_threads=1,
    )
    Trainer(take_data_fields(cfg), folder / "run").train()
    return folder / "run"
