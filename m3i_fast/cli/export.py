"""m3i-fast export RUN OUT --to NAME: write what a run has learnt for other libraries."""

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
    """Write what a run has learnt as a folder: for timm, small for `m3i_fast.load`, or compiled."""

    run: tyro.conf.Positional[Path]
    """Run directory, whose newest good checkpoint is taken, or one checkpoint in it."""
    out: tyro.conf.Positional[Path]
    """Folder to write; it must not exist."""
    to: Literal["timm", "safetensors", "onnx", "torch-export", "aoti"]
    """What reads the folder. timm: timm.create_model("local-dir:OUT", pretrained=True), of a ViT
    with absolute positions; safetensors: m3i_fast.load(OUT), of any encoder with its heads and its
    moving average, without decoders and optimiser. Graphs of any encoder and its heads, pixels
    normalised inside: onnx: onnxruntime and others; torch-export: torch.export.load; aoti: machine
    code, torch._inductor.aoti_load_package."""
    which: Literal["trained", "ema"] = "trained"
    """Encoder: the trained one, or its moving average, which has no heads; safetensors has both."""
    data: Path | None = None
    """Data set of a run that an older version began without data.json; timm needs none."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of this machine that --to aoti compiles for."""


def main(argv: list[str]) -> int:
    command = tyro.cli(ExportCommand, prog="m3i-fast export", args=argv)
    if command.out.exists():
        return refuse(f"{command.out} exists already: name another folder")
    if command.device != "cpu" and command.to != "aoti":
        return refuse("--device: expected with --to aoti alone, which compiles for one")
    if command.to == "timm":
        return _to_timm(command)
    if command.to != "safetensors":
        return _to_graphs(command, command.to)
    if command.which != "trained":
        return refuse(
            "--which: expected with other folders than safetensors; load(OUT, which='ema') has both"
        )
    from m3i_fast.inference.folder import save_folder

    save_folder(command.run, command.out, data=command.data)
    console.print(
        f"wrote {command.out}: m3i_fast.load({str(command.out)!r})", soft_wrap=True, highlight=False
    )
    return 0


def _to_graphs(command: ExportCommand, target: Literal["onnx", "torch-export", "aoti"]) -> int:
    import torch

    from m3i_fast.inference.graphs.folder import save_graphs
    from m3i_fast.inference.graphs.formats import expect_tools
    from m3i_fast.inference.loading import load

    if command.device == "cuda" and not torch.cuda.is_available():
        return refuse("--device cuda: expected a GPU to compile for, which torch sees, got none")
    expect_tools(target)  # told before the run is read
    model = load(
        command.run,
        which=command.which,
        device=command.device,
        dtype=torch.float32,
        data=command.data,
    )
    files = save_graphs(model, command.out, target)
    told = f"wrote {command.out}: {', '.join(files)}"
    if model.caption is None:
        told += "; no texts: " + (
            "the moving average has no heads"
            if command.which == "ema"
            else f"{command.run} trained no captions"
        )
    console.print(told, soft_wrap=True, highlight=False)
    return 0


def _to_timm(command: ExportCommand) -> int:
    if command.data is not None:
        return refuse("--data: expected with other folders than timm's, which has no classes")
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
