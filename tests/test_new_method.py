"""One file adds a method: with a new loss, one of independent rows, and with a new target.

The first and the last are those of docs/extend/new_method.md. Each is listed, trains, has its FLOPs
in the step's, and is accumulated or refused as its `independent` says, while no other file is
touched.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.config import TextConfig, TrainConfig
from m3i_fast.config.objective.losses import LOSSES, no_products
from m3i_fast.config.objective.targets import TARGETS
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.methods import METHODS
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.recipes import demo_method, shrink
from tests.shared.engine.parts_of_batches import (
    assert_close_states,
    in_parts,
    run_of_eight,
    train_in_parts,
)
from tests.shared.engine.real_step import stepper
from tests.shared.flop_formulas import FORMULAS
from tests.shared.ranks import run_script

TUTORIAL = Path(__file__).parent.parent / "docs" / "extend" / "new_method.md"
SMALL = (
    "--num-steps=3 --log-every=1 --num-classes=9 --text.vocab-size=814 --text.context-length=24 "
    "--data.batch-size=8 --device=cpu"
).split()
# Distances of patches in frequencies: one product with a fixed matrix, each row by itself.
SPECTRUM = """
import math
import torch
from m3i_fast.cli import main
from m3i_fast.config import Term
from m3i_fast.config.objective.flops import Flops
from m3i_fast.config.objective.losses import LOSSES, Loss
from m3i_fast.objectives.methods import METHODS, Method


def loss(z_hat, z):
    k = torch.arange(z.shape[-1], dtype=z_hat.dtype)
    return ((z_hat - z) @ torch.cos(math.pi / len(k) * (k[:, None] + 0.5) * k)).square().mean()


def flops(sizes):
    product = 2 * sizes.rows * sizes.dim**2
    return Flops(forward=product, backward=product)


LOSSES["pixels", "gaussian", "spectrum"] = Loss(
    formula="|DCT(z_hat - z)|^2 / E", build=lambda *_: loss, flops=flops, independent=True
)
METHODS["spectrum"] = Method(title="Spectrum", paper="none", family="intra-view", terms=(
    Term(name="spectrum", target="pixels", predictor="linear",
         likelihood="gaussian", regulariser="spectrum"),
))
if __name__ == "__main__":
    raise SystemExit(main())
"""
NEW_LOSSES = ("simdino", "spectrum")
TERMS = {"simdino": "embedding", "spectrum": "spectrum", "colour": "colour"}
"""The term of each file's method."""
TEXT = TextConfig(vocab_size=90, context_length=24, dim=32, depth=2, num_heads=2, embed_dim=32)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each file, alone in a folder."""
    simdino, colour = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    paths = {}
    for name, code in zip(TERMS, (simdino, SPECTRUM, colour), strict=True):
        paths[name] = tmp_path_factory.mktemp(name) / f"{name}.py"
        paths[name].write_text(code)
    return paths


@pytest.fixture
def added(scripts: dict[str, Path]) -> Iterator[None]:
    """Have the files' targets, losses and methods in this process, for one test."""
    known = [(table, dict(table)) for table in (TARGETS, LOSSES, METHODS)]  # type: ignore[call-overload]
    for path in scripts.values():
        runpy.run_path(str(path))
    yield
    for table, before in known:
        for key in table.keys() - before.keys():
            del table[key]  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_the_tutorials_file_is_at_most_thirty_lines(scripts: dict[str, Path]) -> None:
    lines = [line for line in scripts["simdino"].read_text().splitlines() if line.strip()]
    assert len(lines) <= 30


def test_the_tutorials_method_explains_itself(scripts: dict[str, Path]) -> None:
    explained = run_script(scripts["simdino"], "methods", "--explain", "SimDINO")
    assert "L_embedding = -cos(z_hat, sg(z)) - 0.01 R(z_hat)" in explained


@pytest.mark.matrix
@pytest.mark.parametrize("name", TERMS)
def test_one_file_is_all_that_a_method_takes(
    name: str, scripts: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    assert re.search(rf"^ *{name} ", run_script(scripts[name], "methods"), re.MULTILINE)
    out = tmp_path / "run"
    request = ["--out", str(out), f"--data.path={dataset}", *SMALL]
    run_script(scripts[name], "train", f"demo_{name}", *request)
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    expected = {f"loss/{TERMS[name]}", "monitor/target_rank"}
    if name in NEW_LOSSES:
        expected.add(f"monitor/{TERMS[name]}_cosine")
    assert expected <= rows[0].keys()
    assert [path for path in scripts[name].parent.rglob("*") if path.is_file()] == [scripts[name]]


def _small(name: str) -> TrainConfig:
    cfg = shrink(demo_method(name), path=Path("nowhere"), num_classes=9, text=TEXT)
    return replace(
        cfg,
        data=replace(cfg.data, batch_size=8),
        optim=replace(cfg.optim, matrices="adamw"),  # Muon's products are the optimiser's
    )


@pytest.mark.usefixtures("added")
def test_the_flops_of_a_new_target_are_in_the_steps() -> None:
    cfg = _small("colour")
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as of_step:
        stepper(cfg)()
    assert without_sampling(step_flops(cfg)).hardware == of_step.get_total_flops()


@pytest.mark.parametrize("name", NEW_LOSSES)
@pytest.mark.usefixtures("added")
def test_its_flops_are_in_the_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _small(name)
    (key,) = (term.loss_key for term in cfg.objective.terms)
    row, calls = LOSSES[key], list[tuple[Tensor, Tensor]]()

    def build(*arguments: Any) -> Any:
        loss = row.build(*arguments)  # type: ignore[operator]

        def noted(z_hat: Tensor, z: Tensor) -> Tensor:
            calls.append((torch.randn_like(z_hat).requires_grad_(), torch.randn_like(z)))
            return loss(z_hat, z)

        return noted

    monkeypatch.setitem(LOSSES, key, replace(row, build=build))
    step = stepper(cfg)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as of_step:
        step()
    loss = row.build(cfg.objective.terms[0], cfg.objective, 0, None)  # type: ignore[operator]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as of_loss:
        for z_hat, z in calls:
            loss(z_hat, z).backward()
    whole = step_flops(cfg)
    monkeypatch.setitem(LOSSES, key, replace(row, flops=no_products))
    others = step_flops(cfg)
    counted = of_loss.get_total_flops()
    assert counted > 0
    assert without_sampling(whole).model - without_sampling(others).model == counted
    assert without_sampling(whole).hardware == of_step.get_total_flops()


@pytest.mark.usefixtures("added")
def test_rows_that_are_not_independent_are_not_accumulated(dataset: Path, tmp_path: Path) -> None:
    cfg = in_parts(run_of_eight(dataset, demo_method("simdino")), 2, accumulate=2)
    with pytest.raises(
        ValueError,
        match=r"expected 1 with the term 'embedding' \(embedding, gaussian, coding_rate\)",
    ):
        Trainer(cfg, tmp_path / "run")


@pytest.mark.usefixtures("added")
def test_independent_rows_are_accumulated_exactly(dataset: Path, tmp_path: Path) -> None:
    whole = run_of_eight(dataset, demo_method("spectrum"))
    expected = train_in_parts(whole, whole, tmp_path / "whole", rank=0, num_parts=1)
    cfg = in_parts(whole, 2, accumulate=2)
    assert_close_states(
        train_in_parts(cfg, whole, tmp_path / "parts", rank=0, num_parts=2), expected
    )
