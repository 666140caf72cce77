#include "runtime/memory/requests.h"

#include "runtime/launch/module.h"
#include "runtime/launch/report.h"
#include "runtime/threads/scheduler.h"

#include <algorithm>
#include <array>
#include <deque>
#include <fstream>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace m3i::emulator {

namespace {

constexpr uintptr_t kSector = 32, kWord = 4, kBanks = 32;
constexpr size_t kWidest = 16;  // bytes of a lane in one request
constexpr uint32_t kLanes = 32;

enum class Kind {
  kGlobalRead,
  kGlobalWrite,
  kGlobalAtomic,
  kSharedRead,
  kSharedWrite,
  kSharedAtomic
};

struct Place {
  uintptr_t instruction;
  Kind kind;
  size_t bytes;
  bool operator<(const Place& other) const {
    return std::tie(instruction, kind, bytes) <
           std::tie(other.instruction, other.kind, other.bytes);
  }
};

struct Request {
  uint32_t lanes = 0;
  std::array<uintptr_t, kLanes> address;  // of those lanes; in shared memory from its begin on
};

// The requests of a warp that wait for lanes, the oldest first.
struct Open {
  uint64_t closed = 0;
  std::array<uint64_t, kLanes> next{};  // how often each lane has come
  std::deque<Request> requests;
};

struct Counts {
  uint64_t requests = 0, lanes = 0, units = 0;
  std::map<uint32_t, Open> warps;
};

std::string file_of_counts;  // empty: nothing is counted
std::map<Place, Counts> counts_of_launch;
std::map<std::tuple<const char*, int, const void*>, uint64_t> arrivals_of_launch;

Kind kind_of(const Region& region, Access access) {
  const bool shared = region.shared();
  if (access == Access::kUpdate) return shared ? Kind::kSharedAtomic : Kind::kGlobalAtomic;
  const bool reads = access == Access::kRead || access == Access::kAtomicRead;
  if (reads) return shared ? Kind::kSharedRead : Kind::kGlobalRead;
  return shared ? Kind::kSharedWrite : Kind::kGlobalWrite;
}

bool is_shared(Kind kind) { return kind >= Kind::kSharedRead; }

uint64_t sectors(const Request& request, size_t bytes) {
  std::vector<uintptr_t> touched;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    const uintptr_t begin = request.address[lane];
    for (uintptr_t s = begin / kSector; s <= (begin + bytes - 1) / kSector; ++s)
      touched.push_back(s);
  }
  std::sort(touched.begin(), touched.end());
  return static_cast<uint64_t>(std::unique(touched.begin(), touched.end()) - touched.begin());
}

// Of lanes [first, first + count), whose turn is at once.
uint64_t turns(const Request& request, uint32_t first, uint32_t count, size_t bytes, bool atomic) {
  std::array<std::vector<uintptr_t>, kBanks> words;
  for (uint32_t lane = first; lane < first + count; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    const uintptr_t begin = request.address[lane];
    for (uintptr_t w = begin / kWord; w <= (begin + bytes - 1) / kWord; ++w) {
      words[w % kBanks].push_back(w);
    }
  }
  size_t most = 0;
  for (std::vector<uintptr_t>& of_bank : words) {
    std::sort(of_bank.begin(), of_bank.end());
    if (!atomic) of_bank.erase(std::unique(of_bank.begin(), of_bank.end()), of_bank.end());
    most = std::max(most, of_bank.size());
  }
  return most;
}

uint64_t wavefronts(const Request& request, size_t bytes, bool atomic) {
  const auto parts = static_cast<uint32_t>(std::clamp(bytes, kWord, kWidest) / kWord);
  uint64_t sum = 0;
  for (uint32_t part = 0; part < parts; ++part) {
    sum += turns(request, part * kLanes / parts, kLanes / parts, bytes, atomic);
  }
  return sum;
}

void close(const Place& place, Counts& counts, Open& open) {
  const Request& request = open.requests.front();
  ++counts.requests;
  counts.lanes += static_cast<uint64_t>(__builtin_popcount(request.lanes));
  counts.units += is_shared(place.kind)
                      ? wavefronts(request, place.bytes, place.kind == Kind::kSharedAtomic)
                      : sectors(request, place.bytes);
  open.requests.pop_front();
  ++open.closed;
}

std::string place_of(Site site) {
  if (site.file) {
    return R"("file": ")" + std::string(site.file) + R"(", "line": )" + std::to_string(site.line);
  }
  const uintptr_t at = reinterpret_cast<uintptr_t>(site.instruction) - 1;  // of the call
  const Module* module = module_of(reinterpret_cast<const void*>(at));
  if (!module) return R"("module": "", "offset": 0)";
  return R"("module": ")" + module->path + R"(", "offset": )" + std::to_string(at - module->base);
}

std::string numbers(size_t bytes, uint64_t requests, uint64_t lanes, uint64_t units) {
  return R"(, "bytes": )" + std::to_string(bytes) + R"(, "requests": )" + std::to_string(requests) +
         R"(, "lanes": )" + std::to_string(lanes) + R"(, "units": )" + std::to_string(units) + "}";
}

}  // namespace

void count_access(const Region& region, uintptr_t address, size_t size, Access access,
                  uintptr_t instruction) {
  if (file_of_counts.empty()) return;
  const Thread& thread = *running;
  const Block& block = *thread.block;
  const Place place{instruction, kind_of(region, access), size};
  Counts& counts = counts_of_launch[place];
  const auto warps = static_cast<uint32_t>(block.warps.size());
  Open& open = counts.warps[block.rank * warps + thread.warp];
  const uint64_t number = open.next[thread.lane]++ - open.closed;
  if (number >= open.requests.size()) open.requests.resize(number + 1);
  Request& request = open.requests[number];
  request.lanes |= 1u << thread.lane;
  request.address[thread.lane] = region.shared() ? address - region.begin : address;
  const uint32_t alive = block.warps[thread.warp].alive;
  while (!open.requests.empty() && (open.requests.front().lanes & alive) == alive) {
    close(place, counts, open);
  }
}

void count_barrier(Site site) {
  if (!file_of_counts.empty()) ++arrivals_of_launch[{site.file, site.line, site.instruction}];
}

void finish_requests() {
  for (auto& [place, counts] : counts_of_launch) {
    for (auto& [warp, open] : counts.warps) {
      while (!open.requests.empty()) {
        if (open.requests.front().lanes) {
          close(place, counts, open);
        } else {
          open.requests.pop_front();
        }
      }
    }
    counts.warps.clear();
  }
}

void log_requests(const void* kernel) {
  if (file_of_counts.empty()) return;
  static constexpr const char* kMemory[] = {"global", "global", "global",
                                            "shared", "shared", "shared"};
  static constexpr const char* kAccess[] = {"read", "write", "atomic", "read", "write", "atomic"};
  const Module* module = module_of(kernel);
  const Symbol* symbol =
      module ? module->function_at(reinterpret_cast<uintptr_t>(kernel)) : nullptr;
  std::ofstream log(file_of_counts, std::ios::app);
  log << R"({"kernel": ")" << (symbol ? short_name(symbol->name) : "") << R"(", "places": [)";
  const char* comma = "";
  for (const auto& [place, counts] : counts_of_launch) {
    const auto kind = static_cast<size_t>(place.kind);
    log << comma << "{" << place_of(at(place.instruction)) << R"(, "memory": ")" << kMemory[kind]
        << R"(", "access": ")" << kAccess[kind] << '"'
        << numbers(place.bytes, counts.requests, counts.lanes, counts.units);
    comma = ", ";
  }
  for (const auto& [site, arrivals] : arrivals_of_launch) {
    const auto [file, line, instruction] = site;
    log << comma << "{" << place_of({file, line, instruction})
        << R"(, "memory": "barrier", "access": "barrier")" << numbers(0, 0, arrivals, arrivals);
    comma = ", ";
  }
  log << "]}\n";
  counts_of_launch.clear();
  arrivals_of_launch.clear();
}

void m3i_emulator_count_requests(const char* file) { file_of_counts = file ? file : ""; }

}  // namespace m3i::emulator
