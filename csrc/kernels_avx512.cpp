// AVX-512 (F, BW, DQ, VL): 16 floats a vector. Every function carries the target itself; the file is compiled without
// -m flags.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

// GCC's own header leaves vectors undefined on purpose and, up to GCC 12, warns of it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define GAC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define GAC_INLINE GAC_TARGET __attribute__((always_inline)) inline
#define GAC_KERNEL GAC_TARGET static

namespace gac {
namespace avx512 {

struct V {
  using F = __m512;
  using D = __m512d;
  static constexpr int W = 16, U = 4, UPair = 2;

  GAC_INLINE static F load(const float* p) { return _mm512_loadu_ps(p); }
  GAC_INLINE static F load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // Even elements shifted into place, odd ones where they are.
  GAC_INLINE static void load_any(const bf16* p, F& even, F& odd) {
    const __m512i bits = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  GAC_INLINE static void load_any(const fp16* p, F& first, F& second) {
    first = load(p);
    second = load(p + W);
  }
  GAC_INLINE static F load(const fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  GAC_INLINE static F load(const e4m3* p) {  // through numbers of 16 bits, as to_half()
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i rest = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(x, 7), 15);
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(rest, _mm256_set1_epi16(0x7f));
    const __m256i size = _mm256_mask_mov_epi16(_mm256_slli_epi16(rest, 7), nan, _mm256_set1_epi16(0x7e00));
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, size)), _mm512_set1_ps(256.0f));
  }
  GAC_INLINE static F load(const e5m2* p) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(_mm256_slli_epi16(x, 8));
  }
  GAC_INLINE static D load(const double* p) { return _mm512_loadu_pd(p); }
  GAC_INLINE static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  GAC_INLINE static void store(double* p, D x) { _mm512_storeu_pd(p, x); }
  GAC_INLINE static void store(bf16* p, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  GAC_INLINE static void store(fp16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  GAC_INLINE static D widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  GAC_INLINE static void narrow(float* p, D x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x)); }
  GAC_INLINE static D low(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
  GAC_INLINE static D high(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
  GAC_INLINE static D zero() { return _mm512_setzero_pd(); }
  GAC_INLINE static F set(float x) { return _mm512_set1_ps(x); }
  GAC_INLINE static D set(double x) { return _mm512_set1_pd(x); }
  GAC_INLINE static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  GAC_INLINE static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  GAC_INLINE static F add(F x, F y) { return _mm512_add_ps(x, y); }
  GAC_INLINE static F div(F x, F y) { return _mm512_div_ps(x, y); }
  GAC_INLINE static F sqrt(F x) { return _mm512_sqrt_ps(x); }
  GAC_INLINE static D div(D x, D y) { return _mm512_div_pd(x, y); }
  GAC_INLINE static D sqrt(D x) { return _mm512_sqrt_pd(x); }
  GAC_INLINE static D add(D x, D y) { return _mm512_add_pd(x, y); }
  GAC_INLINE static D sub(D x, D y) { return _mm512_sub_pd(x, y); }
  GAC_INLINE static D mul(D x, D y) { return _mm512_mul_pd(x, y); }
  GAC_INLINE static D fma(D x, D y, D z) { return _mm512_fmadd_pd(x, y, z); }
  GAC_INLINE static D min(D x, D y) { return _mm512_min_pd(x, y); }
  GAC_INLINE static D max(D x, D y) { return _mm512_max_pd(x, y); }
  GAC_INLINE static D round(D x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  GAC_INLINE static D or_nan(D x, D y) { return _mm512_mask_mov_pd(x, _mm512_cmp_pd_mask(y, y, _CMP_UNORD_Q), y); }
  GAC_INLINE static D where_nonzero(D m, D x) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(m, _mm512_setzero_pd(), _CMP_NEQ_OQ), x);
  }
  GAC_INLINE static F inf_where_zero(F m, F x) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(m, _mm512_setzero_ps(), _CMP_EQ_OQ), _mm512_set1_ps(INFINITY));
  }
  GAC_INLINE static D inf_where_zero(D m, D x) {
    return _mm512_mask_mov_pd(x, _mm512_cmp_pd_mask(m, _mm512_setzero_pd(), _CMP_EQ_OQ), _mm512_set1_pd(INFINITY));
  }
  GAC_INLINE static D pow2(D n) {  // 2^52 + 1023 + n holds the biased exponent in its low bits
    const __m512i bits = _mm512_castpd_si512(_mm512_add_pd(n, _mm512_set1_pd(4503599627370496.0 + 1023.0)));
    return _mm512_castsi512_pd(_mm512_slli_epi64(bits, 52));
  }
  GAC_INLINE static double sum(D x) {
    const __m256d quarter = _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(quarter), _mm256_extractf128_pd(quarter, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  GAC_INLINE static F add_signed(F acc, F x, uint32_t word, int bit) {
    const __mmask16 minus = static_cast<__mmask16>(word >> bit);  // a xor runs on more ports than a second addition
    return _mm512_add_ps(acc, _mm512_mask_xor_ps(x, minus, x, _mm512_set1_ps(-0.0f)));
  }
  GAC_INLINE static D add_signed(D acc, D x, uint32_t word, int bit) {
    const __mmask8 minus = static_cast<__mmask8>(word >> bit);
    return _mm512_add_pd(acc, _mm512_mask_xor_pd(x, minus, x, _mm512_set1_pd(-0.0)));
  }
  GAC_INLINE static void hash(uint32_t* out, uint32_t word, uint32_t key) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i h = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(word)), steps);
    h = _mm512_xor_si512(h, _mm512_set1_epi32(static_cast<int>(key)));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int>(0x85EBCA6Bu)));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 13));
    h = _mm512_mullo_epi32(h, _mm512_set1_epi32(static_cast<int>(0xC2B2AE35u)));
    h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
    _mm512_storeu_si512(out, h);
  }
};

#include "kernels.inl"

// The mix of float32 is the one with 256 bits: bound by memory and stores, it is 3 to 6% faster there (measured on Zen
// 4, cold buffers from 4 K to 1 M elements). Its table is a constant, hence ready when this one is made.
static Kernels make_table() {
  Kernels kernels = make_kernels("avx512");
  kernels.mix[kFloat32] = avx2_kernels->mix[kFloat32];
  return kernels;
}

static const Kernels table = make_table();

}  // namespace avx512

const Kernels* const avx512_kernels = &avx512::table;

}  // namespace gac

#else

namespace gac {
const Kernels* const avx512_kernels = nullptr;
}

#endif
