// The registers that are allocated to the warps of a block.
#pragma once

#include "runtime/launch/module.h"
#include "runtime/threads/block.h"

#include <optional>
#include <string>

namespace m3i::emulator {

// Of a thread at the launch of a kernel that uses setmaxnreg: all that there are, shared among as
// many threads as its launch bound says. 0 without a bound of the blocks; ptxas ignores setmaxnreg
// then.
uint32_t launch_registers(const std::optional<LaunchBound>& bound);

// Fails if the warps of a warpgroup have come to different calls; to be called by a block's last
// thread as it returns.
void check_warpgroups_changed_together(const Block& block);

// Describes what a thread that waits for registers waits for, for a report.
std::string describe_wanted_registers(const Block& block, const Thread& thread);

}  // namespace m3i::emulator
