// The table of inner loops that this CPU runs.
#pragma once

#include "kernels.h"

namespace gac {

// The active table: the best that CPU and build have, or what the last select() allowed.
const Kernels& kernels();
// "portable", "avx2", "avx512", "neon", or "" for the best. False, and no change, when CPU or build lacks it.
bool select(const char* isa);

}  // namespace gac
