"""End of a program that ran a backward pass on a GPU."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress

_LIMIT_S = 10.0  # a device that hangs must not keep the program from its end


def release_last_backward() -> None:
    """Have autograd's thread of each device let go of its last backward pass.

    Call this where a program ends. The thread holds the last backward pass for a moment longer than
    the caller of `backward` waits, and Python objects with it. If Python ends in that moment, the
    thread asks for Python's lock, Python ends the thread inside a C++ destructor, and the process
    aborts: "terminate called without an active exception" (pytorch issue 190489).

    The thread takes a new backward pass only after it has let go of the one before, so a new one
    without Python objects is enough. It runs on a thread of its own, because torch keeps the
    context variables of the main thread with every backward pass of the main thread, and through
    the engine itself, because `Tensor.backward` does the same on any thread. `atexit` is too late:
    Python 3.12 starts no thread there.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return

    def run_empty_backward() -> None:
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):
                leaf = torch.empty(1, device=f"cuda:{device}", requires_grad=True)
                # Views launch no kernel, in the backward pass either.
                seed = torch.empty(1, 1, device=leaf.device)
                engine = torch.autograd.Variable._execution_engine
                # No retained graph, no second derivatives, no inputs; gradients go to leaves.
                engine.run_backward(
                    (leaf.view(1, 1),), (seed,), False, False, (), accumulate_grad=True
                )

    def run() -> None:
        # The program has told already that a device failed or is full.
        with suppress(torch.AcceleratorError, torch.OutOfMemoryError):
            run_empty_backward()

    thread = threading.Thread(target=run, name="release-backward", daemon=True)
    thread.start()
    thread.join(_LIMIT_S)
