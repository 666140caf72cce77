// boltzmann: device code.
#pragma once

#include "boltzmann/boltzmann_grads.cuh"
#include "boltzmann/boltzmann_sums.cuh"
