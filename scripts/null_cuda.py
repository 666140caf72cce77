"""Build the null CUDA runtime (cuda/null) for a torch with CUDA, and run programs on it.

    build/cuda/bin/python -m scripts.null_cuda [SETTING=VALUE ...] COMMAND ...

A setting is what follows NULL_CUDA_ in lower case: card=a100 trace=trace.jsonl.

Standard library alone: it is run by the python of the environment that it is built for. What the
sources do not define is generated from the names that the environment's own libraries export.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "cuda" / "null"

# Entries that neither compute nor fill what they are given: they succeed, and are not recorded.
SETUP = re.compile(r"(Create|Destroy|Set|Init|Descriptor|Attribute|Free|Register|Logger)")

CUDA_NOT_SUPPORTED = 801  # of the runtime and the driver


@dataclass(frozen=True)
class Library:
    """One library that the null runtime stands for."""

    soname: str
    folder: str  # below site-packages/nvidia
    name: str  # of the library in the trace
    sources: tuple[str, ...]  # below cuda/null
    computes: bool = True  # a generated entry succeeds and is recorded; else it is refused
    not_supported: int = CUDA_NOT_SUPPORTED  # what a refused entry returns


RUNTIME = Library(
    "libcudart.so.13",
    "cu13/lib",
    "cudart",
    tuple(f"runtime/{n}.cpp" for n in ("device", "launch", "library", "memory", "stream", "trace")),
    computes=False,
)
DRIVER = Library("libcuda.so.1", "", "cuda", ("libraries/driver.cpp",), computes=False)
NVML = Library(
    "libnvidia-ml.so.1", "", "nvml", ("libraries/nvml.cpp",), computes=False, not_supported=3
)
NCCL_SOURCES = tuple(f"libraries/{n}.cpp" for n in ("nccl", "nccl_ranks", "nccl_reduce"))
OTHERS = (
    Library("libcublas.so.13", "cu13/lib", "cublas", ("libraries/cublas.cpp",)),
    Library("libcublasLt.so.13", "cu13/lib", "cublasLt", ("libraries/cublaslt.cpp",)),
    Library("libcudnn.so.9", "cudnn/lib", "cudnn", ("libraries/cudnn.cpp",)),
    Library("libcusolver.so.12", "cu13/lib", "cusolver", ("libraries/cusolver.cpp",)),
    Library("libcupti.so.13", "cu13/lib", "cupti", ("libraries/cupti.cpp",), computes=False),
    Library("libnccl.so.2", "nccl/lib", "nccl", NCCL_SOURCES, computes=False),
)
LIBRARIES = (DRIVER, RUNTIME, NVML, *OTHERS)


def exported_names(library: Path) -> set[str]:
    """Return the functions that a shared library exports."""
    listing = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True)
    lines = [line.split() for line in listing.splitlines()]
    return {line[2].split("@")[0] for line in lines if len(line) == 3 and line[1] in "TW"}


def driver_names(site: Path) -> set[str]:
    """Return the driver's functions, which no wheel carries: those of cuda.h."""
    header = (site / "nvidia" / "cu13" / "include" / "cuda.h").read_text()
    declared = re.findall(r"CUDAAPI\s*\n?\s*(cu\w+)\(", header)
    return {*declared, *re.findall(r"#define cu\w+\s+(cu\w+_v\d+)", header)}


def nvml_names(site: Path) -> set[str]:
    """Return NVML's functions, which no wheel carries: those that nvidia-ml-py looks up."""
    module = (site / "pynvml.py").read_text()
    return set(re.findall(r"_nvmlGetFunctionPointer\([\"'](nvml\w+)", module))


def wanted_names(library: Library, site: Path) -> set[str]:
    """Return the functions that callers of the real library may look for."""
    if library is NVML:
        return nvml_names(site)
    if library is DRIVER:
        return driver_names(site)
    return exported_names(site / "nvidia" / library.folder / library.soname)


def own_names(library: Library) -> set[str]:
    """Return the functions that the sources of a library define."""
    text = "\n".join((SOURCES / source).read_text() for source in library.sources)
    return set(re.findall(r"M3I_EXPORT[^;(]*?(\w+)\(", text))


def generated_source(library: Library, names: set[str]) -> str:
    """Return C++ that defines the names: recorded, silent or refused."""
    lines = [
        'extern "C" long null_cuda_library_call(const char*, const char*, const void*);',
        'extern "C" long null_cuda_unsupported(const char*, const char*);',
    ]
    for name in sorted(names):
        if not library.computes:
            result = f'null_cuda_unsupported("{library.name}", "{name}")'
            if library.not_supported != CUDA_NOT_SUPPORTED:
                result = f"({result}, {library.not_supported}L)"
        elif SETUP.search(name):
            result = "0"
        else:
            result = f'null_cuda_library_call("{library.name}", "{name}", first)'
        argument = "void* first" if "first" in result else "void*"
        lines.append(
            f'extern "C" __attribute__((visibility("default"))) long {name}({argument}) '
            f"{{ return {result}; }}"
        )
    return "\n".join(lines) + "\n"


def build_library(library: Library, site: Path, out: Path) -> None:
    """Compile one library into `out`, under the name that its callers ask for."""
    rest = out / f"{library.name}_rest.cpp"
    others = wanted_names(library, site) - own_names(library)
    rest.write_text(generated_source(library, others))
    versions = out / f"{library.name}.map"
    versions.write_text(f"{library.soname} {{ global: *; }};\n")
    headers = [site / "nvidia" / name / "include" for name in ("cu13", "cudnn", "nccl")]
    includes = [f"-I{SOURCES}", *(f"-isystem{folder}" for folder in headers)]
    against = [] if library is RUNTIME else [str(out / RUNTIME.soname)]
    script = [f"-Wl,--version-script={versions}"] if library.folder else []
    command = [
        *("g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", *includes),
        *(str(SOURCES / source) for source in library.sources),
        str(rest),
        *("-o", str(out / library.soname), f"-Wl,-soname,{library.soname}", *script, *against),
        *("-Wl,-rpath,$ORIGIN", "-ldl", "-lpthread"),
    ]
    subprocess.run(command, check=True)


def build(site: Path, out: Path) -> None:
    """Build all libraries for the torch in `site` (site-packages) into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for library in (RUNTIME, DRIVER, NVML, *OTHERS):
        build_library(library, site, out)


def environment(libraries: Path, **settings: object) -> dict[str, str]:
    """Return the environment in which a program runs on the null runtime.

    settings: what follows NULL_CUDA_ in upper case, as card="a100", devices=2, trace=PATH.
    """
    preload = " ".join(str(libraries / library.soname) for library in LIBRARIES)
    named = {f"NULL_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
    return {**os.environ, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1", **named}


# As python runs `-c CODE`, `-m MODULE` and FILE.
_PROGRAM = """
import os, runpy, sys
first, *words = sys.argv[1:]
try:
    if first == "-c":
        sys.argv = [first, *words[1:]]
        exec(compile(words[0], "<string>", "exec"))
    elif first == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *words], os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")
finally:
    from m3i_fast.backward_threads import release_last_backward
    release_last_backward()
"""


def program(*words: object) -> list[str]:
    """Return the command of a test's program, whose words are those of `python`.

    Its end is that of the package's own programs, so that none of them forgets what autograd needs.
    """
    return [sys.executable, "-c", _PROGRAM, *map(str, words)]


def main() -> None:
    """Run a command on the null runtime of build/null, in the place of this process."""
    arguments, settings = sys.argv[1:], {}
    while arguments and "=" in arguments[0]:
        name, _, value = arguments.pop(0).partition("=")
        settings[name] = value
    if not arguments:
        sys.exit(f"expected a command after the settings, got none\n\n{__doc__}")
    os.execvpe(arguments[0], arguments, environment(ROOT / "build" / "null", **settings))


if __name__ == "__main__":
    main()
