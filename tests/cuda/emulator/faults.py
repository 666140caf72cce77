"""Faults to plant, a line each, in the kernels of tests/shared/cuda/kernels and in the ops' own."""

from __future__ import annotations

from tests.shared.cuda.fault import Fault

KERNEL_FAULTS = {
    # Outside by one
    "global read": Fault(
        "block",
        "sum += values[blockIdx.x * width + i];",
        "sum += values[blockIdx.x * width + i + 1];",
        "block_sum",
        r"out-of-bounds read of 4 bytes at 0x\w+, 0 bytes past the end of an allocation of 12000",
    ),
    "global write": Fault(
        "block",
        "out[blockIdx.x * blockDim.x + thread] = sum;",
        "out[blockIdx.x * blockDim.x + thread + 1] = sum;",
        "warp_scan",
        r"out-of-bounds write of 4 bytes .* 0 bytes past the end of an allocation of 2048",
    ),
    "global write, before": Fault(
        "block",
        "out[blockIdx.x * blockDim.x + thread] = sum;",
        "(out + blockIdx.x * blockDim.x + thread)[-1] = sum;",
        "warp_scan",
        r"out-of-bounds write of 4 bytes .* 4 bytes before an allocation of 2048",
    ),
    "global atomic": Fault(
        "block",
        "atomicAdd(&counts[i], bins[i])",
        "atomicAdd(&counts[i + 1], bins[i])",
        "histogram",
        r"out-of-bounds atomic operation of 4 bytes .* 0 bytes past the end .* of 148",
    ),
    "vector red": Fault(
        "block",
        "if (i >= size) return;",
        "if (i > size) return;",
        "red",
        r"out-of-bounds atomic operation of 16 bytes .* 0 bytes past the end .* of 6000",
    ),
    "index of a shared array": Fault(
        "block",
        "partial[thread / 32] = sum;",
        "partial[thread / 32 + 1] = sum;",
        "block_sum",
        r"out-of-bounds index 8 of an array 'float \[8\]'",
    ),
    "pointer into a shared array": Fault(
        "block",
        "partial[thread / 32] = sum;",
        "*(static_cast<float*>(partial) + thread / 32 + 1) = sum;",
        "block_sum",
        r"out-of-bounds write of 4 bytes .* outside every shared variable",
    ),
    "dynamic shared memory": Fault(
        "block",
        "i < num_bins; i += blockDim.x) bins[i] = 0;",
        "i <= num_bins; i += blockDim.x) bins[i] = 0;",
        "histogram",
        r"out-of-bounds write of 4 bytes .* 0 bytes past the end of dynamic shared memory of 148",
    ),
    "copy to shared memory": Fault(
        "gemm",
        "i < rows * kTileK / kChunk; i += 32",
        "i < (2 * rows + 1) * kTileK / kChunk; i += 32",
        "gemm",
        r"(out-of-bounds|data race|under way)",
    ),
    # A barrier too few
    "no barrier before the sum": Fault(
        "block",
        "partial[thread / 32] = sum;\n  __syncthreads();",
        "partial[thread / 32] = sum;",
        "block_sum",
        r"read before written: .* of shared variable .*block_sum_kernel.*::partial",
    ),
    "no barrier in the transpose": Fault(
        "block",
        "  __syncthreads();\n  const int out_x",
        "  const int out_x",
        "transpose",
        r"(read before written|data race): read of 4 bytes .* of shared variable .*::tile",
    ),
    "no barrier after clearing": Fault(
        "block",
        "bins[i] = 0;\n  __syncthreads();",
        "bins[i] = 0;",
        "histogram",
        r"(read before written|data race): .* of dynamic shared memory",
    ),
    "no barrier before the flush": Fault(
        "block",
        "  __syncthreads();\n  for (int i = threadIdx.x; i < num_bins; i += blockDim.x) atomicAdd",
        "  for (int i = threadIdx.x; i < num_bins; i += blockDim.x) atomicAdd",
        "histogram",
        r"data race: .* of dynamic shared memory, which thread .* without a barrier",
    ),
    "no warp barrier before the read": Fault(
        "block",
        "    __syncwarp();\n    if (lane >= step)",
        "    if (lane >= step)",
        "warp_scan",
        r"data race: .* of shared variable .*::buffer, which thread",
    ),
    "no warp barrier after the read": Fault(
        "block",
        "sum += buffer[thread - step];\n    __syncwarp();",
        "sum += buffer[thread - step];",
        "warp_scan",
        r"data race: .* of shared variable .*::buffer, which thread",
    ),
    "buffer not awaited": Fault(
        "block",
        "      if (step > 0) m3i::named_barrier_sync(kTaken, 64);\n",
        "",
        "hand_over",
        r"data race: .* of shared variable .*::buffer, which thread",
    ),
    "no barrier after the product": Fault(
        "gemm",
        "multiply_tiles<kHalf>(tiles[step % 2], sum);\n    __syncthreads();",
        "multiply_tiles<kHalf>(tiles[step % 2], sum);",
        "gemm",
        r"data race: write of 16 bytes .* of dynamic shared memory, which .* read",
    ),
    "copy not awaited": Fault(
        "gemm",
        "copy_async_wait<1>",
        "copy_async_wait<2>",
        "gemm",
        r"to which a copy of .* is under way",
    ),
    # Shared memory that nobody wrote
    "a warp's sum is missing": Fault(
        "block",
        "if (thread % 32 == 0) partial",
        "if (thread % 64 == 0) partial",
        "block_sum",
        r"read before written: .* byte 4 of shared variable .*::partial",
    ),
    "a bin is not cleared": Fault(
        "block",
        "for (int i = threadIdx.x; i < num_bins; i += blockDim.x) bins[i] = 0;",
        "for (int i = threadIdx.x + 2; i < num_bins; i += blockDim.x) bins[i] = 0;",
        "histogram",
        r"read before written: atomic operation of 4 bytes .* byte 4 of dynamic shared memory",
    ),
    "a row of the tile is not copied": Fault(
        "gemm",
        "copy_tile(tiles.b, kTileN, matrices.b",
        "copy_tile(tiles.b, kTileN - 1, matrices.b",
        "gemm",
        r"read before written: read of 16 bytes .* of dynamic shared memory",
    ),
    # Two threads write one place
    "two threads write the sum": Fault(
        "block",
        "if (thread == 0) {",
        "if (thread <= 1) {",
        "block_sum",
        r"data race: write of 4 bytes .* of an allocation of 12, which thread \(0, 0, 0\) wrote",
    ),
    "threads share a counter": Fault(
        "block",
        "atomicAdd(&bins[values[i]], 1);",
        "bins[values[i]] += 1;",
        "histogram",
        r"data race: .* of dynamic shared memory, which thread",
    ),
    "blocks write one place": Fault(
        "block",
        "sums[blockIdx.x] = total;",
        "sums[blockIdx.x / 2] = total;",
        "block_sum",
        r"data race: write .* which a thread of another block of this launch wrote",
    ),
    # Threads that do not come
    "a warp skips the barrier": Fault(
        "block",
        "  __syncthreads();\n  if (thread == 0) {",
        "  if (thread < 224) __syncthreads();\n  if (thread == 0) {",
        "block_sum",
        r"__syncthreads, which thread \(224, 0, 0\) returned without reaching"
        r"|deadlock|read before written",
    ),
    "a thread returns before the barrier": Fault(
        "block",
        "  const int thread = threadIdx.x, holds = values[thread] > limit;",
        "  const int thread = threadIdx.x, holds = values[thread] > limit;\n"
        "  if (thread == 5) return;",
        "vote",
        r"__syncthreads, which thread \(5, 0, 0\) returned without reaching",
    ),
    "two barriers for one": Fault(
        "block",
        "  out[3 * thread] = __syncthreads_count(holds);",
        "  if (thread < 32) {\n    __syncthreads();\n  }\n"
        "  out[3 * thread] = __syncthreads_count(holds);",
        "vote",
        r"__syncthreads, while thread \(0, 0, 0\) waits at another one",
    ),
    "a lane of the mask does not come": Fault(
        "block",
        "  put(__shfl_sync(mask, value, 3));",
        "  if (lane != 9) put(__shfl_sync(mask, value, 3));\n  else put(0);",
        "warp_operations",
        r"__shfl_sync with mask 0xffffffff",
    ),
    "the caller is not in the mask": Fault(
        "block",
        "put(__any_sync(mask, value > 1000));",
        "put(__any_sync(mask - 1, value > 1000));",
        "warp_operations",
        r"a vote with mask 0xfffffffe, which does not name the calling lane 0",
    ),
    "a shuffle from a lane that is gone": Fault(
        "block",
        "  put(__shfl_sync(mask, value, 3));",
        "  if (lane == 3) return;\n  put(__shfl_sync(mask, value, 3));",
        "warp_operations",
        r"a shuffle that reads lane 3, which takes no part in it",
    ),
    "a trap": Fault(
        "block",
        "  put(__shfl_sync(mask, value, 3));",
        "  if (lane == 3) __trap();\n  put(__shfl_sync(mask, value, 3));",
        "warp_operations",
        r"__trap\(\)\n  kernel warp_operations_kernel, block \(0, 0, 0\), thread \(3, 0, 0\)\n"
        r"  at .*block.cu:\d+",
    ),
    "nobody fills the buffer": Fault(
        "block",
        "      m3i::named_barrier_arrive(kFilled, 64);\n",
        "",
        "hand_over",
        r"deadlock: no thread of the block can go on\n(.*\n)*  32 threads wait for a named barrier",
    ),
    "a named barrier of part of a warp": Fault(
        "block",
        "m3i::named_barrier_arrive(kFilled, 64)",
        "m3i::named_barrier_arrive(kFilled, 60)",
        "hand_over",
        r"named barrier 1 for 60 threads: expected a multiple of 32",
    ),
    # Addresses that an instruction does not take
    "misaligned vector": Fault(
        "block",
        "m3i::red_add(out + i, values)",
        "m3i::red_add(out + i + 1, values)",
        "red",
        r"misaligned atomic operation of 16 bytes",
    ),
    "misaligned row of ldmatrix": Fault(
        "gemm",
        "constexpr int kRow = kTileK + 8;",
        "constexpr int kRow = kTileK + 4;",
        "gemm",
        r"misaligned (read|write) of 16 bytes",
    ),
    "product of part of a warp": Fault(
        "gemm",
        "  m3i::mma_tf32(sum, rows, columns);",
        "  if (g == 7) return;\n  m3i::mma_tf32(sum, rows, columns);",
        "gemm_tf32",
        r"mma by the lanes 0xfffffff: expected the whole warp",
    ),
}

# In an op's device code, and found by a call of the op: `launcher` is the op.
OP_FAULTS = {
    "a pixel too far": Fault(
        "sm80/kernels.cuh",
        "pixels[c] = load<kPixels>(in + c * plane);",
        "pixels[c] = load<kPixels>(in + c * plane + kPixels);",
        "mask_mix",
        r"out-of-bounds read of 16 bytes .* 0 bytes past the end of an allocation",
    ),
    "a store too far": Fault(
        "sm80/kernels.cuh",
        "+ chunk_begin<Out>(odd_lane, step));",
        "+ chunk_begin<Out>(odd_lane, step) + kChunk<Out>);",
        "mask_mix",
        r"(out-of-bounds|data race:) write of 16 bytes",
    ),
    "both lanes of a pair store the same pixels": Fault(
        "sm80/kernels.cuh",
        "chunk_begin<Out>(odd_lane, step));",
        "chunk_begin<Out>(false, step));",
        "mask_mix",
        r"data race: write of 16 bytes .* which thread \(\d+, 0, 0\) wrote",
    ),
    "pictures that overlap": Fault(
        "sm80/kernels.cuh",
        "+ p * kMaskMixChannels * plane + pixel;",
        "+ p / 2 * kMaskMixChannels * plane + pixel;",
        "mask_mix",
        r"data race: write of 16 bytes .* a thread of another block of this launch wrote",
    ),
    "a member of the next picture": Fault(
        "sm80/kernels.cuh",
        "params.members[p * params.num_members + column]",
        "params.members[(p + 1) * params.num_members + column]",
        "mask_mix",
        r"out-of-bounds read of 8 bytes .* past the end of an allocation",
    ),
    "an odd address": Fault(
        "sm80/kernels.cuh",
        "normalise_and_store<Out, kChunk<Out>>(pixels.at + step * kChunk<Out>, scale, shift,",
        "normalise_and_store<Out, kChunk<Out>>(pixels.at + step * kChunk<Out>, scale, shift, 1 +",
        "mask_mix",
        r"misaligned write of 16 bytes",
    ),
}
