"""Fields of a config that change nothing of a run: where its data lie, what is evaluated.

Whether other places hold the same data the loader's state tells, by their digest.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from m3i_fast.config import TrainConfig, differences
from m3i_fast.config.data import BUCKET_FIELDS, LoaderConfig

logger = logging.getLogger(__name__)

FREE_FIELDS = (
    "path",
    "num_threads",
    "affinity",
    "prefetch",
    "backend",
    "strict",
    "max_skipped",
    "hw_decoder_load",
    *BUCKET_FIELDS,
)
"""Fields of `LoaderConfig` that a resume is free to change; the directories of its mixture, too."""

EVALUATE_FIELDS = ("evaluate_every", "evaluate_split", "evaluate_data", "evaluate_pictures")


def with_free_fields(saved: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """Return the config `saved` with what a resume as `asked` is free to change."""
    data = replace(saved.data, **{name: getattr(asked.data, name) for name in FREE_FIELDS})
    if _dealt(data) == _dealt(asked.data):
        data = replace(data, mixture=asked.data.mixture)
    evaluate = {name: getattr(asked, name) for name in EVALUATE_FIELDS}
    return replace(saved, data=data, **evaluate)


def log_free_fields(saved: TrainConfig, asked: TrainConfig) -> None:
    """Log what a resume as `asked` changes of the run's free fields, and that it is the same run.

    Called on the first rank.
    """
    if changed := differences(saved, with_free_fields(saved, asked)):
        logger.info(
            "other fields, which change nothing of the run (run != now): %s",
            "; ".join(changed),
        )


def _dealt(data: LoaderConfig) -> list[tuple[str, float]]:
    """Return split and weight of each data set of a mixture, wherever they lie."""
    return [(part.split, part.weight) for part in data.mixture_parts]
