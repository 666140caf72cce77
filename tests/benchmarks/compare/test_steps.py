"""Steps of two versions: equal work or a refusal, times in turns, shares of the product's rate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import m3i_fast
from m3i_fast.benchmarks.compare import main as compare
from m3i_fast.benchmarks.compare import step_work, steps
from m3i_fast.benchmarks.compare.gate import judge
from m3i_fast.benchmarks.compare.versions import Plan, Steps, Version, Worker
from m3i_fast.benchmarks.core.harness import summarise
from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine import train_step
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import capabilities_of, resolve_precision
from m3i_fast.engine.train_step import build_train_step
from m3i_fast.terminal import make_console

RECIPE = "demo_autoencoder"
COMMIT = "0123456789abcdef"
PLANTED = """

import time
_as_it_is, _now = TrainStep.__call__, [0.0]

def _planted(self, *batches, monitor=False):
    metrics = _as_it_is(self, *batches, monitor=monitor)
    _now[0] += {seconds} * (1 + self.steps_taken / 1e4)
    metrics["loss/total"] = metrics["loss/total"] * {factor}
    return metrics

TrainStep.__call__ = _planted
time.perf_counter = lambda: _now[0]
"""


def planted(folder: Path, name: str, *, seconds: float, factor: float = 1.0) -> Version:
    """A copy of the package, whose steps take so long by a clock that only they move."""
    site, ignored = folder / name, shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(m3i_fast.__file__).parent, site / "m3i_fast", ignore=ignored)
    beside, library = find_spec("m3i_fast.pipelines"), find_spec("m3i_fast._C")
    assert beside and beside.submodule_search_locations and library and library.origin
    shutil.copytree(
        beside.submodule_search_locations[0],
        site / "m3i_fast" / "pipelines",
        ignore=ignored,
        dirs_exist_ok=True,
    )
    (site / "m3i_fast" / Path(library.origin).name).symlink_to(library.origin)
    with (site / "m3i_fast" / "engine" / "train_step.py").open("a") as file:
        file.write(PLANTED.format(seconds=seconds, factor=factor))
    return Version(name, COMMIT, site)


@pytest.fixture
def against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What --against builds takes 30 ms a step, this version 10; rows go to the folder."""
    before = planted(tmp_path, "HEAD~3", seconds=0.03)

    @contextmanager
    def built(ref: str) -> Iterator[Version]:
        yield before

    monkeypatch.setattr(compare, "built", built)
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    return tmp_path


COMMAND = f"step --against HEAD~3 --recipes {RECIPE} --batch-size 4 --pairs 1 --looks 1".split()


def test_a_slower_version_is_told_and_leaves_a_row(
    against: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = planted(against, "ours", seconds=0.01)
    monkeypatch.setattr(compare, "Version", lambda: ours)
    assert compare.main([*COMMAND, "--curve", "3", "--samples", "8"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "faster than the baseline" in printed
    assert (
        "ours has 3.000 times the images/s. Losses of the first 3 steps differ by 0 at" in printed
    )
    (row,) = ledger.read_rows("step_versions")
    figures, name = row["figures"], COMMIT[:12]
    assert figures["against"] == name and figures["recipe"] == RECIPE
    assert row["config"]["data"]["batch_size"] == figures["batch_size"] == 4
    assert figures["verdict"]["ratio"] == pytest.approx(1 / 3)
    assert figures["timings"][name]["median_ms"] == pytest.approx(30, rel=1e-2)
    assert figures["images_per_s"]["m3i_fast"] == pytest.approx(400, rel=1e-2)
    gemm = figures["gemm"]
    ms = figures["timings"]["m3i_fast"]["median_ms"]
    share = gemm["gflop"] / ms * 1e3 / gemm["rate_gflop_s"]
    assert gemm["share"] == pytest.approx({"m3i_fast": share, name: share / 3}, rel=1e-3)


def test_a_version_of_other_losses_is_refused(
    against: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = planted(against, "ours", seconds=0.01, factor=1.001)
    monkeypatch.setattr(compare, "Version", lambda: ours)
    told = r"at most --loss-bound 1e-05, got 0\.00\d+ at step 1: .* of HEAD~3, .* of ours; their"
    with pytest.raises(ValueError, match=told):
        compare.main([*COMMAND, "--curve", "2", "--samples", "8"])
    assert not list(ledger.read_rows("step_versions"))


# ---- A process -----------------------------------------------------------------------------------


def _batch_file(folder: Path, **changes: Any) -> str:
    batch = draw_batch(steps.config_of("demo", batch_size=4, num_steps=1))
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    torch.save(values | changes, folder / "batch.pt")
    return str(folder / "batch.pt")


def test_the_steps_are_those_that_train(tmp_path: Path) -> None:
    """Each at the next positions, which draw other masks; the call goes on behind the first."""
    take, said = step_work.prepare("demo", _batch_file(tmp_path), 2)
    train = steps.config_of("demo", batch_size=4, num_steps=3)
    assert json.loads(said["config"]) == json.loads(train.to_json())
    device = torch.device("cpu")
    arithmetic = resolve_precision(
        capabilities_of(device), gemm_shapes(train), train.precision, train.backend
    )
    assert said["dtype"] == str(arithmetic.compute_dtype).removeprefix("torch.")
    step, batch, losses = build_train_step(train, World(device), arithmetic), draw_batch(train), []
    for index in range(3):
        moved = replace(batch, position=torch.arange(4 * index, 4 * index + 4))
        losses.append(float(step(moved)["loss/total"]))
    assert [*said["losses"], float(take())] == losses  # type: ignore[arg-type]


def test_what_a_version_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _batch_file(tmp_path)
    with pytest.raises(step_work.MissingError, match="a recipe large, this version has demo,"):
        step_work.prepare("large", file, 1)
    monkeypatch.delattr(train_step, "build_train_step")
    monkeypatch.setitem(step_work.NEEDS, "m3i_fast.engine.steps", ("take", "give"))
    missing = "train_step.build_train_step, m3i_fast.engine.steps.take, m3i_fast.engine.steps.give"
    with pytest.raises(step_work.MissingError, match=f"expected m3i_fast.engine.{missing}, which"):
        step_work.prepare(RECIPE, file, 1)


def test_a_batch_of_other_fields_names_the_version(tmp_path: Path) -> None:
    other = planted(tmp_path, "HEAD~3", seconds=1.0)
    file = Path(_batch_file(tmp_path, depth=torch.zeros(4)))
    plan = Plan(RECIPE, steps=Steps(file, 1))
    told = r"HEAD~3: m3i_fast\.pipelines\.batch\.Batch: expected the fields boxes, columns, depth, "
    with pytest.raises(ValueError, match=told), Worker(plan, other) as worker:
        worker.wait_until_warm()


# ---- Equal work ----------------------------------------------------------------------------------


def _said(**changes: Any) -> dict[str, Any]:
    config = {"optim": {"lr": 0.1}, "terms": [{"name": "a"}, {"name": "b"}]}
    said = {"config": json.dumps(config), "dtype": "float32", "losses": [4.0, 2.0, 1.0]}
    return said | changes


NEWER = {"optim": {"lr": 0.1, "clip": 1.0}, "terms": [{"name": "a"}, {"name": "b", "scale": 2}]}
OTHER = {"optim": {"lr": 0.2}, "terms": [{"name": "a"}, {"name": "c"}]}


def test_rounding_and_new_settings_are_equal_work() -> None:
    said = [_said(), _said(config=json.dumps(NEWER), losses=[4.0, 2.0, 1.0 + 9e-6])]
    steps.expect_same_work("demo", ("old", "new"), said, loss_bound=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config": json.dumps(OTHER)},
            r"demo: .* in old and new, got optim.lr: 0.1 != 0.2; terms.1.name: 'b' != 'c'",
        ),
        ({"dtype": "bfloat16"}, "expected one dtype, got float32 of old and bfloat16 of new"),
        ({"losses": [4.0, 2.0001, 1.0]}, "got 5e-05 at step 2: 2.0 of old, 2.0001 of new"),
        ({"losses": [4.0, 2.0, float("nan")]}, "got nan at step 3"),
    ],
)
def test_other_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        said = [_said(), _said(**changes)]
        steps.expect_same_work("demo", ("old", "new"), said, loss_bound=1e-5)


# ---- What is told --------------------------------------------------------------------------------


def test_shares_and_images_are_of_the_medians(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = [100.0, 90.0, 140.0], [50.0, 40.0, 60.0]
    compared = steps.StepComparison(
        recipe="demo",
        versions=(Version("v1", COMMIT), Version()),
        batch_size=20,
        num_threads=1,
        dtype="float32",
        timings=(summarise(before), summarise(after)),
        verdict=judge([before], [after]),
        curves=steps.Curves(baseline=[2.0, -1.0], candidate=[2.0, -1.5]),
        settings_of_one=["optim.clip"],
        gflop=3.0,
        rate_gflop_s=120.0,
    )
    assert compared.images_per_s == [200.0, 400.0]
    assert compared.shares == pytest.approx([0.25, 0.5])
    assert compared.curves.differences == [0.0, 0.5]
    assert compared.figures["minimum_ms"] == {"m3i_fast": 40.0, COMMIT[:12]: 90.0}
    make_console().print(steps.table(compared))
    printed = " ".join(capsys.readouterr().out.split())
    assert "v1 100 90 200 25.0%" in printed and "this version 50 40 400 50.0%" in printed
    for words in ("2.000 times the images/s", "by 0.5 at most", "One version alone has optim.clip"):
        assert words in printed
    unknown = replace(compared, gflop=None)
    assert unknown.shares == [None, None] and unknown.figures["gemm"]["share"]["m3i_fast"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recipes": ("demo", "large")}, "recipes: expected some of demo, .* got 'large'"),
        ({"recipes": ()}, "recipes: expected one or more"),
        ({"curve": 0}, "curve: expected at least 1"),
        ({"loss_bound": -1.0}, "loss_bound: expected at least 0"),
        ({"samples": 3000}, r"curve, samples: expected at most the 2000 steps of demo together"),
        ({"batch_size": 5}, r"batch_size: expected a multiple of .*2.*got 5"),
        ({"against": None, "self_test": 2}, "subject: expected one of mask_mix, .* got 'step'"),
    ],
)
def test_a_wrong_request_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.configs_of(compare.Config(**{"subject": "step", "against": "HEAD", **wrong}))


def test_recipes_share_alpha_and_a_step_has_its_own_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = compare.parse("step --against HEAD --recipes demo m3i_vit_s --no-record".split())
    assert (cfg.pairs, cfg.samples, cfg.looks) == (3, 12, 3)
    assert compare.parse(["gaussian"]).pairs == 6
    asked: list[float] = []

    def comparing(*_: Any, judge: Any, **__: Any) -> Any:
        asked.append(judge.keywords["alpha"])
        raise InterruptedError

    monkeypatch.setattr(steps, "compare_steps", comparing)
    with pytest.raises(InterruptedError):
        compare.compare_recipes(
            cfg, compare.configs_of(cfg), (Version(), Version()), make_console()
        )
    assert asked == [cfg.alpha / 2]
