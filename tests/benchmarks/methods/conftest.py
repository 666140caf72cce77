"""Small methods, and the data that they train on."""

from pathlib import Path

import pytest

from m3i_fast.benchmarks.methods import plan as methods_plan
from m3i_fast.config import TrainConfig
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import DEMO_MERGES, shrink
from tests.benchmarks.methods.small_runs import SMALL, TEXT

config_of = methods_plan.config_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods of SMALL at a size that trains in a second."""

    def shrunk(method: str, *, data: Path = Path("data"), seed: int = 0) -> TrainConfig:
        cfg = config_of(method, data=data, seed=seed)
        return shrink(cfg, path=data, num_classes=9, text=TEXT) if method in SMALL else cfg

    monkeypatch.setattr(methods_plan, "config_of", shrunk)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small `openmoji`."""
    folder = tmp_path_factory.mktemp("data")
    length = TEXT.context_length
    openmoji.build(folder / "openmoji", limit=60, num_merges=DEMO_MERGES, context_length=length)
    return folder
