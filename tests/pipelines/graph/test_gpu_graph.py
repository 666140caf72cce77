"""The graph of a GPU, as far as it goes without one: it is defined, and not built."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.graph.reader import Source, evaluation_graph, training_graph
from m3i_fast.pipelines.loader import Loader

SOURCE = Source(
    paths=("a.tar",),
    index_paths=("a.idx",),
    shard_id=0,
    num_shards=1,
    context_length=8,
    max_captions=1,
    max_alternates=0,
    on_gpu=True,
    shuffle=None,
)


def test_outputs_stay_ours_for_as_long_as_they_are_held() -> None:
    """DALI keeps a buffer that DLPack handed out under its dynamic executor alone; under any other
    one it writes the next batches into it (the documentation of TensorGPU.__dlpack__)."""
    options = {"batch_size": 2, "num_threads": 1, "device_id": 1, "prefetch_queue_depth": 3}
    training = training_graph(SOURCE, ViewConfig(size=16), None, **options)
    evaluation = evaluation_graph(SOURCE, 16, **options)
    for pipeline in (training, evaluation):
        assert pipeline.exec_dynamic and pipeline.exec_pipelined
        assert pipeline.device_id == 1
        assert pipeline.prefetch_queue_depth == 3


@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_loader_of_a_gpu_defines_it_on_that_gpu(dataset: Path, prefetch: int) -> None:
    cfg = LoaderConfig(path=dataset, batch_size=4, prefetch=prefetch)
    pipeline = Loader(cfg, device_id=2)._build(None)
    assert pipeline.exec_dynamic and pipeline.device_id == 2
    assert pipeline.prefetch_queue_depth == prefetch
