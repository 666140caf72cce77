// Checks of the shared memory that the asynchronous proxy, wgmma and tensor copies, reads and
// writes.
#pragma once

#include "runtime/memory/race.h"

namespace m3i::emulator {

inline constexpr uint32_t kChunk = 16;  // bytes of the units in which an operation reads

// Fails if one of the bytes, which a copy is to overwrite, was written by a thread without
// fence_proxy_async and a barrier after it.
void check_overwritten(const Region& region, uintptr_t address, size_t size, Site site);

// Fails if one of the bytes, in global memory, which a tensor copy of the running thread is to read
// or to write, was written in this launch without fence_proxy_async_global of the thread that
// wrote, or of the running thread since it has heard of that.
void check_fenced_in_global(const Region& region, uintptr_t address, size_t size, Site site);

// Records that `operation` reads a chunk, at this offset in dynamic shared memory, until end_read.
// Fails if it lies outside, was not written, or was written by a thread that did not call
// fence_proxy_async before a barrier. Returns the chunk.
const void* begin_read(AsyncRead& operation, uint32_t offset);
void end_read(const AsyncRead& operation);

// Whether one of the bytes is being read so.
bool is_being_read(const Region& region, uintptr_t address, size_t size);

}  // namespace m3i::emulator
