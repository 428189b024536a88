// AVX2, FMA and F16C: 8 floats a vector. Every function carries the target itself; the file is compiled without -m flags.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define GAC_TARGET __attribute__((target("avx2,fma,f16c")))
#define GAC_INLINE GAC_TARGET __attribute__((always_inline)) inline
#define GAC_KERNEL GAC_TARGET static

namespace gac {
namespace avx2 {

struct V {
  using F = __m256;
  using D = __m256d;
  static constexpr int W = 8, U = 2, UPair = 1;

  GAC_INLINE static F load(const float* p) { return _mm256_loadu_ps(p); }
  GAC_INLINE static F load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // Even elements shifted into place, odd ones where they are.
  GAC_INLINE static void load_any(const bf16* p, F& even, F& odd) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  GAC_INLINE static void load_any(const fp16* p, F& first, F& second) {
    first = load(p);
    second = load(p + W);
  }
  GAC_INLINE static F load(const fp16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  GAC_INLINE static F load(const e4m3* p) {  // through numbers of 16 bits, as to_half()
    const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i rest = _mm_and_si128(x, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_srli_epi16(x, 7), 15);
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(rest, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
    const __m128i half = _mm_or_si128(_mm_or_si128(sign, nan), _mm_slli_epi16(rest, 7));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
  }
  GAC_INLINE static F load(const e5m2* p) {
    const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtph_ps(_mm_slli_epi16(x, 8));
  }
  GAC_INLINE static D load(const double* p) { return _mm256_loadu_pd(p); }
  GAC_INLINE static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  GAC_INLINE static void store(double* p, D x) { _mm256_storeu_pd(p, x); }
  GAC_INLINE static void store(bf16* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  GAC_INLINE static void store(fp16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  GAC_INLINE static D widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  GAC_INLINE static void narrow(float* p, D x) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x)); }
  GAC_INLINE static D low(F x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
  GAC_INLINE static D high(F x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
  GAC_INLINE static D zero() { return _mm256_setzero_pd(); }
  GAC_INLINE static F set(float x) { return _mm256_set1_ps(x); }
  GAC_INLINE static D set(double x) { return _mm256_set1_pd(x); }
  GAC_INLINE static F mul(F x, F y) { return _mm256_mul_ps(x, y); }
  GAC_INLINE static F fma(F x, F y, F z) { return _mm256_fmadd_ps(x, y, z); }
  GAC_INLINE static F add(F x, F y) { return _mm256_add_ps(x, y); }
  GAC_INLINE static F div(F x, F y) { return _mm256_div_ps(x, y); }
  GAC_INLINE static F sqrt(F x) { return _mm256_sqrt_ps(x); }
  GAC_INLINE static D div(D x, D y) { return _mm256_div_pd(x, y); }
  GAC_INLINE static D sqrt(D x) { return _mm256_sqrt_pd(x); }
  GAC_INLINE static D add(D x, D y) { return _mm256_add_pd(x, y); }
  GAC_INLINE static D sub(D x, D y) { return _mm256_sub_pd(x, y); }
  GAC_INLINE static D mul(D x, D y) { return _mm256_mul_pd(x, y); }
  GAC_INLINE static D fma(D x, D y, D z) { return _mm256_fmadd_pd(x, y, z); }
  GAC_INLINE static D min(D x, D y) { return _mm256_min_pd(x, y); }
  GAC_INLINE static D max(D x, D y) { return _mm256_max_pd(x, y); }
  GAC_INLINE static D round(D x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  GAC_INLINE static D or_nan(D x, D y) { return _mm256_blendv_pd(x, y, _mm256_cmp_pd(y, y, _CMP_UNORD_Q)); }
  GAC_INLINE static D where_nonzero(D m, D x) {
    return _mm256_and_pd(_mm256_cmp_pd(m, _mm256_setzero_pd(), _CMP_NEQ_OQ), x);
  }
  GAC_INLINE static F inf_where_zero(F m, F x) {
    return _mm256_blendv_ps(x, _mm256_set1_ps(INFINITY), _mm256_cmp_ps(m, _mm256_setzero_ps(), _CMP_EQ_OQ));
  }
  GAC_INLINE static D inf_where_zero(D m, D x) {
    return _mm256_blendv_pd(x, _mm256_set1_pd(INFINITY), _mm256_cmp_pd(m, _mm256_setzero_pd(), _CMP_EQ_OQ));
  }
  GAC_INLINE static D pow2(D n) {  // 2^52 + 1023 + n holds the biased exponent in its low bits
    const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(n, _mm256_set1_pd(4503599627370496.0 + 1023.0)));
    return _mm256_castsi256_pd(_mm256_slli_epi64(bits, 52));
  }
  GAC_INLINE static double sum(D x) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  GAC_INLINE static F add_signed(F acc, F x, uint32_t word, int bit) {
    const __m256i counts = _mm256_sub_epi32(_mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24), _mm256_set1_epi32(bit));
    const __m256i moved = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(word)), counts);
    const __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(moved), _mm256_set1_ps(-0.0f));
    return _mm256_add_ps(acc, _mm256_xor_ps(x, sign));
  }
  GAC_INLINE static D add_signed(D acc, D x, uint32_t word, int bit) {
    const __m256i counts = _mm256_sub_epi64(_mm256_setr_epi64x(63, 62, 61, 60), _mm256_set1_epi64x(bit));
    const __m256i moved = _mm256_sllv_epi64(_mm256_set1_epi64x(static_cast<long long>(word)), counts);
    const __m256d sign = _mm256_and_pd(_mm256_castsi256_pd(moved), _mm256_set1_pd(-0.0));
    return _mm256_add_pd(acc, _mm256_xor_pd(x, sign));
  }
  GAC_INLINE static void hash(uint32_t* out, uint32_t word, uint32_t key) {
    __m256i h = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(word)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    h = _mm256_xor_si256(h, _mm256_set1_epi32(static_cast<int>(key)));
    h = _mm256_xor_si256(h, _mm256_srli_epi32(h, 16));
    h = _mm256_mullo_epi32(h, _mm256_set1_epi32(static_cast<int>(0x85EBCA6Bu)));
    h = _mm256_xor_si256(h, _mm256_srli_epi32(h, 13));
    h = _mm256_mullo_epi32(h, _mm256_set1_epi32(static_cast<int>(0xC2B2AE35u)));
    h = _mm256_xor_si256(h, _mm256_srli_epi32(h, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), h);
  }
};

#include "kernels.inl"

static constexpr Kernels table = make_kernels("avx2");

}  // namespace avx2

const Kernels* const avx2_kernels = &avx2::table;

}  // namespace gac

#else

namespace gac {
const Kernels* const avx2_kernels = nullptr;
}

#endif
