"""m3i-fast export RUN OUT --to timm: write what a run has learnt for other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from m3i_fast.cli import refuse
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.terminal import make_console

console = make_console()


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write what a run has learnt as a folder: for timm, or small for `m3i_fast.load`."""

    run: tyro.conf.Positional[Path]
    """Run directory, whose newest good checkpoint is taken, or one checkpoint in it."""
    out: tyro.conf.Positional[Path]
    """Folder to write; it must not exist."""
    to: Literal["timm", "hf", "safetensors"]
    """What reads the folder. timm: timm.create_model("local-dir:OUT", pretrained=True), of a ViT
    with absolute positions; hf: transformers.AutoModel.from_pretrained(OUT), of any encoder, and of
    its text encoder; safetensors: m3i_fast.load(OUT), of any encoder with its heads and its moving
    average, without decoders and optimiser."""
    which: Literal["trained", "ema"] = "trained"
    """Encoder for timm and hf: the trained one, or its moving average, which comes without text."""
    image_only: bool = False
    """Leave the text encoder out, for hf: the class is then one of transformers where one fits."""
    license: str = ""
    """Licence of the weights as the hub names them, such as cc-by-4.0, for hf's model card."""
    data: Path | None = None
    """Data set of a run that an older version began without data.json, for hf and safetensors."""


def main(argv: list[str]) -> int:
    command = tyro.cli(ExportCommand, prog="m3i-fast export", args=argv)
    if command.out.exists():
        return refuse(f"{command.out} exists already: name another folder")
    if command.to != "hf" and (command.image_only or command.license):
        return refuse("--image-only, --license: expected with --to hf alone")
    if command.to == "hf":
        return _to_transformers(command)
    if command.to == "timm":
        return _to_timm(command)
    if command.which != "trained":
        return refuse("--which: expected with --to timm or hf; load(OUT, which='ema') has both")
    from m3i_fast.inference.folder import save_folder

    save_folder(command.run, command.out, data=command.data)
    console.print(
        f"wrote {command.out}: m3i_fast.load({str(command.out)!r})", soft_wrap=True, highlight=False
    )
    return 0


def _to_transformers(command: ExportCommand) -> int:
    from m3i_fast.inference.huggingface import save_transformers_folder

    lines = save_transformers_folder(
        command.run,
        command.out,
        which=command.which,
        image_only=command.image_only,
        licence=command.license,
        data=command.data,
    )
    console.print(f"wrote {command.out}; its README.md says how it is used:", soft_wrap=True)
    console.print(lines, soft_wrap=True, highlight=False, markup=False)
    return 0


def _to_timm(command: ExportCommand) -> int:
    if command.data is not None:
        return refuse("--data: expected with --to hf or safetensors; timm's folder has no classes")
    require("timm", extra="timm")  # told before the run is read
    from m3i_fast.export.timm_folder import save_timm_folder
    from m3i_fast.inference.loading import load
    from m3i_fast.models.transformer.vit import ViT

    model = load(command.run, which=command.which, device="cpu")
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
    console.print(
        f'wrote {command.out}, a {name}: timm.create_model("local-dir:{command.out}", '
        "pretrained=True)",
        soft_wrap=True,
        highlight=False,
    )
    return 0
