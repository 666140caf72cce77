"""The null CUDA runtime under programs of nvcc: what needs no torch with CUDA."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.trace import peak_device_bytes, read_trace, split_at_marks
from scripts import null_cuda
from tests.shared.cuda import emulator

SITE = Path(sysconfig.get_path("purelib"))
TOOLKIT = SITE / "nvidia" / "cu13"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime and the driver, built against the toolkit of the environment."""
    out = tmp_path_factory.mktemp("null")
    for library in (null_cuda.RUNTIME, null_cuda.DRIVER):
        null_cuda.build_library(library, SITE, out)
    return out


def build(source: Path, text: str, *options: str) -> Path:
    """Compile a program of machine code for 8.0 that takes the runtime as a shared library."""
    source.write_text(text)
    program = source.with_suffix("")
    command = [
        *("nvcc", source, "-o", program, "-cudart", "shared", f"-L{TOOLKIT / 'lib'}"),
        *("-gencode=arch=compute_80,code=sm_80", *options),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return program


def run(program: Path, libraries: Path, **settings: object) -> Any:
    """Run a program on the null runtime; return the JSON that it prints."""
    preload = " ".join(str(path) for path in sorted(libraries.glob("*.so*")))
    named = {f"NULL_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    variables = {**os.environ, "LD_PRELOAD": preload, **named}
    done = subprocess.run([program], env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LAUNCHES = r"""
#include <cstdio>
__global__ void nothing() {}
int main() {
  nothing<<<0, 32>>>();
  std::printf("[%d, ", cudaGetLastError());
  nothing<<<1, 2048>>>();
  std::printf("%d, ", cudaGetLastError());
  nothing<<<1, 32, 64 << 10>>>();
  std::printf("%d, ", cudaGetLastError());
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  auto shared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  std::printf("%d, ", cudaFuncSetAttribute(nothing, shared, most + 1));
  cudaFuncSetAttribute(nothing, shared, most);
  (void)cudaGetLastError();
  nothing<<<1, 32, 64 << 10>>>();
  std::printf("%d]\n", cudaGetLastError());
}
"""


def test_launches_out_of_limits_have_the_errors_of_cuda(tmp_path: Path, libraries: Path) -> None:
    """Codes of driver_types.h: 9 is an invalid configuration, 1 an invalid value."""
    program = build(tmp_path / "launches.cu", LAUNCHES)
    assert run(program, libraries, card="a100") == [9, 9, 1, 1, 0]
    # Machine code for 8.0 alone does not run on a 9.0: 209, no kernel image.
    assert run(program, libraries, card="h100") == [209] * 3 + [1, 209]


STEP = r"""
#include <cstdio>
#include <dlfcn.h>
__global__ void nothing() {}
int main() {
  auto mark = (void (*)(const char*))dlsym(RTLD_DEFAULT, "null_cuda_mark");
  float *device, *pinned, pageable[4] = {1, 2, 3, 4};
  cudaMalloc(&device, 1 << 20);
  cudaMallocHost(&pinned, sizeof pageable);
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  mark("step");
  nothing<<<1, 32, 0, stream>>>();
  cudaMemcpyAsync(device, pageable, sizeof pageable, cudaMemcpyDefault, stream);
  cudaMemcpyAsync(pinned, device, sizeof pageable, cudaMemcpyDefault, stream);
  cudaStreamSynchronize(stream);
  mark("graph");
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  nothing<<<1, 32, 0, stream>>>();
  nothing<<<1, 32, 0, stream>>>();
  int refused = cudaMalloc(&device, 1);
  int ended = cudaStreamEndCapture(stream, &graph);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  nothing<<<1, 32, 0, stream>>>();
  nothing<<<1, 32, 0, stream>>>();
  int good = cudaStreamEndCapture(stream, &graph);
  cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphLaunch(executable, stream);
  int too_much = cudaMalloc(&device, size_t{1} << 50);
  std::printf("[%g, %d, %d, %d, %d]\n", pinned[3], refused, ended, good, too_much);
}
"""


def test_copies_are_made_and_captures_refuse_what_cuda_refuses(
    tmp_path: Path, libraries: Path
) -> None:
    """900: not while a stream is captured; 901: by which the capture is lost; 2: out of memory."""
    trace = tmp_path / "trace.jsonl"
    program = build(tmp_path / "step.cu", STEP)
    assert run(program, libraries, card="a100", trace=trace) == [4, 900, 901, 0, 2]
    records = list(read_trace(trace))
    assert peak_device_bytes(records) == 1 << 20
    _, step, graph = split_at_marks(records)
    assert (step.num_launches, step.streams) == (1, {1})
    assert step.copied_bytes == {("pageable", "device"): 16, ("device", "pinned"): 16}
    assert [wait["call"] for wait in step.of("wait")] == ["cudaStreamSynchronize"]
    assert (graph.num_launches, graph.host_launches) == (2, 1)
    (launch,) = step.of("launch")
    assert (launch["name"], launch["block"], launch["architecture"]) == (
        "nothing()",
        [32, 1, 1],
        80,
    )


# Maps of the same matrices: by the driver's encoder in a program of nvcc, and in a library of the
# emulator. Nobody reads the matrices.
MAPS = r"""
#include <cstdio>
#include "m3i/host/make_tensor_map.h"
using m3i::DType;
using m3i::Swizzle;
void* const base = reinterpret_cast<void*>(0x7f1234567890);
const m3i::TiledMatrix kMatrices[] = {
  // type, base, rows, columns, row_bytes, box_rows, box_columns, swizzle
  {DType::kBFloat16, base, 1000, 72, 144, 64, 64, Swizzle::k128},
  {DType::kFloat16, base, 5, 21841, 43696, 8, 32, Swizzle::k64},
  {DType::kFloat32, base, int64_t{1} << 31, 12, 64, 256, 8, Swizzle::k32},
  {DType::kFloat32, base, 7, 300, 1200, 3, 20, Swizzle::kNone},
};
constexpr int kCount = sizeof(kMatrices) / sizeof(kMatrices[0]);
extern "C" __attribute__((visibility("default"))) int encode(m3i::TensorMap* maps) {
  int errors = 0;
  for (int i = 0; i < kCount; ++i) errors += m3i::make_tensor_map(&maps[i], kMatrices[i]) != 0;
  return errors;
}
#ifndef M3I_EMULATOR
int main() {
  m3i::TensorMap maps[kCount];
  std::printf("[%d", encode(maps));
  for (const m3i::TensorMap& map : maps) {
    for (unsigned long long word : map.opaque) std::printf(", %llu", word);
  }
  std::printf("]\n");
}
#endif
"""
NUM_MAPS = MAPS.count("  {DType")
TYPES = {7: (4, True), 9: (2, False), 6: (2, False)}  # of cuda.h: bytes, whether float32
SWIZZLE_BYTES = [16, 32, 64, 128]  # of cuda.h's CUtensorMapSwizzle


def encoded_by_driver(folder: Path, include: Path, libraries: Path) -> list[tuple[Any, ...]]:
    """What the program hands to cuTensorMapEncodeTiled, in the emulator's terms.

    After them rank, element strides, interleaving and what fills the elements outside.
    """
    program = build(folder / "maps.cu", MAPS, "-std=c++17", f"-I{include}")
    errors, *words = run(program, libraries, card="h100")
    assert errors == 0
    maps = []
    for fields in struct.iter_unpack("<10Q10I6B2x", struct.pack(f"<{len(words)}Q", *words)):
        address, sizes, strides = fields[0], fields[1:6], fields[6:10]
        box, steps = fields[10:15], fields[15:20]
        kind, rank, interleave, swizzle, _, fill = fields[20:]  # promotion is of speed alone
        assert not any((*sizes[2:], *strides[1:], *box[2:], *steps[2:]))
        matrix = (address, sizes[1], sizes[0], strides[0], box[1], box[0], *TYPES[kind])
        others = rank, steps[:2], interleave, fill
        maps.append((*matrix, SWIZZLE_BYTES[swizzle], *others))
    return maps


def encoded_by_emulator(folder: Path) -> list[tuple[Any, ...]]:
    """Likewise. The emulator's boxes are of two dimensions and all that lies in them."""
    source = folder / "emulated" / "maps.cu"
    source.parent.mkdir()
    source.write_text(MAPS)
    library = emulator.build_kernels([source], include=[source.parent], architecture=90)
    memory = ctypes.create_string_buffer(128 * NUM_MAPS)
    assert ctypes.CDLL(str(library)).encode(memory) == 0
    maps = [memory.raw[128 * i : 128 * i + 128] for i in range(NUM_MAPS)]
    fields = [struct.unpack_from("<8x4Q3i?3xi", one) for one in maps]
    return [(*matrix, 2, (1, 1), 0, 0) for matrix in fields]


def test_tensor_maps_are_those_of_the_emulator(tmp_path: Path, libraries: Path) -> None:
    driver = encoded_by_driver(tmp_path, emulator.CUDA / "include", libraries)
    assert len(driver) == NUM_MAPS and driver == encoded_by_emulator(tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("CU_TENSOR_MAP_SWIZZLE_64B", "CU_TENSOR_MAP_SWIZZLE_128B", id="swizzle"),
        pytest.param("{static_cast<cuuint32_t>(matrix.box_columns),", "{64u,", id="box"),
        pytest.param("steps[] = {1, 1}", "steps[] = {1, 2}", id="element strides"),
        pytest.param("<cuuint64_t>(matrix.rows)}", "<cuuint64_t>(matrix.rows + 1)}", id="size"),
        pytest.param(
            "<cuuint64_t>(matrix.row_bytes)", "<cuuint64_t>(matrix.row_bytes + 16)", id="stride"
        ),
        pytest.param("OOB_FILL_NONE", "OOB_FILL_NAN_REQUEST_ZERO_FMA", id="fill"),
        pytest.param("MAP_DATA_TYPE_BFLOAT16", "MAP_DATA_TYPE_FLOAT32", id="type"),
    ],
)
def test_planted_fault_of_a_tensor_map_is_seen(
    tmp_path: Path, libraries: Path, before: str, after: str
) -> None:
    include = tmp_path / "include"
    shutil.copytree(emulator.CUDA / "include", include)
    header = include / "m3i/host/make_tensor_map.h"
    text = header.read_text()
    assert text.count(before) == 1
    header.write_text(text.replace(before, after))
    assert encoded_by_driver(tmp_path, include, libraries) != encoded_by_emulator(tmp_path)


def test_every_name_of_the_runtime_is_there(libraries: Path) -> None:
    real = null_cuda.exported_names(TOOLKIT / "lib" / null_cuda.RUNTIME.soname)
    ours = null_cuda.exported_names(libraries / null_cuda.RUNTIME.soname)
    assert len(real) > 200 and real <= ours


def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, libraries: Path) -> None:
    program = build(tmp_path / "launches.cu", LAUNCHES)
    for name, value in (("card", "h900"), ("fail", "cudaMalloc"), ("devices", "-1")):
        with pytest.raises(AssertionError, match=rf"NULL_CUDA_{name.upper()}: expected .*{value}"):
            run(program, libraries, **{name: value})


def test_what_is_generated_records_or_refuses(tmp_path: Path) -> None:
    computing, runtime = null_cuda.OTHERS[0], null_cuda.RUNTIME
    text = null_cuda.generated_source(computing, {"cublasSgemm_v2", "cublasSetMathMode"})
    assert 'cublasSgemm_v2(void* first) { return null_cuda_library_call("cublas"' in text
    assert "cublasSetMathMode(void*) { return 0; }" in text
    text = null_cuda.generated_source(runtime, {"cudaArrayGetInfo"})
    assert 'return null_cuda_unsupported("cudart", "cudaArrayGetInfo");' in text
    text = null_cuda.generated_source(null_cuda.NVML, {"nvmlUnitGetCount"})
    assert 'return (null_cuda_unsupported("nvml", "nvmlUnitGetCount"), 3L);' in text
    variables = null_cuda.environment(tmp_path, card="a100", devices=2)
    assert variables["NULL_CUDA_CARD"] == "a100" and variables["NULL_CUDA_DEVICES"] == "2"
    assert len(variables["LD_PRELOAD"].split()) == len(null_cuda.LIBRARIES)
