// dcnv3: device code.
#pragma once

#include "dcnv3/dcnv3_bwd.cuh"
#include "dcnv3/dcnv3_fixed.cuh"
#include "dcnv3/dcnv3_fwd.cuh"
