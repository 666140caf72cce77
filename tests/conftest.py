"""One thread, one seed, no network; groups of tests; GPU tests only if there is a GPU."""

from __future__ import annotations

import os
import random

# Read when torch, DALI and the hub's client are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Generator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from m3i_fast.backward_threads import release_last_backward  # noqa: E402
from scripts import checks  # noqa: E402
from tests.shared.groups import InputsOnly  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--group",
        choices=[checks.GATE, *checks.GROUPS],
        help="run only the tests of this group (scripts/checks.py), and hold them to its inputs",
    )
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


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    group = config.getoption("--group")
    if group in checks.GROUPS:
        config.pluginmanager.register(InputsOnly(group))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    group = config.getoption("--group")
    if group and collection_path.suffix == ".py":
        file = collection_path.relative_to(checks.ROOT).as_posix()
        return checks.group_of_file(file) not in (group, checks.GATE) or None
    return None


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


def group_of(item: pytest.Item) -> str:
    """Return the group that a test or its file is marked with; the gate if none."""
    file = item.path.relative_to(checks.ROOT).as_posix()
    marked = [name for name in checks.GROUPS if item.get_closest_marker(name)]
    if marked and checks.group_of_file(file) == checks.GATE:
        (name,) = marked
        if file not in checks.test_files(name):
            raise pytest.UsageError(f"{file}: expected `mark.{name}` in its text or its imports'")
        return name
    return checks.group_of_file(file)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if group := config.getoption("--group"):
        others = [item for item in items if group_of(item) != group]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, in whatever order they run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
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
