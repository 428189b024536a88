#include "dispatch.h"

#include <atomic>

namespace gac {
namespace {

bool cpu_has(const Kernels* table) {
  if (!table) return false;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();  // these also ask whether the operating system saves the registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (table == avx2_kernels) return avx2;
  if (table == avx512_kernels)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return true;
}

const Kernels* find(const char* isa) {
  const Kernels* const tables[] = {avx512_kernels, avx2_kernels, neon_kernels, &portable_kernels};
  for (const Kernels* table : tables)
    if (cpu_has(table) && (!*isa || !std::strcmp(isa, table->name))) return table;
  return nullptr;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = active.load(std::memory_order_relaxed);
  if (!table) {
    table = find("");
    active.store(table, std::memory_order_relaxed);
  }
  return *table;
}

bool select(const char* isa) {
  const Kernels* table = find(isa);
  if (table) active.store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace gac
