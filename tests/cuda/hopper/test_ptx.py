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
OF_PRODUCTS = ["d", "a", "b", "accumulate"]  # parameters of the kernels that macros make

LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
DONE = "selp.u32 out, 1, 0, complete"
REMOTE = "mapa.shared::cluster.u32 remote, barrier, rank"


def words(name: str, count: int, comma: str = ", ") -> str:
    return "{" + comma.join([name, *(f"{name}+{4 * i}" for i in range(1, count))]) + "}"


def wgmma(columns: int, dtype: str, a_is_m_major: int, b_is_n_major: int) -> list[str]:
    """Of the last two numbers, 1 transposes: the operand's rows or columns are contiguous."""
    shape = f"m64n{columns}k16.f32.{dtype}.{dtype}"
    d = words("d", columns // 2, ",")
    product = f"wgmma.mma_async.sync.aligned.{shape} {d}, a, b, p, 1, 1"
    return ["setp.ne.b32 p, accumulate, 0", f"{product}, {a_is_m_major}, {b_is_n_major}"]


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
    "arrive_cluster": ["barrier.cluster.arrive.release"],
    "wait_for_cluster": ["barrier.cluster.wait.acquire"],
    "sync_named": ["bar.sync id, threads"],
    "arrive_named": ["bar.arrive id, threads"],
    "count": ["red.release.gpu.global.add.u64 [counter], value"],
    "read_count": ["ld.acquire.gpu.global.u64 out, [counter]"],
    "fence": ["fence.proxy.async.shared::cta"],
    "fence_global": ["fence.proxy.async.global"],
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
}


def read_ptx(folder: Path, include: Path = CUDA / "include") -> dict[str, list[str]]:
    """Each kernel's inline assembly, in which a register is the parameter that it holds.

    `d+8` is what was loaded from 8 bytes after the parameter d; a register that only the assembly
    sets is `out`.
    """
    made = folder / "wrappers.ptx"
    run_nvcc("-std=c++17", "-O3", f"-I{include}", "-ptx", "-arch=sm_90a", SOURCE, "-o", made)
    listed = re.findall(r"^KERNEL\((\w+), (.*?)\) \{", SOURCE.read_text(), re.M | re.S)
    parameters = {name: re.findall(r"(\w+)(?:,|$)", text) for name, text in listed}
    found = {}
    for kernel, body in re.findall(r"\.entry (\w+)\(.*?\{\n(.*?)\n\}\n", made.read_text(), re.S):
        found[kernel] = read_kernel(kernel, body, parameters.get(kernel, OF_PRODUCTS))
    return found


def read_kernel(kernel: str, body: str, parameters: list[str]) -> list[str]:
    held: dict[str, str] = {}

    def resolve(text: str) -> str:
        text = re.sub(rf"{kernel}_param_(\d+)", lambda at: parameters[int(at[1])], text)
        return re.sub(r"%\w+", lambda at: held.get(at[0], at[0]), text)

    assembly, inside = [], False
    for line in re.split(r"[;{}]\s*\n|\n|;\s*\}", re.sub(r"\{ (\.reg)", r"\1", body)):
        line = line.strip().removesuffix(";").strip()
        if line.startswith("//"):
            inside = "begin" in line
        elif inside and line and not line.startswith((".reg", "{")):
            assembly.append(re.sub(r"%(r|rd)\d+\b", "out", resolve(re.sub(r"\s+", " ", line))))
        elif moved := re.fullmatch(r"(mov|ld|cvt|cvta)\.\S+\s+(%\w+), (.+)", line):
            held[moved[2]] = resolve(moved[3]).strip("[]")
    return assembly


def test_operands_are_where_the_instructions_take_them(tmp_path: Path) -> None:
    assert read_ptx(tmp_path) == EXPECTED


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
