"""Faults to plant, a line each, in the kernel that multiplies by wgmma."""

from __future__ import annotations

from tests.shared.cuda.fault import Fault

FAULTS = {
    # Order
    "no proxy fence": Fault(
        "wgmma",
        "  m3i::fence_proxy_async();\n",
        "",
        "wgmma",
        r"asynchronous read of 16 bytes .* of dynamic shared memory, which a thread wrote without "
        r"fence_proxy_async",
    ),
    "a proxy fence too early": Fault(
        "wgmma",
        "  copy_image(b, problem.b);\n  m3i::fence_proxy_async();\n",
        "  m3i::fence_proxy_async();\n  copy_image(b, problem.b);\n",
        "wgmma",
        r"which a thread wrote without fence_proxy_async",
    ),
    "no barrier": Fault(
        "wgmma",
        "  __syncthreads();\n",
        "",
        "wgmma",
        r"asynchronous read of 16 bytes .*, which was written without a barrier between the two",
    ),
    "no fence before the products": Fault(
        "wgmma", "  m3i::wgmma_fence(d);\n", "", "wgmma", r"wgmma without wgmma_fence"
    ),
    "no commit": Fault(
        "wgmma",
        "  m3i::wgmma_commit();\n",
        "",
        "wgmma",
        r"wgmma_wait, with products that no wgmma_commit has put in a group",
    ),
    "no wait": Fault(
        "wgmma",
        "  m3i::wgmma_wait<0>(d);\n",
        "",
        "wgmma",
        r"a thread returned without wgmma_wait",
    ),
    "a wait for too little": Fault(
        "wgmma",
        "wgmma_wait<0>(d)",
        "wgmma_wait<1>(d)",
        "wgmma",
        r"a thread returned without wgmma_wait",
    ),
    "an operand is overwritten before the wait": Fault(
        "wgmma",
        "  m3i::wgmma_commit();\n",
        "  m3i::wgmma_commit();\n  if (threadIdx.x == 127) b[16] = 0;\n",
        "wgmma",
        r"write of 1 bytes .* of dynamic shared memory, which an asynchronous operation is reading",
    ),
    "an operand is overwritten by who has not heard of a wait": Fault(
        "wgmma",
        "  m3i::wgmma_commit();\n",
        "  m3i::wgmma_commit();\n  if (threadIdx.x == 5) b[16] = 0;\n",
        "wgmma",
        r"data race: write of 1 bytes .* which an asynchronous operation read",
    ),
    "an accumulator is changed before the wait": Fault(
        "wgmma",
        "  m3i::wgmma_commit();\n",
        "  m3i::wgmma_commit();\n  d[3] += 1.0f;\n",
        "wgmma",
        r"an accumulator of wgmma was written before wgmma_wait",
    ),
    # Who takes part, and with what
    "a warp does not take part": Fault(
        "wgmma",
        "  m3i::wgmma_fence(d);\n",
        "  m3i::wgmma_fence(d);\n  if (threadIdx.x >= 96) return;\n",
        "wgmma",
        r"deadlock: no thread of the block can go on\n(.*\n)*  96 threads wait for wgmma",
    ),
    "a thread has another descriptor": Fault(
        "wgmma",
        "return m3i::wgmma_advance(first, operand.starts[step]);",
        "return m3i::wgmma_advance(first, operand.starts[step] + (threadIdx.x == 77 ? 32 : 0));",
        "wgmma",
        r"wgmma with other operands than thread \(0, 0, 0\) .*(\n.*)*thread \(77, 0, 0\)",
    ),
    # Descriptors
    "a stride out of shared memory": Fault(
        "wgmma",
        "m3i::wgmma_descriptor(image, operand.leading, operand.stride, swizzle);",
        "m3i::wgmma_descriptor(image, operand.leading, 16 * operand.stride, swizzle);",
        "wgmma",
        r"out-of-bounds asynchronous read of 16 bytes at byte 16384 of dynamic shared memory, "
        r"0 bytes past the end",
    ),
    "a pattern that starts between two": Fault(
        "wgmma",
        "return m3i::wgmma_advance(first, operand.starts[step]);",
        "return m3i::wgmma_advance(first, operand.starts[step] + 128);",
        "wgmma",
        r"the pattern of the 128-byte swizzle does not start at a multiple of its 1024 bytes",
    ),
    "bytes that nobody wrote": Fault(
        "wgmma",
        "i < operand.bytes / 4; i += blockDim.x",
        "i < operand.bytes / 4 - 1; i += blockDim.x",
        "wgmma",
        r"asynchronous read of 16 bytes .*, which this block has not written",
    ),
}
