// The random projection of a list of tensors, and the pass that keeps its sum over time.
#pragma once

#include "gac_cpu.h"
#include "lists.h"

namespace gac {

constexpr int64_t kAbsorbCell = 1024;  // elements of one sum of absorb
constexpr int64_t kCellLanes = 128;    // lanes of one sum where a sketch is absorbed

// Each as gac_cpu.h says of the function of the same name.
void sketch(const Table& tensors, const int64_t* pieces, const gac_sketch_map& map, double* moments, int threads);
void sketch_weighted(const Table& tensors, const Table& seconds, const int64_t* pieces, const gac_sketch_map& map,
                     double eps, double* moments, int threads);
void absorb(const float* current, float* previous, float* total, int64_t m, double scale, double* out, bool add,
            int threads);

}  // namespace gac
