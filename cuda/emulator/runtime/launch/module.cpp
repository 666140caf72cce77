#include "runtime/launch/module.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>

// The dynamic loader's, with its argument; no header declares it.
struct TlsIndex {
  size_t module, offset;
};
extern "C" void* __tls_get_addr(TlsIndex* index);

namespace m3i::emulator {

namespace {

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// An ELF file of this machine's word size.
class Elf {
 public:
  explicit Elf(const std::string& path) : bytes_(read_file(path)) {
    if (bytes_.size() < sizeof(ElfW(Ehdr)) || std::memcmp(bytes_.data(), ELFMAG, SELFMAG) != 0) {
      throw std::runtime_error("not an ELF file: " + path);
    }
  }
  template <class T>
  const T* at(size_t offset) const {
    return reinterpret_cast<const T*>(bytes_.data() + offset);
  }
  const ElfW(Ehdr) & header() const { return *at<ElfW(Ehdr)>(0); }
  const ElfW(Shdr) & section(size_t i) const { return at<ElfW(Shdr)>(header().e_shoff)[i]; }
  const char* name(const ElfW(Shdr) & section_header) const {
    return at<char>(section(header().e_shstrndx).sh_offset) + section_header.sh_name;
  }

 private:
  std::vector<char> bytes_;
};

void read_symbols(const Elf& elf, const ElfW(Shdr) & table, Module& module) {
  const char* names = elf.at<char>(elf.section(table.sh_link).sh_offset);
  const auto* symbols = elf.at<ElfW(Sym)>(table.sh_offset);
  for (size_t i = 0; i < table.sh_size / sizeof(ElfW(Sym)); ++i) {
    const ElfW(Sym) & symbol = symbols[i];
    if (symbol.st_shndx == SHN_UNDEF || symbol.st_size == 0) continue;
    const char* name = names + symbol.st_name;
    if (ELF64_ST_TYPE(symbol.st_info) == STT_TLS) {
      module.shared.push_back({symbol.st_value, symbol.st_size, name});
    } else if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) {
      module.functions.push_back({module.base + symbol.st_value, symbol.st_size, name});
    }
  }
}

// The section holds an address for each kernel with a bound, relocated when it was loaded.
void read_bounds(const ElfW(Shdr) & section, Module& module) {
  const auto* entries = reinterpret_cast<const uintptr_t*>(module.base + section.sh_addr);
  module.bounds.assign(entries, entries + section.sh_size / sizeof(uintptr_t));
  std::sort(module.bounds.begin(), module.bounds.end());
}

int read_segments(dl_phdr_info* info, size_t, void* argument) {
  auto& module = *static_cast<Module*>(argument);
  if (info->dlpi_addr != module.base) return 0;
  module.tls_module = info->dlpi_tls_modid;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    const uintptr_t begin = module.base + header.p_vaddr;
    if (header.p_type == PT_TLS) module.shared_bytes = header.p_memsz;
    if (header.p_type == PT_LOAD) {
      module.segments.push_back({begin, begin + header.p_memsz, (header.p_flags & PF_W) != 0});
    }
  }
  return 1;
}

std::unique_ptr<Module> read_module(const Dl_info& found) {
  auto module = std::make_unique<Module>();
  module->path = found.dli_fname;
  module->base = reinterpret_cast<uintptr_t>(found.dli_fbase);
  dl_iterate_phdr(read_segments, module.get());
  const Elf elf(module->path);
  for (size_t i = 0; i < elf.header().e_shnum; ++i) {
    const ElfW(Shdr) & section = elf.section(i);
    if (section.sh_type == SHT_SYMTAB) read_symbols(elf, section, *module);
    if (!std::strcmp(elf.name(section), "__patchable_function_entries")) {
      read_bounds(section, *module);
    }
  }
  const auto by_begin = [](const Symbol& a, const Symbol& b) { return a.begin < b.begin; };
  std::sort(module->functions.begin(), module->functions.end(), by_begin);
  std::sort(module->shared.begin(), module->shared.end(), by_begin);
  return module;
}

const Symbol* find(const std::vector<Symbol>& symbols, uintptr_t at) {
  auto next = std::upper_bound(symbols.begin(), symbols.end(), at,
                               [](uintptr_t value, const Symbol& s) { return value < s.begin; });
  if (next == symbols.begin()) return nullptr;
  const Symbol& symbol = *--next;
  return at - symbol.begin < symbol.size ? &symbol : nullptr;
}

}  // namespace

uintptr_t Module::shared_base() const {
  if (tls_module == 0) return 0;
  TlsIndex index{tls_module, 0};
  return reinterpret_cast<uintptr_t>(__tls_get_addr(&index));
}

const Symbol* Module::function_at(uintptr_t address) const { return find(functions, address); }
const Symbol* Module::shared_at(size_t offset) const { return find(shared, offset); }

const Segment* Module::segment_at(uintptr_t address) const {
  for (const Segment& segment : segments) {
    if (segment.begin <= address && address < segment.end) return &segment;
  }
  return nullptr;
}

std::optional<LaunchBound> Module::launch_bound(uintptr_t address) const {
  constexpr unsigned kBlocks = 2048;  // qualifiers.h
  auto padding = std::upper_bound(bounds.begin(), bounds.end(), address);
  if (padding == bounds.begin()) return std::nullopt;
  --padding;
  // It is another kernel's if a function lies between.
  const auto own =
      std::lower_bound(functions.begin(), functions.end(), address,
                       [](const Symbol& s, uintptr_t value) { return s.begin < value; });
  if (own != functions.begin() && std::prev(own)->begin >= *padding) return std::nullopt;
  const auto size = static_cast<unsigned>(address - *padding);
  return LaunchBound{size % kBlocks, size / kBlocks};
}

size_t Module::static_shared_bytes(const Symbol& kernel) const {
  // _ZZ<kernel>E<variable> is the variable of _Z<kernel>.
  const std::string prefix = "_ZZ" + kernel.name.substr(2) + "E";
  size_t total = 0;
  for (const Symbol& symbol : shared) {
    if (symbol.name.compare(0, prefix.size(), prefix) == 0) total += symbol.size;
  }
  return total;
}

const Module* module_of(const void* address) {
  static std::map<void*, std::unique_ptr<Module>> modules;
  Dl_info found;
  if (!dladdr(address, &found)) return nullptr;
  std::unique_ptr<Module>& module = modules[found.dli_fbase];
  if (!module) module = read_module(found);
  return module.get();
}

std::string demangle(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = text ? text : name;
  std::free(text);
  return result;
}

std::string short_name(const std::string& mangled) {
  std::string name = demangle(mangled);
  // Cut from the parenthesis that opens the parameters on.
  size_t at = name.rfind(')');
  for (int depth = 0; at != std::string::npos && at > 0; --at) {
    depth += name[at] == ')' ? 1 : name[at] == '(' ? -1 : 0;
    if (depth == 0) break;
  }
  if (at != std::string::npos) name.resize(at);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t i; (i = name.find(unnamed)) != std::string::npos;) name.erase(i, unnamed.size());
  return name;
}

}  // namespace m3i::emulator
