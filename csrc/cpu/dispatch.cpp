// Which instruction set the kernels run with.
#include <atomic>
#include <cstdlib>

#include "cpu/table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace condense::cpu {

namespace baseline {
extern const Table kTable;
}
#if defined(CONDENSE_X86)
namespace avx2 {
extern const Table kTable;
}
namespace avx512 {
extern const Table kTable;
}
namespace avx512_bf16 {
extern const Table kTable;
}
namespace amx {
extern const Table kTable;
}
#endif

namespace {

bool always() { return true; }

#if defined(CONDENSE_X86)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {  // x86-64-v4
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// Beyond the processor's support, Linux wants a process to ask for the 8 KiB of tile state that a context switch saves.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 24 & 1) || !(d >> 22 & 1)) return false;  // amx-tile, amx-bf16
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

struct InstructionSet {
  const char* name;
  const Table* table;
  bool (*supported)();
};

const InstructionSet kAll[] = {
    {"baseline", &baseline::kTable, always},
#if defined(CONDENSE_X86)
    {"avx2", &avx2::kTable, has_avx2},
    {"avx512", &avx512::kTable, has_avx512},
    {"avx512_bf16", &avx512_bf16::kTable, has_avx512_bf16},
    {"amx", &amx::kTable, has_amx},
#endif
};

const InstructionSet* find(const std::string& name) {
  for (const InstructionSet& set : kAll) {
    if (name == set.name && set.supported()) return &set;
  }
  return nullptr;
}

const InstructionSet* first_choice() {
  const char* asked = std::getenv("CONDENSE_CPU_ISA");
  if (asked && *asked) {
    if (const InstructionSet* set = find(asked)) return set;
  }
  const InstructionSet* best = kAll;
  for (const InstructionSet& set : kAll) {
    if (set.supported()) best = &set;
  }
  return best;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{first_choice()};
  return set;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kAll) {
    if (set.supported()) names.emplace_back(set.name);
  }
  return names;
}

const char* instruction_set() { return chosen().load()->name; }

void use_instruction_set(const std::string& name) {
  const InstructionSet* set = find(name);
  if (!set) {
    std::string known;
    for (const std::string& each : instruction_sets()) known += (known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("instruction set '" + name + "' is not available here, expected one of " + known);
  }
  chosen() = set;
}

const Table& table() { return *chosen().load()->table; }

}  // namespace condense::cpu
