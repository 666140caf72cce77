"""The files of exported graphs: ONNX, torch.export's, and packages of AOTInductor.

Each writer takes a captured program and writes one file. What they need is named by `expect_tools`
before a run is read.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch.export import ExportedProgram

from m3i_fast.durable_files import write_durably
from m3i_fast.inference.graphs.modules import Graph
from m3i_fast.ops.grid_sample import DECOMPOSITIONS
from m3i_fast.pipelines.optional_imports import require

Target = Literal["onnx", "torch-export", "aoti"]
SUFFIX: dict[Target, str] = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}

OPSET = 18
"""Of ONNX's standard operators; the first that torch's translations are written for."""
ONE_FILE = 1 << 30
"""Bytes of weights that one ONNX file holds: protobuf reads no file of 2 GiB."""


def expect_tools(target: Target, device: str = "cpu") -> None:
    """Raise ImportError, or ValueError, naming what is missing here to write for a target."""
    if target == "onnx":
        for library in ("onnx", "onnxscript"):
            require(library, extra="onnx")
    if target == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                "--to aoti: expected a C++ compiler, g++ or the one that CXX names, got none; "
                "--to torch-export needs none"
            ) from error
        if device == "cuda":
            _expect_cuda_headers()


def _expect_cuda_headers() -> None:
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not Path(CUDA_HOME, "include", "cuda.h").is_file():
        raise ValueError(
            "--to aoti --device cuda: expected CUDA's headers, cuda.h in $CUDA_HOME/include, got "
            f"CUDA_HOME {CUDA_HOME or 'that is not set'}: set it to a toolkit, of pip's packages "
            "site-packages/nvidia/cu13"
        )


def write_graph(program: ExportedProgram, graph: Graph, path: Path, target: Target) -> None:
    """Write a captured graph for a target to a file, whose name ends in its SUFFIX."""
    match target:
        case "onnx":
            write_onnx(program, graph, path)
        case "torch-export":
            buffer = io.BytesIO()  # torch's own writer ends the process on a full disk
            torch.export.save(program, buffer)
            write_durably(path, [buffer.getbuffer()])
        case "aoti":
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def write_onnx(
    program: ExportedProgram, graph: Graph, path: Path, *, one_file: int = ONE_FILE
) -> None:
    """Write a graph of ONNX's standard operators, with inputs and outputs by name, and check it.

    Weights of more than `one_file` bytes in all go to a file beside it, PATH.data.
    """
    onnx = require("onnx", extra="onnx")
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    with _without_details():
        exported = torch.onnx.export(
            program.run_decompositions(DECOMPOSITIONS),
            dynamo=True,
            opset_version=OPSET,
            input_names=graph.input_names,
            output_names=graph.output_names,
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
        assert exported is not None
        exported.save(path, external_data=size > one_file)
    onnx.checker.check_model(str(path), full_check=True)


@contextmanager
def _without_details() -> Iterator[None]:
    """Keep what the translation logs of every node, and torch's own deprecations, to itself."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
