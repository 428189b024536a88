// NEON of 64-bit ARM: 4 floats a vector. It is that architecture's baseline, so no target attribute is needed.
#include "kernels.h"

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))

#include <arm_neon.h>

#define GAC_INLINE __attribute__((always_inline)) inline
#define GAC_KERNEL static

namespace gac {
namespace neon {

struct V {
  using F = float32x4_t;
  using D = float64x2_t;
  static constexpr int W = 4, U = 4, UPair = 3;

  GAC_INLINE static F load(const float* p) { return vld1q_f32(p); }
  GAC_INLINE static F load(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  GAC_INLINE static F load(const fp16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  GAC_INLINE static F load(const e4m3* p) {  // through numbers of 16 bits, as to_half()
    const uint16_t halves[4] = {to_half(p[0]).bits, to_half(p[1]).bits, to_half(p[2]).bits, to_half(p[3]).bits};
    return vmulq_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))), vdupq_n_f32(256.0f));
  }
  GAC_INLINE static F load(const e5m2* p) {
    const uint16_t halves[4] = {to_half(p[0]).bits, to_half(p[1]).bits, to_half(p[2]).bits, to_half(p[3]).bits};
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
  }
  template <class T>
  GAC_INLINE static void load_any(const T* p, F& first, F& second) {
    first = load(p);
    second = load(p + W);
  }
  GAC_INLINE static D load(const double* p) { return vld1q_f64(p); }
  GAC_INLINE static void store(float* p, F x) { vst1q_f32(p, x); }
  GAC_INLINE static void store(double* p, D x) { vst1q_f64(p, x); }
  GAC_INLINE static void store(bf16* p, F x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16));
  }
  GAC_INLINE static void store(fp16* p, F x) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x)));
  }
  GAC_INLINE static D widen(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
  GAC_INLINE static void narrow(float* p, D x) { vst1_f32(p, vcvt_f32_f64(x)); }
  GAC_INLINE static D low(F x) { return vcvt_f64_f32(vget_low_f32(x)); }
  GAC_INLINE static D high(F x) { return vcvt_high_f64_f32(x); }
  GAC_INLINE static D zero() { return vdupq_n_f64(0.0); }
  GAC_INLINE static F set(float x) { return vdupq_n_f32(x); }
  GAC_INLINE static D set(double x) { return vdupq_n_f64(x); }
  GAC_INLINE static F mul(F x, F y) { return vmulq_f32(x, y); }
  GAC_INLINE static F fma(F x, F y, F z) { return vfmaq_f32(z, x, y); }
  GAC_INLINE static F add(F x, F y) { return vaddq_f32(x, y); }
  GAC_INLINE static F div(F x, F y) { return vdivq_f32(x, y); }
  GAC_INLINE static F sqrt(F x) { return vsqrtq_f32(x); }
  GAC_INLINE static D div(D x, D y) { return vdivq_f64(x, y); }
  GAC_INLINE static D sqrt(D x) { return vsqrtq_f64(x); }
  GAC_INLINE static D add(D x, D y) { return vaddq_f64(x, y); }
  GAC_INLINE static D sub(D x, D y) { return vsubq_f64(x, y); }
  GAC_INLINE static D mul(D x, D y) { return vmulq_f64(x, y); }
  GAC_INLINE static D fma(D x, D y, D z) { return vfmaq_f64(z, x, y); }
  GAC_INLINE static D min(D x, D y) { return vminq_f64(x, y); }
  GAC_INLINE static D max(D x, D y) { return vmaxq_f64(x, y); }
  GAC_INLINE static D round(D x) { return vrndnq_f64(x); }
  GAC_INLINE static D or_nan(D x, D y) { return vbslq_f64(vceqq_f64(y, y), x, y); }
  GAC_INLINE static D where_nonzero(D m, D x) {
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(x), vceqzq_f64(m)));
  }
  GAC_INLINE static F inf_where_zero(F m, F x) { return vbslq_f32(vceqzq_f32(m), vdupq_n_f32(INFINITY), x); }
  GAC_INLINE static D inf_where_zero(D m, D x) { return vbslq_f64(vceqzq_f64(m), vdupq_n_f64(INFINITY), x); }
  GAC_INLINE static D pow2(D n) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vaddq_s64(vcvtq_s64_f64(n), vdupq_n_s64(1023)), 52));
  }
  GAC_INLINE static double sum(D x) { return vaddvq_f64(x); }
  GAC_INLINE static F add_signed(F acc, F x, uint32_t word, int bit) {
    const int32x4_t counts = {31 - bit, 30 - bit, 29 - bit, 28 - bit};
    const uint32x4_t sign = vandq_u32(vshlq_u32(vdupq_n_u32(word), counts), vdupq_n_u32(0x80000000u));
    return vaddq_f32(acc, vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), sign)));
  }
  GAC_INLINE static D add_signed(D acc, D x, uint32_t word, int bit) {
    const int64x2_t counts = {63 - bit, 62 - bit};
    const uint64x2_t sign = vandq_u64(vshlq_u64(vdupq_n_u64(word), counts), vdupq_n_u64(uint64_t{1} << 63));
    return vaddq_f64(acc, vreinterpretq_f64_u64(veorq_u64(vreinterpretq_u64_f64(x), sign)));
  }
  GAC_INLINE static void hash(uint32_t* out, uint32_t word, uint32_t key) {
    const uint32x4_t steps = {0, 1, 2, 3};
    uint32x4_t h = veorq_u32(vaddq_u32(vdupq_n_u32(word), steps), vdupq_n_u32(key));
    h = veorq_u32(h, vshrq_n_u32(h, 16));
    h = vmulq_u32(h, vdupq_n_u32(0x85EBCA6Bu));
    h = veorq_u32(h, vshrq_n_u32(h, 13));
    h = vmulq_u32(h, vdupq_n_u32(0xC2B2AE35u));
    vst1q_u32(out, veorq_u32(h, vshrq_n_u32(h, 16)));
  }
};

#include "kernels.inl"

static const Kernels table = make_kernels("neon");

}  // namespace neon

const Kernels* const neon_kernels = &neon::table;

}  // namespace gac

#else

namespace gac {
const Kernels* const neon_kernels = nullptr;
}

#endif
