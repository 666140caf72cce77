"""The registry is the one list of ops, and an op more touches nine files."""

from __future__ import annotations

import ast
import filecmp
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from m3i_fast import op_registry, ops
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.subjects import SUBJECTS
from m3i_fast.op_registry import OPS, OpSpec
from m3i_fast.ops import reference

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("m3i_fast", "benchmarks", "pipelines", "scripts")
NAMES = {op.name for op in OPS}
# Beside the registry, what gives the names to users, and does so in Python's own way.
LISTS = {"m3i_fast/op_registry.py", "m3i_fast/ops/__init__.py"}


# ---- What there is -------------------------------------------------------------------------------


def test_the_registry_has_every_folder_of_kernels_and_every_public_function() -> None:
    folders = {path.parent.name for path in (ROOT / "cuda").glob("*/op_cuda.cpp")}
    public = {name for name in ops.__all__ if name.islower()}
    assert len(OPS) == len(NAMES) and folders == public == NAMES


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_all_that_belongs_to_an_op_has_its_name(op: OpSpec) -> None:
    assert callable(getattr(reference, op.name))
    assert (ROOT / "m3i_fast" / "ops" / f"{op.name}.py").is_file()
    budget = json.loads((ROOT / op.budget).read_text())
    assert all(kernel.startswith(op.name) for card in budget.values() for kernel in card)
    file, _, test = op.sanitizer.partition("::")
    assert re.fullmatch(rf"tests/ops/{op.name}/test_\w+\.py", file)
    assert f"def {test}" in (ROOT / file).read_text()
    assert SUBJECTS[op.name] == (op.module, op.measures)
    assert re.fullmatch(rf"ops\.{op.name}(\.main)?", op.module)
    assert {row["subject"] for row in ledger.read_rows(op.name)} == {op.name}
    assert op.is_right("cpu")


def literals(file: Path) -> list[set[str]]:
    """The strings that stand side by side in each tuple, list, set and dict of a file."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        parts: list[ast.expr | None] = []
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = [*node.elts]
        elif isinstance(node, ast.Dict):
            parts = [*node.keys]
        found.append({p.value for p in parts if isinstance(p, ast.Constant)} & NAMES)
    return found


def files_with_a_list(root: Path) -> set[str]:
    """Source files with three ops or more in one literal."""
    files = [path for folder in SOURCES for path in (root / folder).rglob("*.py")]
    assert files
    return {
        path.relative_to(root).as_posix()
        for path in files
        if any(len(names) >= 3 for names in literals(path))
    }


def test_nobody_else_lists_the_ops(tmp_path: Path) -> None:
    assert files_with_a_list(ROOT) <= LISTS
    planted = tmp_path / "scripts" / "planted.py"
    planted.parent.mkdir()
    for text in ("{'dcnv3': 1, 'gaussian': 2, 'mask_mix': 3}", "('dcnv3', 'gaussian', 'mask_mix')"):
        planted.write_text(text)
        assert files_with_a_list(tmp_path) == {"scripts/planted.py"}


# ---- One more ------------------------------------------------------------------------------------

# Files of the toy op. Those of its folder in cuda/ count as one.
NEW = {
    "cuda/scale/cpu/op_cpu.cpp": """\
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace {
torch::stable::Tensor scale_cpu(const torch::stable::Tensor& x, double factor) {
  torch::stable::Tensor y = torch::stable::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  for (int64_t i = 0; i < x.numel(); ++i) to[i] = from[i] * static_cast<float>(factor);
  return y;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(m3i, CPU, library) { library.impl("scale", TORCH_BOX(&scale_cpu)); }
""",
    "m3i_fast/ops/scale.py": '''\
"""Multiply by a number."""

import torch
from torch import Tensor

from m3i_fast.ops.library import m3i


@torch.library.register_fake("m3i::scale")
def _fake(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def scale(x: Tensor, factor: float) -> Tensor:
    """Return `factor` times x."""
    return m3i.scale(x, factor)
''',
    "tests/ops/scale/test_scale.py": """\
import torch
from m3i_fast.ops import reference, scale


def test_scale():
    x = torch.randn(7)
    assert torch.equal(scale(x, 2.0), reference.scale(x, 2.0))
    torch.library.opcheck(torch.ops.m3i.scale.default, (x, 2.0))
""",
    "benchmarks/ops/scale.py": "def main(argv=None): pass\n",
}
# DALI's operators are built of all but the last.
VIEWS_SOURCES = "".join(
    f"    cuda/views/cpu/{name}.cpp\n" for name in ("avx2", "avx512", "baseline", "op_cpu")
)
# In these files: what it stands before, and what it adds.
ADDED = {
    "cuda/bindings.cpp": [
        ("}\n\nM3I_PYTHON_MODULE", '  library.def("scale(Tensor x, float factor) -> Tensor");\n'),
    ],
    "CMakeLists.txt": [(VIEWS_SOURCES, "    cuda/scale/cpu/op_cpu.cpp\n")],
    "m3i_fast/ops/__init__.py": [
        ("\n__all__", "from m3i_fast.ops.scale import scale\n"),
        ('    "views",\n]', '    "scale",\n'),
    ],
    "m3i_fast/ops/reference.py": [
        ("def mask_mix(", "def scale(x, factor):\n    return x * factor\n\n\n"),
    ],
    "m3i_fast/op_registry.py": [
        ("# ---- The list", '''\
def _scale_calls(large: bool) -> Iterator[Call]:
    import torch
    from m3i_fast.ops import reference, scale
    inputs = {"x": torch.tensor([1.5]), "factor": 2.0}
    yield Call(what="a number", op=scale, reference=reference.scale, inputs=inputs)


def _scale_work() -> Callable[[], Any]:
    import torch
    from m3i_fast.ops import scale
    return lambda: scale(torch.tensor([1.5]), 2.0)


'''),
    ],
}  # fmt: skip
SPEC = """\
    OpSpec(
        name="scale", title="Scaling", calls=_scale_calls, work=_scale_work,
        measures="a product", sanitizer="tests/ops/scale/test_scale.py",
        gpu=GpuBenchmark(worth=8, limit_s=1.0),
    ),
)
"""

# Run in the copy, with its package before the installed one.
USE = """
import sys
site, tree = sys.argv[1:]
sys.meta_path[:] = [
    f for f in sys.meta_path if "m3i_fast" not in getattr(f, "known_source_files", ())
]
sys.path[:0] = [site, tree]
import pytest
from m3i_fast.benchmarks.compare import main as compare, worker
from m3i_fast.benchmarks.ledger import readme_tables
from m3i_fast.benchmarks.subjects import load
from m3i_fast import op_registry
from m3i_fast.doctor import probes
from m3i_fast.profiling import kernel_families
from scripts.gpu import plan

assert op_registry.__file__.startswith(site) and plan.__file__.startswith(tree)
assert worker.works(op_registry.__file__)["scale"]()().tolist() == [3.0]
assert compare.Config(subject="scale", self_test=1).subject == "scale"
assert callable(load("scale"))
assert "`m3i-fast bench scale`: a product | not measured yet" in readme_tables.ops()
assert kernel_families.family("m3i::scale") == "scale"
assert kernel_families.FAMILIES["scale"] == "Scaling"
assert list(plan.BENCHMARKS)[-1] == "scale"
there = plan.Machine(inventory={"compute-sanitizer": "there"}, small=False)
assert all("tests/ops/scale/test_scale.py" in step.command for step in plan.sanitizer_steps(there))
op_registry.OPS = op_registry.OPS[-1:]  # the only one whose kernel was built here
assert probes.kernels_cpu() == {"ops": ["scale"]}
listed = "tests/cuda/test_compile.py::test_cmake_lists_every_source_once_and_sorted"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/ops/scale/test_scale.py", listed]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with one op more."""
    tree = tmp_path_factory.mktemp("one_more") / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for folder in (*SOURCES, "cuda", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name, text in NEW.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    for name, places in ADDED.items():
        text = (tree / name).read_text()
        for before, added in places:
            assert text.count(before) == 1, f"{name}: {text.count(before)} times {before!r}"
            text = text.replace(before, added + before)
        (tree / name).write_text(text)
    registry_file = tree / "m3i_fast" / "op_registry.py"
    registry_file.write_text(registry_file.read_text().removesuffix(")\n") + SPEC)
    return tree


def touched(tree: Path) -> set[str]:
    """What differs from the checkout: files, and of a folder in cuda/ the folder."""
    found = set()
    for path in tree.rglob("*"):
        name = path.relative_to(tree)
        if path.is_dir() or "__pycache__" in name.parts:
            continue
        if not (ROOT / name).is_file() or not filecmp.cmp(path, ROOT / name, shallow=False):
            is_in_folder = name.parts[0] == "cuda" and len(name.parts) > 2
            found.add("/".join(name.parts[:2]) if is_in_folder else name.as_posix())
    return found


def test_one_more_op_touches_nine_files(tree: Path) -> None:
    """And whoever needs to know of it does (below): a list by hand would be a tenth."""
    assert touched(tree) == {
        *("cuda/scale", "cuda/bindings.cpp", "CMakeLists.txt"),
        *("m3i_fast/ops/scale.py", "m3i_fast/ops/__init__.py"),
        *("m3i_fast/ops/reference.py", "m3i_fast/op_registry.py"),
        *("tests/ops/scale/test_scale.py", "benchmarks/ops/scale.py"),
    }
    assert len(touched(tree)) <= 9


def test_everybody_knows_one_more_op(tree: Path, tmp_path: Path) -> None:
    package = tmp_path / "m3i_fast"
    package.mkdir()
    for source in (*(tree / "m3i_fast").iterdir(), tree / "pipelines", tree / "benchmarks"):
        (package / source.name).symlink_to(source)
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    torch_root = Path(spec.submodule_search_locations[0])
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    command += [f"-I{tree / 'cuda'}", f"-I{tree / 'cuda' / 'include'}"]
    command += [f"-I{torch_root / 'include'}", f"-I{sysconfig.get_path('include')}"]
    command += [str(tree / "cuda" / name) for name in ("bindings.cpp", "scale/cpu/op_cpu.cpp")]
    command += ["-Wl,--no-as-needed", f"-L{torch_root / 'lib'}", "-ltorch"]
    subprocess.run([*command, "-o", str(package / "_C.abi3.so")], check=True)
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path), str(tree)],
        cwd=tree,
        env={**os.environ, "M3I_RESULTS": str(ROOT / ledger.results_dir())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_registry_is_read_without_the_package() -> None:
    """By a Python without site-packages: no torch, no m3i_fast."""
    code = "import runpy, sys; print([o.name for o in runpy.run_path(sys.argv[1])['OPS']])"
    command = [sys.executable, "-I", "-S", "-c", code, op_registry.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str([op.name for op in OPS]), done.stderr
