"""Who may import whom, as CONTRIBUTING.md draws it: arrows point down, and nothing goes round."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

from tests.shared.source_files import FILES

ANYWHERE = {
    "backward_threads",
    "config",
    "did_you_mean",
    "durable_files",
    "flags",
    "json_files",
    "keyed_draws",
    "line_files",
    "terminal",
}
MODELS = {"models", "ops"}
ENGINE = {"costs", "engine", "evaluation", "objectives", "observe", "pipelines", *MODELS}
MAY_IMPORT = {
    "": {"engine", "inference", "ops"},  # m3i_fast/__init__.py, for type checkers
    "models": {"ops"},
    "objectives": MODELS,
    "costs": {"config", "objectives", *MODELS},
    "engine": {"export", *ENGINE},
    "planning": {"config", "costs", "engine", "objectives", "pipelines", *MODELS},
    "config": set(),
    "pipelines": {"ops"},
    "recipes": {"objectives", "pipelines"},
    "evaluation": {"pipelines", *MODELS},
    "export": MODELS,
    "inference": {"export", *ENGINE},
    "measuring": {"inference", *ENGINE},
    "observe": {"_nvtx"},
    "op_registry": {"ops"},
    "doctor": {"op_registry", *ENGINE},
    "report": {"evaluation", "objectives", "observe", "pipelines"},
    "search": {"export", "inference", "report", *ENGINE},
    "profiling": {"op_registry", "report", *ENGINE},
    "benchmarks": {"export", "op_registry", "planning", "profiling", "recipes", "report", *ENGINE},
    "cli": {
        "benchmarks",
        "doctor",
        "export",
        "inference",
        "measuring",
        "planning",
        "profiling",
        "recipes",
        "report",
        "search",
        *ENGINE,
    },
}
# Copied as it is into folders for transformers, where modules know each other by relative names.
FOLDER_CODE = "m3i_fast/export/huggingface/folder_code/"
# Libraries that only these files and folders import; the doctor tries each in a child process.
DOCTOR = "m3i_fast/doctor/probes.py"
ONLY_IN = {
    "nvidia": ("pipelines/graph/", "benchmarks/loader/", DOCTOR),
    "transformer_engine": (
        "m3i_fast/models/transformer/te_",
        "m3i_fast/engine/precision/arithmetic.py",
        "m3i_fast/engine/optim/optimizers.py",
        DOCTOR,
    ),
    "apex": ("m3i_fast/engine/optim/optimizers.py",),
    "torchao": ("m3i_fast/models/transformer/float8.py", DOCTOR),
    "cupy": ("benchmarks/", "m3i_fast/evaluation/", DOCTOR),
    "cupy_backends": ("benchmarks/",),
    "pynvml": ("m3i_fast/observe/telemetry/sampler.py", DOCTOR),
    "prometheus_client": ("m3i_fast/observe/sinks/prometheus.py",),
    "wandb": ("m3i_fast/observe/sinks/trackers.py",),
    "mlflow": ("m3i_fast/observe/sinks/trackers.py",),
    "transformers": (FOLDER_CODE,),
    "torch.ops.m3i": ("m3i_fast/ops/",),
    "m3i_fast._nvtx": ("m3i_fast/observe/nvtx.py",),
}


def module_of(file: str) -> str:
    """The name that the file is imported by: pipelines/ and benchmarks/ are inside m3i_fast."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("m3i_fast") else f"m3i_fast.{name}"


MODULES = {module_of(file): file for file in FILES}


def uses(file: str) -> Iterator[tuple[str, bool]]:
    """(imported module or torch.ops.m3i, for type checking only), function bodies included."""
    tree = ast.parse(FILES[file].read_text())
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    guards = [guard for guard in guards if "TYPE_CHECKING" in ast.unparse(guard.test)]
    type_only = {node for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            is_absolute = node.level == 0 or file.startswith(FOLDER_CODE)
            assert is_absolute, f"{file}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        elif isinstance(node, ast.Attribute) and node.attr == "m3i":
            names = [ast.unparse(node)]
        yield from ((name, node in type_only) for name in names)


USES = {file: list(uses(file)) for file in sorted(FILES)}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_point_down() -> None:
    for file, used, type_only in (
        (file, *use) for file, all_used in USES.items() for use in all_used
    ):
        here = room(module_of(file))
        for library, places in ONLY_IN.items():
            if f"{used}.".startswith(f"{library}."):
                assert file.startswith(places), f"{file} uses {used}"
        if used.startswith("m3i_fast.") and not (type_only and used == "m3i_fast.pipelines.batch"):
            assert room(used) in {here, *ANYWHERE, *MAY_IMPORT.get(here, ())}, f"{file}: {used}"


def test_imports_have_no_cycle() -> None:
    graph = {
        module_of(file): {name for name, type_only in used if name in MODULES and not type_only}
        for file, used in USES.items()
    }
    TopologicalSorter(graph).prepare()


def test_a_room_of_benchmarks_imports_what_all_share_and_no_other_room() -> None:
    allowed = {
        "core": {"core", "ledger"},
        "ledger": {"ledger"},
        "one_stage": {"one_stage", "methods", "core", "ledger"},  # its arms are methods, too
        "__main__": {"subjects"},
    }
    for file, used in USES.items():
        parts = module_of(file).split(".")
        if parts[1:2] != ["benchmarks"] or len(parts) < 3:
            continue
        rooms = {name.split(".")[2] for name, _ in used if name.startswith("m3i_fast.benchmarks.")}
        assert rooms <= allowed.get(parts[2], {parts[2], "core", "ledger"}), file


@pytest.mark.parametrize("top", [f"m3i_fast.{name}" for name in sorted(MAY_IMPORT) if name])
def test_rooms_have_no_cycle(top: str) -> None:
    """A folder below `top`, or a module beside the folders, counts as one."""

    def inner(module: str) -> str:
        return module.removeprefix(f"{top}.").split(".")[0]

    graph: dict[str, set[str]] = {}
    for file, used in USES.items():
        if module_of(file).startswith(f"{top}."):
            here = inner(module_of(file))
            names = [name for name, type_only in used if not type_only]
            inside = {inner(name) for name in names if name.startswith(f"{top}.")}
            graph.setdefault(here, set()).update(inside - {here})
    TopologicalSorter(graph).prepare()
