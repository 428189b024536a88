// Sums over the tokens of sequences.
#pragma once

#include "gac_cpu.h"

namespace gac {

// out: [rows, 7].
void token_moments(const gac_tokens& tokens, double* out, int threads);

}  // namespace gac
