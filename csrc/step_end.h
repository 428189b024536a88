// What follows from the sums of a step: statistics, standard errors, law gac, and the weights of the next step.
#pragma once

#include "gac_cpu.h"

namespace gac {

// As gac_cpu.h says of gac_step_end.
void step_end(const gac_ending& ending);

}  // namespace gac
