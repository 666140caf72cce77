"""Traces of torch.profiler: a real one of a CPU, one of a GPU with a known answer, damaged ones."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from m3i_fast.ops import boltzmann, gaussian
from m3i_fast.profiling.kernel_families import FAMILIES, family, normalised
from m3i_fast.profiling.operator_costs import CONVOLUTIONS, flops_of
from m3i_fast.profiling.recording import HostRange, StageLookup, length, overlap, self_times, union
from m3i_fast.profiling.summary import Pace, summarise
from m3i_fast.profiling.torch_trace import read_trace
from tests.shared.flop_formulas import FORMULAS

ABOUT = {
    "recipe": "demo",
    "profiler": "torch.profiler",
    "device": "cpu",
    "pace": Pace(before_ms=1.0, profiled_ms=1.0, after_ms=1.0),
}
N, D, HEADS = 48, 32, 4


def _work() -> None:
    """Products, attention and both of their backward passes; a loss over all pairs; one read."""
    x = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(D, D, requires_grad=True)
    with record_function("fwd.input"):
        q = F.linear(x, weight, torch.ones(D)) @ weight
        q = q.view(1, N, HEADS, -1).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(N, D)
    with record_function("loss.caption"):
        loss = boltzmann(z, x, torch.tensor(2.0), row_ids=torch.arange(N), col_ids=torch.arange(N))
        assert loss.item() > 0
    with record_function("bwd"):
        loss.backward()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    _work()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(2):
            with record_function("step"):
                _work()
    profiler.export_chrome_trace(str(path))
    return path


def test_a_real_trace_is_split_whole(trace: Path) -> None:
    recording = read_trace(trace)
    summary = summarise(recording, **ABOUT)  # type: ignore[arg-type]
    assert summary["kind"] == "cpu" and summary["num_steps"] == 2 and summary["gpu"] is None
    assert sum(row["share"] for row in summary["families"]) == pytest.approx(1)
    assert sum(row["share"] for row in summary["kernels"]) == pytest.approx(1)
    assert sum(row["ms"] for row in summary["stages"]) == pytest.approx(summary["step_ms"])
    assert {row["name"] for row in summary["stages"]} == {
        "fwd.input",
        "loss.caption",
        "bwd",
        "between stages",
    }
    assert {"gemm", "attention", "boltzmann"} <= {row["name"] for row in summary["families"]}
    assert 0 < summary["work_share"] <= 1


def test_flops_are_those_that_torch_counts(trace: Path) -> None:
    """Its counter does not see the CPU's attention, of which it has the formulas."""
    counter = FlopCounterMode(display=False)
    with counter:
        _work()
    heads = (1, HEADS, N, D // HEADS)
    attention = sdpa_flop_count(heads, heads, heads)
    attention += sdpa_backward_flop_count(heads, heads, heads, heads)
    work = read_trace(trace).activities
    ours = sum(w.flops for w in work if w.name.startswith("m3i::"))
    theirs = sum(w.flops for w in work) - ours
    assert theirs == 2 * (counter.get_total_flops() + attention)
    # Logits; in the backward pass these again, and products by z_hat and by z, which is x.
    assert ours == 2 * 4 * 2 * N * N * D


def _convolutions() -> None:
    """Strides, padding, dilation and groups, with and without gradients of the input."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 15, 14, requires_grad=True)
    dense, deep = (torch.randn(s, requires_grad=True) for s in ((16, 8, 3, 3), (8, 1, 5, 5)))
    y = F.conv2d(x, dense, torch.ones(16), stride=2, padding=1)
    y = F.conv2d(y, torch.randn(4, 16, 3, 2), dilation=(2, 1))
    z = F.conv2d(x, deep, groups=8, padding=2)
    patches = F.conv2d(x.detach(), torch.randn(6, 8, 7, 7, requires_grad=True), stride=7)
    (y.sum() + z.sum() + patches.sum()).backward()


def _decorrelated() -> None:
    """The products of the regulariser are torch's, and stand in a trace themselves."""
    z_hat = torch.randn(4, 16, 8, requires_grad=True)
    gaussian(z_hat, torch.randn(4, 16, 8), normalise=True, decorrelation_weight=0.1).backward()


@pytest.mark.parametrize("work", [_convolutions, _decorrelated])
def test_flops_of_other_operators_are_those_that_torch_counts(
    work: Callable[[], None], tmp_path: Path
) -> None:
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter:
        work()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        with record_function("step"):
            work()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    assert counter.get_total_flops() > 0
    assert sum(w.flops for w in read_trace(tmp_path / "trace.json").activities) == (
        counter.get_total_flops()
    )


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_attention_of_a_gpu_has_the_flops_of_torchs_formula(kind: str) -> None:
    """By the operators that launch its kernels, whose arguments stand where torch has them."""
    q, k = [2, 3, 20, 8], [2, 3, 15, 8]  # B, H, N, d
    shapes = [q, k, k] if kind == "cudnn" else [[b, n, h, d] for b, h, n, d in (q, k, k)]
    for direction, before, formula in (
        ("forward", [], sdpa_flop_count(q, k, k)),
        ("backward", [shapes[0]], sdpa_backward_flop_count(q, q, k, k)),
    ):
        name = f"_{kind}_attention_{direction}"
        schema = getattr(torch.ops.aten, name).default._schema
        place = len(before)
        assert [a.name for a in schema.arguments][place : place + 2] == ["query", "key"]
        event = {"name": f"aten::{name}", "args": {"Input Dims": [*before, *shapes]}}
        assert flops_of(event) == formula
        packed = {"name": f"aten::{name}", "args": {"Input Dims": [[20, 3, 8]] * 4}}
        assert flops_of(packed) == 0


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_arguments_of_convolutions_stand_where_torch_has_them(name: str) -> None:
    schema = getattr(torch.ops.aten, name.removeprefix("aten::")).default._schema
    names = [a.name for a in schema.arguments]
    assert [names[i] for i in CONVOLUTIONS[name]] == ["stride", "padding", "dilation"]


def test_bytes_are_of_the_arguments(trace: Path) -> None:
    products = [w for w in read_trace(trace).activities if w.name == "aten::addmm"]
    assert {w.num_bytes for w in products} == {4 * (D + N * D + D * D)}


def test_reads_are_found_in_their_stage(trace: Path) -> None:
    waits = [w for w in read_trace(trace).waits if w.stage == "loss.caption"]
    assert {w.name for w in waits} == {"aten::_local_scalar_dense"} and len(waits) >= 2


# ---- A GPU's -------------------------------------------------------------------------------------


def _event(kind: str, name: str, begin: float, end: float, **arguments: Any) -> dict[str, Any]:
    thread = 7 if kind in ("kernel", "gpu_memcpy") else 1
    about = {"ph": "X", "cat": kind, "name": name, "tid": thread, "args": arguments}
    return about | {"ts": begin, "dur": end - begin}


def _launched(
    kind: str, name: str, span: tuple[float, float], at: float, stream: int, **arguments: Any
) -> list[dict[str, Any]]:
    number = int(10 * at)
    ids = {"correlation": number, "External id": number, "stream": stream, **arguments}
    call = _event("cuda_runtime", "cudaLaunchKernel", at, at + 5, correlation=number)
    return [call, _event(kind, name, *span, **ids)]


def _gpu_events() -> list[dict[str, Any]]:
    """One step of 1000 us: a product of 300, an elementwise kernel of 100, NCCL of 200 of which
    150 run beside a product of 200, and a copy of 40."""
    shapes = {"Input Dims": [[64, 32], [32, 16]], "Input type": ["c10::BFloat16"] * 2}
    return [
        _event("user_annotation", "step", 0, 1000),
        _event("user_annotation", "fwd.input", 0, 300),
        _event("user_annotation", "bwd", 500, 900),
        _event("cpu_op", "aten::mm", 5, 30, **{"External id": 100}, **shapes),
        *_launched("kernel", "sm90_xmma_gemm_bf16", (100, 390), 10, 7),
        *_launched("kernel", "combine_splits", (390, 400), 10, 7),
        *_launched("kernel", "vectorized_elementwise_kernel<4>", (400, 500), 360, 7),
        *_launched("kernel", "ncclDevKernel_ReduceScatter", (650, 850), 600, 9),
        *_launched("kernel", "nvjet_tst_128x128", (700, 900), 610, 7),
        *_launched("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", (20, 60), 5, 7, bytes=4096),
        *_launched("kernel", "of_before", (-50, -10), -60, 7),
        _event("cuda_runtime", "cudaStreamSynchronize", 920, 940),
        {"ph": "M", "name": "process_name"},
    ]


def _write(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree))
    return path


def test_a_gpus_step_is_split_by_what_ran_on_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "trace.json", {"traceEvents": _gpu_events()})
    summary = summarise(read_trace(path), **ABOUT)  # type: ignore[arg-type]
    assert summary["kind"] == "cuda"
    assert {row["name"]: row["ms"] for row in summary["families"]} == {
        "gemm": pytest.approx(0.49),
        "comm": pytest.approx(0.2),
        "elementwise": pytest.approx(0.1),
        "memcpy": pytest.approx(0.04),
        "other": pytest.approx(0.01),
    }
    gpu = summary["gpu"]
    assert gpu["idle_share"] == pytest.approx(0.31) and gpu["num_streams"] == 2
    assert gpu["comm_overlap"] == pytest.approx(0.75)
    device_ms = {row["name"]: row["device_ms"] for row in summary["stages"]}
    assert device_ms == {
        "fwd.input": pytest.approx(0.34),
        "bwd": pytest.approx(0.25),
        "between stages": pytest.approx(0.1),  # the elementwise kernel was launched there
    }
    rows = {row["name"]: row for row in summary["kernels"]}
    # An operator's FLOPs are credited once, to the longest of its kernels.
    assert rows["sm90_xmma_gemm_bf16"]["flop_s"] == pytest.approx(2 * 64 * 32 * 16 / 290e-6)
    assert rows["combine_splits"]["flop_s"] is None
    (wait,) = summary["device_waits"]
    assert wait["name"] == "cudaStreamSynchronize" and wait["ms"] == pytest.approx(0.02)


def test_what_the_loader_launches_is_of_no_stage(tmp_path: Path) -> None:
    """DALI's threads call the runtime, and no operator of torch's."""
    events = _gpu_events()
    for thread, moments in ((3, (600, 610)), (8, (360, 920))):  # autograd's, the loader's
        for event in events:
            if event.get("cat") == "cuda_runtime" and event["ts"] in moments:
                event["tid"] = thread
    events.append(_event("cpu_op", "aten::mm", 605, 606) | {"tid": 3})
    path = _write(tmp_path / "trace.json", {"traceEvents": events})
    summary = summarise(read_trace(path), **ABOUT)  # type: ignore[arg-type]
    assert {row["name"]: row["device_ms"] for row in summary["stages"]} == {
        "fwd.input": pytest.approx(0.34),
        "bwd": pytest.approx(0.25),
        "between stages": 0.0,
        "loader": pytest.approx(0.1),
    }
    assert summary["device_waits"] == []


def test_damaged_traces_are_named(tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "trace.json"
    whole = trace.read_bytes()
    cases: list[tuple[bytes, str]] = [
        (whole[: len(whole) // 2], "not a whole trace"),
        (gzip.decompress(whole)[:1000], "damaged: "),
        (b"[]", "expected an object, got a list"),
        (b"{}", "traceEvents: expected a list, got nothing"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"traceEvents": []}', "whole range named 'step'"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1, "tid": 1}]}', "has no dur"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
            read_trace(path)
    with pytest.raises(FileNotFoundError, match="a trace of torch.profiler"):
        read_trace(tmp_path / "absent.json")


# ---- Intervals and names -------------------------------------------------------------------------


def test_unions_and_overlaps_are_those_of_sets() -> None:
    """Held against sets of whole moments."""
    draw = random.Random(0)
    for _ in range(50):
        spans = [
            [(b, b + draw.randint(0, 9)) for b in draw.choices(range(60), k=draw.randint(0, 8))]
            for _ in range(2)
        ]
        moments = [{m for begin, end in found for m in range(begin, end)} for found in spans]
        joined = [union(found) for found in spans]
        assert [length(found) for found in joined] == [len(found) for found in moments]
        assert overlap(*joined) == len(moments[0] & moments[1])


def test_self_times_sum_to_the_time_that_any_is_open() -> None:
    intervals = [
        HostRange("outer", 0, 100, 1),
        HostRange("inner", 10, 40, 1),
        HostRange("innermost", 20, 30, 1),
        HostRange("second", 50, 120, 1),  # reaches over its end
        HostRange("elsewhere", 0, 100, 2),
    ]
    assert self_times(intervals) == [20, 20, 10, 50, 100]


def test_the_innermost_interval_is_found() -> None:
    inside = StageLookup([HostRange("outer", 10, 100), HostRange("inner", 20, 30)])
    found = [inside(moment) for moment in (5, 10, 20, 29, 30, 99, 100)]
    between = "between stages"
    assert found == [between, "outer", "inner", "inner", "outer", "outer", between]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm>(Params)", "gemm"),
        ("nvjet_tst_192x128_64x6_1x2_h_bz_coopB_NNT", "gemm"),
        ("aten::addmm", "gemm"),
        ("aten::convolution_backward", "gemm"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "norm"),
        ("transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norm"),
        ("aten::native_layer_norm_backward", "norm"),
        ("void transformer_engine::normalization::ln_bwd_finalize_tuned_kernel<>", "norm"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<>", "elementwise"),
        ("void at::native::detail::chunk_cat_cuda_kernel<float, float>", "elementwise"),
        ("void at::native::detail::split_with_sizes_copy_out_contiguous_kernel", "elementwise"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, 8>", "elementwise"),
        ("aten::linalg_vector_norm", "elementwise"),
        ("m3i::dcnv3_bwd", "dcnv3"),
        ("void m3i::dcnv3_fwd_kernel<float>", "dcnv3"),
        ("m3i::boltzmann_sums", "boltzmann"),
        ("boltzmann_grads_kernel<__nv_bfloat16>", "boltzmann"),
        ("m3i::gaussian", "gaussian"),
        ("gaussian_fwd_kernel", "gaussian"),
        ("GeneratedBackwardFor_m3i_gaussian_default", "gaussian"),
        ("SoftmaxBackward", "boltzmann"),
        ("aten::_softmax", "elementwise"),
        ("_SumOverRanks", "comm"),
        ("aten::normal_", "other"),
        ("aten::_foreach_lerp_", "elementwise"),
        ("triton_poi_fused_add_gelu_3", "elementwise"),
        ("m3i::mask_mix", "mask_mix"),
        ("void m3i::mask_mix_kernel<float, 16, 2>", "mask_mix"),
        ("void m3i::gaussian::gaussian_value_kernel<float>", "gaussian"),
        ("Memcpy HtoD", "memcpy"),
        ("aten::copy_", "memcpy"),
        ("ncclDevKernel_AllGather_RING_LL", "comm"),
        ("c10d::allreduce_", "comm"),
        ("aten::as_strided", "other"),
    ],
)
def test_names_belong_to_families(name: str, expected: str) -> None:
    assert family(name) == expected and expected in FAMILIES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void at::native::f<4, g<float>>(int, h<2>)", "at::native::f"),
        ("void (anonymous namespace)::softmax_warp<float>(float*)", "softmax_warp"),
        ("aten::addmm, op_id = 1234, seq = 56", "aten::addmm"),
        ("triton_poi_fused_add_12", "triton_poi_fused_add"),
        ("sm90_xmma_gemm_bf16bf16_tn_n_tilesize128x128x64", None),
        ("autograd::engine::evaluate_function: AddmmBackward0", None),
    ],
)
def test_names_are_without_what_differs_between_runs(name: str, expected: str | None) -> None:
    assert normalised(name) == (expected or name)
