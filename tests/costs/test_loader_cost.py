"""What a loader costs: by rows of the ledger, and by arithmetic that is written out here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.ops.views import CASES
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.costs import loader_cost as loading
from m3i_fast.costs import view_cost as views
from m3i_fast.costs.gpus import CARDS
from m3i_fast.costs.loader_cost import ENGINES, READING, THREADS, VIEWS, Source, loader_cost
from m3i_fast.recipes import recipes

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
H100, CPU = CARDS["h100"], CARDS["cpu"]
SSL = ViewConfig(blur_probability=0.5, solarize_probability=0.1)


def figures_of(subject: str, run: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (RESULTS / f"{subject}.jsonl").read_text().splitlines())
    return [row["figures"] for row in rows if row["run_id"] == run]


def test_figures_are_those_of_the_rows_that_are_named() -> None:
    ms = {row["views"]: row["view_ms"] for row in figures_of("views", views.LEDGER_RUN)}
    assert pytest.approx(ms["2 x 224, resize alone"], rel=1e-3) == views.RESIZE_MS
    assert pytest.approx(ms["2 x 224"], rel=1e-3) == views.WHOLE_MS
    decoding = {
        row["global_views"]: 1e3 * row["cpu_s_per_image"]["decode, torchvision"]
        for row in figures_of("loader", loading.LEDGER_RUN)
        if row["local_views"] == "none"
    }
    assert decoding["2 x 224"] == pytest.approx(loading.DECODE_MS, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_other_sizes_of_views_are_told_from_two_rows(case: str) -> None:
    """Two of the four rows have made the constants; the others are measured and not fitted."""
    (measured,) = [
        row["view_ms"] for row in figures_of("views", views.LEDGER_RUN) if row["views"] == case
    ]
    groups = CASES[case]
    whole = sum(group.count * views.cpu_view_s(group, 375, 500) for group in groups)
    mean_ms = 1e3 * whole / sum(group.count for group in groups)
    fitted = "8 x 96" not in case and "64" not in case
    assert mean_ms == pytest.approx(measured, rel=1e-3 if fitted else 0.2)


def cost(cfg: LoaderConfig, card: Any = H100, source: Source | None = None, cores: float = 14):
    return loader_cost(cfg, card, source or Source(), cores=cores, local_ranks=8)


def test_the_loader_of_a_vit_s_on_eight_h100() -> None:
    """Photographs of 768 x 1,024 pixels; 8 threads take what seven engines leave."""
    cfg = recipes()["m3i_vit_s_h100"]().data
    found = cost(cfg, source=Source(height=768, width=1024))
    decode_s = 0.986e-3 * 768 * 1024 / 187_500
    engines = 7 * (1000 * 551 * 676 / 0.12765 / 5) / (768 * 1024)
    assert found.rates[ENGINES] == pytest.approx(engines / 0.65)
    assert found.rates[THREADS] == pytest.approx(8 / (0.35 * decode_s))
    assert found.rates[READING] == pytest.approx(25e9 / 8 / (110e3 * 768 * 1024 / 187_500))
    loads = views.view_work([cfg.global_views], 768, 1024).loads
    views_s = loads / (32 * 132 * 1.83e9)
    assert views_s > 3 * (768 * 1024 + 2 * 224**2) / 3.35e12  # what memory takes
    assert found.rates[VIEWS] == pytest.approx(1 / (views_s + 5e-6 / 1024))
    assert found.bound == "decoding" and found.images_s == found.rates[THREADS]
    packed = next(one for one in found.helps if "--for-gpu 256" in one.change)
    assert packed.images_s == pytest.approx(8 / (0.35 * 0.986e-3 * 256 * 341 / 187_500))


@pytest.mark.parametrize(
    ("changes", "source", "bound"),
    [
        ({"num_threads": 1}, {}, "decoding"),
        ({"hw_decoder_load": 1.0}, {}, "decoding"),
        ({"num_threads": 14}, {"read_byte_s": 1e9}, "reading"),
    ],
)
def test_what_bounds_a_loader_on_a_card(
    changes: dict[str, Any], source: dict[str, Any], bound: str
) -> None:
    found = cost(LoaderConfig(num_threads=8), source=Source(**source))
    slower = cost(replace(LoaderConfig(num_threads=8), **changes), source=Source(**source))
    assert slower.bound == bound
    assert slower.images_s == min(slower.rates.values())
    assert found.rates.keys() == {READING, ENGINES, THREADS, VIEWS}
    if changes.get("hw_decoder_load") == 1.0:
        assert THREADS not in slower.rates and slower.thread_s == 0


def test_views_bound_a_cpu_and_fewer_of_them_are_no_help() -> None:
    local = ViewConfig(count=8, size=96, scale=(0.05, 0.3), blur_probability=0.5)
    cfg = LoaderConfig(global_views=SSL, local_views=local, num_threads=2)
    found = cost(cfg, CPU, cores=2)
    assert found.rates.keys() == {READING, THREADS} and found.bound == "views"
    assert found.views_s > found.decode_s
    assert found.thread_s == pytest.approx(found.views_s + found.decode_s)
    assert found.rates[THREADS] == pytest.approx(2 / found.thread_s)
    alone = cost(replace(cfg, local_views=None), CPU, cores=2)
    assert alone.bound == "decoding" and alone.images_s > found.images_s
    # They are another training, which asks for another number of pictures.
    assert not [one for one in found.helps if "views" in one.change]


def test_torch_and_pillow_make_no_use_of_a_card() -> None:
    cfg = LoaderConfig(num_threads=2, backend="torch")
    assert cost(cfg).thread_s == cost(replace(cfg, backend="auto"), CPU).thread_s
    assert cost(cfg).rates.keys() == {READING, THREADS}


def test_engines_that_exact_decode_leaves_idle_are_not_counted() -> None:
    cfg = LoaderConfig(num_threads=8, exact_decode=True)
    found = cost(cfg)
    assert found.rates == cost(replace(cfg, exact_decode=False, hw_decoder_load=0.0)).rates
    assert found.hardware_share == 0 and ENGINES not in found.rates
    assert found.rates[THREADS] == pytest.approx(8 / found.decode_s)
    assert not [one for one in found.helps if "decoder-load" in one.change]


@pytest.mark.parametrize("cores", [0.5, 2.5, 7.9])
def test_a_part_of_a_core_is_a_part_of_a_thread(cores: float) -> None:
    found = cost(LoaderConfig(num_threads=8), cores=cores)
    assert found.num_threads == 8 and found.filled_cores == cores
    assert found.rates[THREADS] == pytest.approx(cores / found.thread_s)


def test_threads_are_no_more_than_cores_and_more_are_named_where_there_are_some() -> None:
    cfg = LoaderConfig(num_threads=8)
    assert cost(cfg, cores=4).rates[THREADS] == cost(replace(cfg, num_threads=4)).rates[THREADS]
    named = {one.change: one.images_s for one in cost(replace(cfg, num_threads=2)).helps}
    assert named["--data.num-threads 13"] == cost(replace(cfg, num_threads=13)).images_s
    assert not [one for one in cost(cfg, cores=8.5).helps if "num-threads" in one.change]


def test_help_is_named_by_what_it_gives_and_only_where_it_gives_something() -> None:
    slow = Source(height=768, width=1024, read_byte_s=1e9)
    helps = cost(LoaderConfig(num_threads=14), source=slow).helps
    assert [one.change for one in helps] == ["m3i-fast data pack SOURCE DIR --for-gpu 256"]
    packed = Source(height=256, width=341, kilobytes=27, read_byte_s=1e9)
    assert not cost(LoaderConfig(num_threads=14), source=packed).helps
    assert packed.packed() is packed
    wide = Source(height=375, width=500).packed()
    assert (wide.height, wide.width) == (256, 341) and wide.size == pytest.approx(27e3, rel=0.01)
