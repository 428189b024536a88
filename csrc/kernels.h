// One table of inner loops for each instruction set; the operations cut the work and call them.
#pragma once

#include <type_traits>

#include "types.h"

namespace gac {

// Where a contiguous run of elements goes: lane of its first element, sign index of its first element.
struct SketchRun {
  int64_t lanes;
  int64_t lane;
  uint64_t index;
  uint32_t seed;
};

// Inner loops over contiguous elements, indexed by Dtype.
struct Kernels {
  const char* name;
  // Sum of squares.
  double (*moments[kDtypes])(const void* x, int64_t n);
  // sums[3]: x*x, y*y, x*y; set, not added to.
  void (*pair[kPaired])(const void* x, const void* y, int64_t n, double* sums);
  // a <- mu*a + rest*b.
  void (*mix[kPaired])(void* a, const void* b, int64_t n, double mu, double rest);
  // Adds signed elements to the lane accumulators, wrapping at the end of a row; returns the sum of squares. float64
  // input needs double lanes: its entry in sketch_float is null.
  double (*sketch_float[kDtypes])(const void* x, int64_t n, float* lanes, const SketchRun& run);
  double (*sketch_double[kDtypes])(const void* x, int64_t n, double* lanes, const SketchRun& run);
  // The same of x / (sqrt(v) + eps), 0 where v is 0, in float32, for element types other than float64: [x's type][v's
  // type]. Values beyond float32 make the sum of squares non-finite.
  double (*sketch_weighted[kFloat64][kFloat64])(const void* x, const void* v, int64_t n, double eps, float* lanes,
                                                const SketchRun& run);
  // x <- x / (sqrt(v) + eps), 0 where v is 0.
  void (*weigh)(double* x, const double* v, int64_t n, double eps);
  // out <- x / (sqrt(v) + eps), 0 where v is 0, in float32; [x's type][v's type].
  void (*weigh_short[kFloat64][kFloat64])(const void* x, const void* v, int64_t n, double eps, float* out);
  // added = x, or, with previous, float32(x) - previous, and previous <- x; total += scale * added. Returns |added|^2.
  double (*accumulate[kDtypes])(const void* x, float* previous, float* total, int64_t n, double scale);
  // Adds the seven sums of reference.token_moments over n tokens; keep holds 1.0 or 0.0.
  void (*tokens)(const double* logp, const double* advantage, const double* keep, int64_t n, double* sums);
  // delta = scale * (current - previous), total += delta, previous <- current; previous may be null. Returns |delta|^2.
  double (*absorb)(const float* current, float* previous, float* total, int64_t n, double scale);
};

extern const Kernels portable_kernels;
// Null when the build does not have them.
extern const Kernels* const avx2_kernels;
extern const Kernels* const avx512_kernels;
extern const Kernels* const neon_kernels;

}  // namespace gac
