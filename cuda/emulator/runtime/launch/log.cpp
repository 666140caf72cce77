#include "runtime/launch/log.h"

#include "runtime/launch/module.h"

#include <fstream>
#include <string>

namespace m3i::emulator {

namespace {

std::string file_of_log;  // empty: nothing is logged
bool skip_launches = false;

std::string to_json(dim3 extents) {
  return "[" + std::to_string(extents.x) + ", " + std::to_string(extents.y) + ", " +
         std::to_string(extents.z) + "]";
}

}  // namespace

void log_launch(const cudaLaunchConfig_t& config, const void* kernel, dim3 cluster) {
  if (file_of_log.empty()) return;
  const Module* module = module_of(kernel);
  const Symbol* symbol =
      module ? module->function_at(reinterpret_cast<uintptr_t>(kernel)) : nullptr;
  std::ofstream log(file_of_log, std::ios::app);
  log << R"({"name": ")" << (symbol ? demangle(symbol->name) : "") << R"(", "grid": )"
      << to_json(config.gridDim) << R"(, "block": )" << to_json(config.blockDim)
      << R"(, "shared": )" << config.dynamicSmemBytes;
  const unsigned blocks = cluster.x * cluster.y * cluster.z;
  if (blocks != 1) log << R"(, "cluster": )" << blocks;
  log << "}\n";
}

void m3i_emulator_log_launches(const char* file) { file_of_log = file ? file : ""; }

void m3i_emulator_skip_launches(bool skip) { skip_launches = skip; }

bool skips_launches() { return skip_launches; }

}  // namespace m3i::emulator
