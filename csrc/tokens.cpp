#include "tokens.h"

#include <algorithm>

#include "dispatch.h"
#include "elements.h"
#include "threads.h"

namespace gac {
namespace {

constexpr int64_t kTokensBlock = 512;  // tokens converted at a time

template <class T>
void gather(const void* data, int64_t stride, int64_t n, double* out) {
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < n; ++i) out[i] = to_double(x[i * stride]);
}

void gather(int dtype, const void* base, int64_t offset, int64_t stride, int64_t n, double* out) {
  const char* x = static_cast<const char*>(base) + offset * bytes_of(dtype);
  if (stride == 1) return to_doubles(dtype, x, n, out);
  switch (dtype) {
    case kFloat32: return gather<float>(x, stride, n, out);
    case kBFloat16: return gather<bf16>(x, stride, n, out);
    case kFloat16: return gather<fp16>(x, stride, n, out);
    default: return gather<double>(x, stride, n, out);
  }
}

template <class U>
void gather_mask(const void* base, int64_t offset, int64_t stride, int64_t n, bool is_float, double* out) {
  const U* x = static_cast<const U*>(base) + offset;
  const U bits = is_float ? static_cast<U>(static_cast<U>(~U(0)) >> 1) : static_cast<U>(~U(0));
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i * stride] & bits) ? 1.0 : 0.0;
}

void gather_mask(const gac_tokens& t, int64_t offset, int64_t n, double* out) {
  const bool is_float = t.mask_float != 0;
  switch (t.mask_bytes) {
    case 1: return gather_mask<uint8_t>(t.mask, offset, t.mask_col, n, is_float, out);
    case 2: return gather_mask<uint16_t>(t.mask, offset, t.mask_col, n, is_float, out);
    case 4: return gather_mask<uint32_t>(t.mask, offset, t.mask_col, n, is_float, out);
    default: return gather_mask<uint64_t>(t.mask, offset, t.mask_col, n, is_float, out);
  }
}

void token_row(const gac_tokens& t, int64_t row, double* sums) {
  double logp[kTokensBlock], advantage[kTokensBlock], keep[kTokensBlock];
  std::fill(sums, sums + 7, 0.0);
  const bool expert = t.is_expert[row * t.is_expert_row] != 0;
  const bool constant = expert || t.advantages_col == 0;
  if (constant && t.length) {
    double value = 0;
    if (!expert) gather(t.advantages_dtype, t.advantages, row * t.advantages_row, 1, 1, &value);
    std::fill(advantage, advantage + kTokensBlock, value);
  }
  for (int64_t i = 0; i < t.length; i += kTokensBlock) {
    const int64_t n = std::min(kTokensBlock, t.length - i);
    gather(t.logprobs_dtype, t.logprobs, row * t.logprobs_row + i * t.logprobs_col, t.logprobs_col, n, logp);
    if (!constant)
      gather(t.advantages_dtype, t.advantages, row * t.advantages_row + i * t.advantages_col, t.advantages_col, n,
             advantage);
    gather_mask(t, row * t.mask_row + i * t.mask_col, n, keep);
    kernels().tokens(logp, advantage, keep, n, sums);
  }
}

}  // namespace

void token_moments(const gac_tokens& tokens, double* out, int threads) {
  if (!tokens.length) {
    std::fill(out, out + 7 * tokens.rows, 0.0);
    return;
  }
  auto body = [&](int64_t row) { token_row(tokens, row, out + 7 * row); };
  parallel_for(threads, tokens.rows, body);
}

}  // namespace gac
