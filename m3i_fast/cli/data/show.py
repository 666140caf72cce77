"""m3i-fast data show: a page of what is in a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from m3i_fast.cli import console
from m3i_fast.config.data import LoaderConfig
from m3i_fast.terminal import progress_bar


@dataclass(frozen=True, kw_only=True)
class Show:
    """Show what is in a data set, on one page.

    Pictures with captions, classes and the views that training cuts of them, histograms, near
    duplicates, and what packing refused.
    """

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DATASET")]]
    """Dataset directory, or its URL in object storage."""
    num: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    """Pictures shown, in the order of a run's first epoch over a folder, also of a bucket."""
    out: Path = Path("page.html")
    """Page to write; everything is in this one file."""
    split: str = "train"
    """Split whose pictures are shown and counted."""
    recipe: str = "vit_s"
    """Recipe whose views are cut."""
    config: Path | None = None
    """A run's config.json, whose views are cut instead of the recipe's."""
    counted: int = 10_000
    """Pictures of each split, from all over it (of a bucket its first), that histograms and near
    duplicates are of."""
    seed: int = 0
    """Seed of order and views, data.seed of a run."""

    def run(self) -> None:
        for name in ("num", "counted"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        from m3i_fast.report.data.gather import gather
        from m3i_fast.report.data.page import write_data_page

        views_of, cfg = self._views()
        cfg = replace(
            cfg,
            path=self.path,
            split=self.split,
            mixture=(),
            seed=self.seed,
            num_threads=min(len(os.sched_getaffinity(0)), 16),
            hw_decoder_load=None,
        )
        with progress_bar("reading pictures", None, console=console) as update:
            page = gather(
                cfg,
                num_shown=self.num,
                num_counted=self.counted,
                views_of=views_of,
                tell=lambda done, total: update(completed=done, total=total),
            )
        write_data_page(page, self.out)
        console.print(
            f"wrote {self.out}: {len(page.samples)} of {page.num_samples:,} pictures, "
            f"{page.num_near:,} near duplicates of other groups",
            highlight=False,
            soft_wrap=True,
        )

    def _views(self) -> tuple[str, LoaderConfig]:
        """Return what says how views are cut, and the config with them."""
        from m3i_fast.recipes import find_recipe

        choice = [self.recipe] if self.config is None else ["--config", str(self.config)]
        name, config, _ = find_recipe(choice)
        return (f"recipe {name}" if self.config is None else str(self.config)), config.data
