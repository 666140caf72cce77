"""What a run's row keeps of its log."""

from __future__ import annotations

import math

from m3i_fast.benchmarks.one_stage.train import means_by_part


def test_the_log_of_terms_is_kept_by_fifths_of_the_steps() -> None:
    rows = [{"step": n, "loss/a": float(n), "throughput/img_s": 9.0} for n in range(1, 11)]
    rows[0]["gradient/a"] = math.inf
    rows[9]["gradient/a"] = 1 / 3
    assert means_by_part(rows, 10) == {
        "loss/a": [1.5, 3.5, 5.5, 7.5, 9.5],
        "gradient/a": [None, None, None, None, 0.33333],
    }


def test_a_run_shorter_than_its_parts_is_kept() -> None:
    rows = [{"step": 1, "loss/a": 1.0}, {"step": 2, "loss/a": 2.0}]
    assert means_by_part(rows, 2) == {"loss/a": [1.0, None, 2.0, None, None]}
