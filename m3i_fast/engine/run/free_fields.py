"""Fields of a config that a resume may change: paths of data, evaluation, logging, checkpoints.

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

MAY_DIFFER = {
    "log_every": "limits, back-off and rollbacks of the guard take effect at other steps",
    "num_threads": "on a CPU sums may differ in their last bits",
}
"""What may differ in a run that is resumed with another value of the field."""

_OF_RUN = (
    *("telemetry", "checkpoint_every"),
    *("evaluate_every", "evaluate_split", "evaluate_data", "evaluate_pictures"),
    *MAY_DIFFER,
)


def with_free_fields(saved: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """Return the config `saved` with what a resume as `asked` is free to change.

    With --guard.spikes rollback, checkpoints decide to which step a run returns, so that
    checkpoint_every is not free.
    """
    data = replace(saved.data, **{name: getattr(asked.data, name) for name in FREE_FIELDS})
    if _dealt(data) == _dealt(asked.data):
        data = replace(data, mixture=asked.data.mixture)
    of_run = {name: getattr(asked, name) for name in _OF_RUN}
    if saved.guard.spikes == "rollback":
        del of_run["checkpoint_every"]
    return replace(saved, data=data, **of_run)


def may_differ(saved: TrainConfig, asked: TrainConfig) -> list[str]:
    """Return a line for each free field whose change may change the run."""
    pairs = {name: (getattr(saved, name), getattr(asked, name)) for name in MAY_DIFFER}
    return [
        f"{name}: {old} != {new}: {MAY_DIFFER[name]}"
        for name, (old, new) in pairs.items()
        if old != new
    ]


def log_free_fields(saved: TrainConfig, asked: TrainConfig) -> None:
    """Log what a resume as `asked` changes of the run's free fields, and what that may change.

    Called on the first rank.
    """
    same = replace(asked, **{name: getattr(saved, name) for name in MAY_DIFFER})
    if changed := differences(saved, with_free_fields(saved, same)):
        logger.info(
            "other fields, which change nothing of the run (run != now): %s",
            "; ".join(changed),
        )
    if lines := may_differ(saved, asked):
        logger.warning("the run may differ from here on (run != now): %s", "; ".join(lines))


def _dealt(data: LoaderConfig) -> list[tuple[str, float]]:
    """Return split and weight of each data set of a mixture, wherever they lie."""
    return [(part.split, part.weight) for part in data.mixture_parts]
