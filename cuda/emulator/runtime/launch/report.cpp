#include "runtime/launch/report.h"

#include "runtime/instructions/mbarrier.h"
#include "runtime/launch/module.h"
#include "runtime/memory/memory.h"
#include "runtime/threads/registers.h"
#include "runtime/threads/scheduler.h"

#include <cstdio>
#include <map>

namespace m3i::emulator {

namespace {

const void* current_kernel = nullptr;
cudaError_t error_of_launch = cudaSuccess;
std::string text_of_last;

// File and line of an instruction, and of the calls that were inlined to it, by addr2line.
std::string source_of(uintptr_t instruction) {
  static std::map<uintptr_t, std::string> found;  // each costs a process
  if (const auto known = found.find(instruction); known != found.end()) return known->second;
  // A return address belongs to the call before it.
  const uintptr_t at = instruction - 1;
  const Module* module = module_of(reinterpret_cast<const void*>(at));
  if (!module) return "an unknown place";
  const std::string command = "addr2line -i -e '" + module->path + "' " + hex(at - module->base);
  std::string lines;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char line[512];
    while (std::fgets(line, sizeof(line), pipe)) {
      lines += (lines.empty() ? "" : "  inlined at ") + std::string(line);
    }
    pclose(pipe);
  }
  while (!lines.empty() && lines.back() == '\n') lines.pop_back();
  return found[instruction] = lines.empty() ? module->path : lines;
}

std::string kernel_name() {
  const Module* module = module_of(current_kernel);
  const Symbol* symbol =
      module ? module->function_at(reinterpret_cast<uintptr_t>(current_kernel)) : nullptr;
  return symbol ? short_name(symbol->name) : "an unknown kernel";
}

// Keeps the first report of a launch.
void record(cudaError_t error, const std::string& what, const std::string& where, Site site) {
  if (error_of_launch != cudaSuccess) return;
  error_of_launch = error;
  text_of_last = what + "\n  kernel " + kernel_name() + where;
  text_of_last += "\n  at " + to_string(site);
}

std::string place_of(const Thread& thread) {
  return ", block " + to_string(thread.block->index) + ", thread " + to_string(thread.index);
}

std::string waits_for(const Thread& thread) {
  switch (thread.state) {
    case Thread::State::kAtBarrier:
      return "__syncthreads";
    case Thread::State::kAtNamedBarrier:
      return "a named barrier";
    case Thread::State::kAtMbarrier:
      return "parity " + std::to_string(thread.parity) + " of " +
             describe_mbarrier(thread.mbarrier);
    case Thread::State::kAtCollective:
    case Thread::State::kAtWarpgroup:
      return thread.operation;
    case Thread::State::kAtRegisters:
      return describe_wanted_registers(*thread.block, thread);
    case Thread::State::kAtCluster:
      return "a cluster barrier";
    case Thread::State::kYielded:
      return "their turn, again and again,";
    default:
      return "nothing";
  }
}

}  // namespace

std::string to_string(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string to_string(Site site) {
  if (site.file) return std::string(site.file) + ":" + std::to_string(site.line);
  if (!site.instruction) return "an unknown place";
  return source_of(reinterpret_cast<uintptr_t>(site.instruction));
}

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

bool same(Site a, Site b) {
  return a.line == b.line && a.instruction == b.instruction &&
         (a.file == b.file || (a.file && b.file && std::string(a.file) == b.file));
}

std::string describe_memory(const Region& region, uintptr_t address, size_t size) {
  const std::string bytes = std::to_string(size) + " bytes at " + hex(address) + ", ";
  const size_t offset = address - region.begin;
  const std::string at = "byte " + std::to_string(offset) + " of ";
  if (region.kind == Region::Kind::kDynamicShared) {
    const bool alone = running_cluster->blocks.size() == 1;
    const bool own = alone || (running && region.block == running_block->rank);
    return bytes + at + "dynamic shared memory" +
           (own ? "" : " of block " + to_string(running_cluster->blocks[region.block].index));
  }
  if (region.kind == Region::Kind::kGlobal) {
    return bytes + at + "an allocation of " + std::to_string(region.end - region.begin);
  }
  const Module* module = module_of(current_kernel);
  const Symbol* variable = module ? module->shared_at(offset) : nullptr;
  if (!variable) return bytes + "outside the shared variables";
  return bytes + "byte " + std::to_string(offset - variable->begin) + " of shared variable " +
         demangle(variable->name);
}

void fail_thread(const Thread& thread, const std::string& what, Site site) {
  record(cudaErrorLaunchFailure, what, place_of(thread), site);
  abandon_block();
}

void record_failure(cudaError_t error, const std::string& what, Site site) {
  record(error, what, place_of(*running), site);
}

void fail_with(cudaError_t error, const std::string& what, Site site) {
  record_failure(error, what, site);
  abandon_block();
}

void fail(const char* what, Site site) { fail_with(cudaErrorLaunchFailure, what, site); }

namespace {

void report_waiting(const Cluster& cluster, const std::string& why) {
  // How many threads wait for what, where
  std::map<std::string, int> counts;
  const Thread* first = nullptr;
  for (const Block& block : cluster.blocks) {
    for (const Thread& thread : block.threads) {
      if (thread.state == Thread::State::kDone) continue;
      if (!first) first = &thread;
      ++counts[waits_for(thread) + " at " + to_string(thread.site)];
    }
  }
  std::string what = why;
  for (const auto& [wait, count] : counts) {
    what += "\n  " + std::to_string(count) + " threads wait for " + wait;
  }
  what += describe_mbarriers(cluster);
  record(cudaErrorLaunchFailure, what, place_of(*first), first->site);
}

}  // namespace

void report_deadlock(const Cluster& cluster) {
  const bool one = cluster.blocks.size() == 1;
  report_waiting(cluster, std::string("deadlock: no thread of the ") + (one ? "block" : "cluster") +
                              " can go on");
}

void report_standstill(const Cluster& cluster) {
  report_waiting(cluster, "standstill: all threads that can go on only wait for others");
}

cudaError_t launch_error() { return error_of_launch; }

void forget_report() { text_of_last.clear(); }

void begin_reports(const void* kernel) {
  current_kernel = kernel;
  error_of_launch = cudaSuccess;
}

const char* m3i_emulator_report() { return text_of_last.c_str(); }

}  // namespace m3i::emulator
