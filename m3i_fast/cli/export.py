"""m3i-fast export RUN OUT --to timm: write what a run has learnt for other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from m3i_fast.cli import refuse
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.terminal import make_console

if TYPE_CHECKING:
    from m3i_fast.inference.model import Model

console = make_console()

Layout = Literal["classification", "detection", "huggingface"]


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write what a run has learnt for other libraries, or small for `m3i_fast.load`."""

    run: tyro.conf.Positional[Path]
    """Run directory, whose newest good checkpoint is taken, or one checkpoint in it."""
    out: tyro.conf.Positional[Path]
    """Folder to write, or file for internimage; it must not exist."""
    to: Literal["timm", "safetensors", "open_clip", "internimage"]
    """What reads it. timm: timm.create_model("local-dir:OUT", pretrained=True), of a ViT with
    absolute positions; safetensors: m3i_fast.load(OUT), of any encoder with its heads and its
    moving average, without decoders and optimiser; open_clip:
    open_clip.create_model_and_transforms("local-dir:OUT"), of a ViT and a causal text encoder;
    internimage: the published InternImage programs, of an InternImage."""
    which: Literal["trained", "ema"] = "trained"
    """Encoder for timm and internimage: the trained one, or its moving average."""
    data: Path | None = None
    """Data set of a run that an older version began without data.json, for --to safetensors and
    open_clip."""
    layout: Layout | None = None
    """Layout of the file for internimage, by default classification. classification: .pth with
    the keys of the official models; detection: .pth with stem and stages alone, for mmdet and
    mmseg; huggingface: .safetensors."""


def main(argv: list[str]) -> int:
    command = tyro.cli(ExportCommand, prog="m3i-fast export", args=argv)
    if command.out.exists():
        return refuse(f"{command.out} exists already: name another")
    if refused := _misplaced(command):
        return refuse(refused)
    match command.to:
        case "timm":
            return _to_timm(command)
        case "open_clip":
            return _to_open_clip(command)
        case "internimage":
            return _to_internimage(command)
    from m3i_fast.inference.folder import save_folder

    save_folder(command.run, command.out, data=command.data)
    return _wrote(f"{command.out}: m3i_fast.load({str(command.out)!r})")


def _misplaced(command: ExportCommand) -> str:
    """Return what is wrong with a flag of another target; an empty text for none."""
    if command.which != "trained" and command.to not in ("timm", "internimage"):
        return (
            "--which: expected with --to timm and internimage alone; heads have no average, and "
            "load(OUT, which='ema') of --to safetensors has both encoders"
        )
    if command.data is not None and command.to not in ("safetensors", "open_clip"):
        return (
            "--data: expected with --to safetensors and open_clip alone; the others have no classes"
        )
    if command.layout is not None and command.to != "internimage":
        return "--layout: expected with --to internimage alone"
    return ""


def _load(command: ExportCommand) -> Model:
    from m3i_fast.inference.loading import load

    return load(command.run, which=command.which, device="cpu", data=command.data)


def _wrote(what: str) -> int:
    console.print(f"wrote {what}", soft_wrap=True, highlight=False)
    return 0


def _to_open_clip(command: ExportCommand) -> int:
    require("open_clip", extra="shards")  # told before the run is read
    from m3i_fast.inference.open_clip_folder import save_open_clip_folder

    model = _load(command)
    tower = save_open_clip_folder(model, command.out)
    needs = "" if model.tokenizer.num_merges is None else " (its tokenizer needs transformers)"
    return _wrote(
        f"{command.out}, whose image tower is {tower}: "
        f'open_clip.create_model_and_transforms("local-dir:{command.out}"), '
        f'open_clip.get_tokenizer("local-dir:{command.out}"){needs}'
    )


def _to_internimage(command: ExportCommand) -> int:
    from m3i_fast.export.internimage import save_internimage
    from m3i_fast.models.internimage.model import InternImage

    layout = command.layout or "classification"
    encoder = _load(command).encoder
    if not isinstance(encoder, InternImage):
        return refuse(
            f"--to internimage: expected a run with an InternImage, got {type(encoder).__name__}; "
            "use --to timm"
        )
    save_internimage(encoder, command.out, layout)
    return _wrote(f"{command.out}, in the layout {layout}")


def _to_timm(command: ExportCommand) -> int:
    require("timm", extra="timm")  # told before the run is read
    from m3i_fast.export.timm_folder import save_timm_folder
    from m3i_fast.models.transformer.vit import ViT

    model = _load(command)
    if not isinstance(model.encoder, ViT):
        return refuse(f"--to timm: expected a run with a ViT, got {type(model.encoder).__name__}")
    made = model.transform.preprocessing
    name = save_timm_folder(
        model.encoder,
        command.out,
        mean=made.mean,
        std=made.std,
        interpolation=made.interpolation,
    )
    return _wrote(
        f'{command.out}, a {name}: timm.create_model("local-dir:{command.out}", pretrained=True)'
    )
