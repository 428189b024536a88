// Both totals are read once, and rows are cleared as they are read.
#include "step_sums.h"

#include <cstring>
#include <vector>

#include "lists.h"
#include "reductions.h"

namespace gac {
namespace {

constexpr int kLanes = 8;  // independent sums: one addition need not wait for the last

double sum_of(const double* x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lanes[k] += x[i + k];
  for (int k = 0; i + k < n; ++k) lanes[k] += x[i + k];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// |s|^2, |r|^2 and <s, r>, in the chunks and the order of pair_moments: the same bits.
void norms(const gac_step& step, double* out, int threads) {
  const int64_t chunks = ceil_div(step.m, kChunk);
  std::vector<double> partials(3 * chunks);
  auto body = [&](int64_t c) {
    const int64_t begin = c * kChunk, count = std::min(kChunk, step.m - begin);
    pair_run(kFloat32, kFloat32, reinterpret_cast<const char*>(step.sft + begin),
             reinterpret_cast<const char*>(step.rl + begin), count, &partials[3 * c]);
  };
  parallel_for(threads, chunks, body);
  for (int64_t c = 0; c < chunks; ++c)
    for (int w = 0; w < 3; ++w) out[w] += partials[3 * c + w];
}

}  // namespace

void step_sums(const gac_step& step, double* out, int threads) {
  std::fill(out, out + GAC_STEP_SUMS, 0.0);
  for (int64_t k = 0; k < step.used; ++k) {
    double* const row = step.rows + k * step.stride;
    out[GAC_NONFINITE] += row[1];
    if (k < step.contributions) {
      const double *const told = step.told + 3 * k, tokens = told[1];
      const int branch = told[0] != 0;
      const double power = step.lossless ? row[0] * told[2] : sum_of(row + 2, step.cells);
      out[GAC_TOKENS + branch] += tokens;
      if (tokens > 0) {
        out[GAC_POWER + branch] += power * (1 / tokens);
        out[GAC_COUNTS + branch] += 1;
      }
    }
    if (step.clear) std::memset(row, 0, step.stride * sizeof(double));
  }
  norms(step, out + GAC_NORMS, threads);
}

}  // namespace gac
