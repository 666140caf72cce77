"""What a row of the methods' benchmark says of its run is what the run logged."""

from dataclasses import replace

import numpy as np
import pytest

from m3i_fast.benchmarks.methods.run import pack, training_figures, unpack
from m3i_fast.recipes import demo


def test_figures_of_a_training_are_those_of_its_logged_steps() -> None:
    cfg = replace(demo(), num_steps=100)  # 4 steps of warm-up
    rank = {20: 1.0, 40: 1.0, 60: 1.0, 80: 9.0, 100: 9.0}  # healthy from 1.5 up
    cosine = {20: 1.0, 40: 1.0, 60: 0.5, 80: 1.0, 100: 1.0}  # never three times in a row
    rows = [
        {
            "step": step,
            "loss/total": 3.0 - step / 100,
            "throughput/img_s": 320.0 if step <= 40 else 160.0,
            "monitor/target_rank": rank[step],
            "monitor/intra_cosine": cosine[step],
        }
        for step in rank
    ]
    figures = training_figures(cfg, rows)
    assert figures["train_seconds"] == pytest.approx(40 * 32 / 320 + 60 * 32 / 160)
    assert figures["final_loss"] == 2.0
    assert figures["collapsed"] == ["monitor/target_rank"]


def test_hits_are_packed_and_unpacked() -> None:
    assert pack([0.0, 1.0, 1.0]) == "011" and unpack("011") == [0.0, 1.0, 1.0]
    thirds = [1 / 3, 1.0, 0.0, 2 / 3]
    assert pack(thirds) == "3:1302" and unpack("3:1302") == thirds
    assert pack([0.125, -0.5]) == [0.125, -0.5] and unpack([0.125, -0.5]) == [0.125, -0.5]
    assert pack([0.12345]) == [0.1235]
    assert unpack(pack([])) == []


def test_items_that_were_not_asked_about_are_packed() -> None:
    for hits in ([1.0, np.nan, 0.0], [1 / 3, np.nan, 2 / 3], [0.1234, np.nan, 0.5]):
        packed = pack(hits)
        assert np.array_equal(unpack(packed), hits, equal_nan=True) and "NaN" not in str(packed)
    assert pack([1.0, np.nan, 0.0]) == "1-0" and pack([1 / 3, np.nan]) == "3:1-"
    assert pack([0.1234, np.nan]) == [0.1234, None]
