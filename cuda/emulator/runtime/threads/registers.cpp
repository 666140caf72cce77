#include "runtime/threads/registers.h"

#include "emulator/instructions/registers.h"
#include "runtime/launch/device.h"
#include "runtime/launch/report.h"
#include "runtime/threads/scheduler.h"

#include <algorithm>

namespace m3i::emulator {

namespace {

constexpr uint32_t kWarpsOfGroup = 4;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Change {
  uint32_t count;
  bool increase;
};

std::string describe(Change change) {
  return std::string("setmaxnreg_") + (change.increase ? "inc" : "dec") + "<" +
         std::to_string(change.count) + ">";
}

void check_change(const Block& block, const Warp& warp, Change change, Site site) {
  const std::string what = describe(change);
  if (block.launch_registers == 0) {
    fail((what + " in a kernel without __launch_bounds__(threads, blocks), where ptxas ignores it")
             .c_str(),
         site);
  }
  if (block.threads.size() % (kWarpsOfGroup * kWarpSize) != 0) {
    fail((what + " in a block of " + std::to_string(block.threads.size()) +
          " threads, which are no whole warpgroups")
             .c_str(),
         site);
  }
  if (change.increase ? change.count < warp.registers : change.count > warp.registers) {
    fail((what + " by a warp of " + std::to_string(warp.registers) + " registers a thread").c_str(),
         site);
  }
}

// Gives the warps that wait, in their order, what there is.
void grant(Block& block) {
  for (uint32_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    const uint32_t more = warp.wanted_registers - warp.registers;
    if (more == 0 || more > block.free_registers) continue;
    block.free_registers -= more;
    warp.registers = warp.wanted_registers;
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
      Thread& thread = block.threads[w * kWarpSize + lane];
      if (thread.state == Thread::State::kAtRegisters) block.make_ready(thread);
    }
  }
}

// Of a whole warp. Register counts are those of a lane: all lanes have the same.
void change_registers(uint32_t lanes, void* const* payloads, Site site) {
  Block& block = *running_block;
  Warp& warp = block.warp_of(*running);
  const Change change = *static_cast<const Change*>(payloads[running->lane]);
  if (lanes != kAllLanes) {
    fail((describe(change) + " by the lanes " + hex(lanes) + ": expected the whole warp").c_str(),
         site);
  }
  check_change(block, warp, change, site);
  warp.register_changes.push_back(change.count);
  warp.wanted_registers = change.count;
  if (!change.increase) {
    block.free_registers += warp.registers - change.count;
    warp.registers = change.count;
  }
  grant(block);
}

}  // namespace

uint32_t launch_registers(const std::optional<LaunchBound>& bound) {
  constexpr uint32_t kOfMultiprocessor = 65536, kMostOfThread = 256, kUnit = 8;
  if (!bound || bound->blocks == 0) return 0;
  const uint32_t share = kOfMultiprocessor / (bound->threads * bound->blocks);
  return std::min(kMostOfThread, share / kUnit * kUnit);
}

void set_max_registers(int count, bool increase) {
  const Site site = at(reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  require_architecture(90, "setmaxnreg", site);
  Change change{static_cast<uint32_t>(count), increase};
  meet(kAllLanes, "setmaxnreg", change_registers, &change, site);
  const Warp& warp = running_block->warp_of(*running);
  while (warp.registers != warp.wanted_registers) wait(Thread::State::kAtRegisters, site);
}

void check_warpgroups_changed_together(const Block& block) {
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const size_t first = w / kWarpsOfGroup * kWarpsOfGroup;
    if (block.warps[w].register_changes == block.warps[first].register_changes) continue;
    fail(("setmaxnreg by a part of a warpgroup: warp " + std::to_string(w) + " came to " +
          std::to_string(block.warps[w].register_changes.size()) + " of them or to others, warp " +
          std::to_string(first) + " to " +
          std::to_string(block.warps[first].register_changes.size()))
             .c_str(),
         running->site);
  }
}

std::string describe_wanted_registers(const Block& block, const Thread& thread) {
  const Warp& warp = block.warps[thread.warp];
  return std::to_string(warp.wanted_registers) + " registers a thread in the place of " +
         std::to_string(warp.registers) + " (setmaxnreg; of " +
         std::to_string(block.launch_registers) + " a thread at the launch, " +
         std::to_string(block.free_registers * kWarpSize) + " are free)";
}

}  // namespace m3i::emulator
