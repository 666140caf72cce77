"""Faults to plant, a line each, in the kernels that only compute capability 9.0 runs."""

from __future__ import annotations

from tests.shared.cuda.fault import Fault

RACE = r"(read before written|data race): read of 4 bytes .* of dynamic shared memory"

FAULTS = {
    # A wait or an arrival too few
    "a full slot is not awaited": Fault(
        "mbarrier",
        "      m3i::mbarrier_wait(&ring.full[stage], parity);\n",
        "",
        "ring",
        RACE,
    ),
    "an empty slot is not awaited": Fault(
        "mbarrier",
        "      m3i::mbarrier_wait(&ring.empty[stage], 1 - parity);\n",
        "",
        "ring",
        r"data race: write of 4 bytes .* of dynamic shared memory, which .* read",
    ),
    "one consumer of two is not awaited": Fault(
        "mbarrier",
        "      m3i::mbarrier_arrive(&ring.empty[stage]);\n",
        "      for (int i = 2; warp == 1 && i; --i) m3i::mbarrier_arrive(&ring.empty[stage]);\n",
        "ring",
        r"data race: write of 4 bytes .* of dynamic shared memory, which .* read",
    ),
    "consumers arrive before they read": Fault(
        "mbarrier",
        "      m3i::mbarrier_wait(&ring.full[stage], parity);\n",
        "      m3i::mbarrier_wait(&ring.full[stage], parity);\n"
        "      m3i::mbarrier_arrive(&ring.empty[stage]);\n"
        "      for (int i = 0; i < 9; ++i) __nanosleep(1);\n",
        "ring",
        r"data race: .* of dynamic shared memory",
    ),
    # Waits that never end
    "a producer that waits for the wrong parity": Fault(
        "mbarrier",
        "m3i::mbarrier_wait(&ring.empty[stage], 1 - parity);",
        "m3i::mbarrier_wait(&ring.empty[stage], parity);",
        "ring",
        r"deadlock: no thread of the block can go on"
        r"(.*\n)+  64 threads wait for parity 0 of the mbarrier of 8 bytes at \w+, byte 0 of"
        r"(.*\n)+  32 threads wait for parity 0 of the mbarrier of 8 bytes at \w+, byte 24 of"
        r"(.*\n)+  the mbarrier of 8 bytes at \w+, byte 0 of dynamic shared memory: phase 0, of"
        r" parity 0, waits for 32 of 32 arrivals and for 0 bytes",
    ),
    "a producer that never arrives": Fault(
        "mbarrier",
        "      m3i::mbarrier_arrive(&ring.full[stage]);\n",
        "",
        "ring",
        r"deadlock: no thread of the block can go on",
    ),
    "an arrival too few": Fault(
        "mbarrier",
        "m3i::mbarrier_init(&ring.full[i], 32);",
        "m3i::mbarrier_init(&ring.full[i], 33);",
        "ring",
        r"deadlock: (.*\n)+.* waits for 1 of 33 arrivals and for 0 bytes",
    ),
    "bytes that do not come": Fault(
        "mbarrier",
        "      m3i::mbarrier_arrive(&ring.full[stage]);\n",
        "      m3i::mbarrier_arrive_expect_tx(&ring.full[stage], 4);\n",
        "ring",
        r"deadlock: (.*\n)+.* waits for 0 of 32 arrivals and for 128 bytes",
    ),
    "polling for the wrong parity": Fault(
        "mbarrier",
        "m3i::mbarrier_try_wait(&empty, 1 - step % 2)",
        "m3i::mbarrier_try_wait(&empty, step % 2)",
        "poll",
        r"standstill: (.*\n)+  32 threads wait for their turn, again and again, at "
        r"(.*\n)+.* of shared variable .*::empty: phase 0, of parity 0",
    ),
    # Objects that are not mbarriers yet, or are no longer memory
    "a barrier that nobody initialises": Fault(
        "mbarrier",
        "      m3i::mbarrier_init(&ring.full[i], 32);\n",
        "",
        "ring",
        r"mbarrier_\w+ on the mbarrier of 8 bytes .*, which nobody has initialised",
    ),
    "no barrier after the initialisation": Fault(
        "mbarrier",
        "    m3i::mbarrier_init_fence();\n  }\n  __syncthreads();",
        "    m3i::mbarrier_init_fence();\n  }",
        "ring",
        r"mbarrier_\w+ on .* which thread \(0, 0, 0\) initialised without a barrier between",
    ),
    "two threads initialise": Fault(
        "mbarrier",
        "if (threadIdx.x == 0) {",
        "if (threadIdx.x <= 1) {",
        "ring",
        r"mbarrier_init on .* which thread \(0, 0, 0\) has initialised before",
    ),
    "a plain write of the barrier": Fault(
        "mbarrier",
        "      m3i::mbarrier_arrive(&ring.full[stage]);\n",
        "      ring.full[stage] = 0;\n",
        "ring",
        r"write of 8 bytes at \w+, byte 0 of dynamic shared memory, which holds an mbarrier",
    ),
    "a slot over the barrier": Fault(
        "mbarrier",
        "ring.slots[stage][lane] = values",
        "ring.slots[stage][lane - 2] = values",
        "ring",
        r"(out-of-bounds index -2|write of 4 bytes .* which holds an mbarrier)",
    ),
    "an address that is not a multiple of 8": Fault(
        "mbarrier",
        "Ring& ring = *m3i::dynamic_shared<Ring>();",
        "Ring& ring = *reinterpret_cast<Ring*>(m3i::dynamic_shared<char>() + 4);",
        "ring",
        r"misaligned",
    ),
    "a barrier in global memory": Fault(
        "mbarrier",
        "m3i::mbarrier_init(&ring.full[i], 32);",
        "m3i::mbarrier_init(reinterpret_cast<m3i::Mbarrier*>(out), 32);",
        "ring",
        r"is not in shared memory",
    ),
    # Registers that are not there
    "more registers than are given up": Fault(
        "registers",
        "setmaxnreg_dec<24>",
        "setmaxnreg_dec<40>",
        "give_and_take",
        r"deadlock: (.*\n)+  32 threads wait for 240 registers a thread in the place of 168 "
        r"\(setmaxnreg; of 168 a thread at the launch, 256 are free\)",
    ),
    "a launch bound without blocks": Fault(
        "registers",
        "__launch_bounds__(kThreads, 1)",
        "__launch_bounds__(kThreads)",
        "give_and_take",
        r"setmaxnreg_dec<24> in a kernel without __launch_bounds__\(threads, blocks\)",
    ),
    "a launch bound of two blocks": Fault(
        "registers",
        "__launch_bounds__(kThreads, 1)",
        "__launch_bounds__(kThreads, 2)",
        "give_and_take",
        r"deadlock: (.*\n)+.* of 80 a thread at the launch",
    ),
    "an increase that decreases": Fault(
        "registers",
        "setmaxnreg_inc<240>",
        "setmaxnreg_inc<160>",
        "give_and_take",
        r"setmaxnreg_inc<160> by a warp of 168 registers a thread",
    ),
    "a part of a warpgroup": Fault(
        "registers",
        "  if (group == 0) {",
        "  if (threadIdx.x / 32 == 2) return;\n  if (group == 0) {",
        "give_and_take",
        r"setmaxnreg by a part of a warpgroup: warp 2 .* warp 0|deadlock",
    ),
    "a part of a warp": Fault(
        "registers",
        "  if (group == 0) {",
        "  if (threadIdx.x == 5) return;\n  if (group == 0) {",
        "give_and_take",
        r"setmaxnreg_dec<24> by the lanes 0xffffffdf: expected the whole warp",
    ),
    "a block of no whole warpgroups": Fault(
        "registers",
        "give_and_take_kernel, 1, kThreads",
        "give_and_take_kernel, 1, kThreads - 32",
        "give_and_take",
        r"setmaxnreg_\w+<\d+> in a block of 352 threads, which are no whole warpgroups",
    ),
    # Blocks of a cluster that do not wait for each other
    "a neighbour's values are not awaited": Fault(
        "cluster",
        "  own[threadIdx.x] = values[i];\n  m3i::cluster_sync();\n",
        "  m3i::cluster_sync();\n  own[threadIdx.x] = values[i];\n",
        "exchange",
        r"(read before written|data race): read of 4 bytes .* of dynamic shared memory of block "
        r"\(\d, 0, 0\), (which nobody has written|which thread .* of block .* wrote)",
    ),
    "an arrival without a wait": Fault(
        "cluster",
        "  own[threadIdx.x] = values[i];\n  m3i::cluster_sync();\n",
        "  own[threadIdx.x] = values[i];\n  m3i::cluster_arrive();\n",
        "exchange",
        r"which may not have begun: no cluster barrier was waited for",
    ),
    "an arrival for nothing": Fault(
        "cluster",
        "  m3i::cluster_arrive();\n  out[i]",
        "  m3i::cluster_arrive();\n  m3i::cluster_arrive();\n  out[i]",
        "exchange",
        r"cluster_arrive without a cluster_wait since the last",
    ),
    "a wait for nothing": Fault(
        "cluster",
        "  m3i::cluster_arrive();\n  out[i]",
        "  out[i]",
        "exchange",
        r"cluster_wait without a cluster_arrive before",
    ),
    "a block returns while it is read": Fault(
        "cluster",
        "  m3i::cluster_arrive();\n  out[i] = taken + static_cast<int>(next);\n"
        "  m3i::cluster_wait();\n",
        "  out[i] = taken + static_cast<int>(next);\n",
        "exchange",
        r"block \(\d, 0, 0\) returns, while thread \(\d+, 0, 0\) of block \(\d, 0, 0\) may still "
        r"use|which has returned",
    ),
    "a write to a block that may not have begun": Fault(
        "cluster",
        "  m3i::cluster_sync();\n  m3i::map_shared_rank(own, next)",
        "  m3i::map_shared_rank(own, next)",
        "put",
        r"access of shared memory of block \(1, 0, 0\), byte 0, which may not have begun",
    ),
    "values put too late": Fault(
        "cluster",
        "  m3i::cluster_sync();\n  __syncthreads();\n",
        "  __syncthreads();\n",
        "put",
        r"(read before written|data race): read of 4 bytes .* of dynamic shared memory",
    ),
    "beyond a neighbour's shared memory": Fault(
        "cluster",
        "m3i::map_shared_rank(own, next)[threadIdx.x] =",
        "m3i::map_shared_rank(own, next)[threadIdx.x + 1] =",
        "put",
        r"out-of-bounds write of 4 bytes .* 0 bytes past the end of dynamic shared memory of 256",
    ),
    "a rank that the cluster has not": Fault(
        "cluster",
        "m3i::map_shared_rank(own, next)[threadIdx.x] =",
        "m3i::map_shared_rank(own, next + 2)[threadIdx.x] =",
        "put",
        r"rank [23] of a cluster of 2",
    ),
    "a static shared variable": Fault(
        "cluster",
        "  own[threadIdx.x] = values[i];\n",
        "  __shared__ volatile int copy[kThreads];\n  copy[threadIdx.x] = values[i];\n"
        "  own[threadIdx.x] = copy[threadIdx.x];\n",
        "exchange",
        r"a static shared variable in a cluster",
    ),
    "a remote slot is not awaited": Fault(
        "cluster",
        "      m3i::mbarrier_wait(&slot.empty, 1 - step % 2);\n",
        "",
        "broadcast",
        r"data race: write of 4 bytes .* of dynamic shared memory of block .* which thread .* of "
        r"block .* read",
    ),
    "a filled slot is not awaited": Fault(
        "cluster",
        "      m3i::mbarrier_wait(&slot.full, step % 2);\n",
        "",
        "broadcast",
        r"(read before written|data race): read of 4 bytes .* of dynamic shared memory",
    ),
    "a remote barrier without the fence": Fault(
        "cluster",
        "    m3i::mbarrier_init_fence();\n",
        "",
        "broadcast",
        r"mbarrier_arrive_remote on .* initialised without an mbarrier_init_fence",
    ),
    "a remote arrival too few": Fault(
        "cluster",
        "m3i::mbarrier_init(&slot.empty, kThreads * (size - 1));",
        "m3i::mbarrier_init(&slot.empty, kThreads * size);",
        "broadcast",
        r"deadlock: no thread of the cluster can go on(.*\n)+.* of dynamic shared memory of block "
        r"\(0, 0, 0\): phase 0, of parity 0, waits for 64 of 192 arrivals",
    ),
    "the arrival at another block's barrier as at one's own": Fault(
        "cluster",
        "m3i::mbarrier_arrive_remote(&slot.full, to);",
        "m3i::mbarrier_arrive(m3i::map_shared_rank(&slot.full, to));",
        "broadcast",
        r"mbarrier_arrive on .* of block \(1, 0, 0\), which is another block's",
    ),
    "a block that does not wait for the others at its end": Fault(
        "cluster",
        "  m3i::cluster_sync();\n}\n\n}  // namespace",
        "}\n\n}  // namespace",
        "broadcast",
        r"block \(0, 0, 0\) returns, while thread .* may still use|which has returned",
    ),
}
