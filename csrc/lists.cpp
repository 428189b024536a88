#include "lists.h"

#include "elements.h"

namespace gac {

bool Table::readable() const {
  for (int64_t k = 0; k < n_; ++k)
    if (!rows_[k] && rows_[n_ + k]) return false;
  return true;
}

// NaN and infinity make the sum of squares non-finite, so counting is needed only then.
double nonfinite_in(const Tensor& t, int64_t begin, int64_t count, double squares) {
  if (std::isfinite(squares)) return 0;
  int64_t found = 0;
  for_runs(t, begin, count, [&](const char* x, int64_t, int64_t n) { found += count_nonfinite(t.dtype, x, n); });
  return static_cast<double>(found);
}

}  // namespace gac
