"""Measuring 100,000 rows takes the memory of measuring few."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WIDTH, TEXT_WIDTH = 384, 64
MEASURE = """
import json, resource, sys
import numpy as np, torch
from m3i_fast.evaluation.rows.neighbours import classify_by_neighbours
from m3i_fast.evaluation.rows.retrieval import recall_hits
from m3i_fast.evaluation.feature_rows import FileRows
from m3i_fast.evaluation.rows.zero_shot import classify_by_prompts

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def measure(num):
    bank, text = FileRows(f"{folder}/bank.npy"), FileRows(f"{folder}/text.npy")
    rows, few = np.arange(num), np.arange(0, num, max(num // 2048, 1))[:2048]
    label = rows % 10
    knn = classify_by_neighbours(bank, rows, label, bank, few, ks=(10, 200))
    prompts = classify_by_prompts(bank, rows, torch.eye(10, bank.shape[1]), scale=1.0)
    hits = recall_hits(text, few, few, text, rows, rows)
    return [float((knn[0] == label[few]).mean()), float(hits.mean()), len(prompts.ranked)]

folder, num = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
small = measure(8192)
before = peak()
print(json.dumps([small, measure(num), before, peak()]))
"""


@pytest.mark.matrix
def test_peak_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    num = 100_000
    random = np.random.default_rng(0)
    for name, width in (("bank", WIDTH), ("text", TEXT_WIDTH)):
        np.save(tmp_path / f"{name}.npy", random.normal(size=(num, width)).astype(np.float32))
    size = (tmp_path / "bank.npy").stat().st_size / 2**20
    assert size > 140
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(num)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large, before, after = json.loads(done.stdout)
    assert large[1:] == [1.0, num] and small[1:] == [1.0, 8192]
    # Labels, numbers of rows and what is predicted take some bytes a row, features none.
    assert after - before < 40 < size / 3, (before, after)
