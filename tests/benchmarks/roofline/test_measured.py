"""Predicted beside measured, of rows that are made up: no card has made one."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.ops import dcnv3, views
from m3i_fast.benchmarks.ops.boltzmann.main import GPU_SIZES
from m3i_fast.benchmarks.roofline import main as roofline
from m3i_fast.benchmarks.roofline.calls import VIEWS, NotDescribed, call_of, shown_calls
from m3i_fast.benchmarks.roofline.measured import compare_rows, roofline_card, write_compared
from m3i_fast.costs.kernels.constants import rates_of

ROOT = Path(__file__).resolve().parents[3]
H100 = "NVIDIA H100 80GB HBM3"
PAIRS: dict[str, Any] = {
    "kind": "speed", "device": "cuda", "form": "softmax", "rows": 32768, "columns": 32768,
    "dim": 512, "dtype": "bfloat16", "pass": "forward+backward",
}  # fmt: skip
MAPS: dict[str, Any] = {
    "device": "cuda", "batch_size": 64, "height": 56, "width": 56, "channels": 128, "groups": 8,
    "dtype": "float16", "offset_px": 1.5, "pass": "forward",
}  # fmt: skip


def row(subject: str, figures: dict[str, Any], ms: float, gpu: str | None = H100) -> dict[str, Any]:
    timings = {"m3i_fast": {"median_ms": ms}, "other": {"median_ms": 1.0}}
    return {"subject": subject, "machine": {"gpu": gpu}, "figures": {**figures, "timings": timings}}


def test_the_worst_comes_first_in_either_direction() -> None:
    predicted = [
        call_of(subject, figures).predict(rates_of("h100")).ms
        for subject, figures in (("boltzmann", PAIRS), ("dcnv3", MAPS))
    ]
    rows = [
        row("boltzmann", PAIRS, predicted[0] / 2),
        row("dcnv3", MAPS, predicted[1] * 3),
        row("dcnv3", {**MAPS, "offset_px": 10.0}, 0.3),
    ]
    compared, left = compare_rows(rows)
    assert not left and [each.off for each in compared] == sorted(
        (each.off for each in compared), reverse=True
    )
    by_op = {each.op: each for each in compared if "10 px" not in each.name}
    assert by_op["boltzmann"].ratio == pytest.approx(2)
    assert by_op["dcnv3"].ratio == pytest.approx(1 / 3)
    assert by_op["dcnv3"].off == pytest.approx(3)
    assert by_op["dcnv3"].name == "64x56x56x128 / 8, 1.5 px, forward, float16"


@pytest.mark.parametrize(
    ("subject", "figures", "gpu", "reason"),
    [
        ("boltzmann", {**PAIRS, "form": "sigmoid"}, H100, "boltzmann: form sigmoid, described is"),
        ("boltzmann", {"device": "cuda", "kind": "growth"}, H100, "boltzmann: kind growth"),
        ("dcnv3", {**MAPS, "dtype": "float32"}, H100, "dcnv3: dtype float32, described is"),
        ("dcnv3", {**MAPS, "groups": 1}, H100, "dcnv3: groups of 128 channels"),
        ("dcnv3", MAPS, "NVIDIA B200", "dcnv3: card b200, constants are known of a100"),
        ("dcnv3", MAPS, "NVIDIA X", "dcnv3: NVIDIA X: none of a100"),
        ("dcnv3", {**MAPS, "device": "cpu"}, None, "dcnv3: measured on cpu, not on a GPU"),
        ("step", {"device": "cuda"}, H100, "step: step, described are dcnv3"),
    ],
)
def test_what_has_no_prediction_says_why(
    subject: str, figures: dict[str, Any], gpu: str | None, reason: str
) -> None:
    compared, left = compare_rows([row(subject, figures, 1.0, gpu)] * 2)
    assert not compared
    ((text, count),) = left.items()
    assert text.startswith(reason) and count == 2


def test_cards_are_known_by_what_the_driver_calls_them() -> None:
    names = {"NVIDIA GH200 480GB": "gh200", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H200": "h200"}
    assert {name: roofline_card(name) for name in names} == names
    with pytest.raises(NotDescribed, match="a part of a card"):
        roofline_card("NVIDIA H100 80GB HBM3 MIG 1g.10gb")


def test_every_size_of_a_gpus_benchmark_is_predicted_or_says_why() -> None:
    """The sizes that `make gpu` measures, of each op."""
    found = [
        {**PAIRS, "form": size.form, "rows": size.rows, "columns": size.columns, "dim": size.dim}
        for size in GPU_SIZES
        if size.form not in ("sigmoid", "soft")  # not described
    ]
    for figures in found:
        assert call_of("boltzmann", figures).predict(rates_of("h100")).ms > 1
    for form in {size.form for size in GPU_SIZES} - {"softmax", "classes"}:
        with pytest.raises(NotDescribed, match=f"form {form}, described is softmax, classes"):
            call_of("boltzmann", {**found[0], "form": form})
    for size in dcnv3.GPU_SIZES:
        sizes = {name: getattr(size, name) for name in
                 ("batch_size", "height", "width", "channels", "groups")}  # fmt: skip
        assert call_of("dcnv3", {**MAPS, **sizes}).predict(rates_of("a100")).ms > 1e-3
    assert VIEWS == views.CASES
    for name in VIEWS:
        figures = {"picture": "375 x 500", "views": name, "batch_size": 16}
        assert call_of("views", figures).predict(rates_of("h100")).binds in ("wavefronts", "launch")


# ---- The page ------------------------------------------------------------------------------------


def test_the_page_begins_with_the_worst(tmp_path: Path) -> None:
    (tmp_path / "dcnv3.jsonl").write_text(json.dumps(row("dcnv3", MAPS, 0.3)) + "\n")
    rows = [row("boltzmann", PAIRS, 80.0), row("boltzmann", {**PAIRS, "form": "sigmoid"}, 7.0)]
    (tmp_path / "boltzmann.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    write_compared(tmp_path)
    lines = (tmp_path / "predicted.md").read_text().splitlines()
    assert lines[2].startswith("The worst of 2 predictions: boltzmann, softmax, 32768x32768x512")
    assert "80 ms measured (0.1" in lines[2]
    assert [line.split(" | ")[0] for line in lines[6:8]] == ["| boltzmann", "| dcnv3"]
    assert lines[-1] == "- boltzmann: form sigmoid, described is softmax, classes (1 rows)"
    content = json.loads((tmp_path / "predicted.json").read_text())
    assert content["compared"][0]["ratio"] == pytest.approx(
        content["compared"][0]["predicted_ms"] / 80
    )


@pytest.fixture
def run_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[dict[str, Any]]]:
    """Run the step of `make gpu`; returns the checks that it prints."""
    program = ROOT / "scripts" / "gpu" / "programs" / "predicted.py"

    def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [str(program), str(folder), *arguments])
        runpy.run_path(str(program), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        checks = [line.removeprefix("check ") for line in lines if line.startswith("check ")]
        return [json.loads(check) for check in checks]

    return run


def test_the_first_hour_writes_it_from_the_rows_of_its_folder(
    tmp_path: Path, run_program: Callable[..., list[dict[str, Any]]]
) -> None:
    rows = [row("dcnv3", MAPS, 0.3), row("dcnv3", {**MAPS, "groups": 4}, 3.0)]
    (tmp_path / "dcnv3.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    worst, other = run_program(tmp_path)
    assert worst["got"].startswith("3 ms; predicted / measured 0.06") and worst["holds"] is None
    assert other["got"].startswith("0.3 ms; predicted / measured ")
    assert worst["expected"].endswith("bound by wavefronts")
    assert (tmp_path / "predicted.md").is_file()


def test_without_a_card_it_says_what_it_would_write(
    tmp_path: Path, run_program: Callable[..., list[dict[str, Any]]]
) -> None:
    (tmp_path / "dcnv3.jsonl").write_text(json.dumps(row("dcnv3", MAPS, 0.3)) + "\n")
    (check,) = run_program(tmp_path, "--unmeasured")
    assert check["got"] == "none here: predicted.md has the predictions, to be compared"
    page = (tmp_path / "predicted.md").read_text()
    assert "nothing is compared" in page
    assert page.count("\n| ") == 2 * len(shown_calls()) + 2  # both cards, below the heading
    first = shown_calls()[0].predict(rates_of("h100"))
    assert f"| h100 | {first.ms:.3g} |  |  | {first.binds} |" in page


# ---- The command ---------------------------------------------------------------------------------


def test_the_command_prints_each_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    roofline.main([])
    told = capsys.readouterr().out
    assert "predicted on h100, ms" in told and told.rstrip().endswith("no GPU has run any of it.")
    roofline.main(["--show", "published"])
    assert "siglip-kernel" in capsys.readouterr().out
    roofline.main(["--show", "constants"])
    assert "Shankhdhar" in capsys.readouterr().out.replace("\n", "")
    roofline.main(["--card", "a100", "--op", "dcnv3", "--phases"])
    told = capsys.readouterr().out
    assert "dcnv3_round_kernel" in told and "boltzmann" not in told


def test_the_command_compares_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dcnv3.jsonl").write_text(json.dumps(row("dcnv3", MAPS, 0.3)) + "\n")
    roofline.main(["--measured", str(tmp_path)])
    assert "The worst of 1 predictions: dcnv3" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"measured: expected a folder with <op>\.jsonl"):
        roofline.Config(measured=tmp_path / "none")
