"""`PackedLoader`, the training iterator over views of any size and aspect, with exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.pipelines.loader import BatchesOfRun, expect_allowed, fields_beside_views
from m3i_fast.pipelines.open_data import OpenSplit
from m3i_fast.pipelines.sample_order.token_budget import TokenBudget, ViewSides
from m3i_fast.pipelines.samples_to_views import MadeBatch, PatchSides


class PackedLoader(BatchesOfRun[PackedBatch]):
    """An endless iterator over training batches of one rank, of views of any size and aspect.

    A batch has as many samples as fit into a budget of patches (`TokenBudget`): which ones is a
    function of the seed and of the position at which the step begins, the same on any number of
    ranks and after any resume. Each view is cut to a grid of patches of the aspect of its box,
    which is drawn as for `Loader`: wider `ratio`s of the views make for other aspects, and where
    `scale` is (1, 1) a picture whose aspect is within them is taken whole. `cfg.batch_size` and the
    views' sizes are not read.

    Raises as `Loader`, and ValueError for data in object storage, whose lanes are dealt to ranks
    sample by sample, and for the DALI backend, whose operator cuts views of one size.
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
        skipped_file: Path | None = None,
        opened: OpenSplit | None = None,
    ) -> None:
        """token_budget: most patches of a batch, of all views of all of its samples.

        patch_size: pixels along a side of a patch. global_sides, local_sides: least and most
        patches along a side of the square of which a view has the area; local_sides where the
        config has local views. skipped_file, opened: as of `Loader`.
        """
        if cfg.backend == "dali":
            raise ValueError(
                "data.backend: expected torch or auto for views of any size, got dali, whose "
                "operator cuts views of one size"
            )
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
        )
        self._patch_size = patch_size
        super().__init__(
            replace(cfg, backend="torch"),
            self._budget,
            rank=rank,
            num_ranks=num_ranks,
            device_id=None,
            skipped_file=skipped_file,
            opened=opened,
        )
        if self._open.lanes:
            self.close()
            raise ValueError(
                "data.path: expected a folder for views of any size, got object storage, whose "
                "samples are dealt to ranks by number: copy it first"
            )

    @property
    def _sides(self) -> PatchSides:
        return PatchSides(self._patch_size, self._budget.most_tokens)

    def _to_batch(self, made: MadeBatch) -> PackedBatch:
        expect_allowed(made.rows, self._open)
        assert made.grids is not None
        return PackedBatch(
            patches=made.views,
            grids=made.grids,
            num_global=self.cfg.global_views.count,
            step_counts=self._budget.counts(self._start),
            **fields_beside_views(made),
        )
