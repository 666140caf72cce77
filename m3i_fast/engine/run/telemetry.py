"""What a run's rows tell of its efficiency, and of the node of its first rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.costs.gpus import Card, card_of
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.run.mfu import efficiency, joule_per_image
from m3i_fast.observe.telemetry.sampler import Telemetry, cuda_devices

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Steps between two logged rows."""

    begin_s: float
    """Of time.monotonic(), as end_s."""
    end_s: float
    num_images: float
    """Of all ranks."""
    progress: float
    """Of the run, 0 to 1."""


class RunTelemetry:
    """Of the first rank: samples from `start` to `stop`, and `values` of an interval between."""

    def __init__(self, cfg: TrainConfig, world: World, arithmetic: Arithmetic) -> None:
        self._cfg, self._world, self._arithmetic = cfg, world, arithmetic
        self._card = _find_card(world)
        self._counts = True  # the run's FLOPs are known
        self._sampler: Telemetry | None = None

    def start(self) -> None:
        """Nothing where it samples already."""
        if self._cfg.telemetry.hz and self._sampler is None and self._world.is_main:
            num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            gpus = cuda_devices(num_ranks) if self._world.device.type == "cuda" else []
            self._sampler = Telemetry(self._cfg.telemetry.hz, devices=gpus)
            self._sampler.__enter__()

    def stop(self) -> None:
        if self._sampler is not None:
            self._sampler.__exit__(None, None, None)
            self._sampler = None

    def values(self, interval: Interval) -> dict[str, float]:
        """By `group/name_unit`; what is not known is missing."""
        seconds = interval.end_s - interval.begin_s
        found = self._efficiency(interval, seconds)
        if self._sampler is None:
            return found
        told = self._sampler.summary(interval.begin_s, interval.end_s)
        # One rank has one GPU, and all have as many images.
        num_images = interval.num_images / self._world.size * len(told["gpus"])
        joules = joule_per_image(told["energy_j"], num_images)
        if joules is not None:
            found["efficiency/joule_per_image"] = joules
        return found | flatten(told, seconds)

    def _efficiency(self, interval: Interval, seconds: float) -> dict[str, float]:
        if not self._counts:
            return {}
        try:
            told = efficiency(
                self._cfg,
                self._arithmetic,
                images_s=interval.num_images / self._world.size / seconds,
                card=self._card,
                num_ranks=self._world.size,
                progress=interval.progress,
            )
        except (ValueError, FileNotFoundError) as error:  # a teacher of unknown size
            logger.warning("efficiency: not logged: %s", error)
            self._counts = False
            return {}
        # In FP8 the peak of BF16 is not what the products could reach: its name says so.
        of = "_of_bf16_peak" if self._arithmetic.is_fp8 else ""
        found = {
            "tflop_s": told.model_flop_s / 1e12,
            f"mfu{of}": told.mfu,
            f"hfu{of}": told.hfu,
            "mfu_weighted": told.mfu_weighted,
        }
        return {f"efficiency/{k}": v for k, v in found.items() if v is not None}


def _find_card(world: World) -> Card | None:
    if world.device.type != "cuda":
        return None
    found = card_of(torch.cuda.get_device_name(world.device))
    if isinstance(found, Card):
        return found
    if world.is_main:
        logger.warning("efficiency: no MFU: no published peak: %s", found)
    return None


def flatten(summary: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """A summary of telemetry over so many seconds, as `gpu/name_unit` and `host/name_unit`.

    Means over time and cards, the hottest card's temperature, and of what is counted the rate.
    """
    found: dict[str, float] = {}
    for group, told in (("gpu", summary["gpus"]), ("host", [summary["host"]])):
        for name in dict.fromkeys(name for each in told for name in each):
            values = [each[name] for each in told if name in each]
            if isinstance(values[0], dict):
                means = [value["mean"] for value in values]
                mean = max(means) if name == "temperature_c" else sum(means) / len(means)
                unit, scale = _unit(name)
                found[f"{group}/{unit}"] = mean * scale
            elif name.endswith("_bytes"):  # counted
                rate = sum(values) / len(values) / seconds
                found[f"{group}/{name.removesuffix('_bytes')}_gib_s"] = rate / 2**30
            elif name.startswith(("ecc_", "remap")):
                found[f"{group}/{name}"] = sum(values)
    if summary["gpus"] and summary["num_samples"]:
        found["gpu/throttled"] = float(summary["throttled"])
    return found


def _unit(name: str) -> tuple[str, float]:
    """Bytes are logged in GiB."""
    for unit, longer in (("_bytes", "_gib"), ("_byte_s", "_gib_s")):
        if name.endswith(unit):
            return name.removesuffix(unit) + longer, 2.0**-30
    return name, 1.0
