// Single tensor copies, for the tests of the emulator: the image of a box in shared memory goes to
// the test, or comes from it.
#include "m3i/gpu/cluster.cuh"
#include "m3i/host/launch.h"
#include "m3i/host/make_tensor_map.h"
#include "m3i/gpu/shared.cuh"
#include "m3i/gpu/tma.cuh"

namespace {

// image = the box at (row, column), as it lies in shared memory.
__global__ void __launch_bounds__(64) load_kernel(const __grid_constant__ m3i::TensorMap map,
                                                  uint32_t* image, int words, int row, int column) {
  uint32_t* box = m3i::dynamic_shared<uint32_t>();
  auto* landed = reinterpret_cast<m3i::Mbarrier*>(box + words);
  if (threadIdx.x == 0) {
    m3i::tma_prefetch(map);
    m3i::mbarrier_init(landed, 1);
    m3i::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    m3i::mbarrier_arrive_expect_tx(landed, 4 * words);
    m3i::tma_load_2d(box, map, row, column, landed);
  }
  m3i::mbarrier_wait(landed, 0);
  for (int i = threadIdx.x; i < words; i += 64) image[i] = box[i];
}

// Each block of a cluster loads one box and hands it to all of them: box r is the one at (row +
// r box_rows, column). images[block] = the boxes, one after the other.
__global__ void __launch_bounds__(64)
    share_kernel(const __grid_constant__ m3i::TensorMap map, uint32_t* images, int words, int row,
                 int column, int box_rows) {
  uint32_t* boxes = m3i::dynamic_shared<uint32_t>();
  const int rank = m3i::cluster_rank(), size = m3i::cluster_size();
  auto* all_landed = reinterpret_cast<m3i::Mbarrier*>(boxes + size * words);
  if (threadIdx.x == 0) {
    m3i::mbarrier_init(all_landed, 1);
    m3i::mbarrier_init_fence();
    m3i::mbarrier_arrive_expect_tx(all_landed, 4 * words * size);
  }
  m3i::cluster_sync();
  if (threadIdx.x == 0) {
    m3i::tma_load_2d_multicast(boxes + rank * words, map, row + rank * box_rows, column, all_landed,
                               static_cast<uint16_t>((1 << size) - 1));
  }
  m3i::mbarrier_wait(all_landed, 0);
  for (int i = threadIdx.x; i < size * words; i += 64) {
    images[blockIdx.x * size * words + i] = boxes[i];
  }
  m3i::cluster_sync();
}

// The box at (row, column) = image, or += image.
__global__ void __launch_bounds__(64)
    store_kernel(const __grid_constant__ m3i::TensorMap map, const uint32_t* image, int words,
                 int row, int column, bool add) {
  uint32_t* box = m3i::dynamic_shared<uint32_t>();
  for (int i = threadIdx.x; i < words; i += 64) box[i] = image[i];
  m3i::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (add) {
      m3i::tma_reduce_add_2d(map, row, column, box);
    } else {
      m3i::tma_store_2d(map, row, column, box);
    }
    m3i::tma_store_commit();
    m3i::tma_store_wait_read<0>();
    box[0] = 0;
    m3i::tma_store_wait<0>();
  }
}

cudaError_t make_map(m3i::TensorMap* map, const m3i::TiledMatrix& matrix, int* words) {
  *words = matrix.box_rows * matrix.box_columns * m3i::bytes_of(matrix.dtype) / 4;
  return m3i::make_tensor_map(map, matrix);
}

}  // namespace

#define M3I_TEST_API extern "C" __attribute__((visibility("default")))

M3I_TEST_API cudaError_t load(const m3i::TiledMatrix* matrix, uint32_t* image, int row,
                              int column) {
  m3i::TensorMap map;
  int words;
  const cudaError_t error = make_map(&map, *matrix, &words);
  if (error != cudaSuccess) return error;
  return m3i::launch_with_shared(load_kernel, 1, 64, 4 * words + 8, nullptr, map, image, words, row,
                                 column);
}

M3I_TEST_API cudaError_t share(const m3i::TiledMatrix* matrix, uint32_t* images, int row, int column,
                               int cluster) {
  m3i::TensorMap map;
  int words = 0;
  const cudaError_t error = make_map(&map, *matrix, &words);
  if (error != cudaSuccess) return error;
  const size_t shared_bytes = 4 * cluster * words + sizeof(m3i::Mbarrier);
  return m3i::launch_cluster(share_kernel, cluster, cluster, 64, shared_bytes, nullptr, map, images,
                             words, row, column, matrix->box_rows);
}

M3I_TEST_API cudaError_t store(const m3i::TiledMatrix* matrix, const uint32_t* image, int row,
                               int column, bool add) {
  m3i::TensorMap map;
  int words;
  const cudaError_t error = make_map(&map, *matrix, &words);
  if (error != cudaSuccess) return error;
  return m3i::launch_with_shared(store_kernel, 1, 64, 4 * words, nullptr, map, image, words, row,
                                 column, add);
}

M3I_TEST_API const char* fault_of(const m3i::TiledMatrix* matrix) {
  return m3i::tensor_map_fault(*matrix);
}
