"""Tables of the README and the docs are what the ledger says, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.ledger import readme_tables as readme
from m3i_fast.benchmarks.ledger import rows as ledger

ROOT = Path(__file__).parents[3]
Append = Callable[..., None]


@pytest.fixture
def append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Append:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)

    def row(subject: str, figures: dict[str, Any], **changes: Any) -> None:
        made = ledger.make_row(subject, figures, command=f"bench {subject}") | changes
        with (tmp_path / f"{subject}.jsonl").open("a") as file:
            file.write(json.dumps(made) + "\n")

    return row


def _timed(device: str, ours: float, **others: float) -> dict[str, Any]:
    medians = {"m3i_fast": ours, **others}
    return {
        "device": device,
        "timings": {
            name: {"median_ms": ms, "p20_ms": ms / 2, "p80_ms": ms * 2, "num_samples": 5}
            for name, ms in medians.items()
        },
        "times_slower_than_ours": {name: ms / ours for name, ms in medians.items()},
    }


@pytest.mark.parametrize("name", readme.FILES)
def test_tables_are_those_of_the_ledger(name: str) -> None:
    text = (ROOT / name).read_text()
    assert readme.fill(text) == text, "m3i-fast bench page --readme writes them anew"


def test_every_table_stands_somewhere() -> None:
    marked = [
        found[2] for f in readme.FILES for found in readme.MARKED.finditer((ROOT / f).read_text())
    ]
    assert sorted(marked) == sorted(readme.TABLES)


def test_what_is_between_the_marks_is_replaced_and_all_else_kept(append: Append) -> None:
    append("step", {**_timed("cpu", 10.0, eager=15.4), "batch_size": 8,
                    "images_per_s": {"m3i_fast": 800.0}})  # fmt: skip
    text = "a\n<!-- ledger:step -->\nold\n<!-- /ledger -->\nb\n"
    text += "<!-- ledger:gate -->\n<!-- /ledger -->\n"
    filled = readme.fill(text)
    assert "old" not in filled and filled.startswith("a\n<!-- ledger:step -->\n| a step of M3I |")
    assert "| 8 pictures | 800 | 1.54 | - |" in filled
    assert "<!-- /ledger -->\nb\n<!-- ledger:gate -->\nThe gate: not measured yet" in filled
    assert readme.fill(filled) == filled


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="ledger:speed: expected one of demo, mask_mix"):
        readme.fill("<!-- ledger:speed -->\n<!-- /ledger -->")


def test_newest_row_of_each_size_on_the_machine_measured_last(append: Append) -> None:
    size = {"batch_size": 64, "image_size": 64, "dtype": "float32"}
    append("mask_mix", _timed("cpu", 9.0) | size, machine_class="another")
    append("mask_mix", _timed("cpu", 7.0) | size)
    append("mask_mix", _timed("cpu", 1.5, torch=150.0, copy=0.75) | size)
    append("mask_mix", _timed("cpu", 2500.0) | size | {"image_size": 224})
    shown = readme.mask_mix()
    assert "| 64 views of 64 pixels, float32 | 1.50 (0.750 to 3.00) | 100 | - | - | 0.50 |" in shown
    assert "| 64 views of 224 pixels, float32 | 2,500 (1,250 to 5,000) |" in shown
    assert "7.0" not in shown and "9.0" not in shown and "`bench mask_mix`" in shown


@pytest.mark.parametrize("name", [name for name in readme.TABLES if name != "gpu"])
def test_without_rows_nothing_is_claimed(append: Append, name: str) -> None:
    said = readme.TABLES[name]()
    assert readme.ABSENT in said and "|" not in said


def test_a_gpus_rows_are_shown_beside_the_prediction(
    append: Append, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "_predictions", lambda: "predicted")
    assert readme.gpu() == "On a GPU: not measured yet.\n\npredicted"
    card = {"cpu": "X", "num_cores": 9, "gpu": "H100", "num_gpus": 1}
    figures = _timed("cuda", 2.0, torch=8.0, copy=1.0, eager=6.0) | {"batch_size": 64}
    append("mask_mix", figures, machine=card)
    append("mask_mix", _timed("cpu", 3.0))
    line = "| mask_mix, batch_size 64, H100 | 2.00 (1.00 to 4.00) | 3.00 (eager) | 0.50 (copy) |"
    assert line in readme.gpu() and readme.gpu().endswith("predicted")


def test_predictions_are_marked_as_such() -> None:
    text = (ROOT / "docs" / "measure" / "performance.md").read_text()
    (block,) = re.findall(r"<!-- ledger:gpu -->(.*?)<!-- /ledger -->", text, re.DOTALL)
    for recipe in readme.PREDICTED:
        assert f"`{recipe}`" in block
    assert "predicted, images/s" in block and "no card has confirmed them" in block


def _rate(median: float) -> dict[str, float]:
    return {"median": median, "ci_low": median - 10, "ci_high": median + 20}


def test_loaders_are_ordered_by_their_rate(append: Append) -> None:
    figures = {
        "device": "cpu",
        "source": "bucket",
        "global_views": "2 x 96",
        "local_views": "4 x 48",
        "images_per_s": {"m3i_fast": _rate(1234.4), "decode": _rate(4000.0), "torch": _rate(400.0)},
        "times_slower_than_ours": {"m3i_fast": 1.0, "decode": 0.3086, "torch": 3.086},
        "floor": {"decoder": "decode"},
    }
    append("loader", figures)
    append("loader", {name: of for name, of in figures.items() if name != "source"})
    lines = readme.loader().splitlines()
    assert lines[2:6] == [
        "| 2 x 96 + 4 x 48, bucket: decode | 4,000 (3,990 to 4,020) | 0.31 |",
        "| 2 x 96 + 4 x 48, bucket: m3i_fast | 1,234 (1,224 to 1,254) | 1.00 |",
        "| 2 x 96 + 4 x 48, bucket: torch | 400 (390 to 420) | 3.09 |",
        "",
    ]
    assert "The floor, which only decodes, is decode." in readme.loader()


def test_a_nodes_newest_verdict_is_shown(append: Append) -> None:
    for median in (9999.0, 1200.0):
        parts = {"loader": 1500.0, "synthetic": 1300.0, "both": median, "without exchange": 1400.0}
        figures = {
            **{"recipe": "demo", "device": "cuda", "batch_size": 64},
            "measurements": {name: {"per_node": _rate(value)} for name, value in parts.items()},
            "verdict": {"bottleneck": "model"},
        }
        append("node", figures)
    append("node", {"recipe": "demo", "sweep": []})
    lines = readme.node().splitlines()
    assert lines[2:4] == [
        "| demo, cuda, batch 64 | 1,500 (1,490 to 1,520) | 1,300 (1,290 to 1,320) "
        "| 1,200 (1,190 to 1,220) | model |",
        "",
    ]


def test_scaling_shows_what_was_measured_alone(append: Append) -> None:
    kept = {"value": 0.913, "ci_low": 0.9, "ci_high": 0.92}
    for ranks, sent in ((1, None), (2, {"value": 0.074})):
        for median in (50.0, 100.0 * ranks):
            figures = {
                **{"kind": "measured", "recipe": "demo", "device": "cpu", "mode": "weak"},
                **{"ranks": ranks, "batch_per_rank": 32, "images_s": _rate(median)},
                **{"efficiency": kept, "communication_share": sent},
            }
            append("scaling", figures)
    append("scaling", {"kind": "predicted", "recipe": "demo", "points": []})
    lines = readme.scaling().splitlines()
    assert lines[2:5] == [
        "| demo, cpu, weak, 1 x 32 | 100 (90 to 120) | 0.91 (0.90 to 0.92) | - |",
        "| demo, cpu, weak, 2 x 32 | 200 (190 to 220) | 0.91 (0.90 to 0.92) | 7% |",
        "",
    ]


def test_gate_says_how_often_it_erred(append: Append) -> None:
    def kind(slower: int, faster: int, *ratios: float) -> dict[str, Any]:
        counts = {"comparisons": 20, "slower": slower, "faster": faster}
        return counts | {"ratios": ratios, "seconds_a_comparison": 11.26}

    settings = {"work": "gaussian", "alpha": 0.01, "threshold": 0.05, "slowdown": 0.1, "threads": 1}
    for planted in (3, 19):
        append(
            "gate",
            settings
            | {"unchanged": kind(0, 1, 0.98, 1.01), "planted": kind(planted, 0, 1.08, 1.1)},
        )
    line = "| gaussian | 1 of 20 | 0.980 to 1.010 | 19 of 20 (+10%) | 1.080 to 1.100 | 11.3 |"
    assert line in readme.gate() and "3 of 20" not in readme.gate()
    assert "Alpha 0.01, threshold 0.05" in readme.gate()
