"""The PTX of the wrappers: which argument of the host's version stands for which operand.

No GPU runs the instructions here, and the emulator runs the other branch of each wrapper. So the
operands are read from what nvcc makes of ptx.cu, whose kernels call one wrapper each by their own
parameters, and compared to the places that the PTX ISA gives them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.shared.cuda.nvcc import CUDA, run_nvcc

SOURCE = Path(__file__).with_name("ptx.cu")
OF_MACROS = ["d", "a", "b", "accumulate"]  # parameters of the kernels that macros make

LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
DONE = "selp.u32 out, 1, 0, complete"
REMOTE = "mapa.shared::cluster.u32 remote, barrier, rank"


def words(name: str, count: int, comma: str = ", ") -> str:
    return "{" + comma.join(word(name, i) for i in range(count)) + "}"


def word(name: str, i: int) -> str:
    return f"{name}+{4 * i}" if i else name


def wgmma(columns: int, dtype: str, a_is_m_major: int, b_is_n_major: int) -> list[str]:
    """Of the last two numbers, 1 transposes: the operand's rows or columns are contiguous."""
    shape = f"m64n{columns}k16.f32.{dtype}.{dtype}"
    d = words("d", columns // 2, ",")
    product = f"wgmma.mma_async.sync.aligned.{shape} {d}, a, b, p, 1, 1"
    return ["setp.ne.b32 p, accumulate, 0", f"{product}, {a_is_m_major}, {b_is_n_major}"]


def load_matrices(count: int, transposed: str = "") -> list[str]:
    kind = f"ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16"
    return [f"{kind} {words('d', count)}, [a]"]


def mma(shape: str, dtype: str) -> list[str]:
    kind = f"mma.sync.aligned.{shape}.row.col.f32.{dtype}.{dtype}.f32"
    d = words("d", 4)
    return [f"{kind} {d}, {words('a', 4)}, {words('b', 2)}, {d}"]


# By the PTX ISA. Coordinates and sizes of a tensor begin with the contiguous dimension, columns.
EXPECTED = {
    "prefetch": ["prefetch.tensormap [map]"],
    "load_box": [f"{LOAD} [shared], [map, {{column, row}}], [barrier]"],
    "multicast_box": [
        f"{LOAD}.multicast::cluster [shared], [map, {{column, row}}], [barrier], blocks"
    ],
    "store_box": [
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [map, {column, row}], [shared]"
    ],
    "add_box": [
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group "
        "[map, {column, row}], [shared]"
    ],
    "commit_boxes": ["cp.async.bulk.commit_group"],
    "wait_boxes_read": ["cp.async.bulk.wait_group.read 3"],
    "wait_boxes": ["cp.async.bulk.wait_group 2"],
    # The last operand is how many bytes are read; the rest is filled with zeros.
    **{
        f"copy_{size}": [f"cp.async.{cache}.shared.global [to], [from], {size}, {size}"]
        for size, cache in ((4, "ca"), (8, "ca"), (16, "cg"))
    },
    "zero_8": ["cp.async.ca.shared.global [to], [from], 8, 0"],
    "zero_16": ["cp.async.cg.shared.global [to], [from], 16, 0"],
    "commit_copies": ["cp.async.commit_group"],
    "wait_copies": ["cp.async.wait_group 3"],
    "add_1": ["red.global.add.f32 [d], a"],
    "add_2": [f"red.global.add.v2.f32 [d], {words('a', 2)}"],
    "add_4": [f"red.global.add.v4.f32 [d], {words('a', 4)}"],
    "init": ["mbarrier.init.shared::cta.b64 [barrier], count"],
    "init_fence": ["fence.mbarrier_init.release.cluster"],
    "arrive": ["mbarrier.arrive.shared::cta.b64 state, [barrier]"],
    "arrive_expect": ["mbarrier.arrive.expect_tx.shared::cta.b64 state, [barrier], bytes"],
    "expect": ["mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [barrier], bytes"],
    "complete": ["mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [barrier], bytes"],
    "try_wait": ["mbarrier.try_wait.parity.shared::cta.b64 complete, [barrier], parity", DONE],
    "wait_cluster": [
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [barrier], parity",
        DONE,
    ],
    "arrive_remote": [
        REMOTE,
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]",
    ],
    "arrive_relaxed": [
        REMOTE,
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote]",
    ],
    "map_rank": ["mapa.u64 out, shared, rank"],
    "read_rank": ["mov.u32 to, %cluster_ctarank"],
    "read_size": ["mov.u32 to, %cluster_nctarank"],
    "arrive_cluster": ["barrier.cluster.arrive.release"],
    "wait_for_cluster": ["barrier.cluster.wait.acquire"],
    "sync_named": ["bar.sync id, threads"],
    "arrive_named": ["bar.arrive id, threads"],
    "count": ["red.release.gpu.global.add.u64 [counter], value"],
    "read_count": ["ld.acquire.gpu.global.u64 to, [counter]"],
    "fence": ["fence.proxy.async.shared::cta"],
    "fence_global": ["fence.proxy.async.global"],
    "take_registers": ["setmaxnreg.inc.sync.aligned.u32 232"],
    "give_registers": ["setmaxnreg.dec.sync.aligned.u32 40"],
    "fence_products": ["wgmma.fence.sync.aligned"],
    **{f"wgmma_{n}_BFloat16_kK_kK": wgmma(n, "bf16", 0, 0) for n in range(32, 257, 32)},
    "wgmma_256_BFloat16_kK_kMN": wgmma(256, "bf16", 0, 1),
    "wgmma_256_BFloat16_kMN_kK": wgmma(256, "bf16", 1, 0),
    "wgmma_256_Float16_kMN_kMN": wgmma(256, "f16", 1, 1),
    "wgmma_words": [
        "setp.ne.b32 p, accumulate, 0",
        f"wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {words('d', 16, ',')}, "
        f"{words('a', 4)}, b, p, 1, 1, 1",
    ],
    "commit": ["wgmma.commit_group.sync.aligned"],
    "wait_products": ["wgmma.wait_group.sync.aligned 1"],
    "mma_bf16": mma("m16n8k16", "bf16"),
    "mma_f16": mma("m16n8k16", "f16"),
    "mma_tf32": mma("m16n8k8", "tf32"),
    **{f"load_{n}": load_matrices(n) for n in (1, 2, 4)},
    **{f"load_transposed_{n}": load_matrices(n, ".trans") for n in (1, 2, 4)},
    "tf32": ["cvt.rna.tf32.f32 to, value"],
    # The first source goes to the upper half of the word.
    "pack_bf16": ["cvt.rn.bf16x2.f32 to, high, low"],
    "pack_f16": ["cvt.rn.f16x2.f32 to, high, low"],
    "unpack_f16": ["mov.b32 {l, h}, packed", "cvt.f32.f16 to, l", "cvt.f32.f16 to+4, h"],
    "exp2_fast": ["ex2.approx.ftz.f32 to, value"],
    "reciprocal": ["rcp.approx.ftz.f32 to, value"],
}


def read_ptx(
    folder: Path, include: Path = CUDA / "include", architecture: str = "sm_90a"
) -> dict[str, list[str]]:
    """Each kernel's inline assembly, in which a register is the parameter that it holds.

    `d+8` is what was loaded from 8 bytes after the parameter d, or is stored there; any other
    register that only the assembly sets is `out`.
    """
    made = folder / "wrappers.ptx"
    options = ["-std=c++17", "-O3", f"-I{include}", "-ptx", f"-arch={architecture}"]
    run_nvcc(*options, SOURCE, "-o", made)
    listed = re.findall(r"^KERNEL\((\w+), (.*?)\) \{", SOURCE.read_text(), re.M | re.S)
    parameters = {name: re.findall(r"(\w+)(?:,|$)", text) for name, text in listed}
    found = {}
    for kernel, body in re.findall(r"\.entry (\w+)\(.*?\{\n(.*?)\n\}\n", made.read_text(), re.S):
        found[kernel] = read_kernel(kernel, body, parameters.get(kernel, OF_MACROS))
    return found


def read_kernel(kernel: str, body: str, parameters: list[str]) -> list[str]:
    held: dict[str, str] = {}

    def resolve(text: str) -> str:
        text = re.sub(rf"{kernel}_param_(\d+)", lambda at: parameters[int(at[1])], text)
        return re.sub(r"%\w+", lambda at: held.get(at[0], at[0]), text)

    assembly, inside = [], False
    for line in re.split(r"[;{}]\s*\n|\n|;\s*\}", re.sub(r"\{\s*(\.reg)", r"\1", body)):
        line = line.strip().removesuffix(";").strip()
        if line.startswith("//"):
            inside = "begin" in line
        elif inside and line and not line.startswith((".reg", "{")):
            assembly.append(re.sub(r"\s+", " ", line))
        elif moved := re.fullmatch(r"(mov|ld|cvt|cvta|add)\.\S+\s+(%\w+), (.+)", line):
            held[moved[2]] = resolve(moved[3]).strip("[]").replace(", ", "+")
        elif stored := re.fullmatch(r"st\.\S+\s+\[(.+)\], (%\w+)", line):
            held.setdefault(stored[2], resolve(stored[1]))
    return [re.sub(r"%(r|rd|f)\d+\b", "out", resolve(line)) for line in assembly]


def test_operands_are_where_the_instructions_take_them(tmp_path: Path) -> None:
    assert read_ptx(tmp_path) == EXPECTED


def test_floats_are_added_one_at_a_time_before_compute_capability_9(tmp_path: Path) -> None:
    found = read_ptx(tmp_path, architecture="sm_80")
    for size in (1, 2, 4):
        adds = [f"red.global.add.f32 [{word('d', i)}], {word('a', i)}" for i in range(size)]
        assert found[f"add_{size}"] == adds


def test_every_wrapper_of_ptx_has_a_kernel() -> None:
    """Also one that is written later. `asm volatile("" ..)` has no instruction."""
    calls, wrappers = SOURCE.read_text(), set()
    for header in sorted((CUDA / "include").rglob("*.*h")):
        for function in re.split(r"^__device__ inline ", header.read_text(), flags=re.M)[1:]:
            if re.search(r'(asm|asm volatile|M3I_ASM_90A?)\(\s*"[^"]', function):
                wrappers.add(re.match(r".*?(\w+)\(", function)[1])
    assert len(wrappers) > 40 and {"load_matrices", "wgmma_fence", "fast_exp2"} <= wrappers
    assert not {name for name in wrappers if not re.search(rf"\b{name}\b[<()]", calls)}


@pytest.mark.parametrize(
    ("header", "before", "after", "kernels"),
    [
        pytest.param(
            "tma", '"[%0], [%1, {%2, %3}], [%4];"', '"[%0], [%1, {%3, %2}], [%4];"',
            {"load_box"}, id="coordinates",
        ),
        pytest.param(
            "wgmma", 'p, trans_a ", " trans_b)', 'p, trans_b ", " trans_a)',
            {"wgmma_256_BFloat16_kK_kMN", "wgmma_256_BFloat16_kMN_kK"}, id="transposition",
        ),
        pytest.param(
            "wgmma", 'M3I_TEXT_224                               \\\n  ",%112,%113',
            'M3I_TEXT_224                               \\\n  ",%113,%112',
            {name for name in EXPECTED if name.startswith("wgmma_256")}, id="accumulators",
        ),
        pytest.param("counter", "ld.acquire.gpu", "ld.acquire.cta", {"read_count"}, id="scope"),
        pytest.param(
            "mma", ".shared.b16 {%0, %1, %2, %3}, [%4]", ".shared.b16 {%0, %2, %1, %3}, [%4]",
            {"load_4", "load_transposed_4"}, id="matrices",
        ),
        pytest.param(
            "copy_async", '[%0], [%1], 16, %2;"', '[%0], [%1], 16;"',
            {"copy_16", "zero_16"}, id="zeros",
        ),
        pytest.param(
            "red", '"f"(values[0]), "f"(values[1])\n', '"f"(values[1]), "f"(values[0])\n',
            {"add_2"}, id="added",
        ),
        pytest.param(
            "registers", "setmaxnreg.dec", "setmaxnreg.inc", {"give_registers"}, id="registers"
        ),
    ],
)  # fmt: skip
def test_planted_fault_is_read(
    tmp_path: Path, header: str, before: str, after: str, kernels: set[str]
) -> None:
    include = tmp_path / "include"
    shutil.copytree(CUDA / "include", include)
    source = include / "m3i" / "gpu" / f"{header}.cuh"
    text = source.read_text()
    assert text.count(before) == 1
    source.write_text(text.replace(before, after))
    found = read_ptx(tmp_path, include)
    assert {name for name in EXPECTED if found[name] != EXPECTED[name]} == kernels
