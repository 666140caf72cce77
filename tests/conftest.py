"""One thread, one seed, no network; GPU tests where a GPU is seen."""

from __future__ import annotations

import os

# Read when torch, DALI and the hub's client are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Generator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from m3i_fast.backward_threads import release_last_backward  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--skip-missing-packages",
        action="store_true",
        help="skip the tests of a file that imports a package which is not installed",
    )
    parser.addoption(
        "--fp8-seeds",
        type=int,
        default=1,
        help="runs in FP8 that are compared with bf16 (engine/precision/test_fp8_training.py)",
    )


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    release_last_backward()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that cannot be imported for want of a package is skipped, by the option alone."""
    report = yield
    if report.failed and collector.config.getoption("--skip-missing-packages"):
        error = report.call.excinfo.value  # type: ignore[attr-defined]
        while error is not None and not isinstance(error, ModuleNotFoundError):
            error = error.__cause__
        if error is not None and str(error.name).split(".")[0] not in ("m3i_fast", "tests"):
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {error.name} is not installed")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty OpenMoji concepts, a part of them annotated only in part; 814 token ids, 24 a row."""
    from m3i_fast.pipelines.sources import openmoji

    out = tmp_path_factory.mktemp("data") / "openmoji"
    try:
        return openmoji.build(out, limit=60, labelled=0.5, num_merges=300, context_length=24)
    except ImportError as error:
        if not request.config.getoption("--skip-missing-packages"):
            raise
        pytest.skip(str(error))
