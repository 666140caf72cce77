// Replaces CUDA's header of this name when g++ compiles a .cu for the emulator: see
// cuda/emulator/README.md.
#pragma once

#if !defined(__GNUC__) || defined(__clang__)
#error "the emulator is built by g++"
#endif

#include "cuda_runtime_api.h"
#include "emulator/access.h"
#include "emulator/instructions/atomics.h"
#include "emulator/instructions/cluster.h"
#include "emulator/instructions/counter.h"
#include "emulator/instructions/mbarrier.h"
#include "emulator/instructions/registers.h"
#include "emulator/instructions/tile.h"
#include "emulator/instructions/tma.h"
#include "emulator/instructions/warp.h"
#include "emulator/instructions/wgmma.h"
#include "emulator/launch.h"
#include "emulator/numbers/math.h"
#include "emulator/numbers/vector_types.h"
#include "emulator/qualifiers.h"
#include "emulator/thread.h"

// nvcc gives kernels these names without std::.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
