// Reductions of the null NCCL: numbers of each type, summed in the order of ranks.
#pragma once

#include <nccl.h>

#include <cstddef>
#include <vector>

namespace m3i::null {

size_t bytes_of(ncclDataType_t type);

// The number of that type; 1 for a type that is no float.
double number_at(const void* number, ncclDataType_t type);

// Reduces parts of so many bytes each, in their order, every number times scale first. 16-bit
// floats are summed in fp32. False for a type that is not known: the 8-bit floats.
bool reduce_parts(const std::vector<const char*>& parts, size_t bytes, ncclDataType_t type,
                  ncclRedOp_t operation, double scale, char* result);

}  // namespace m3i::null
