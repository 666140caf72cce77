"""Builds an op's CUDA sources for the host and runs its kernels under cuda/emulator.

`emulated("mask_mix")` is a context in which torch.ops.m3i.mask_mix runs the emulated CUDA kernel on
CPU tensors, below the op's own fake and autograd: every test of the op then tests the CUDA kernel.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scripts import checks

ROOT = Path(__file__).parents[3]
CUDA = ROOT / "cuda"
EMULATOR = CUDA / "emulator"
BUILD = checks.CACHE / "emulator"
KERNELS = Path(__file__).parent / "kernels"  # of no op: for the tests alone
# Libraries are shared by checkouts, so they have these names for the folders of their sources.
CHECKOUT, COPIES = Path("/checkout"), Path("/copies")

SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES = 0, 1, 9, 701

_COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
_COMMON += [f"-ffile-prefix-map={ROOT}={CHECKOUT}"]
_KERNEL = [
    *_COMMON,
    # As nvcc: its header first, and its pragmas
    *("-x", "c++", "-D__CUDACC__", "-include", "cuda_runtime.h", "-Wno-unknown-pragmas"),
    # Shared variables are told apart by their library
    "-fno-gnu-unique",
    # One access of the source stays one: a wider one could be misaligned
    *("-O2", "-g1", "-fno-tree-vectorize", "-fno-store-merging"),
    # The return address of a call is in its caller
    "-fno-optimize-sibling-calls",
    # Only what the source fuses is fused: the same bits on every CPU
    "-ffp-contract=off",
    *("-fsanitize=thread,alignment,bounds", "--param=tsan-instrument-func-entry-exit=0"),
    "--param=tsan-distinguish-volatile=1",
]
_WRAPPED = ("memcpy", "memmove", "memset", "__assert_fail")


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _torch_root() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _digest(files: Sequence[Path], *options: str) -> str:
    digest = hashlib.sha256("\0".join(options).encode())
    digest.update(Path(__file__).read_bytes())
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _headers() -> list[Path]:
    folders = (EMULATOR / "include", CUDA / "include")
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def _cached(name: str, build: Callable[[Path, Path], None]) -> Path:
    """Return the file of this name in the cache; build(file, scratch folder) makes it if absent.

    Two processes may both make it; the one that ends last replaces the other's.
    """
    file = BUILD / name
    if not file.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / name
            build(made, Path(folder))
            os.replace(made, file)
    return file


@cache
def runtime() -> ctypes.CDLL:
    """The emulator's runtime, one copy a process, whatever number of kernels run on it."""
    sources = sorted([*(EMULATOR / "runtime").rglob("*.cpp"), EMULATOR / "torch" / "allocator.cpp"])

    def build(library: Path, folder: Path) -> None:
        torch_root = _torch_root()
        options = [*_COMMON, "-O3", f"-I{EMULATOR}", f"-I{EMULATOR / 'include'}"]
        options += ["-isystem", f"{torch_root}/include"]
        link = ["-shared", "-ldl", f"-L{torch_root}/lib", "-lc10"]
        _run("g++", *options, *sources, "-o", library, *link, f"-Wl,-soname,{library.name}")

    files = [*sources, *(EMULATOR / "runtime").rglob("*.h"), *_headers()]
    library = _cached(f"runtime-{_digest(files, torch.__version__)}.so", build)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.m3i_emulator_report.restype = ctypes.c_char_p
    return loaded


def _compile_kernels(source: Path, name: str, options: list[str]) -> Path:
    """To an object, kept under a name, in which an untouchable gap follows each shared variable.

    C++ has no way to ask for one, so it is added to the assembler's text: the only thread-local
    variables of a kernel's source are its shared ones. Kernels know no torch: every one shares it.
    """

    def build(made: Path, _: Path) -> None:
        assembly = made.with_suffix(".s")
        _run("g++", *_KERNEL, *options, "-S", source, "-o", assembly)
        # A .zero is all there is of a variable in a section .tbss.
        sections = re.split(r"(?=\n\t\.section\t)", assembly.read_text())
        for i, section in enumerate(sections):
            if section.startswith("\n\t.section\t.tbss"):
                sections[i] = re.sub(r"(\n\t\.zero\t\d+)", r"\1 + 64", section)
        assembly.write_text("".join(sections))
        _run("g++", "-c", assembly, "-o", made)

    return _cached(name, build)


def _compile_host(source: Path, options: list[str]) -> Path:
    """A source that uses torch and the emulator's host side, to an object that is kept.

    Its own headers are those of its folder and the rooms below that.
    """
    options = [*_COMMON, "-O1", *options, "-isystem", f"{_torch_root()}/include"]
    options += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    files = [source, *source.parent.rglob("*.h"), *_headers()]
    return _cached(
        f"{source.stem}-{_digest(files, torch.__version__)}.o",
        lambda made, _: _run("g++", *options, "-c", source, "-o", made),
    )


def _room_of(source: Path, include: Sequence[Path]) -> Path:
    """The folder whose files a source may include: below an `include` folder, or its own."""
    for folder in include:
        if folder in source.parent.parents:
            return folder / source.relative_to(folder).parts[0]
    return source.parent


def build_kernels(
    kernels: Sequence[Path],
    host: Sequence[Path] = (),
    *,
    include: Sequence[Path] = (CUDA,),
    architecture: int = 80,
) -> Path:
    """A library of `.cu` sources, instrumented, and of host sources that use torch.

    Its `include` folders are those where the op's own folder is found. Those outside of this
    checkout go by the name of COPIES in the library, which is kept when they are gone.
    """
    runtime_library = Path(runtime()._name)
    rooms = {_room_of(source, include) for source in [*kernels, *host]}
    files = [path for room in rooms for path in room.rglob("*.*")]
    digest = _digest([*files, *_headers()], str(architecture))
    room = _room_of(kernels[0], include).name if host else kernels[0].stem
    name = f"{room}-{_digest([], digest, runtime_library.name)}.so"
    options = [f"-I{EMULATOR / 'include'}", f"-I{CUDA / 'include'}", *(f"-I{i}" for i in include)]
    options += ["-DM3I_EMULATOR"]
    options += [f"-ffile-prefix-map={i}={COPIES}" for i in include if ROOT not in i.parents]

    def build(library: Path, folder: Path) -> None:
        for_kernels = [*options, f"-D__CUDA_ARCH__={architecture}0"]
        objects = [
            _compile_kernels(
                source, f"{room}-{source.parent.name}-{source.stem}-{digest}.o", for_kernels
            )
            for source in kernels
        ]
        objects += [_compile_host(source, options) for source in host]
        link = ["-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", runtime_library, "-lm"]
        link += [f"-Wl,--wrap={name}" for name in _WRAPPED]
        if host:
            link += [f"-L{_torch_root()}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
            objects.append(folder / "namespace.cpp")
            value = f'm3i_emulated_namespace[] = "{_namespace_of(library)}"'
            objects[-1].write_text(
                f'extern "C" {{ extern const char m3i_emulated_namespace[]; const char {value}; }}'
            )
        _run("g++", *objects, *link, "-o", library)

    return _cached(name, build)


# ---- Ops ----------------------------------------------------------------------------------------


def _namespace_of(library: Path) -> str:
    """The operators' namespace of a library: two builds of one op are two sets of operators."""
    return "m3i_" + library.stem.replace("-", "_")


@cache
def _load_op(op: str, folder: Path, architecture: int) -> tuple[str, torch.library.Library]:
    """The namespace where the kernels of op_cuda.cpp are registered, with the schemas of m3i."""
    source = folder / op
    host = [source / "op_cuda.cpp", EMULATOR / "torch" / "shims.cpp"]
    kernels = sorted(source.glob("sm*/*.cu"))
    library = build_kernels(kernels, host, include=[folder], architecture=architecture)
    return _register(library, tuple(_registered_in(source / "op_cuda.cpp")))


@cache
def _register(library: Path, names: tuple[str, ...]) -> tuple[str, torch.library.Library]:
    """Once a library, which several folders of the same sources share."""
    definitions = torch.library.Library(_namespace_of(library), "DEF")
    for name in names:
        schema = str(getattr(torch.ops.m3i, name).default._schema)
        definitions.define(schema.removeprefix("m3i::"))
    ctypes.CDLL(str(library))
    return _namespace_of(library), definitions


def _registered_in(source: Path) -> list[str]:
    return re.findall(r'\.impl\("(\w+)"', source.read_text())


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Tensors made within are memory that a kernel may access, up to their last byte."""
    runtime().m3i_emulator_guard_torch(True)
    try:
        yield
    finally:
        runtime().m3i_emulator_guard_torch(False)


def guarded(tensor: Tensor) -> Tensor:
    """A copy in guarded memory, of the same strides and the same address modulo 64."""
    shift = tensor.data_ptr() % 64
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = (extent + 1) * tensor.element_size() if tensor.numel() else 0
    with guarded_memory():
        memory = torch.empty(shift + size, dtype=torch.uint8)
    view = memory[shift:].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return view.copy_(tensor)


def to_c(argument: Tensor | int | float) -> object:
    """A launcher's argument for ctypes: a float stays one, of C's kind."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


def last_report() -> str:
    """What the runtime said last of a kernel that did something wrong."""
    return runtime().m3i_emulator_report().decode()


def _emulated_kernel(emulated_op: torch._ops.OpOverload) -> Callable[..., object]:
    """A function of CPU tensors, which writes to those that the schema says are written."""
    written = [
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in emulated_op._schema.arguments
    ]

    def call(*arguments: object) -> object:
        copies = pytree.tree_map_only(Tensor, guarded, arguments)
        with guarded_memory():
            result = emulated_op(*copies)
        # torch leaves out arguments at the end that have their default
        given = written[: len(arguments)]
        for argument, copy, described in zip(arguments, copies, given, strict=True):
            if described and isinstance(argument, Tensor):
                argument.copy_(copy)
        return pytree.tree_map_only(Tensor, torch.clone, result)

    return call


@contextmanager
def emulated_gpu(architecture: int) -> Iterator[None]:
    """Within it, kernels are launched on a GPU of this compute capability, times ten."""
    runtime().m3i_emulator_set_architecture(architecture)
    try:
        yield
    finally:
        runtime().m3i_emulator_set_architecture(80)


@contextmanager
def delayed_copies() -> Iterator[None]:
    """Within it, tensor copies land as late as they can, the last one first."""
    runtime().m3i_emulator_delay_copies(True)
    try:
        yield
    finally:
        runtime().m3i_emulator_delay_copies(False)


@contextmanager
def clusters_at_once(number: int) -> Iterator[None]:
    """Within it, so many clusters of a launch run in turns, each until it waits or arrives.

    A GPU orders them by what the kernel waits for alone, and so does the race check.
    """
    runtime().m3i_emulator_run_clusters(number)
    try:
        yield
    finally:
        runtime().m3i_emulator_run_clusters(1)


def emulated_operators(
    op: str, *, folder: Path = CUDA, architecture: int = 80
) -> dict[str, Callable[..., object]]:
    """What folder/<op>/op_cuda.cpp registers, by name, as functions of CPU tensors.

    They are to be called within `emulated_gpu` of the same architecture.
    """
    namespace, _ = _load_op(op, folder, architecture)
    return {
        name: _emulated_kernel(getattr(getattr(torch.ops, namespace), name).default)
        for name in _registered_in(folder / op / "op_cuda.cpp")
    }


@contextmanager
def logged_launches(file: Path, *, run: bool = True) -> Iterator[None]:
    """Within it, each launch is a line of JSON at the end of the file (runtime/launch/log.h).

    run: False only checks and logs launches, so that those of large problems can be counted.
    """
    runtime().m3i_emulator_log_launches(str(file).encode())
    runtime().m3i_emulator_skip_launches(not run)
    try:
        yield
    finally:
        runtime().m3i_emulator_log_launches(None)
        runtime().m3i_emulator_skip_launches(False)


@contextmanager
def emulated(op: str, *, folder: Path = CUDA, architecture: int = 80) -> Iterator[None]:
    """Within it, m3i's ops of folder/<op>/op_cuda.cpp run their CUDA kernels on CPU tensors."""
    operators = emulated_operators(op, folder=folder, architecture=architecture)
    override = torch.library.Library("m3i", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name, kernel in operators.items():
            override.impl(name, kernel, "CPU", allow_override=True)
    try:
        with emulated_gpu(architecture):
            yield
    finally:
        override._destroy()
