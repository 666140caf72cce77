"""Efficiency of a run and telemetry of its first rank's node, as values of its logged rows."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.costs.gpus import Card, card_of
from m3i_fast.costs.packed_pictures import PackedPictures
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.run.mfu import efficiency, joule_per_image
from m3i_fast.observe.telemetry.sampler import TelemetrySampler, cuda_devices

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogInterval:
    """The steps between two logged rows."""

    begin_s: float
    """Start and end are seconds of time.monotonic()."""
    end_s: float
    left_out: tuple[tuple[float, float], ...] = ()
    """Start and end of each evaluation within it."""
    num_images: float
    """Number of images of all ranks."""
    progress: float
    """Progress of the run, 0 to 1."""
    pictures: PackedPictures | None = None
    """This rank's views, where they are of any shape."""

    @property
    def seconds_of_steps(self) -> float:
        """Return its length without what is left out."""
        return self.end_s - self.begin_s - sum(end - begin for begin, end in self.left_out)


class RunTelemetry:
    """Samples the first rank's node from `start` to `stop`; `values` summarises an interval."""

    def __init__(
        self,
        cfg: TrainConfig,
        world: World,
        arithmetic: Arithmetic,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: seconds, of the samples and of the intervals."""
        self._cfg, self._world, self._arithmetic, self._clock = cfg, world, arithmetic, clock
        self._card = _find_card(world)
        self._knows_flops = True
        self._sampler: TelemetrySampler | None = None

    def start(self) -> None:
        """Start sampling, unless it runs already or telemetry.hz is 0."""
        if self._cfg.telemetry.hz and self._sampler is None and self._world.is_main:
            num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            gpus = cuda_devices(num_ranks) if self._world.device.type == "cuda" else []
            self._sampler = TelemetrySampler(
                self._cfg.telemetry.hz, devices=gpus, clock=self._clock
            )
            self._sampler.__enter__()

    def stop(self) -> None:
        """Stop sampling."""
        if self._sampler is not None:
            self._sampler.__exit__(None, None, None)
            self._sampler = None

    def values(self, interval: LogInterval) -> dict[str, float]:
        """Return the values of an interval by `group/name_unit`; unknown ones are left out."""
        values = self._efficiency(interval, interval.seconds_of_steps)
        if self._sampler is None:
            return values
        summary = self._sampler.summary(interval.begin_s, interval.end_s)
        # Each rank has one GPU and an equal number of images.
        num_images = interval.num_images / self._world.size * len(summary["gpus"])
        joules = joule_per_image(self._energy_of_steps(interval, summary["energy_j"]), num_images)
        if joules is not None:
            values["efficiency/joule_per_image"] = joules
        return values | flatten(summary, interval.end_s - interval.begin_s)

    def _energy_of_steps(self, interval: LogInterval, energy_j: float | None) -> float | None:
        """Return the energy without that of what is left out; None where a part is not known."""
        assert self._sampler is not None
        for begin, end in interval.left_out:
            meanwhile = self._sampler.summary(begin, end)["energy_j"]
            if energy_j is None or meanwhile is None:
                return None
            energy_j -= meanwhile
        return energy_j

    def _efficiency(self, interval: LogInterval, seconds: float) -> dict[str, float]:
        if not self._knows_flops:
            return {}
        pictures = interval.pictures
        own = pictures.num_samples if pictures else interval.num_images / self._world.size
        try:
            rates = efficiency(
                self._cfg,
                self._arithmetic,
                images_s=own / seconds,
                card=self._card,
                num_ranks=self._world.size,
                progress=interval.progress,
                pictures=pictures,
            )
        except (ValueError, FileNotFoundError) as error:  # a teacher of unknown size
            logger.warning("efficiency: not logged: %s", error)
            self._knows_flops = False
            return {}
        # In FP8 products can exceed the BF16 peak, so the name says which peak is meant.
        suffix = "_of_bf16_peak" if self._arithmetic.is_fp8 else ""
        values = {
            "tflop_s": rates.model_flop_s / 1e12,
            f"mfu{suffix}": rates.mfu,
            f"hfu{suffix}": rates.hfu,
            "mfu_weighted": rates.mfu_weighted,
        }
        return {f"efficiency/{k}": v for k, v in values.items() if v is not None}


def _find_card(world: World) -> Card | None:
    if world.device.type != "cuda":
        return None
    card = card_of(torch.cuda.get_device_name(world.device))
    if isinstance(card, Card):
        return card
    if world.is_main:
        logger.warning("efficiency: no MFU: no published peak: %s", card)
    return None


def flatten(summary: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Flatten a telemetry summary over so many seconds to `gpu/name_unit` and `host/name_unit`.

    Gauges are means over time and cards, but the temperature is that of the hottest card; counters
    become rates.
    """
    flat: dict[str, float] = {}
    for group, devices in (("gpu", summary["gpus"]), ("host", [summary["host"]])):
        for name in dict.fromkeys(name for device in devices for name in device):
            values = [device[name] for device in devices if name in device]
            if isinstance(values[0], dict):
                means = [value["mean"] for value in values]
                mean = max(means) if name == "temperature_c" else sum(means) / len(means)
                unit, scale = _unit(name)
                flat[f"{group}/{unit}"] = mean * scale
            elif name.endswith("_bytes"):  # a counter's growth
                rate = sum(values) / len(values) / seconds
                flat[f"{group}/{name.removesuffix('_bytes')}_gib_s"] = rate / 2**30
            elif name.startswith(("ecc_", "remap")):
                flat[f"{group}/{name}"] = sum(values)
    if summary["gpus"] and summary["num_samples"]:
        flat["gpu/throttled"] = float(summary["throttled"])
    return flat


def _unit(name: str) -> tuple[str, float]:
    """Return the name in the logged unit and its factor: bytes are logged in GiB."""
    for unit, longer in (("_bytes", "_gib"), ("_byte_s", "_gib_s")):
        if name.endswith(unit):
            return name.removesuffix(unit) + longer, 2.0**-30
    return name, 1.0
