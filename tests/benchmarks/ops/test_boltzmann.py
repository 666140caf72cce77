"""The benchmark of the likelihood runs, compares equal losses and records what it shows."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.benchmarks.core import harness
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ops.boltzmann import growth as boltzmann_growth
from m3i_fast.benchmarks.ops.boltzmann import losses as boltzmann_functions
from m3i_fast.benchmarks.ops.boltzmann import main as boltzmann
from m3i_fast.benchmarks.ops.boltzmann.growth_plot import draw
from m3i_fast.benchmarks.ops.boltzmann.losses import Form, Size, make_functions
from m3i_fast.benchmarks.ops.boltzmann.main import Config

FORMS: dict[Form, tuple[str, str]] = {
    "softmax": ("ClipLoss", "four_gemms"),
    "sigmoid": ("SigLipLoss", "three_gemms"),
    "classes": ("cross_entropy", "three_gemms"),
    "soft": ("cross_entropy", "four_gemms"),
}
SVG = "{http://www.w3.org/2000/svg}"


def small(form: Form, rows: int = 24) -> Size:
    return Size(form=form, rows=rows, columns=rows + 6 * (form in ("classes", "soft")), dim=8)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    return tmp_path


def recorded() -> list[dict[str, Any]]:
    return [row["figures"] for row in ledger.read_rows("boltzmann")]


# ---- Speed ---------------------------------------------------------------------------------------


def test_rows_are_shown_and_recorded(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(boltzmann, "CPU_SIZES", tuple(map(small, FORMS)))
    monkeypatch.setattr(boltzmann, "measure", partial(harness.measure, warmup_s=0.01))
    monkeypatch.setattr(boltzmann_growth, "measure_apart", boltzmann_growth.measure_point)
    boltzmann.main(["--device", "cpu", "--num-samples", "2"])
    rows = recorded()
    assert [(row["kind"], row["form"], row["pass"]) for row in rows] == [
        ("speed", form, kind) for form in FORMS for kind in ("forward", "forward+backward")
    ]
    for row, form in zip(rows[1::2], FORMS, strict=True):
        assert {"m3i_fast", *FORMS[form]} <= set(row["timings"])
    assert ("linear_cross_entropy" in rows[5]["timings"]) == hasattr(F, "linear_cross_entropy")
    assert set(rows[0]["timings"]) == {"m3i_fast", "ClipLoss", "one_gemm"}
    milliseconds = rows[3]["timings"]["m3i_fast"]["median_ms"]
    assert rows[3]["tflop_s"] == pytest.approx(6 * 24 * 24 * 8 / milliseconds / 1e9)
    assert "hfu" not in rows[3]
    assert [set(row.get("extra_peak_bytes", ())) for row in rows[6:]] == [
        set(),
        {"m3i_fast", "cross_entropy"},
    ]
    shown = capsys.readouterr().out
    assert "classes, 24x30x8, fwd + bwd" in shown and str(results) in shown

    monkeypatch.setattr(boltzmann, "CPU_SIZES", (small("sigmoid"),))
    boltzmann.main(["--device", "cpu", "--num-samples", "2", "--no-record"])
    assert len(recorded()) == 8


@pytest.mark.parametrize(
    ("form", "gemms"), [("softmax", 8), ("sigmoid", 6), ("classes", 6), ("soft", 8)]
)
def test_fractions_of_a_known_peak(form: Form, gemms: int) -> None:
    size = small(form)
    row = boltzmann.figures_of(Config(device="cpu", num_samples=1), size, torch.float32, True, 2.0)
    pairs = size.rows * size.columns * size.dim
    seconds = {name: timing["median_ms"] / 1e3 for name, timing in row["timings"].items()}
    assert row["hfu"] == pytest.approx(gemms * pairs / (seconds["m3i_fast"] * 2e12))
    other = FORMS[form][0]
    model_gemms = 8 if form == "soft" else 6
    assert row["model_fraction"][other] == pytest.approx(
        model_gemms * pairs / (seconds[other] * 2e12)
    )
    assert set(row["model_fraction"]) == {name for name in seconds if "gemm" not in name}


def test_peaks_of_cards(caplog: pytest.LogCaptureFixture) -> None:
    peaks = {
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100 80GB PCIe": 312,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835,
        "NVIDIA H200": 989,
        "NVIDIA H200 NVL": 835,
        "NVIDIA B200": 2250,
    }
    assert {card: boltzmann.peak_of(card) for card in peaks} == peaks
    assert not caplog.records
    part = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    for card in ("NVIDIA GH200 480GB", "NVIDIA GB200", part, "NVIDIA GH200 480GB"):
        assert boltzmann.peak_of(card) is None
    assert len(caplog.records) == 3


@pytest.mark.parametrize("form", FORMS)
def test_the_floor_is_the_gemms_of_ours(form: Form) -> None:
    names = {1: "one_gemm", 2: "two_gemms", 3: "three_gemms", 4: "four_gemms"}
    size = small(form)
    forward = 1 + (form == "soft")
    for backward, count in ((False, forward), (True, boltzmann_functions.OUR_GEMMS[form])):
        name, gemms = boltzmann_functions.make_floor(size, torch.float32, "cpu", backward=backward)
        with FlopCounterMode(display=False) as counter:
            gemms()
        assert counter.get_total_flops() == count * 2 * size.rows * size.columns * size.dim
        assert name == names[count]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_have_the_same_value(form: Form, dtype: torch.dtype) -> None:
    functions = make_functions(small(form, 200), dtype, "cpu", backward=True)
    assert {"m3i_fast", *FORMS[form]} <= set(functions)


@pytest.mark.parametrize("form", FORMS)
def test_other_losses_are_not_timed(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    real = boltzmann_functions.make_loss

    def make_loss(name: str, form: Form) -> boltzmann_functions.Loss:
        loss = real(name, form)
        return loss if name == "m3i_fast" else lambda inputs: 1.001 * loss(inputs)

    monkeypatch.setattr(boltzmann_functions, "make_loss", make_loss)
    with pytest.raises(AssertionError, match=f"{FORMS[form][0]}: Scalars are not close"):
        make_functions(small(form), torch.float32, "cpu", backward=False)


def test_an_absent_library_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.loss", None)
    monkeypatch.setitem(sys.modules, "siglip_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    boltzmann_functions._say_left_out.cache_clear()
    for _ in range(2):
        assert set(boltzmann_functions.losses("sigmoid", "cuda")) == {"m3i_fast"}
        assert "Liger" not in boltzmann_functions.losses("classes", "cuda")
    assert [record.message.split(" left out")[0] for record in caplog.records] == [
        "SigLipLoss",
        "siglip-kernel",
        "Liger",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"dim": -1}, "dim: expected at least 1, got -1"),
        ({"growth": True, "ranks": "1"}, "ranks: expected either --growth or --ranks"),
        ({"largest": 2048}, "largest: expected with --growth only"),
        ({"growth": True, "largest": 3000}, "largest: expected 1024, or a doubling .* got 3000"),
        ({"growth": True, "largest": 512}, "largest: expected 1024, or a doubling .* got 512"),
        ({"ranks": "1,x"}, "ranks: expected rising numbers of processes, .* got '1,x'"),
        ({"ranks": "2,1"}, "ranks: expected rising numbers of processes, .* got '2,1'"),
        ({"ranks": "0,1"}, "ranks: expected rising numbers of processes, .* got '0,1'"),
        ({"ranks": "1", "device": "cuda"}, "ranks: expected --device cpu"),
    ],
)
def test_config_names_a_bad_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize(
    ("form", "rows", "columns", "message"),
    [
        ("softmax", 4, 5, "columns: expected 4 as rows of a softmax, got 5"),
        ("classes", 0, 5, "rows: expected at least 1, got 0"),
    ],
)
def test_size_names_a_bad_field(form: Form, rows: int, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Size(form=form, rows=rows, columns=columns, dim=1)


# ---- Growth --------------------------------------------------------------------------------------


def test_growth_is_measured_and_drawn(
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(boltzmann_growth, "SMALLEST", 512)
    monkeypatch.setattr(boltzmann_growth, "CURVES", boltzmann_growth.CURVES[:2])
    # Enough for ClipLoss of 512 rows, too little for 1,024.
    monkeypatch.setattr(boltzmann_growth, "free_bytes", lambda _: 10 * 2**20)
    boltzmann.main(["--device", "cpu", "--growth", "--dim", "8", "--largest", "1024"])
    ours, clip = recorded()
    assert (ours["kind"], ours["form"], ours["function"]) == ("growth", "softmax", "m3i_fast")
    assert clip["function"] == "ClipLoss"
    assert [point["rows"] for point in ours["points"]] == [512, 1024]
    assert [point["rows"] for point in clip["points"]] == [512]
    assert (ours["stops_at"], clip["stops_at"]) == (None, 1024)
    assert "ClipLoss left out from N = 1024 on" in caplog.text
    whole = 512 * 512 * 4  # bytes of one matrix of logits
    assert 3 * whole < clip["points"][0]["extra_peak_bytes"] < 9 * whole
    assert 0 < ours["points"][0]["extra_peak_bytes"] < 3 * whole
    assert all(0 < point["seconds"] < 60 for point in ours["points"])

    picture = ElementTree.parse(results / "boltzmann_growth.svg").getroot()
    assert len(picture.findall(f".//{SVG}circle")) == 2 * 3
    text = " ".join(picture.itertext())
    assert "ClipLoss, softmax (no memory for N = 1,024)" in text
    assert "forward + backward, s" in text and "N, pairs" in text and "MiB" in text
    assert "does not suffice" in capsys.readouterr().out


def row(
    machine: dict[str, str | None], name: str, counts: list[int], **more: Any
) -> dict[str, Any]:
    """A growth row whose seconds are as N, and whose memory is as N^2."""
    points = [
        {"rows": n, "seconds": n / 1024, "extra_peak_bytes": 4 * n**2, "loss": 1.0} for n in counts
    ]
    figures = {
        "kind": "growth",
        "device": "cuda" if machine["gpu"] else "cpu",
        "num_threads": 2,
        "dim": 8,
        "dtype": "float32",
        "form": "softmax",
        "function": name,
        "points": points,
        "stops_at": None,
    }
    return {"machine": machine, "figures": {**figures, **more}}


def test_a_picture_has_the_newest_rows_of_each_machine() -> None:
    laptop, server = {"cpu": "A & B", "gpu": None}, {"cpu": "A & B", "gpu": "C"}
    counts = [1024, 2048, 4096, 8192]
    picture = ElementTree.fromstring(
        draw(
            [
                row(laptop, "m3i_fast", counts, num_threads=1),
                row(laptop, "ClipLoss", counts, num_threads=1),
                row(server, "m3i_fast", counts),
                row(laptop, "m3i_fast", counts[:2]),
                row(laptop, "m3i_fast", counts[:3]),
            ]
        )
    )
    titles = [text.text for text in picture.iter(f"{SVG}text") if text.get("class") == "title"]
    assert titles == ["A & B, 2 threads, float32, D = 8", "C, float32, D = 8"]
    lines = [
        [tuple(map(float, place.split(","))) for place in line.attrib["points"].split()]
        for line in picture.iter(f"{SVG}polyline")
    ]
    assert [len(line) for line in lines] == [3, 3, 4, 4]
    for seconds, megabytes in (lines[:2], lines[2:]):
        steps = [b - a for (a, _), (b, _) in zip(seconds[:-1], seconds[1:], strict=True)]
        assert steps == pytest.approx([steps[0]] * len(steps), abs=0.15)
        # 250 pixels a picture: seconds from 1 to 10 over one decade; memory over two or three.
        rise, of_memory = (
            [a - b for (_, a), (_, b) in zip(line[:-1], line[1:], strict=True)]
            for line in (seconds, megabytes)
        )
        assert rise == pytest.approx([250 * math.log10(2)] * len(rise), abs=0.15)
        decades = 2 if len(seconds) == 3 else 3
        expected = [250 * math.log10(4) / decades] * len(rise)
        assert of_memory == pytest.approx(expected, abs=0.15)

    with pytest.raises(ValueError, match="rows: expected growth rows of boltzmann, got none"):
        draw([])


PEAK = """
import torch
from m3i_fast.benchmarks.core import peak_memory
megabyte = 2**20
torch.ones(256 * megabyte, dtype=torch.uint8)  # an earlier peak
def take():
    return [torch.ones(megabyte // 10, dtype=torch.uint8) for _ in range(640)]  # 64 MiB
take()  # freed, and still in the heap
print(*peak_memory.measure_peak(take, "cpu"), peak_memory.free_bytes("cpu"))
"""


def test_peak_memory_is_what_a_call_takes() -> None:
    """In a process of its own: what other tests have freed would be taken again."""
    shown = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    seconds, peak, free = map(float, shown.stdout.split())
    megabyte = 2**20
    assert 60 * megabyte < peak < 68 * megabyte
    assert 0 < seconds < 60
    assert free > 64 * megabyte


# ---- Ranks ---------------------------------------------------------------------------------------


def test_ranks_are_measured(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ranks", "1,2", "--rows-per-rank", "256", "--dim", "8", "--num-samples", "2"]
    boltzmann.main(arguments)
    rows = recorded()
    assert [(row["kind"], row["ranks"], row["num_threads"]) for row in rows] == [
        ("ranks", 1, 1),
        ("ranks", 2, 1),
    ]
    for name in ("m3i_fast", "ClipLoss"):
        one, two = (row["timings"][name] for row in rows)
        assert (one["num_samples"], two["num_samples"]) == (2, 2)
        assert rows[0]["efficiency"][name] == 1
        assert rows[1]["efficiency"][name] == pytest.approx(2 * one["median_ms"] / two["median_ms"])
        assert all(row["extra_peak_bytes"][name] > 0 for row in rows)
    assert rows[0]["extra_peak_bytes"]["ClipLoss"] > 3 * 256 * 256 * 4
    assert "efficiency" in capsys.readouterr().out
