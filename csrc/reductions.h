// Sums over lists of tensors, and the mix of two lists.
#pragma once

#include "lists.h"

namespace gac {

constexpr int64_t kMixShare = 1 << 15;  // elements that make a thread worth its start in a mix

// out: as gac_cpu.h says of the function of the same name.
void moments(const Table& tensors, bool per_tensor, double* out, int threads);
void pair_moments(const Table& left, const Table& right, bool per_tensor, double* out, int threads);
void mix(const Table& left, const Table& right, double mu, double* out, int threads);

// The same of what one thread does at once. sums are set, not added to.
void moments_chunk(const Tensor& t, int64_t begin, int64_t count, double* sums);
void pair_run(int dtype_a, int dtype_b, const char* x, const char* y, int64_t n, double* sums);
void mix_run(int dtype_a, int dtype_b, char* x, const char* y, int64_t n, double mu, double* sums);  // sums: may be null

}  // namespace gac
