"""One version's process of `m3i-fast bench compare`: takes a sample whenever it is asked.

    python compare_worker.py WORK [--site FOLDER] [--threads N]

Started by its path, and the same file for both versions: it uses nothing of the package but its
public ops, so the work is the same whatever a version's own benchmarks measure. --site: the folder
of another version's package; without it the installed one. Speaks JSON lines: says once what it
loaded, then answers {"calls": N, "extra": M} with {"ms": X}, the time of N + M calls over N. The
calls of `extra` are done, not added up: they plant a slowdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP_S = 0.3


def mask_mix() -> Callable[[], object]:
    """64 pictures mixed of two views of 64 pixels each, fp32."""
    import torch

    from m3i_fast.ops import mask_mix

    rng = torch.Generator().manual_seed(0)
    views = torch.randint(256, (64, 3, 64, 64), dtype=torch.uint8, generator=rng)
    choice = torch.randint(2, (64, 8, 8), dtype=torch.uint8, generator=rng)
    members = torch.randint(64, (64, 2), generator=rng)
    return lambda: mask_mix(views, choice, members, dtype=torch.float32)


def dcnv3() -> Callable[[], object]:
    """InternImage-T's layer of 14 x 14 x 256, batch 4, forward, fp32."""
    import torch

    from m3i_fast.ops import dcnv3

    rng = torch.Generator().manual_seed(0)
    groups, points = 16, 9
    sizes = 256, groups * points * 2, groups * points
    x, offset, mask = (torch.randn(4, 14, 14, size, generator=rng) for size in sizes)
    offset = offset * 1.5
    geometry: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
    return lambda: dcnv3(x, offset, mask, **geometry, groups=groups)


def gaussian() -> Callable[[], object]:
    """The demo's dense term: 64 pictures, 64 cells, width 192; forward and backward, fp32."""
    import torch

    from m3i_fast.ops import gaussian

    rng = torch.Generator().manual_seed(0)
    z_hat, z = (torch.randn(64, 64, 192, generator=rng) for _ in range(2))
    z_hat.requires_grad_()
    return lambda: torch.autograd.grad(gaussian(z_hat, z, sigma=0.5**0.5, normalise=True), z_hat)


def boltzmann() -> Callable[[], object]:
    """The Boltzmann likelihood of 256 pairs of width 256; forward and backward, fp32."""
    import torch

    from m3i_fast.ops import boltzmann

    rng = torch.Generator().manual_seed(0)
    a, b = (
        torch.nn.functional.normalize(torch.randn(256, 256, generator=rng), dim=-1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(10.0)
    return lambda: torch.autograd.grad(boltzmann(a, b, scale), (a, b))


WORKS = {work.__name__: work for work in (mask_mix, dcnv3, gaussian, boltzmann)}


def use_package_of(site: str) -> None:
    """Another version's package goes before the installed one, also before an editable one."""
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if "m3i_fast" not in getattr(finder, "known_source_files", ())
    ]
    sys.path.insert(0, site)


def sample_ms(call: Callable[[], object], calls: int, extra: int) -> float:
    """Milliseconds a call, one unmeasured call after whatever ran in between."""
    call()
    begun = time.perf_counter()
    for _ in range(calls + extra):
        call()
    return (time.perf_counter() - begun) * 1e3 / calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--site")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    del sys.path[0]  # this file's folder, whose names are not the package's
    if arguments.site:
        use_package_of(arguments.site)
    import torch

    torch.set_num_threads(arguments.threads)
    call = WORKS[arguments.work]()
    import m3i_fast.ops

    calls, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < WARM_UP_S or not calls:
        call()
        calls += 1
    said = {"ops": m3i_fast.ops.__file__, "ms": elapsed * 1e3 / calls}
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        milliseconds = sample_ms(call, asked["calls"], asked["extra"])
        sys.stdout.write(json.dumps({"ms": milliseconds}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
