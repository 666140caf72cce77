"""The part of exports: tensors of every format that a run is exported to, operators of its graphs.

Files are never compared: their bytes depend on the versions of libraries. A package of AOTInductor
is not made, because it is compiled for minutes from the program that torch-export stores.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.recipes import demo, demo_internimage
from tests.golden.differences import of_tensor
from tests.golden.training import tiny
from tests.shared.engine.small_run import as_clip

OF_VIT = {
    "safetensors": (),
    "timm": (),
    "open_clip": (),
    "onnx": (),
    "torch-export": (),
    "hf": (),
    "hf, image only": ("--image-only",),
    "hf, classifier": ("--task", "image-classification"),
    "timm, average": ("--which", "ema"),
}
"""Formats of the run with a ViT, with further flags."""
OF_INTERNIMAGE = {
    "torch-export, InternImage": (),
    **{
        f"internimage, {layout}": ("--layout", layout)
        for layout in ("classification", "detection", "huggingface")
    },
}
"""Formats of the run with an InternImage."""


def exports() -> dict[str, Any]:
    """Return what each export of a run with a ViT, and of one with an InternImage, holds."""
    found = {}
    with TemporaryDirectory() as folder:
        vit = as_clip(tiny(demo(), num_steps=1))
        runs = {"vit": vit, "internimage": tiny(demo_internimage(), num_steps=1)}
        for name, cfg in runs.items():
            run = Path(folder) / name
            _save(replace(cfg, checkpoint_every=1), run)
            for title, flags in (OF_VIT if name == "vit" else OF_INTERNIMAGE).items():
                out = Path(folder) / f"out-{len(found)}"
                out = (
                    out.with_suffix(".safetensors" if "huggingface" in flags else ".pth")
                    if (title.startswith("internimage"))
                    else out
                )
                argv = ["export", str(run), str(out), "--to", title.partition(",")[0], *flags]
                said = io.StringIO()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    code = main(argv)
                if code:
                    raise RuntimeError(f"{' '.join(argv)}: {said.getvalue()}")
                found[title] = _content(out)
    return found


def _save(cfg: TrainConfig, run: Path) -> None:
    """Save a run whose weights are the same bits on every machine: drawn, and not trained."""
    optim = replace(cfg.optim, lr=1e-30, muon_lr=1e-30)
    trainer = Trainer(replace(cfg, optim=optim), run)
    drawn, generator = trainer.objective.state_dict(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in drawn.values():
            if tensor.is_floating_point() and tensor.dim():
                tensor.uniform_(-0.1, 0.1, generator=generator)
    before = {name: tensor.clone() for name, tensor in drawn.items()}
    trainer.train()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, drawn[name])]
    if changed:
        raise RuntimeError(f"tensors that the step changed: {changed}")


def _content(out: Path) -> dict[str, Any]:
    """Return the names of a folder's files, and what is in those with tensors or graphs."""
    if out.is_file():
        return _read(out) or {}
    files = sorted(path for path in out.rglob("*") if path.is_file())
    read = {path.relative_to(out).as_posix(): _read(path) for path in files}
    return {name: content if content else "a file" for name, content in read.items()}


def _read(file: Path) -> dict[str, Any] | None:
    match file.suffix:
        case ".safetensors":
            return _tensors(load_file(file))
        case ".bin" | ".pth":
            saved = torch.load(file, weights_only=True)
            return _tensors(saved.get("model", saved.get("state_dict", saved)))
        case ".pt2":
            program = torch.export.load(file)
            calls = (str(n.target) for n in program.graph.nodes if n.op == "call_function")
            return {"operators": _counted(calls), "tensors": _tensors(program.state_dict)}
        case ".onnx":
            graph = onnx.load(file).graph
            weights = {w.name: torch.tensor(numpy_helper.to_array(w)) for w in graph.initializer}
            operators = _counted(node.op_type for node in graph.node)
            # Constants that the translation adds have no name to rely on.
            named = {name: w for name, w in weights.items() if "." in name}
            return {"operators": operators, "tensors": _tensors(named)}
    return None


def _tensors(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: of_tensor(tensor) for name, tensor in sorted(tensors.items())}


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
