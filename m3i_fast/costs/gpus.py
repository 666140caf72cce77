"""What the makers publish of cards and nodes: rates are peaks, which no program reaches.

Dense rates, without sparsity, and 10^9 bytes to a GB. From NVIDIA's data sheets of the A100 80 GB
SXM, H100 SXM, H200 SXM and DGX B200 (an eighth of the node: 180 GB, 8 TB/s, 36 PFLOP/s of sparse
FP8 / 16 for BF16 dense): BF16 312, 989, 989 and 2,250 TFLOP/s; HBM 2,039, 3,350, 4,800 and
8,000 GB/s; NVLink 600, 900, 900 and 1,800 GB/s, which are both directions together. The same of the
H100 PCIe, H100 NVL and H200 NVL: BF16 756, 835 and 835 TFLOP/s; HBM 2,000, 3,900 and 4,800 GB/s;
NVLink (a bridge) 600, 600 and 900 GB/s. Other A100s compute and talk alike: HBM 1,555 GB/s with
40 GB, 1,935 GB/s with 80 GB on PCIe. FP8 is twice BF16 on all that have it. Networks are
an assumption: one adapter a GPU, as in DGX A100 (200 Gbit/s), DGX H100, H200 and B200 (400 Gbit/s).
Cores are those of these nodes, 128 and 112, for one of their eight cards; beside the PCIe and NVL
cards 14 are assumed. Engines for JPEG: five in an A100 (NVIDIA's paper on the architecture), seven
in an H100 and H200 (its guide to MIG); a B200 is assumed to have as many.
Multiprocessors: 108, 132, 114 (H100 PCIe) and 148; their clock is the one at which the BF16 peak
holds, by 2,048, 4,096 and 8,192 operations of a multiprocessor in a clock.
The row `cpu` is an assumption throughout: two cores of a server, 10 Gbit/s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# Share of a card's rate that matrix products reach: of large ViTs in bf16, not measured here.
UTILISATION = 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Hold the published rates of a card, in operations and bytes a second."""

    name: str
    bf16_flop_s: float
    fp32_flop_s: float
    """Rate of fp32 without tensor cores."""
    memory_bytes: float | None
    """Size of the card's memory; None where it is not known."""
    memory_byte_s: float
    nvlink_byte_s: float
    """Rate of NVLink in one direction."""
    network_byte_s: float
    """Rate in one direction of the network adapter of one GPU."""
    formats: tuple[str, ...] = ()
    """FP8 recipes that the card computes natively."""
    workspace_bytes: int = 32 * 2**20
    """Size of the workspace that torch's allocator gives cuBLAS, 8 x 4 MiB from 9.0 up."""
    jpeg_engines: int = 0
    """Engines that decode baseline JPEGs."""
    multiprocessors: int = 0
    clock_hz: float = 0.0
    """Clock of the multiprocessors."""
    cores: int
    """CPU cores of the maker's node for one card."""

    @property
    def is_gpu(self) -> bool:
        """Return whether this is a GPU, and not the row `cpu`."""
        return self.name != "cpu"

    @property
    def fp8_flop_s(self) -> float | None:
        """Return the rate of FP8, twice that of BF16, or None where the card has none."""
        return 2 * self.bf16_flop_s if self.formats else None


HOPPER = ("fp8_current", "fp8_delayed", "fp8_block")
BLACKWELL = ("fp8_current", "fp8_delayed", "mxfp8")

_A100 = Card(
    name="a100",
    bf16_flop_s=312e12,
    fp32_flop_s=19.5e12,
    memory_bytes=80e9,
    memory_byte_s=2039e9,
    nvlink_byte_s=300e9,
    network_byte_s=25e9,
    workspace_bytes=8 * 2**20 + 128 * 2**10,
    jpeg_engines=5,
    multiprocessors=108,
    clock_hz=1.41e9,
    cores=16,
)

_H100 = Card(
    name="h100",
    bf16_flop_s=989e12,
    fp32_flop_s=67e12,
    memory_bytes=80e9,
    memory_byte_s=3350e9,
    nvlink_byte_s=450e9,
    network_byte_s=50e9,
    formats=HOPPER,
    jpeg_engines=7,
    multiprocessors=132,
    clock_hz=1.83e9,
    cores=14,
)
_H100_NVL = Card(
    name="h100_nvl",
    bf16_flop_s=835e12,
    fp32_flop_s=60e12,
    memory_bytes=94e9,
    memory_byte_s=3900e9,
    nvlink_byte_s=300e9,
    network_byte_s=50e9,
    formats=HOPPER,
    jpeg_engines=7,
    multiprocessors=132,
    clock_hz=1.544e9,
    cores=14,
)

CARDS = {
    card.name: card
    for card in (
        _A100,
        replace(_A100, name="a100_40gb", memory_bytes=40e9, memory_byte_s=1555e9),
        replace(_A100, name="a100_pcie", memory_byte_s=1935e9),
        _H100,
        replace(_H100, name="h200", memory_bytes=141e9, memory_byte_s=4800e9),
        Card(
            name="h100_pcie",
            bf16_flop_s=756e12,
            fp32_flop_s=51e12,
            memory_bytes=80e9,
            memory_byte_s=2000e9,
            nvlink_byte_s=300e9,
            network_byte_s=50e9,
            formats=HOPPER,
            jpeg_engines=7,
            multiprocessors=114,
            clock_hz=1.62e9,
            cores=14,
        ),
        _H100_NVL,
        replace(
            _H100_NVL,
            name="h200_nvl",
            memory_bytes=141e9,
            memory_byte_s=4800e9,
            nvlink_byte_s=450e9,
        ),
        Card(
            name="b200",
            bf16_flop_s=2250e12,
            fp32_flop_s=80e12,
            memory_bytes=180e9,
            memory_byte_s=8000e9,
            nvlink_byte_s=900e9,
            network_byte_s=50e9,
            formats=BLACKWELL,
            jpeg_engines=7,
            multiprocessors=148,
            clock_hz=1.856e9,
            cores=14,
        ),
        Card(
            name="cpu",
            bf16_flop_s=100e9,
            fp32_flop_s=100e9,
            memory_bytes=None,
            memory_byte_s=20e9,
            nvlink_byte_s=20e9,
            network_byte_s=1.25e9,
            workspace_bytes=0,
            cores=2,
        ),
    )
}

# What the driver calls a card, whole, with the one that it is.
_NAMES = {
    r"A100-SXM4?-80GB": "a100",
    r"A100-(SXM4?|PCI[Ee])-40GB": "a100_40gb",
    r"A100-PCI[Ee]-80GB|A100 80GB PCIe": "a100_pcie",
    r"H100 80GB HBM3|H100 SXM5?( 80GB)?": "h100",
    r"H100 PCIe": "h100_pcie",
    r"H100 NVL": "h100_nvl",
    r"H200": "h200",
    r"H200 NVL": "h200_nvl",
    r"B200": "b200",
}


def card_of(device_name: str) -> Card | str:
    """Return the card that torch.cuda.get_device_name calls so, or why it is none of CARDS."""
    name = device_name.removeprefix("NVIDIA ").strip()
    if "MIG" in name:
        return f"{device_name}: a part of a card, of which no peak is published"
    for pattern, card in _NAMES.items():
        if re.fullmatch(pattern, name):
            return CARDS[card]
    return f"{device_name}: none of {', '.join(c for c in CARDS if CARDS[c].is_gpu)}"
