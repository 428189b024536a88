// Sums of lists of tensors over time.
#pragma once

#include "gac_cpu.h"
#include "lists.h"

namespace gac {

// As gac_cpu.h says of gac_accumulate.
void accumulate(const Table& tensors, const Table* seconds, const gac_sum& sum, double* moments, int threads);

}  // namespace gac
