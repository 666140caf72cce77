"""m3i-fast export RUN OUT --to NAME: write what a run has learnt for other libraries."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from m3i_fast.cli import refuse
from m3i_fast.durable_files import expect_folder, expect_local
from m3i_fast.flags import read_verb
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.terminal import make_console

if TYPE_CHECKING:
    from m3i_fast.inference.model import Model

console = make_console()

Target = Literal[
    "timm", "hf", "open_clip", "internimage", "onnx", "torch-export", "aoti", "safetensors"
]
Layout = Literal["classification", "detection", "huggingface"]


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write what a run has learnt for other libraries, or small for `m3i_fast.load`."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run directory, whose newest good checkpoint is taken, or one checkpoint in it."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Folder to write, or file for internimage; it must not exist."""
    to: Target
    """What reads it. timm: timm.create_model("local-dir:OUT", pretrained=True), of a ViT with
    absolute positions. hf: transformers.AutoModel.from_pretrained(OUT), of any encoder, and of its
    text encoder, or a classifier by --task. open_clip:
    open_clip.create_model_and_transforms("local-dir:OUT"), of a ViT and a causal text encoder.
    internimage: the published InternImage programs, of an InternImage. safetensors:
    m3i_fast.load(OUT), of any encoder with its heads and its moving average, without decoders and
    optimiser. Graphs of any encoder and its heads, pixels normalised inside: onnx:
    onnxruntime and others; torch-export: torch.export.load; aoti: machine code,
    torch._inductor.aoti_load_package."""
    which: Literal["trained", "ema"] = "trained"
    """Encoder: the trained one, or its moving average, which has no heads; safetensors has both."""
    data: Path | None = None
    """Data set of a run that an older version began without data.json."""
    image_only: bool = False
    """Leave the text encoder out, for hf: the class is then one of transformers where one fits."""
    task: Literal["encoders", "image-classification"] = "encoders"
    """What hf's folder does. encoders: embeds pictures, and texts where the run has captions;
    image-classification: transformers.AutoModelForImageClassification, with the run's head."""
    column: str = ""
    """Named column, of a class or of labels, that --task image-classification tells; none: the
    class."""
    license: str = ""
    """Licence of the weights as the hub names them, such as cc-by-4.0, for hf's model card."""
    layout: Layout = "classification"
    """Layout of the file for internimage. classification: .pth with the keys of the official
    models; detection: .pth with stem and stages alone, for mmdet and mmseg; huggingface:
    .safetensors."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of this machine that --to aoti compiles for."""


TAKEN_BY: dict[str, tuple[Target, ...]] = {
    "which": ("timm", "hf", "internimage", "onnx", "torch-export", "aoti"),
    "data": ("hf", "open_clip", "onnx", "torch-export", "aoti", "safetensors"),
    "image_only": ("hf",),
    "task": ("hf",),
    "column": ("hf",),
    "license": ("hf",),
    "layout": ("internimage",),
    "device": ("aoti",),
}
"""Flags that not every target takes, and which do."""


def main(argv: list[str]) -> int:
    command = read_verb(ExportCommand, "export", argv)
    expect_local(command.out, "OUT")
    expect_folder(command.out.parent, "OUT")
    if command.out.exists():
        return refuse(f"{command.out} exists already: name another")
    if refused := _misplaced(command):
        return refuse(refused)
    match command.to:
        case "timm":
            return _to_timm(command)
        case "hf":
            return _to_transformers(command)
        case "open_clip":
            return _to_open_clip(command)
        case "internimage":
            return _to_internimage(command)
        case "onnx" | "torch-export" | "aoti":
            return _to_graphs(command, command.to)
    from m3i_fast.inference.folder import save_folder

    save_folder(command.run, command.out, data=command.data)
    return _wrote(f"{command.out}: m3i_fast.load({str(command.out)!r})")


def _misplaced(command: ExportCommand) -> str:
    """Return what is wrong with a flag that the target does not take; an empty text for none."""
    defaults = {each.name: each.default for each in fields(command) if each.default is not MISSING}
    for name, targets in TAKEN_BY.items():
        if getattr(command, name) != defaults[name] and command.to not in targets:
            flag = f"--{name.replace('_', '-')}"
            known = " or ".join(filter(None, (", ".join(targets[:-1]), targets[-1])))
            return f"{flag}: expected with --to {known} alone, got --to {command.to}"
    return ""


def _load(command: ExportCommand) -> Model:
    from m3i_fast.inference.loading import has_average, load

    model = load(command.run, which=command.which, device="cpu", data=command.data)
    if command.which == "trained" and has_average(command.run):
        console.print("--which ema writes the moving average of the run's encoder", soft_wrap=True)
    return model


def _wrote(what: str) -> int:
    console.print(f"wrote {what}", soft_wrap=True, highlight=False)
    return 0


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
    if model.category is not None or len(model.columns):
        console.print("left out: heads of classes, as --to hf --task image-classification has them")
    return _wrote(
        f'{command.out}, a {name}: timm.create_model("local-dir:{command.out}", pretrained=True)'
    )


def _to_transformers(command: ExportCommand) -> int:
    if command.column and command.task == "encoders":
        return refuse("--column: expected with --task image-classification, got --task encoders")
    if command.image_only and command.task != "encoders":
        return refuse(
            f"--image-only: expected with --task encoders, got --task {command.task}, whose folder "
            "has no text encoder"
        )
    from m3i_fast.inference.huggingface import save_transformers_folder

    lines = save_transformers_folder(
        command.run,
        command.out,
        which=command.which,
        image_only=command.image_only,
        task=command.task,
        column=command.column,
        licence=command.license,
        data=command.data,
    )
    return _wrote(f"{command.out}; its README.md says how it is used:\n{lines}")


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

    encoder = _load(command).encoder
    if not isinstance(encoder, InternImage):
        return refuse(
            f"--to internimage: expected a run with an InternImage, got {type(encoder).__name__}; "
            "use --to timm"
        )
    save_internimage(encoder, command.out, command.layout)
    return _wrote(f"{command.out}, in the layout {command.layout}")


def _to_graphs(command: ExportCommand, target: Literal["onnx", "torch-export", "aoti"]) -> int:
    import torch

    from m3i_fast.inference.graphs.folder import save_graphs
    from m3i_fast.inference.graphs.formats import expect_tools
    from m3i_fast.inference.loading import load

    if command.device == "cuda" and not torch.cuda.is_available():
        return refuse("--device cuda: expected a GPU to compile for, which torch sees, got none")
    expect_tools(target, command.device)  # told before the run is read
    model = load(
        command.run,
        which=command.which,
        device=command.device,
        dtype=torch.float32,
        data=command.data,
    )
    told = f"{command.out}: {', '.join(save_graphs(model, command.out, target))}"
    if model.caption is None:
        told += "; no texts: " + (
            "the moving average has no heads"
            if command.which == "ema"
            else f"{command.run} trained no captions"
        )
    return _wrote(told)
