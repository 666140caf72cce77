"""The backend with DALI: one graph that reads, decodes and cuts views in DALI's threads.

    rows of a batch -> m3i_read -> decoders.image -> m3i_views        operators of cuda/dali/
                                   m3i_draw_views ->

Python gives rows alone (`batch_rows`), so that order, draws and pixels are those of the backend
without DALI.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.pipelines.batch_rows import BatchRows
from m3i_fast.pipelines.graph.dali import (
    DataNode,
    Pipeline,
    expect_gpu_operators,
    fn,
    load_operators,
    pipeline_def,
    types,
)
from m3i_fast.pipelines.samples_to_views import TOKENS, MadeBatch, SampleError, SampleWork
from m3i_fast.pipelines.threads import threads_on
from m3i_fast.pipelines.torch_backend import read_sample

_NAMED = re.compile(
    r"(?:corrupt|Failed to decode sample #\d+ :) "
    r"sample (?P<id>\d+) at position (?P<position>\d+) in (?P<file>[^\n]+?)(?:: (?P<reason>.+))?$",
    re.MULTILINE,
)


class DaliBackend:
    """Makes batches by a DALI pipeline, on a GPU where the work names one."""

    def __init__(self, source: Iterator[BatchRows], work: SampleWork) -> None:
        load_operators()
        if work.device_id is not None:
            expect_gpu_operators()
        self._work = work
        self._rows: deque[BatchRows] = deque()  # given to the pipeline, and not yet returned

        def give() -> tuple[NDArray[Any], NDArray[Any]]:
            rows = next(source)
            self._rows.append(rows)
            return rows.rows, rows.paths

        self._pipeline: Pipeline | None = _graph(
            give,
            work,
            batch_size=work.batch_size,
            num_threads=work.num_threads,
            prefetch_queue_depth=work.prefetch,
            device_id=work.device_id,
            seed=0,  # nothing in the graph draws by it
        )
        with threads_on(work.cores):
            self._pipeline.build()

    def __next__(self) -> MadeBatch:
        """Return the next batch, as `Backend` says; its tensors own DALI's buffers, uncopied."""
        outputs = self._run()
        texts = None
        if self._work.caption_member != TOKENS:
            *outputs, stored = outputs
            texts = partial(_texts, stored)
        *views, params, size, token_ids, num_tokens = self._as_tensors(outputs)
        return MadeBatch(
            rows=self._rows.popleft(),
            views=tuple(views),
            params=params,
            image_size=size,
            token_ids=token_ids,
            num_tokens=num_tokens,
            texts=texts,
        )

    def close(self) -> None:
        """Stop DALI's threads."""
        self._pipeline = None

    def _run(self) -> list[Any]:
        assert self._pipeline is not None, "the backend is closed"
        device_id = self._work.device_id
        try:
            if device_id is None:
                return list(self._pipeline.run())
            return list(self._pipeline.run(torch.cuda.current_stream(device_id)))
        except RuntimeError as error:
            raise self._named(error) from error

    def _as_tensors(self, outputs: list[Any]) -> tuple[Tensor, ...]:
        device_id = self._work.device_id
        if device_id is None:
            return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
        with torch.cuda.device(device_id):
            return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)

    def _named(self, error: RuntimeError) -> RuntimeError:
        """Return an error that names the sample which stopped the pipeline, if one did.

        DALI names a sample whose pixels do not decode, not one whose header it cannot parse: then
        the samples that it was given are tried one by one, with Pillow and then by DALI itself.
        """
        found = _NAMED.search(str(error))
        if found:
            return SampleError(
                sample_id=int(found["id"]),
                position=int(found["position"]),
                file=found["file"],
                reason=found["reason"] or "corrupt picture",
            )
        for rows in self._rows:
            for index in range(len(rows.samples)):
                try:
                    read_sample(rows, index, self._work)
                except SampleError as named:
                    return named
        for rows in self._rows:
            if refused := _refused(rows, self._work):
                return refused
        return RuntimeError(f"the data pipeline stopped: {error}")


def _texts(stored: Any) -> list[bytes]:
    """Return the texts of a batch, a list of DALI's, which costs a microsecond or two each."""
    return [stored.at(i).tobytes() for i in range(len(stored))]


def _refused(rows: BatchRows, work: SampleWork) -> SampleError | None:
    """Return the first sample of a batch that DALI does not take, tried alone; None: there is none.

    Where DALI does not take another one either, it is no fault of a sample: None.
    """
    count = len(rows.samples)
    found = _first_refused(rows, range(count), work)
    if found is None:
        return None
    index, error = found
    if index == 0 and count > 1 and _first_refused(rows, range(1, 2), work):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("Error in ")), "")
    told += next((f" {line}" for line in lines if "[/" in line), "")
    return SampleError(
        sample_id=int(rows.sample_id[index]),
        position=int(rows.positions[index]),
        file=rows.path(index),
        reason=f"DALI refuses it, though Pillow decodes it: {told or lines[-1]}",
    )


def _first_refused(
    rows: BatchRows, indices: range, work: SampleWork
) -> tuple[int, RuntimeError] | None:
    """Make samples of a batch one by one; returns the first that fails, and DALI's error."""
    given = iter(indices)

    def give() -> tuple[NDArray[Any], NDArray[Any]]:
        index = next(given)
        return rows.rows[index : index + 1], rows.paths[index : index + 1]

    pipeline = _graph(
        give,
        work,
        batch_size=1,
        num_threads=1,
        prefetch_queue_depth=1,
        device_id=work.device_id,
        seed=0,
    )
    for index in indices:
        try:
            pipeline.run()
        except RuntimeError as error:
            return index, error
    return None


@pipeline_def
def _graph(give: Any, work: SampleWork) -> tuple[DataNode, ...]:
    """Build the graph: views, parameters, size, token ids and their number, texts if there are."""
    on_gpu = work.device_id is not None
    rows, paths = fn.external_source(source=give, num_outputs=2, batch=True)
    encoded, token_ids, num_tokens, *others = fn.m3i_read(
        rows,
        paths,
        context_length=work.tokenizer.context_length,
        vocab_size=work.tokenizer.vocab_size,
        max_pixels=work.max_pixels,
        caption_member=work.caption_member,
        alternates=work.alternates,
    )
    pictures = [encoded, others.pop()] if work.alternates else [encoded]
    sizes = [fn.peek_image_shape(picture)[:2] for picture in pictures]
    params = fn.m3i_draw_views(
        rows,
        *sizes,
        key=work.seed,
        centre=work.centre,
        distribution=[float(number).hex() for view in work.views for number in view.distribution],
    )
    load = {} if work.hw_decoder_load is None else {"hw_decoder_load": work.hw_decoder_load}
    images = [
        fn.decoders.image(
            picture,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
            **load,
        )
        for picture in pictures
    ]
    views = fn.m3i_views(
        params,
        *images,
        geometry=[number for view in work.views for number in view.geometry()],
    )
    views = views if isinstance(views, (list, tuple)) else [views]
    return (*views, params, sizes[0], token_ids, num_tokens, *others)
