"""The benchmark of packed views counts what batches hold, and times squares of as many patches."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from m3i_fast.benchmarks.core.timed_windows import Series, Window
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.loader import packed
from m3i_fast.pipelines.loader import Loader
from tests.shared.pipelines.data import encode_image, pack, sample, smooth_picture

SMALL = packed.Config(
    device="cpu", token_budget=512, patch_size=4, sides=(2, 6), num_threads=1, windows=3,
    window_seconds=0.05,
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [sample(i, encode_image(smooth_picture(i, 40, 60), "JPEG")) for i in range(24)]
    return pack(tmp_path_factory.mktemp("data") / "shards", samples, samples_per_shard=12)


def test_a_run_leaves_a_row_of_both_loaders(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    flags = "--device cpu --token-budget 512 --patch-size 4 --sides 2 6 --num-threads 1"
    packed.main(
        [*flags.split(), "--windows", "3", "--window-seconds", "0.05", "--data", f"{shards}"]
    )
    assert "patches/s" in capsys.readouterr().out
    (row,) = ledger.read_rows("packed_loader")
    figures = row["figures"]
    names = {
        f"{kind}, {backend}" for kind in ("packed", "squares") for backend in ("dali", "torch")
    }
    for what in ("timings", "pictures_per_s", "patches_per_s", "cpu_s_per_picture"):
        assert figures[what].keys() == names
    for name in names:  # as many patches a picture, but for a square's whole side
        mean = figures["patches_per_s"][name]["median"] / figures["pictures_per_s"][name]["median"]
        assert 20 < mean < 50
    for backend, ratio in figures["patches_beside_squares"].items():
        rates = figures["patches_per_s"]
        ours, theirs = (rates[f"{kind}, {backend}"]["median"] for kind in ("packed", "squares"))
        assert ratio == pytest.approx(ours / theirs)


def test_what_batches_hold_is_counted(shards: Path) -> None:
    cfg = SMALL.loader(shards)
    loader = packed.packed_of(SMALL, cfg, None)
    work = packed.CountedBatches(loader, packed.count_packed, num_ahead=1)
    for _ in range(3):
        work.step()
    found = work.read()
    again = packed.packed_of(SMALL, cfg, None)
    batches = [next(again) for _ in range(3)]
    assert found["pictures"] == sum(batch.batch_size for batch in batches)
    assert found["patches"] == sum(int(batch.grids.prod(2).sum()) for batch in batches)
    assert work.read()["patches"] == 0
    squares = packed.squares_like(SMALL, cfg)
    batch = next(Loader(squares))
    side = squares.global_views.size // 4
    assert packed.count_squares(batch, 4) == (batch.batch_size, batch.batch_size * 2 * side**2)
    mean = found["patches"] / found["pictures"] / 2
    assert (side - 1) ** 2 < mean < (side + 1) ** 2
    for each in (loader, again):
        each.close()


def test_ratios_are_of_the_same_backend() -> None:
    def series(pictures: float, patches: float) -> Series:
        stages = {"pictures": pictures, "patches": patches, "cpu_s": 1.0}
        window = Window(seconds=2.0, num_steps=4, num_images=4, stages=stages)
        return Series(windows=[window] * 3, num_warmup_steps=1, is_settled=True)

    found = packed.figures(
        {
            "packed, dali": series(80, 1600),
            "squares, dali": series(100, 1000),
            "packed, torch": series(10, 300),
            "squares, torch": series(20, 200),
        }
    )
    assert found["pictures_beside_squares"] == {"dali": 0.8, "torch": 0.5}
    assert found["patches_beside_squares"] == {"dali": 1.6, "torch": 1.5}
    assert found["cpu_s_per_picture"]["packed, torch"] == 0.1
    assert found["timings"]["squares, dali"]["median_ms"] == 500


def test_no_figure_of_a_fast_loader_is_cut_off_in_eighty_columns() -> None:
    names = [
        f"{kind}, {backend}" for kind in ("packed", "squares") for backend in ("dali", "torch")
    ]
    row = {
        "num_views": 2,
        "data": "shards",
        "patch_size": 4,
        "square_size": 16,
        "device": "cpu",
        "num_threads": 1,
        "pictures_per_s": dict.fromkeys(names, {"median": 98765, "p5": 87654, "p95": 99876}),
        "patches_per_s": dict.fromkeys(names, {"median": 3_259_245.0}),
        "patches_beside_squares": {"dali": 0.92, "torch": 0.89},
        "cpu_s_per_picture": dict.fromkeys(names, 1.23e-3),
    }
    console = Console(width=80)
    with console.capture() as shown:
        console.print(packed.table([row]))
    for text in ("k patches/s", "98,765", "87,654 - 99,876", "3,259", "CPU ms", "packed, torch"):
        assert text in shown.get()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.get()


def test_wrong_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="num_views: expected at least 1, got 0"):
        packed.Config(num_views=0)
    with pytest.raises(ValueError, match="sides: expected 1 <= least <= most, got 9, 4"):
        packed.packed_of(packed.Config(sides=(9, 4)), packed.Config().loader(Path("none")), None)
