"""Faults to plant, a line each, in kernels that copy boxes of matrices."""

from __future__ import annotations

from tests.shared.cuda.fault import Fault

UNDER_WAY = r"(to which a copy of .* is under way|which an asynchronous operation wrote)"

FAULTS = {
    # Loads
    "a box is not awaited": Fault(
        "tma", "  m3i::mbarrier_wait(landed, 0);\n", "  __syncthreads();\n", "load", UNDER_WAY
    ),
    "one thread awaits a box for all": Fault(
        "tma",
        "  m3i::mbarrier_wait(landed, 0);\n",
        "  __syncthreads();\n  if (threadIdx.x == 63) m3i::mbarrier_wait(landed, 0);\n",
        "load",
        UNDER_WAY,
    ),
    "too many bytes expected": Fault(
        "tma",
        "m3i::mbarrier_arrive_expect_tx(landed, 4 * words);",
        "m3i::mbarrier_arrive_expect_tx(landed, 4 * words + 16);",
        "load",
        r"deadlock: no thread of the block can go on(.*\n)*.* waits for 0 of 1 arrivals and for "
        r"16 bytes",
    ),
    "a box of the rows inside only": Fault(
        "tma",
        "m3i::mbarrier_arrive_expect_tx(landed, 4 * words);",
        "m3i::mbarrier_arrive_expect_tx(landed, 4 * words - 384);",
        "load",
        r"deadlock: no thread of the block can go on(.*\n)*.* and for -384 bytes",
    ),
    "a pattern that starts between two": Fault(
        "tma",
        "m3i::tma_load_2d(box, map, row, column, landed);",
        "m3i::tma_load_2d(box + 32, map, row, column, landed);",
        "load",
        r"a tensor copy with byte 128 of dynamic shared memory: its box begins at multiples of "
        r"1024",
    ),
    "a box out of shared memory": Fault(
        "tma",
        "m3i::tma_load_2d(box, map, row, column, landed);",
        "m3i::tma_load_2d(box + 256, map, row, column, landed);",
        "load",
        r"out-of-bounds write of 2048 bytes .* of which only 1032 lie in it",
    ),
    "an mbarrier of which copies do not know": Fault(
        "tma",
        "(landed, 1);\n    m3i::mbarrier_init_fence();\n  }",
        "(landed, 1);\n  }",
        "load",
        r"initialised without an mbarrier_init_fence",
    ),
    "a box over what a thread stored": Fault(
        "tma",
        "  if (threadIdx.x == 0) {\n    m3i::tma_prefetch(map);\n",
        "  box[threadIdx.x] = 0;\n  if (threadIdx.x == 0) {\n    m3i::tma_prefetch(map);\n",
        "load",
        r"a copy to 1 bytes .*, which a thread wrote without fence_proxy_async",
    ),
    "a matrix with a row too many": Fault(
        "tma",
        "  return m3i::make_tensor_map(map, matrix);",
        "  m3i::TiledMatrix taller = matrix;\n  taller.rows += 1;\n"
        "  taller.base = static_cast<const char*>(matrix.base) + 24 * matrix.row_bytes;\n"
        "  return m3i::make_tensor_map(map, taller);",
        "load",
        r"out-of-bounds read of \d+ bytes .* past the end of an allocation",
    ),
    # Stores
    "no proxy fence before a store": Fault(
        "tma",
        "  m3i::fence_proxy_async();\n",
        "",
        "store",
        r"asynchronous read of 16 bytes .*, which a thread wrote without fence_proxy_async",
    ),
    "no barrier before a store": Fault(
        "tma",
        "box[i] = image[i];\n  m3i::fence_proxy_async();\n  __syncthreads();\n",
        "box[i] = image[i];\n  m3i::fence_proxy_async();\n",
        "store",
        r"asynchronous read of 16 bytes .*, which this block has not written",
    ),
    "a stored box is overwritten": Fault(
        "tma",
        "    m3i::tma_store_wait_read<0>();\n",
        "",
        "store",
        r"write of 4 bytes .* of dynamic shared memory, which an asynchronous operation is reading",
    ),
    "a store in no group": Fault(
        "tma",
        "    m3i::tma_store_commit();\n",
        "",
        "store",
        r"tma_store_wait, with copies that no tma_store_commit has put in a group",
    ),
    "a thread returns before its box is read": Fault(
        "tma",
        "    m3i::tma_store_wait_read<0>();\n    box[0] = 0;\n    m3i::tma_store_wait<0>();\n",
        "",
        "store",
        r"a thread returned while a copy of it read shared memory",
    ),
    # The ring of a product
    "a stage is not awaited": Fault(
        "hopper_gemm",
        "    m3i::mbarrier_wait(&shared.full[stage], parity);\n",
        "    if (step == 1) m3i::mbarrier_wait(&shared.full[stage], parity);\n",
        "hopper_gemm",
        r"asynchronous read of 16 bytes .* of dynamic shared memory, which this block has not "
        r"written",
    ),
    "a stage is fetched that is being read": Fault(
        "hopper_gemm",
        "    m3i::mbarrier_wait(&shared.empty[stage], 1 - parity);\n",
        "    if (step < kStages) m3i::mbarrier_wait(&shared.empty[stage], 1 - parity);\n",
        "hopper_gemm",
        r"write of 16384 bytes .* of dynamic shared memory, which an asynchronous operation is "
        r"reading|all 1 arrivals of phase 0 have come, and 32768 bytes have not",
    ),
    "a stage is given back too early": Fault(
        "hopper_gemm",
        "    if (step > 0 && threadIdx.x % 128 == 0) {\n"
        "      m3i::mbarrier_arrive(&shared.empty[(step - 1) % kStages]);",
        "    if (threadIdx.x % 128 == 0) {\n"
        "      m3i::mbarrier_arrive(&shared.empty[step % kStages]);",
        "hopper_gemm",
        r"write of 16384 bytes .* of dynamic shared memory, which an asynchronous operation is "
        r"reading",
    ),
    "bytes of one box expected": Fault(
        "hopper_gemm",
        "2 * sizeof(shared.a[0]));",
        "sizeof(shared.a[0]));",
        "hopper_gemm",
        r"asynchronous read of 16 bytes .*(to which a copy is under way|without a barrier)",
    ),
    "a copy to a block that may not have begun": Fault(
        "tma",
        "  m3i::cluster_sync();\n  if (threadIdx.x == 0) {\n    m3i::tma_load_2d_multicast",
        "  __syncthreads();\n  if (threadIdx.x == 0) {\n    m3i::tma_load_2d_multicast",
        "share",
        r"a copy on the mbarrier .* of block \(\d, 0, 0\), which (nobody has initialised|thread)",
    ),
    "shared boxes that are not awaited": Fault(
        "tma",
        "  m3i::mbarrier_wait(all_landed, 0);\n  for (int i = threadIdx.x; i < size * words",
        "  for (int i = threadIdx.x; i < size * words",
        "share",
        r"read before written|data race|under way",
    ),
    "a block that the cluster has not": Fault(
        "tma",
        "static_cast<uint16_t>((1 << size) - 1)",
        "static_cast<uint16_t>((2 << size) - 1)",
        "share",
        r"a tensor copy to the blocks 0x7 of a cluster that has 2",
    ),
}
