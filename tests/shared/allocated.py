"""Memory of torch's CPU allocator while a function runs."""

from __future__ import annotations

from collections.abc import Callable

import torch


def most_allocated(function: Callable[[], object]) -> int:
    """Bytes, at one time, in torch's allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
