"""`PackedLoader`, the training iterator over views of any size and aspect, with exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.pipelines.loader import BatchesOfRun
from m3i_fast.pipelines.make_batch import expect_allowed, fields_beside_views
from m3i_fast.pipelines.opened.open_data import OpenSplit, in_object_storage
from m3i_fast.pipelines.sample_order.token_budget import TokenBudget, ViewSides
from m3i_fast.pipelines.samples_to_views import MadeBatch, PatchSides


class PackedLoader(BatchesOfRun[PackedBatch]):
    """An endless iterator over training batches of one rank, of views of any size and aspect.

    A batch has as many samples as fit into a budget of patches (`TokenBudget`): which ones is a
    function of the seed and of the position at which the step begins, the same on any number of
    ranks and after any resume. Each view is cut to a grid of patches of the aspect of its box,
    which is drawn as for `Loader`: wider `ratio`s of the views make for other aspects, and where
    `scale` is (1, 1) a picture whose aspect is within them is taken whole. `cfg.batch_size` and the
    views' sizes are not read. Where data lie in object storage, samples are dealt to the batches of
    a step one by one, so that each lane of a bucket is of one rank.

    Its batches are equal for both backends on a CPU; with a `device_id` that GPU decodes, cuts and
    holds them.

    Raises as `Loader`.
    """

    def __init__(
        self,
        cfg: LoaderConfig,
        *,
        token_budget: int,
        patch_size: int,
        global_sides: tuple[int, int],
        local_sides: tuple[int, int] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        accumulate: int = 1,
        images_per_input: int = 1,
        device_id: int | None = None,
        skipped_file: Path | None = None,
        opened: OpenSplit | None = None,
    ) -> None:
        """token_budget: most patches of a batch, of all views of all of its samples.

        patch_size: pixels along a side of a patch. global_sides, local_sides: least and most
        patches along a side of the square of which a view has the area; local_sides where the
        config has local views. images_per_input: of which a batch has a multiple. device_id,
        skipped_file, opened: as of `Loader`.
        """
        if patch_size < 1:
            raise ValueError(f"patch_size: expected at least 1, got {patch_size}")
        if (local_sides is None) != (cfg.local_views is None):
            raise ValueError(
                f"local_sides: expected {'none' if cfg.local_views is None else 'two numbers'}, as "
                f"many as data.local_views asks for, got {local_sides}"
            )
        sides = [ViewSides(*global_sides)] * cfg.global_views.count
        if cfg.local_views is not None and local_sides is not None:
            sides += [ViewSides(*local_sides)] * cfg.local_views.count
        self._budget = TokenBudget(
            tokens=token_budget,
            views=tuple(sides),
            seed=cfg.seed,
            num_ranks=num_ranks,
            accumulate=accumulate,
            images_per_input=images_per_input,
            dealt=in_object_storage(cfg) if opened is None else bool(opened.lanes),
        )
        self._patch_size = patch_size
        super().__init__(
            replace(cfg, batch_size=self._budget.mean_samples),  # what is fetched and kept
            self._budget,
            rank=rank,
            num_ranks=num_ranks,
            device_id=device_id,
            skipped_file=skipped_file,
            opened=opened,
        )

    @property
    def _sides(self) -> PatchSides:
        return PatchSides(self._patch_size, self._budget.most_tokens)

    def _to_batch(self, made: MadeBatch) -> PackedBatch:
        expect_allowed(made.rows, self._open)
        assert made.grids is not None
        batch = PackedBatch(
            patches=made.views,
            grids=made.grids,
            num_global=self.cfg.global_views.count,
            step_counts=self._budget.counts(self._start),
            **fields_beside_views(made, self._open, self.cfg),
        )
        return batch if self._device_id is None else batch.to(f"cuda:{self._device_id}")
