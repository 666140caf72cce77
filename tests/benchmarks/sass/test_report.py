"""The report on kernels that nvcc compiles here, beside plain counts in what others print."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from m3i_fast.benchmarks.core import cuda_toolkit
from m3i_fast.benchmarks.core.cuda_toolkit import (
    MissingTool,
    architecture_options,
    compile_cubin,
    find_tool,
    parse_ptxas,
    short_names,
)
from m3i_fast.benchmarks.core.sass.disassembly import Kernel, disassemble
from m3i_fast.benchmarks.core.sass.figures import figures_of
from m3i_fast.benchmarks.core.sass.flow import analyse
from m3i_fast.benchmarks.sass import main as sass
from m3i_fast.benchmarks.sass.changes import changes, figures, read_report
from m3i_fast.benchmarks.sass.code import kernels_of_file
from m3i_fast.benchmarks.tune.compile import code_digest
from tests.shared.cuda.nvcc import CUDA, find_nvcc, find_nvdisasm, run_nvcc

SOURCE = Path(__file__).with_name("kernels.cu")
HOPPER = Path(__file__).parents[2] / "shared" / "cuda" / "kernels" / "hopper_gemm.cu"
OURS = CUDA / "mask_mix" / "sm80" / "launch.cu"


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_nvcc()
    find_nvdisasm()
    return compile_cubin(SOURCE, tmp_path_factory.mktemp("sass") / "kernels-80.cubin", "80")


# ---- Against other tools -------------------------------------------------------------------------


def plain_counts(cubin: Path) -> dict[str, Counter[str]]:
    """Opcodes by mangled name, by one expression on the text of nvdisasm without options."""
    text = subprocess.run(
        [find_nvdisasm(), "-c", cubin], check=True, capture_output=True, text=True
    ).stdout
    parts = re.split(r"\n\.text\.(\S+):\n", text)[1:]
    return {
        name: Counter(re.findall(r"\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", body))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def assert_counted_as_plainly(cubin: Path, kernels: list[Kernel]) -> None:
    plain = plain_counts(cubin)
    assert plain.keys() == {kernel.mangled for kernel in kernels}
    for kernel in kernels:
        opcodes = plain[kernel.mangled]
        found = figures_of(kernel, "80")
        assert found.instructions + found.filling == opcodes.total()
        assert sum(found.by_class.values()) == sum(found.by_pipe.values()) == found.instructions
        flow = analyse(kernel)
        unreached = [b for b in flow.blocks if b.number not in flow.owner]
        assert {each.stem for block in unreached for each in block.instructions} <= {"BRA", "NOP"}
        for stem, kind in {
            "LDG": "global load",
            "STG": "global store",
            "LDS": "shared load",
        }.items():
            plainly = sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] == stem)
            assert plainly == sum(n for name, n in found.accesses.items() if name.startswith(kind))
        shuffles = sum(n for opcode, n in opcodes.items() if opcode.startswith("SHFL"))
        assert shuffles == found.by_class.get("shuffle", 0)


def test_totals_are_those_of_nvdisasms_text(cubin: Path) -> None:
    assert_counted_as_plainly(cubin, disassemble(cubin))


@pytest.mark.parametrize("architecture", cuda_toolkit.ARCHITECTURES)
def test_totals_of_a_kernel_of_ours(architecture: str, tmp_path: Path) -> None:
    find_nvcc()
    find_nvdisasm()
    made = compile_cubin(OURS, tmp_path / "ours.cubin", architecture)
    found = disassemble(made)
    assert_counted_as_plainly(made, found)
    budget = json.loads((CUDA / "mask_mix" / "budget.json").read_text())[f"sm_{architecture}"]
    assert {kernel.name for kernel in found} == budget.keys()
    for kernel in found:
        assert 0 < kernel.registers <= budget[kernel.name]["registers"]


def test_registers_are_those_that_ptxas_told(cubin: Path, tmp_path: Path) -> None:
    printed = run_nvcc("-std=c++17", "-O3", "-arch=sm_80", "-Xptxas=-v", "-cubin", SOURCE,
                       "-o", tmp_path / "again.cubin")  # fmt: skip
    told = {name: used.registers for name, used in parse_ptxas(printed).items()}
    assert told == {kernel.mangled: kernel.registers for kernel in disassemble(cubin)}


def test_lines_change_no_instruction(cubin: Path, tmp_path: Path) -> None:
    without = compile_cubin(SOURCE, tmp_path / "without.cubin", "80", lines=False)
    assert code_digest(without.read_bytes()) == code_digest(cubin.read_bytes())
    assert not any(each.frames for kernel in disassemble(without) for each in kernel.instructions)


def test_products_between_waits(tmp_path: Path) -> None:
    find_nvcc()
    find_nvdisasm()
    made = compile_cubin(HOPPER, tmp_path / "gemm.cubin", "90a")
    (opcodes,) = plain_counts(made).values()
    (kernel,) = disassemble(made)
    found = figures_of(kernel, "90a")
    products = sum(n for opcode, n in opcodes.items() if opcode.startswith("HGMMA"))
    waits = sum(n for opcode, n in opcodes.items() if opcode.startswith("WARPGROUP.DEPBAR"))
    assert products and found.by_class["tensor"] == products == sum(found.tensor_between_waits)
    assert len(found.tensor_between_waits) == waits


def test_a_library_has_the_code_of_each_architecture(tmp_path: Path) -> None:
    """As cuobjdump -sass counts it."""
    find_nvcc()
    try:
        cuobjdump = find_tool("cuobjdump")
    except MissingTool as error:
        pytest.skip(str(error))
    library = tmp_path / "kernels.so"
    targets = [architecture_options(architecture) for architecture in ("80", "90a")]
    options = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", *targets[0], *targets[1]]
    run_nvcc(*options, SOURCE, "-o", library)
    text = subprocess.run(
        [cuobjdump, "-sass", library], check=True, capture_output=True, text=True
    ).stdout
    expected = {}
    for part in re.split(r"(?=arch = sm_)", text)[1:]:
        (architecture,) = re.findall(r"arch = sm_(\w+)", part)
        for function in re.split(r"Function : ", part)[1:]:
            name = short_names([function.split()[0]]).popitem()[1]
            code = re.findall(r"^\s+/\*[0-9a-f]{4}\*/", function, re.MULTILINE)
            expected[architecture, name] = len(code)
    found = {
        (architecture, kernel.name): len(kernel.instructions)
        for architecture, kernel in kernels_of_file(library)
    }
    assert found == expected and len(found) == 10


# ---- The command ---------------------------------------------------------------------------------


def test_a_change_is_told_kernel_by_kernel(
    cubin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loads of 8 bytes instead of 16 are seen as such, and kernels that did not change are not."""
    report = tmp_path / "before.json"
    arguments = ["--file", str(cubin), "--kernels", ".*(vectors|shuffles|atomics).*"]
    assert sass.main([*arguments, "--json", str(report)]) == 0
    assert "next: --details" in capsys.readouterr().out
    changed = tmp_path / "kernels.cu"
    changed.write_text(
        SOURCE.read_text().replace("= bytes[i]", "= bytes[2 * i] + bytes[2 * i + 1]")
    )
    made = compile_cubin(changed, tmp_path / "changed.cubin", "80")
    arguments[1], arguments[-1] = str(made), ".*(vectors|shuffles|divisions).*"
    assert sass.main([*arguments, "--baseline", str(report), "--json", str(report)]) == 0
    told = capsys.readouterr().out
    assert "gone: atomics_kernel, sm_80" in told and "new: divisions_kernel, sm_80" in told
    assert re.search(
        r"vectors_kernel, sm_80 .*\n(.*\n)*.* global load 8-bit +1 +2 +\+100\.0%", told
    )
    assert "shuffles_kernel<32>, sm_80" not in told
    assert sass.main([*arguments, "--baseline", str(report)]) == 0
    assert "nothing else changed" in capsys.readouterr().out


def test_details_and_what_a_warp_issues_are_told(
    cubin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--file", str(cubin), "--kernels", "loops_kernel", "--details"]
    sass.main([*arguments, "--trips", "kernels.cu:6=3,1=7,other=1", "--shares", "kernels.cu:10=0"])
    told = capsys.readouterr().out
    (kernel,) = (kernel for kernel in disassemble(cubin) if kernel.name == "loops_kernel")
    found = figures_of(kernel, "80")
    assert f"loops_kernel, sm_80: {found.instructions} instructions" in told
    assert f"loop 1 at kernels.cu:8: {found.loops[1].instructions}\n" in told
    (total,) = re.findall(r"loops_kernel: a warp issues ([\d,]+)\n", told)
    inner = 3 * 7 * found.loops[1].instructions
    assert inner < int(total) < inner + found.instructions


def test_changes_are_of_every_figure() -> None:
    """A kernel of which each number is one more than before is told of in each."""
    loop = {"instructions": 8, "line": "a.cu:3", "depth": 1}
    before = {
        "kernel": "a_kernel",
        "architecture": "80",
        **{"registers": 16, "instructions": 40, "longest_block": 9, "spills": 0},
        **{
            "by_class": {"fp32": 2},
            "accesses": {"global load 32-bit": 1},
            "atomics": {"RED ADD F32": 4},
        },
        **{"loads_in_flight": {"2": 1}, "loops": [loop]},
    }
    now = before | {
        **{"registers": 17, "instructions": 41, "longest_block": 10, "spills": 1},
        **{
            "by_class": {"fp32": 3},
            "accesses": {"global load 32-bit": 2},
            "atomics": {"RED ADD F32": 5},
        },
        **{"loads_in_flight": {"3": 1}, "loops": [loop | {"instructions": 9}, loop]},
    }
    found = changes([before], [now])
    assert {each.what for each in found} == figures(now).keys()
    grown = {each.what: each.now - each.before for each in found}
    assert grown.pop("loop 1") == 8 and set(grown.values()) == {1}
    assert not changes([before], [before])


def test_wrong_requests_say_what_to_type(cubin: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kernels: expected to match one of .*loops_kernel.*; got"):
        sass.main(["--file", str(cubin), "--kernels", "nothing"])
    with pytest.raises(ValueError, match="op: expected all or one of .*dcnv3.*; got 'dcn'"):
        sass.Config(op="dcn")
    with pytest.raises(ValueError, match="shares: expected with --trips"):
        sass.Config(shares="a.cu:3=0")
    with pytest.raises(ValueError, match="--trips: expected PLACE=NUMBER .*, got 'a.cu:3'"):
        sass.main(["--file", str(cubin), "--trips", "a.cu:3"])
    with pytest.raises(ValueError, match="file: expected a cubin or a library"):
        sass.main(["--file", str(tmp_path / "none.cubin")])
    damaged = tmp_path / "report.json"
    damaged.write_text('{"kernels": [{"kernel": 3}]}')
    with pytest.raises(ValueError, match="damaged"):
        read_report(damaged)


@pytest.mark.parametrize(
    ("tool", "package"),
    [
        ("nvdisasm", "nvidia-cuda-nvdisasm"),
        ("cuobjdump", "nvidia-cuda-cuobjdump"),
        ("nvcc", "cuda-"),
    ],
)
def test_a_missing_tool_is_named_with_its_package(
    tool: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda_toolkit.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(MissingTool, match=f"{tool}: found none in .*pip install '?{package}"):
        find_tool(tool)
    (tmp_path / tool).write_text("")
    assert find_tool(tool) == tmp_path / tool
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cuda_toolkit.sysconfig, "get_path", lambda name: str(tmp_path / "other"))
    (tmp_path / "home" / "bin").mkdir(parents=True)
    shutil.copy(sys.executable, tmp_path / "home" / "bin" / tool)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_tool(tool) == tmp_path / "home" / "bin" / tool
