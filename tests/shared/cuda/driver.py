"""A stand-in for NVIDIA's driver: of CUDA 12.4, with one GPU that nothing here can use."""

from __future__ import annotations

import subprocess
from pathlib import Path

# The functions that m3i_fast/doctor/probes.py calls.
SOURCE = """
#include <cstring>
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetName(char* name, int size, int) { std::strncpy(name, "Test GPU", size); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return 0;
}
}
"""


def build_driver(folder: Path) -> dict[str, str]:
    """Compile the driver into the folder; return the environment in which it is the driver."""
    source = folder / "driver.cpp"
    source.write_text(SOURCE)
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    return {"LD_LIBRARY_PATH": str(folder)}
