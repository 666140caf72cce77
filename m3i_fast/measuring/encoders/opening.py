"""Which encoder a text names: one of ours, timm's, open_clip's, raw pixels, or an untrained one."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from m3i_fast.measuring.encoders.encoder import Encoder, EncoderSettings
from m3i_fast.measuring.encoders.pixels import PixelEncoder

logger = logging.getLogger(__name__)

EXPECTED = (
    "a run, a checkpoint, a folder of `m3i-fast export --to safetensors`, "
    "timm:NAME_OR_FOLDER[,checkpoint=FILE], open_clip:NAME_OR_FOLDER[,checkpoint=FILE], pixels or "
    "random:RUN"
)
_OPTION = re.compile(r",(checkpoint|pretrained|which)=")
_TAKES = {"timm": {"checkpoint"}, "open_clip": {"checkpoint", "pretrained"}, "random": set()}


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Return the name of an encoder, and the options behind it."""
    name, *rest = _OPTION.split(spec)
    return name, dict(zip(rest[::2], rest[1::2], strict=True))


def open_encoder(spec: str, settings: EncoderSettings) -> Encoder:
    """Open the encoder that a text names, on the device of the settings.

    spec: as `EXPECTED` says; `RUN,which=ema` is the moving average of a run's encoder. Raises
    ValueError for an option that an encoder of this kind does not take, and as the functions that
    open it.
    """
    name, options = split_spec(spec)
    kind, _, of_kind = name.partition(":")
    if name == "pixels" and not options:
        return PixelEncoder(settings)
    takes = _TAKES.get(kind, {"which"}) if of_kind else {"which"}
    if unknown := options.keys() - takes:
        raise ValueError(f"{spec}: unknown option {sorted(unknown)[0]}; expected {EXPECTED}")
    file = Path(options["checkpoint"]) if "checkpoint" in options else None
    if kind == "timm" and of_kind:
        from m3i_fast.measuring.encoders.timm_models import open_timm

        return open_timm(spec, of_kind, file, settings)
    if kind == "open_clip" and of_kind:
        from m3i_fast.measuring.encoders.open_clip_models import open_open_clip

        return open_open_clip(
            spec,
            of_kind,
            checkpoint=file,
            pretrained=options.get("pretrained"),
            settings=settings,
        )
    from m3i_fast.inference.loading import has_average
    from m3i_fast.measuring.encoders.ours import open_run, open_untrained

    if kind == "random" and of_kind:
        return open_untrained(spec, Path(of_kind), settings)
    if not Path(name).exists():
        raise FileNotFoundError(f"MODEL: expected {EXPECTED}, got {spec}")
    if not options and has_average(name):
        logger.info("%s: %s,which=ema is the moving average of its encoder", spec, name)
    return open_run(spec, Path(name), options.get("which", "trained"), settings)
