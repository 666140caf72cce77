// Stands where CUDA's header of this name does when g++ compiles a .cu for the emulator: see
// cuda/emulator/README.md.
#pragma once

#if !defined(__GNUC__) || defined(__clang__)
#error "the emulator is built by g++"
#endif

#include "cuda_runtime_api.h"
#include "emulator/access.h"
#include "emulator/atomics.h"
#include "emulator/cluster.h"
#include "emulator/launch.h"
#include "emulator/math.h"
#include "emulator/mbarrier.h"
#include "emulator/qualifiers.h"
#include "emulator/registers.h"
#include "emulator/thread.h"
#include "emulator/tile.h"
#include "emulator/tma.h"
#include "emulator/vector_types.h"
#include "emulator/warp.h"
#include "emulator/wgmma.h"

// nvcc gives kernels these names without std::.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
