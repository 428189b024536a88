// The C interface: takes numbers and addresses apart, refuses null pointers, and calls the operations.
#include <new>

#include "accumulate.h"
#include "dispatch.h"
#include "gac_cpu.h"
#include "reductions.h"
#include "sketch.h"
#include "step_end.h"
#include "step_sums.h"
#include "threads.h"
#include "tokens.h"

namespace gac {
namespace {

// Turns C++ errors into codes: none may cross the C interface.
template <class Body>
int guarded(Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return GAC_NO_MEMORY;
  }
}

// What gac_*_one takes in one number.
struct Packed {
  explicit Packed(int64_t packed)
      : numel(packed >> 16), dtype(static_cast<int>(packed & 15)), threads(static_cast<int>(packed >> 4 & 0xfff)) {}
  int64_t numel;
  int dtype, threads;
};

int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(pointer)); }

}  // namespace
}  // namespace gac

using namespace gac;

int gac_select(const char* isa) { return select(isa) ? 0 : 1; }

const char* gac_isa(void) { return kernels().name; }

const char* gac_threading(void) { return threading_name(); }

void gac_prefer_pool(int pool) { prefer_pool(pool != 0); }

int gac_moments(const int64_t* table, int64_t n, int form, int per_tensor, double* out, int threads) {
  return guarded([&]() -> int {
    const Table tensors(table, n, form);
    if (!tensors.readable()) return GAC_NULL_POINTER;
    moments(tensors, per_tensor != 0, out, threads);
    return GAC_OK;
  });
}

int gac_moments_one(const void* x, int64_t packed, double* out) {
  const Packed one(packed);
  if (one.numel > kChunk) {
    const int64_t table[] = {address(x), one.numel};
    return gac_moments(table, 1, 2 + one.dtype, 0, out, one.threads);
  }
  if (!x && one.numel) return GAC_NULL_POINTER;
  moments_chunk({static_cast<char*>(const_cast<void*>(x)), one.numel, one.dtype, one.numel, 0}, 0, one.numel, out);
  return GAC_OK;
}

int gac_pair_moments(const int64_t* a, const int64_t* b, int64_t n, int form, int per_tensor, double* out,
                     int threads) {
  return guarded([&]() -> int {
    const Table left(a, n, form & 15), right(b, n, form >> 4);
    if (!left.readable() || !right.readable()) return GAC_NULL_POINTER;
    pair_moments(left, right, per_tensor != 0, out, threads);
    return GAC_OK;
  });
}

int gac_pair_moments_one(const void* a, const void* b, int64_t packed, double* out) {
  const Packed one(packed);
  if (one.numel > kChunk) {
    const int64_t left[] = {address(a), one.numel}, right[] = {address(b), one.numel};
    return gac_pair_moments(left, right, 1, 17 * (2 + one.dtype), 0, out, one.threads);
  }
  if ((!a || !b) && one.numel) return GAC_NULL_POINTER;
  pair_run(one.dtype, one.dtype, static_cast<const char*>(a), static_cast<const char*>(b), one.numel, out);
  return GAC_OK;
}

int gac_mix(const int64_t* a, const int64_t* b, int64_t n, int form, double mu, double* out, int threads) {
  return guarded([&]() -> int {
    const Table left(a, n, form & 15), right(b, n, form >> 4);
    if (!left.readable() || !right.readable()) return GAC_NULL_POINTER;
    mix(left, right, mu, out, threads);
    return GAC_OK;
  });
}

int gac_mix_one(void* a, const void* b, int64_t packed, double mu, double* out) {
  const Packed one(packed);
  if (one.numel > (out ? kChunk : 2 * kMixShare - 1)) {
    const int64_t left[] = {address(a), one.numel}, right[] = {address(b), one.numel};
    return gac_mix(left, right, 1, 17 * (2 + one.dtype), mu, out, one.threads);
  }
  if ((!a || !b) && one.numel) return GAC_NULL_POINTER;
  mix_run(one.dtype, one.dtype, static_cast<char*>(a), static_cast<const char*>(b), one.numel, mu, out);
  return GAC_OK;
}

int gac_sketch(const int64_t* table, const int64_t* pieces, int64_t n, int form, const gac_sketch_map* map,
               double* moments, int threads) {
  return guarded([&]() -> int {
    const Table tensors(table, n, form);
    if (!tensors.readable() || (!map->out && map->out_size)) return GAC_NULL_POINTER;
    sketch(tensors, pieces, *map, moments, threads);
    return GAC_OK;
  });
}

int gac_sketch_weighted(const int64_t* table, const int64_t* seconds, const int64_t* pieces, int64_t n, int form,
                        const gac_sketch_map* map, double eps, double* moments, int threads) {
  return guarded([&]() -> int {
    const Table tensors(table, n, form & 15), second_moments(seconds, n, form >> 4);
    if (!tensors.readable() || !second_moments.readable() || (!map->out && map->out_size)) return GAC_NULL_POINTER;
    sketch_weighted(tensors, second_moments, pieces, *map, eps, moments, threads);
    return GAC_OK;
  });
}

int gac_token_moments(const gac_tokens* tokens, double* out, int threads) {
  if (tokens->rows && tokens->length && (!tokens->logprobs || !tokens->advantages || !tokens->mask || !tokens->is_expert))
    return GAC_NULL_POINTER;
  token_moments(*tokens, out, threads);
  return GAC_OK;
}

int gac_absorb(const float* current, float* previous, float* total, int64_t m, double scale, double* out, int add,
               int threads) {
  if (m && (!current || !total)) return GAC_NULL_POINTER;
  absorb(current, previous, total, m, scale, out, add != 0, threads);
  return GAC_OK;
}

int gac_accumulate(const int64_t* table, const int64_t* seconds, int64_t n, int form, const gac_sum* sum,
                   double* moments, int threads) {
  return guarded([&]() -> int {
    const Table tensors(table, n, form & 15), second_moments(seconds, n, form >> 4);
    if (!tensors.readable() || (seconds && !second_moments.readable())) return GAC_NULL_POINTER;
    accumulate(tensors, seconds ? &second_moments : nullptr, *sum, moments, threads);
    return GAC_OK;
  });
}

int gac_step_sums(const gac_step* step, double* out, int threads) {
  return guarded([&]() -> int {
    if (step->m && (!step->sft || !step->rl)) return GAC_NULL_POINTER;
    if (step->used && (!step->rows || (step->contributions && !step->told))) return GAC_NULL_POINTER;
    step_sums(*step, out, threads);
    return GAC_OK;
  });
}

int gac_step_end(const gac_ending* ending) {
  step_end(*ending);
  return GAC_OK;
}
