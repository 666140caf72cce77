"""The null CUDA runtime under programs of nvcc: what needs no torch with CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.trace import peak_device_bytes, read_trace, split_at_marks
from scripts import null_cuda

SITE = Path(sysconfig.get_path("purelib"))
TOOLKIT = SITE / "nvidia" / "cu13"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime and the driver, built against the toolkit of the environment."""
    out = tmp_path_factory.mktemp("null")
    for library in (null_cuda.RUNTIME, null_cuda.DRIVER):
        null_cuda.build_library(library, SITE, out)
    return out


def build(source: Path, text: str) -> Path:
    """Compile a program of machine code for 8.0 that takes the runtime as a shared library."""
    source.write_text(text)
    program = source.with_suffix("")
    command = [
        *("nvcc", source, "-o", program, "-cudart", "shared", f"-L{TOOLKIT / 'lib'}"),
        "-gencode=arch=compute_80,code=sm_80",
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
