"""The backend with DALI: one graph that reads, decodes and cuts views in DALI's threads.

    rows of a batch -> m3i_read -> decoders.image -> m3i_views        operators of cuda/dali/
                                   m3i_draw_views ->

Views of any size are cut by m3i_patches in the place of m3i_views, to the grids of m3i_view_grids.

Python gives rows alone (`batch_rows`), so that order, draws and pixels are those of the backend
without DALI.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import DLDeviceType

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

        def give() -> tuple[NDArray[Any], ...]:
            rows = next(source)
            self._rows.append(rows)
            return _given(rows, work)

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
        """Return the next batch, as `Backend` says; its views own DALI's buffers, uncopied."""
        outputs = self._run()
        texts = None
        if self._work.caption_member != TOKENS:
            *outputs, stored = outputs
            texts = partial(_texts, stored)
        num_views = len(self._work.views)
        views, grids = outputs[:num_views], None
        params, size, token_ids, num_tokens, *others = self._as_tensors(outputs[num_views:])
        if self._work.sides is not None:
            (grids,) = others
        return MadeBatch(
            rows=self._rows.popleft(),
            views=self._as_tensors(views, grids),
            params=params,
            image_size=size,
            token_ids=token_ids,
            num_tokens=num_tokens,
            texts=texts,
            grids=grids,
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

    def _as_tensors(self, outputs: list[Any], grids: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return outputs of one shape a sample; with grids those of patches, behind each other."""
        device_id, sides = self._work.device_id, self._work.sides
        if grids is None or sides is None:
            dense = [output.as_tensor() for output in outputs]
        else:
            size = 3 * sides.patch_size**2
            lengths = grids.prod(2).sum(0).tolist()
            dense = [
                output.as_reshaped_tensor([length, size])
                for output, length in zip(outputs, lengths, strict=True)
            ]
        with nullcontext() if device_id is None else torch.cuda.device(device_id):
            return tuple(map(as_tensor, dense))

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


def as_tensor(dense: Any) -> Tensor:
    """Return a tensor of DALI's, of the same memory unless that is pinned.

    In a pipeline on a GPU, DALI pins what the host makes for an operator there: a few numbers a
    sample. PyTorch takes no DLPack of pinned memory, and does not keep memory that it has not
    pinned itself from being used again before a copy to the GPU is done.
    """
    device_type, _ = dense.__dlpack_device__()
    if device_type == DLDeviceType.kDLCUDAHost:
        return torch.from_numpy(np.array(dense))
    return torch.from_dlpack(dense)


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

    def give() -> tuple[NDArray[Any], ...]:
        index = next(given)
        return tuple(of_all[index : index + 1] for of_all in _given(rows, work))

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


def _given(rows: BatchRows, work: SampleWork) -> tuple[NDArray[Any], ...]:
    """Return what the graph is given of a batch: rows, paths and, of any size, most patches."""
    most = () if work.sides is None else (work.sides.most_tokens(rows.positions),)
    return rows.rows, rows.paths, *most


@pipeline_def
def _graph(give: Any, work: SampleWork) -> tuple[DataNode, ...]:
    """Build the graph: views, parameters, size, token ids and their number.

    Then grids of views of any size, and texts, if there are.
    """
    on_gpu, num_given = work.device_id is not None, 2 if work.sides is None else 3
    rows, paths, *most = fn.external_source(source=give, num_outputs=num_given, batch=True)
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
    if work.sides is None:
        grids = []
        geometry = [number for view in work.views for number in view.geometry()]
        views = fn.m3i_views(params, *images, geometry=geometry)
    else:
        grids = [fn.m3i_view_grids(params, *most)]
        filters = [number for view in work.views for number in view.filter]
        patch_size = work.sides.patch_size
        views = fn.m3i_patches(params, *grids, *images, filters=filters, patch_size=patch_size)
    views = views if isinstance(views, (list, tuple)) else [views]
    return (*views, params, sizes[0], token_ids, num_tokens, *grids, *others)
