// Plain C++: no instruction set beyond the compiler's baseline. Small fixed arrays that compilers unroll.
#include "kernels.h"

#define GAC_INLINE inline
#define GAC_KERNEL static

namespace gac {
namespace portable {

struct V {
  static constexpr int W = 8, U = 1, UPair = 1;
  struct F {
    float v[W];
  };
  struct D {
    double v[W / 2];
  };
  static constexpr int H = W / 2;

#define GAC_EACH(type, count, expression) \
  type r;                                 \
  for (int i = 0; i < (count); ++i) r.v[i] = (expression); \
  return r

  template <class T>
  static F load(const T* p) {
    GAC_EACH(F, W, to_float(p[i]));
  }
  template <class T>
  static void load_any(const T* p, F& first, F& second) {
    first = load(p);
    second = load(p + W);
  }
  static D load(const double* p) { GAC_EACH(D, H, p[i]); }
  template <class T>
  static void store(T* p, F x) {
    for (int i = 0; i < W; ++i) p[i] = from_float<T>(x.v[i]);
  }
  static void store(double* p, D x) {
    for (int i = 0; i < H; ++i) p[i] = x.v[i];
  }
  static D widen(const float* p) { GAC_EACH(D, H, static_cast<double>(p[i])); }
  static void narrow(float* p, D x) {
    for (int i = 0; i < H; ++i) p[i] = static_cast<float>(x.v[i]);
  }
  static D low(F x) { GAC_EACH(D, H, static_cast<double>(x.v[i])); }
  static D high(F x) { GAC_EACH(D, H, static_cast<double>(x.v[H + i])); }
  static D zero() { return set(0.0); }
  static F set(float x) { GAC_EACH(F, W, x); }
  static D set(double x) { GAC_EACH(D, H, x); }
  static F mul(F x, F y) { GAC_EACH(F, W, x.v[i] * y.v[i]); }
  static F fma(F x, F y, F z) { GAC_EACH(F, W, x.v[i] * y.v[i] + z.v[i]); }
  static F add(F x, F y) { GAC_EACH(F, W, x.v[i] + y.v[i]); }
  static F div(F x, F y) { GAC_EACH(F, W, x.v[i] / y.v[i]); }
  static F sqrt(F x) { GAC_EACH(F, W, std::sqrt(x.v[i])); }
  static D div(D x, D y) { GAC_EACH(D, H, x.v[i] / y.v[i]); }
  static D sqrt(D x) { GAC_EACH(D, H, std::sqrt(x.v[i])); }
  static D add(D x, D y) { GAC_EACH(D, H, x.v[i] + y.v[i]); }
  static D sub(D x, D y) { GAC_EACH(D, H, x.v[i] - y.v[i]); }
  static D mul(D x, D y) { GAC_EACH(D, H, x.v[i] * y.v[i]); }
  static D fma(D x, D y, D z) { GAC_EACH(D, H, x.v[i] * y.v[i] + z.v[i]); }
  static D min(D x, D y) { GAC_EACH(D, H, x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
  static D max(D x, D y) { GAC_EACH(D, H, x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
  static D round(D x) { GAC_EACH(D, H, std::nearbyint(x.v[i])); }
  static D or_nan(D x, D y) { GAC_EACH(D, H, y.v[i] != y.v[i] ? y.v[i] : x.v[i]); }
  static D where_nonzero(D m, D x) { GAC_EACH(D, H, m.v[i] != 0 ? x.v[i] : 0.0); }
  static F inf_where_zero(F m, F x) { GAC_EACH(F, W, m.v[i] == 0 ? INFINITY : x.v[i]); }
  static D inf_where_zero(D m, D x) { GAC_EACH(D, H, m.v[i] == 0 ? INFINITY : x.v[i]); }
  static D pow2(D n) { GAC_EACH(D, H, pow2_one(n.v[i])); }
  static double pow2_one(double n) {
    const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52;
    double result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }
  static double sum(D x) { return (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]); }
  static F add_signed(F acc, F x, uint32_t word, int bit) {
    GAC_EACH(F, W, acc.v[i] + bits_to_float(float_to_bits(x.v[i]) ^ (word >> (bit + i) & 1u) << 31));
  }
  static D add_signed(D acc, D x, uint32_t word, int bit) {
    GAC_EACH(D, H, acc.v[i] + ((word >> (bit + i) & 1u) ? -x.v[i] : x.v[i]));
  }
  static void hash(uint32_t* out, uint32_t word, uint32_t key) {
    for (int i = 0; i < W; ++i) out[i] = finalize32((word + static_cast<uint32_t>(i)) ^ key);
  }
#undef GAC_EACH
};

#include "kernels.inl"

}  // namespace portable

const Kernels portable_kernels = portable::make_kernels("portable");

}  // namespace gac
