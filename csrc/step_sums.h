// The sums of a step, from what its contributions left.
#pragma once

#include "gac_cpu.h"

namespace gac {

// As gac_cpu.h says of gac_step_sums.
void step_sums(const gac_step& step, double* out, int threads);

}  // namespace gac
