#include "dispatch.h"

#include <atomic>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#define GAC_X86 1
#endif

namespace gac {
namespace {

#ifdef GAC_X86
constexpr unsigned bit(int position) { return 1u << position; }

// Asked of the CPU itself: __builtin_cpu_supports needs a table of the compiler's runtime library, which the one of a
// cross compiler leaves empty. Bits: Intel's manual, volume 2, CPUID; volume 1, 13.2 and 13.3 (XCR0).
struct Features {
  bool avx2 = false, avx512 = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    constexpr unsigned fma = bit(12), osxsave = bit(27), avx = bit(28), f16c = bit(29);
    if (~c & (fma | osxsave | avx | f16c)) return;
    unsigned saved, high;  // registers that the operating system saves
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    constexpr unsigned sse = bit(1), ymm = bit(2), opmask = bit(5), zmm = bit(6) | bit(7);
    if (~saved & (sse | ymm) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = b & bit(5);
    constexpr unsigned f = bit(16), dq = bit(17), bw = bit(30), vl = bit(31);
    avx512 = avx2 && !(~saved & (opmask | zmm)) && !(~b & (f | dq | bw | vl));
  }
};
#endif

bool cpu_has(const Kernels* table) {
  if (!table) return false;
#ifdef GAC_X86
  static const Features features;
  if (table == avx2_kernels) return features.avx2;
  if (table == avx512_kernels) return features.avx512;
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
