"""A small run and its pictures, searched: shared by the tests of this folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import m3i_fast
from m3i_fast.engine.trainer import Trainer
from m3i_fast.search.answers import Answers
from m3i_fast.search.features import cached_features
from m3i_fast.search.pictures import Pictures, open_pictures
from m3i_fast.search.server import SearchServer
from tests.shared.engine.small_run import small_run


@pytest.fixture(scope="session")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, whose weights differ from the drawn ones."""
    cfg = small_run(dataset, num_steps=3, log_every=1, checkpoint_every=3, num_threads=1)
    out = tmp_path_factory.mktemp("search") / "run"
    Trainer(cfg, out).train()
    return out


@pytest.fixture(scope="session")
def model(run: Path) -> m3i_fast.Model:
    return m3i_fast.load(run, device="cpu")


@pytest.fixture(scope="session")
def pictures(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pictures]:
    with open_pictures(dataset, None, tmp_path_factory.mktemp("bucket")) as opened:
        yield opened


@pytest.fixture(scope="session")
def answers(
    model: m3i_fast.Model, pictures: Pictures, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Answers]:
    features = cached_features(model, pictures, tmp_path_factory.mktemp("features"))
    found = Answers(model, pictures, features, model_name="runs/small")
    yield found
    found.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class: JPEG, PNG, GIF and a turned JPEG, beside a text and a damaged picture."""
    out = tmp_path_factory.mktemp("folder") / "animals"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (out / name).mkdir(parents=True)
        for i, kind in enumerate(("jpg", "png", "gif")):
            small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
            small.resize((70, 50)).save(out / name / f"{i}.{kind}")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.open(out / "cat" / "0.jpg").save(out / "cat" / "turned.jpg", exif=exif)
    (out / "cat" / "notes.txt").write_text("no picture")
    (out / "dog" / "damaged.png").write_bytes((out / "dog" / "1.png").read_bytes()[:200])
    return out


@pytest.fixture(scope="session")
def server(answers: Answers) -> Iterator[SearchServer]:
    with SearchServer("127.0.0.1", 0) as made:
        thread = threading.Thread(target=made.serve, args=(answers,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()
