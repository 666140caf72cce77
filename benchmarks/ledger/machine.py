"""The machine and the libraries that a row of the ledger was measured with.

Names of hosts and cards are hashed: rows of one machine can be told from those of another, and say
no more of it. Needs nothing but torch; of a card it also asks nvidia-smi, where that is installed.
"""

from __future__ import annotations

import csv
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from m3i_fast.observe.environment import gpu_name

# Names of distributions; of those with several the installed one counts.
DISTRIBUTIONS = {
    "te": ("transformer-engine",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "flash_attn": ("flash-attn", "flash-attn-3"),
    "torchao": ("torchao",),
}
QUERY = "uuid,driver_version,power.limit,clocks.max.sm,vbios_version"


def hashed(name: str) -> str:
    """Return sixteen hex digits that stand for a name."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


@cache
def machine(cpu: str, num_cores: int) -> dict[str, Any]:
    """Return host, cpu, num_cores, ram_bytes, gpu (its name), num_gpus and facts of each card."""
    cards = list(_cards())
    return {
        "host": hashed(platform.node()),
        "cpu": cpu,
        "num_cores": num_cores,
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": cards[0]["name"] if cards else None,
        "num_gpus": len(cards),
        "cards": cards,
    }


def _cards() -> Iterator[dict[str, Any]]:
    """Each card that torch sees; fields that nvidia-smi does not tell are absent."""
    told = _nvidia_smi() if torch.cuda.is_available() else {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
        yield {
            "name": gpu_name(index),
            "memory_bytes": properties.total_memory,
            **({"uuid_hash": hashed(uuid)} if uuid else {}),
            **told.get(uuid, {}),
        }


def _nvidia_smi() -> dict[str, dict[str, Any]]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_nvidia_smi(shown.stdout) if shown.returncode == 0 else {}


def parse_nvidia_smi(text: str) -> dict[str, dict[str, Any]]:
    """Return UUID without prefix -> driver, power_limit_w, max_sm_clock_mhz, vbios; no `[N/A]`."""
    fields = {}
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(cells) != len(QUERY.split(",")):
            continue
        uuid, driver, power, clock, vbios = (cell.strip() for cell in cells)
        numbers = {"power_limit_w": _number(power), "max_sm_clock_mhz": _number(clock)}
        words = {"driver": _word(driver), "vbios": _word(vbios)}
        known = {name: value for name, value in {**words, **numbers}.items() if value is not None}
        fields[uuid.removeprefix("GPU-")] = known
    return fields


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # [N/A], [Insufficient Permissions]
        return None


def _word(cell: str) -> str | None:
    return None if cell.startswith("[") else cell


def machine_class(machine: Mapping[str, Any]) -> str:
    """Return what machines must have in common for their times to be compared.

    CPU and its cores, name and number of cards, and their power limit where it is known.
    """
    words = [f"{machine['num_cores']} cores of {machine['cpu']}"]
    if machine["num_gpus"]:
        words.insert(0, f"{machine['num_gpus']} x {machine['gpu']}")
        limits = {card.get("power_limit_w") for card in machine.get("cards") or []} - {None}
        if limits:
            words[0] += f" at {min(limits):g} W"
    return ", ".join(words)


@cache
def versions() -> dict[str, str]:
    """Return the versions of python, torch, cuda, cudnn, nccl and of optional libraries found."""
    releases = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        releases["cuda"] = torch.version.cuda
        if cudnn := torch.backends.cudnn.version():
            releases["cudnn"] = str(cudnn)
        if torch.distributed.is_nccl_available():
            releases["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name, distributions in DISTRIBUTIONS.items():
        if version := next(filter(None, map(_installed, distributions)), None):
            releases[name] = version
    # PyPI's apex is another project: NVIDIA's is known by its compiled module.
    if find_spec("amp_C") and (version := _installed("apex")):
        releases["apex"] = version
    return releases


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
