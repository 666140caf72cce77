"""mask_mix's CUDA kernel, as far as a compiler can test it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.shared.cuda.nvcc import CUDA, compile_options, run_nvcc

# Bytes of one pixel of the output, by the type in a kernel's mangled name.
OUT_BYTES = {"f": 4, "NS_8BFloat16E": 2}
WIDTHS = {"v4.u32": 16, "v2.u32": 8, "u32": 4, "u16": 2, "u8": 1}


def test_policy(tmp_path: Path) -> None:
    source = Path(__file__).with_name("policy.cu")
    run_nvcc(*compile_options("80"), "-c", source, "-o", tmp_path / "policy.o")


def test_a_thread_moves_its_pixels_in_the_widest_accesses(tmp_path: Path) -> None:
    """The compiler has split wide stores before; the PTX shows that it has not."""
    ptx = tmp_path / "mask_mix.ptx"
    options = [o for o in compile_options() if o != "-O3"]
    run_nvcc(*options, "-arch=compute_80", "-ptx", CUDA / "mask_mix/sm80/launch.cu", "-o", ptx)
    entries = re.split(r"\.entry ", ptx.read_text())[1:]
    assert len(entries) == 8
    for entry in entries:
        name = re.match(r"_ZN3m3i8mask_mix15mask_mix_kernelI(\w+?)Li(\d+)E", entry)
        assert name, entry[:80]
        pixels = int(name[2])
        loads = [WIDTHS[width] for width in re.findall(r"ld\.global\.nc\.(\S+)", entry)]
        stores = [WIDTHS[width] for width in re.findall(r"st\.global\.wb\.(\S+)", entry)]
        out_bytes = pixels * OUT_BYTES[name[1]]
        assert loads == [pixels] * 3, name[0]
        assert stores == [min(16, out_bytes)] * (3 * max(1, out_bytes // 16)), name[0]
        assert len(re.findall(r"st\.global", entry)) == len(stores)
