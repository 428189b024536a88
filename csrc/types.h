// Element types and the scalar code that every instruction set shares: conversions and the sign hash.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gac {

constexpr uintptr_t kLine = 64, kPage = 4096;  // bytes

// Those from kPaired on are read by operations on one list alone. kScale, a power of two for 32 elements (e8m0), stands in
// the place of second moments.
enum Dtype : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,
  kPaired = 4,
  kFloat8E4M3 = 4,
  kFloat8E5M2 = 5,
  kDtypes = 6,
  kScale = 6
};

constexpr int64_t kScaled = 32;  // elements that share a scale

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

struct e4m3 {  // no infinity, one NaN of either sign
  uint8_t bits;
};
struct e5m2 {
  uint8_t bits;
};

inline int64_t bytes_of(int dtype) {
  return dtype >= kPaired ? 1 : dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Shifted into place the exponent is 112 too small; a product with 2^112 repairs it, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

// Numbers of 16 bits with the same fields, which are 2^8 too small for e4m3: its exponent has a bit less.
inline fp16 to_half(e4m3 x) {
  const unsigned sign = (x.bits & 0x80u) << 8, rest = x.bits & 0x7fu;
  return {static_cast<uint16_t>(rest == 0x7fu ? sign | 0x7e00u : sign | rest << 7)};
}
inline fp16 to_half(e5m2 x) { return {static_cast<uint16_t>(x.bits << 8)}; }
inline float to_float(e4m3 x) { return to_float(to_half(x)) * 0x1p8f; }
inline float to_float(e5m2 x) { return to_float(to_half(x)); }

// 2^(x - 127); 255 is NaN.
inline double scale_of(uint8_t x) {
  const uint64_t bits = x == 255 ? 0x7ff8000000000000u : static_cast<uint64_t>(x + 1023 - 127) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline double to_double(double x) { return x; }
template <class T>
inline double to_double(T x) {
  return to_float(x);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};  // nearest, ties to even
}
template <>
inline fp16 from_float<fp16>(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | (rest >> 13 & 0x3ffu))};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to even
    const uint32_t low = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | low)};
  }
  return {static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13)};
}

template <class T>
inline T from_double(double x) {
  return from_float<T>(static_cast<float>(x));
}
template <>
inline double from_double<double>(double x) {
  return x;
}

inline bool is_finite_bits(float x) { return (float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }
inline bool is_finite_bits(bf16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }
inline bool is_finite_bits(fp16 x) { return (x.bits & 0x7c00u) != 0x7c00u; }
inline bool is_finite_bits(e4m3 x) { return (x.bits & 0x7fu) != 0x7fu; }
inline bool is_finite_bits(e5m2 x) { return (x.bits & 0x7cu) != 0x7cu; }
inline bool is_finite_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

// MurmurHash3's 32-bit finalizer (public domain, Austin Appleby); see gac_kernels/layout.py.
inline uint32_t finalize32(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  return h ^ h >> 16;
}

inline uint32_t sign_key(uint32_t seed, uint32_t high_word) {
  return finalize32(seed ^ finalize32(high_word + 0x9E3779B9u));
}

inline uint32_t sign_word(uint32_t seed, uint64_t word) {
  return finalize32(static_cast<uint32_t>(word) ^ sign_key(seed, static_cast<uint32_t>(word >> 32)));
}

}  // namespace gac
