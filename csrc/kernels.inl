// Inner loops, written once over a vector type V. Each kernels_*.cpp defines, inside its own namespace,
//
//   GAC_INLINE, GAC_KERNEL   attributes that put the function under the instruction set (and nothing else)
//   V::F, V::D               W floats; W/2 doubles
//   V::W                     floats of a vector: a divisor of 32
//   V::U, V::UPair           independent vectors per turn of the reduction loops
//   V::load_any              two vectors of adjacent elements in any order, the same for every call
//
// and includes this file. Nothing here may call a non-inline function of another target, and no lambda may be used:
// lambdas do not inherit target attributes.
//
// Sums of products of float32 are taken in float64, where the products are exact and cannot leave the range. The loops
// are bound by memory, which pays for it. Reductions have no software prefetch: from memory it was measured to be slower
// than the hardware's own, for two streams by a third. A sketch has one, at the end of pages (Plain::look_ahead).

struct D2 {
  V::D lo, hi;
};

template <class T>
GAC_INLINE D2 load2(const T* p) {
  const V::F x = V::load(p);
  return {V::low(x), V::high(x)};
}
GAC_INLINE D2 load2(const float* p) { return {V::widen(p), V::widen(p + V::W / 2)}; }
GAC_INLINE D2 load2(const double* p) { return {V::load(p), V::load(p + V::W / 2)}; }

GAC_INLINE void store2(float* p, D2 x) {
  V::narrow(p, x.lo);
  V::narrow(p + V::W / 2, x.hi);
}
GAC_INLINE void store2(double* p, D2 x) {
  V::store(p, x.lo);
  V::store(p + V::W / 2, x.hi);
}

GAC_INLINE D2 zero2() { return {V::zero(), V::zero()}; }
GAC_INLINE D2 fma2(D2 x, D2 y, D2 z) { return {V::fma(x.lo, y.lo, z.lo), V::fma(x.hi, y.hi, z.hi)}; }
GAC_INLINE D2 add2(D2 x, D2 y) { return {V::add(x.lo, y.lo), V::add(x.hi, y.hi)}; }
GAC_INLINE double total(D2 x) { return V::sum(V::add(x.lo, x.hi)); }


// float32 and float64 elements; those of 8 bits, so that sums have the bits that widened ones have.
template <class T>
GAC_KERNEL double moments_wide(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  constexpr int W = V::W, U = V::U;
  D2 sums[U];
  for (int u = 0; u < U; ++u) sums[u] = zero2();
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W) {
    for (int u = 0; u < U; ++u) {
      const D2 v = load2(x + i + u * W);
      sums[u] = fma2(v, v, sums[u]);
    }
  }
  for (; i + W <= n; i += W) {
    const D2 v = load2(x + i);
    sums[0] = fma2(v, v, sums[0]);
  }
  for (int u = 1; u < U; ++u) sums[0] = add2(sums[0], sums[u]);
  double result = total(sums[0]);
  for (; i < n; ++i) {
    const double v = to_double(x[i]);
    result += v * v;
  }
  return result;
}

template <class T>
GAC_KERNEL void pair_wide(const void* first, const void* second, int64_t n, double* out) {
  const T* x = static_cast<const T*>(first);
  const T* y = static_cast<const T*>(second);
  constexpr int W = V::W, U = V::UPair;
  D2 xx[U], yy[U], xy[U];
  for (int u = 0; u < U; ++u) xx[u] = yy[u] = xy[u] = zero2();
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W) {
    for (int u = 0; u < U; ++u) {
      const D2 v = load2(x + i + u * W), w = load2(y + i + u * W);
      xx[u] = fma2(v, v, xx[u]);
      yy[u] = fma2(w, w, yy[u]);
      xy[u] = fma2(v, w, xy[u]);
    }
  }
  for (; i + W <= n; i += W) {
    const D2 v = load2(x + i), w = load2(y + i);
    xx[0] = fma2(v, v, xx[0]);
    yy[0] = fma2(w, w, yy[0]);
    xy[0] = fma2(v, w, xy[0]);
  }
  for (int u = 1; u < U; ++u) {
    xx[0] = add2(xx[0], xx[u]);
    yy[0] = add2(yy[0], yy[u]);
    xy[0] = add2(xy[0], xy[u]);
  }
  double sxx = total(xx[0]), syy = total(yy[0]), sxy = total(xy[0]);
  for (; i < n; ++i) {
    const double v = to_double(x[i]), w = to_double(y[i]);
    sxx += v * v;
    syy += w * w;
    sxy += v * w;
  }
  out[0] = sxx;
  out[1] = syy;
  out[2] = sxy;
}

// 16-bit elements: their products are exact in float32 (16 and 22 bits), so runs of kRun of them are added in float32
// and emptied into float64, which saves most conversions. bfloat16's products can leave float32's range: too large
// makes the sum non-finite, and too small matters only when the whole sum is small; both are seen afterwards, and the
// run is then done again in float64.
constexpr int kRun = 16;

template <class T>
GAC_INLINE bool in_range(double squares, int64_t n) {
  return sizeof(T) != 2 || std::is_same<T, fp16>::value ||
         (squares >= static_cast<double>(n) * 0x1p-100 && squares < 0x1p126);
}

GAC_INLINE D2 widened(V::F x, D2 sums) { return {V::add(sums.lo, V::low(x)), V::add(sums.hi, V::high(x))}; }

template <class T>
GAC_KERNEL double moments_short(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  constexpr int W = V::W;
  constexpr int64_t kStep = 2 * W * kRun;
  D2 sums = zero2();
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    V::F a = V::set(0.0f), b = V::set(0.0f);
    for (int r = 0; r < kRun; ++r) {
      V::F v, w;
      V::load_any(x + i + r * 2 * W, v, w);
      a = V::fma(v, v, a);
      b = V::fma(w, w, b);
    }
    sums = widened(a, widened(b, sums));
  }
  for (; i + W <= n; i += W) {
    const D2 v = load2(x + i);
    sums = fma2(v, v, sums);
  }
  double result = total(sums);
  for (; i < n; ++i) {
    const double v = to_double(x[i]);
    result += v * v;
  }
  return in_range<T>(result, n) ? result : moments_wide<T>(data, n);
}

template <class T>
GAC_KERNEL void pair_short(const void* first, const void* second, int64_t n, double* out) {
  const T* x = static_cast<const T*>(first);
  const T* y = static_cast<const T*>(second);
  constexpr int W = V::W;
  constexpr int64_t kStep = 2 * W * kRun;
  D2 xx = zero2(), yy = zero2(), xy = zero2();
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    V::F a = V::set(0.0f), b = a, c = a, d = a, e = a, f = a;
    for (int r = 0; r < kRun; ++r) {
      V::F v, w, p, q;
      V::load_any(x + i + r * 2 * W, v, w);
      V::load_any(y + i + r * 2 * W, p, q);
      a = V::fma(v, v, a);
      b = V::fma(w, w, b);
      c = V::fma(p, p, c);
      d = V::fma(q, q, d);
      e = V::fma(v, p, e);
      f = V::fma(w, q, f);
    }
    xx = widened(a, widened(b, xx));
    yy = widened(c, widened(d, yy));
    xy = widened(e, widened(f, xy));
  }
  double sxx = total(xx), syy = total(yy), sxy = total(xy);
  double rest[3];
  pair_wide<T>(x + i, y + i, n - i, rest);
  out[0] = sxx + rest[0];
  out[1] = syy + rest[1];
  out[2] = sxy + rest[2];
  if (!in_range<T>(out[0], n) || !in_range<T>(out[1], n)) pair_wide<T>(first, second, n, out);
}

// One vector of the mix. float64 weights act on float32 as a rounded part and what the rounding left: the result errs by
// one rounding of rest*b and one of the sum, as a fused multiply-add with exact weights would. 16-bit results have bits to
// spare for the first, and see only the last.
struct Weights {
  V::F mu, mu_left, rest, rest_left;
  V::D mu_wide, rest_wide;
};
GAC_INLINE Weights weights(double mu, double rest) {
  const float m = static_cast<float>(mu), r = static_cast<float>(rest);
  return {V::set(m),
          V::set(static_cast<float>(mu - static_cast<double>(m))),
          V::set(r),
          V::set(static_cast<float>(rest - static_cast<double>(r))),
          V::set(mu),
          V::set(rest)};
}
template <class T>
GAC_INLINE void mix_vector(T* a, const T* b, const Weights& w) {
  const V::F x = V::load(a), y = V::load(b);
  V::store(a, V::fma(w.mu, x, V::mul(w.rest, y)));
}
GAC_INLINE void mix_vector(float* a, const float* b, const Weights& w) {
  const V::F x = V::load(a), y = V::load(b);
  const V::F left = V::fma(w.mu_left, x, V::mul(w.rest_left, y));
  V::store(a, V::fma(w.mu, x, V::fma(w.rest, y, left)));
}
GAC_INLINE void mix_vector(double* a, const double* b, const Weights& w) {
  const D2 x = load2(a), y = load2(b);
  store2(a, {V::fma(w.mu_wide, x.lo, V::mul(w.rest_wide, y.lo)), V::fma(w.mu_wide, x.hi, V::mul(w.rest_wide, y.hi))});
}

// The same with a mu that float32 holds, as one that comes from a float32 tensor: what is left of it is zero. One
// multiplication less is 2% of the time, also where memory is the limit: more loads are under way.
struct PlainWeights : Weights {};
GAC_INLINE void mix_vector(float* a, const float* b, const PlainWeights& w) {
  const V::F x = V::load(a), y = V::load(b);
  V::store(a, V::fma(w.mu, x, V::fma(w.rest, y, V::mul(w.rest_left, y))));
}

template <class T, class W>
GAC_INLINE void mix_all(T* a, const T* b, int64_t n, const W& w, double mu, double rest) {
  constexpr int width = V::W;
  int64_t i = 0;
  for (; i + 2 * width <= n; i += 2 * width) {
    mix_vector(a + i, b + i, w);
    mix_vector(a + i + width, b + i + width, w);
  }
  for (; i + width <= n; i += width) mix_vector(a + i, b + i, w);
  for (; i < n; ++i) a[i] = from_double<T>(mu * to_double(a[i]) + rest * to_double(b[i]));
}

template <class T>
GAC_KERNEL void mix(void* first, const void* second, int64_t n, double mu, double rest) {
  T* a = static_cast<T*>(first);
  const T* b = static_cast<const T*>(second);
  const Weights w = weights(mu, rest);
  if (std::is_same<T, float>::value && static_cast<double>(static_cast<float>(mu)) == mu)
    mix_all(a, b, n, PlainWeights{w}, mu, rest);
  else
    mix_all(a, b, n, w, mu, rest);
}

// The sign words of `count` groups of 32 elements.
GAC_INLINE void fill_words(uint32_t seed, uint64_t word, int64_t count, uint32_t* words) {
  uint32_t key = sign_key(seed, static_cast<uint32_t>(word >> 32));
  int64_t i = 0;
  if ((word >> 32) == ((word + static_cast<uint64_t>(count)) >> 32))
    for (; i + V::W <= count; i += V::W) V::hash(words + i, static_cast<uint32_t>(word + i), key);
  for (; i < count; ++i) words[i] = sign_word(seed, word + i);
}

// sqrt(v) + eps, which divides an element in the optimizer's space; infinity where v is 0, so that finite elements count
// as 0 and others as NaN.
GAC_INLINE V::F divisor(V::F v, V::F eps) { return V::inf_where_zero(v, V::add(V::sqrt(v), eps)); }
GAC_INLINE V::D divisor(V::D v, V::D eps) { return V::inf_where_zero(v, V::add(V::sqrt(v), eps)); }
GAC_INLINE float divisor(float v, float eps) { return v == 0 ? INFINITY : std::sqrt(v) + eps; }
GAC_INLINE double divisor(double v, double eps) { return v == 0 ? INFINITY : std::sqrt(v) + eps; }

// What a sketch adds up: the elements as they are, ...
template <class T>
struct Plain {
  using Element = T;
  const T* x;
  GAC_INLINE void skip(int64_t n) { x += n; }
  // Fetches the last line of the next page, and with it the page's translation, which the hardware's prefetcher waits for:
  // 10 to 20% of this loop over memory. The page's first lines would not do: they spoil the prefetcher's stream.
  GAC_INLINE void look_ahead() const {
#if defined(__GNUC__)
    __builtin_prefetch(reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(x) / kPage + 2) * kPage - kLine));
#endif
  }
  GAC_INLINE V::F load(int i) const { return V::load(x + i); }
  GAC_INLINE D2 widened(int i, V::F) const { return load2(x + i); }
  GAC_INLINE double one(int64_t i) const { return to_double(x[i]); }
};

// ... or each divided by sqrt(v) + eps, in float32: squares are then float64, and the caller looks for overflow.
template <class T, class S>
struct Weighted {
  using Element = float;
  const T* x;
  const S* v;
  float eps;
  GAC_INLINE void skip(int64_t n) {
    x += n;
    v += n;
  }
  GAC_INLINE void look_ahead() const {}
  GAC_INLINE V::F load(int i) const { return V::div(V::load(x + i), divisor(V::load(v + i), V::set(eps))); }
  GAC_INLINE D2 widened(int, V::F y) const { return {V::low(y), V::high(y)}; }
  GAC_INLINE double one(int64_t i) const { return to_float(x[i]) / divisor(to_float(v[i]), eps); }
};

// Sum of squares on the side of the sketch: float64, or for 16-bit types float32 emptied every kRun additions.
template <class T>
struct Squares {
  D2 sums[2];
  GAC_INLINE void clear() { sums[0] = sums[1] = zero2(); }
  template <class Source>
  GAC_INLINE void add(int i, const Source& source, V::F x) {
    const D2 v = source.widened(i, x);
    D2& sum = sums[i / V::W % 2];
    sum = fma2(v, v, sum);
  }
  GAC_INLINE void empty() {}
  GAC_INLINE double sum() { return total(add2(sums[0], sums[1])); }
};
template <class T>
struct ShortSquares {
  V::F runs[2];
  D2 sums;
  GAC_INLINE void clear() {
    sums = zero2();
    runs[0] = runs[1] = V::set(0.0f);
  }
  template <class Source>
  GAC_INLINE void add(int i, const Source&, V::F x) {
    V::F& run = runs[i / V::W % 2];
    run = V::fma(x, x, run);
  }
  GAC_INLINE void empty() {
    sums = widened(runs[0], widened(runs[1], sums));
    runs[0] = runs[1] = V::set(0.0f);
  }
  GAC_INLINE double sum() { return total(sums); }
};
template <>
struct Squares<bf16> : ShortSquares<bf16> {};
template <>
struct Squares<fp16> : ShortSquares<fp16> {};

// lanes += sign * x for 32 elements.
template <class Source, class S>
GAC_INLINE void add_group(const Source& x, float* acc, uint32_t word, S& squares) {
  constexpr int W = V::W;
#pragma GCC unroll 8
  for (int i = 0; i < 32; i += W) {
    const V::F v = x.load(i);
    V::store(acc + i, V::add_signed(V::load(acc + i), v, word, i));
    squares.add(i, x, v);
  }
}
template <class T>
GAC_INLINE void add_group(const Plain<T>& x, double* acc, uint32_t word, Squares<double>& squares) {
  constexpr int W = V::W, H = V::W / 2;
  for (int i = 0; i < 32; i += W) {
    const D2 v = load2(x.x + i);
    V::store(acc + i, V::add_signed(V::load(acc + i), v.lo, word, i));
    V::store(acc + i + H, V::add_signed(V::load(acc + i + H), v.hi, word, i + H));
    D2& sum = squares.sums[i / W % 2];
    sum = fma2(v, v, sum);
  }
}

template <class T, class A>
struct SquaresOf {
  using type = Squares<T>;
};
template <class T>
struct SquaresOf<T, double> {
  using type = Squares<double>;
};

template <class Source, class A>
GAC_INLINE double add_scalars(const Source& x, int64_t n, A* acc, uint32_t word, int bit) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double v = x.one(i);
    const A term = static_cast<A>(v);
    acc[i] += (word >> (bit + i) & 1u) ? -term : term;
    squares += v * v;
  }
  return squares;
}

// One row after the other: taking two at once saves loads and stores of lanes, but from memory it was measured at half
// the speed.
template <class Source, class A>
GAC_INLINE double add_rows(Source x, int64_t n, A* acc, const SketchRun& run) {
  constexpr int kBatch = kPage / 32 / sizeof(typename Source::Element);  // sign words hashed at a time: a page's
  constexpr int64_t kEmpty = 2 * kRun * V::W / 32;  // groups that fill the runs of the squares
  uint32_t words[kBatch];
  typename SquaresOf<typename Source::Element, A>::type squares;
  squares.clear();
  double others = 0;
  int64_t lane = run.lane;
  uint64_t index = run.index;
  if (lane % 32 && n) {  // up to the first whole group
    const int64_t head = n < 32 - lane % 32 ? n : 32 - lane % 32;
    others += add_scalars(x, head, acc + lane, sign_word(run.seed, index / 32), static_cast<int>(lane % 32));
    x.skip(head);
    n -= head;
    index += head;
    lane += head;
    if (lane == run.lanes) lane = 0;
  }
  while (n >= 32) {
    const int64_t batch = n / 32 < kBatch ? n / 32 : kBatch;
    x.look_ahead();
    fill_words(run.seed, index / 32, batch, words);
    for (int64_t done = 0; done < batch;) {
      int64_t stop = done + (run.lanes - lane) / 32;  // the end of the row
      if (stop > batch) stop = batch;
      if (stop > done + kEmpty) stop = done + kEmpty;
      A* to = acc + lane;
      lane += (stop - done) * 32;
      if (lane == run.lanes) lane = 0;
      for (; done < stop; ++done, x.skip(32), to += 32) add_group(x, to, words[done], squares);
      squares.empty();
    }
    index += batch * 32;
    n -= batch * 32;
  }
  if (n) others += add_scalars(x, n, acc + lane, sign_word(run.seed, index / 32), 0);
  return others + squares.sum();
}

template <class T, class A>
GAC_KERNEL double sketch(const void* data, int64_t count, A* acc, const SketchRun& run) {
  const double squares = add_rows(Plain<T>{static_cast<const T*>(data)}, count, acc, run);
  return sizeof(A) == sizeof(double) || in_range<T>(squares, count) ? squares : moments_wide<T>(data, count);
}

template <class T, class S>
GAC_KERNEL double sketch_weighted(const void* data, const void* second, int64_t count, double eps, float* acc,
                                  const SketchRun& run) {
  const Weighted<T, S> source = {static_cast<const T*>(data), static_cast<const S*>(second), static_cast<float>(eps)};
  return add_rows(source, count, acc, run);
}

// x <- x / (sqrt(v) + eps), 0 where v is 0.
GAC_KERNEL void weigh(double* x, const double* v, int64_t n, double eps) {
  constexpr int H = V::W / 2;
  int64_t i = 0;
  for (; i + H <= n; i += H) V::store(x + i, V::div(V::load(x + i), divisor(V::load(v + i), V::set(eps))));
  for (; i < n; ++i) x[i] /= divisor(v[i], eps);
}

template <class T, class S>
GAC_KERNEL void weigh_short(const void* data, const void* second, int64_t n, double eps, float* out) {
  Weighted<T, S> source = {static_cast<const T*>(data), static_cast<const S*>(second), static_cast<float>(eps)};
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W, source.skip(V::W)) V::store(out + i, source.load(0));
  for (int64_t k = 0; i + k < n; ++k) out[i + k] = static_cast<float>(source.one(k));
}

template <class T>
GAC_INLINE D2 taken(const T* x, float* previous) {
  D2 now = load2(x);
  if (!previous) return now;
  const D2 last = load2(previous);
  store2(previous, now);
  if (sizeof(T) == sizeof(double)) now = load2(previous);  // rounded
  return {V::sub(now.lo, last.lo), V::sub(now.hi, last.hi)};
}

template <class T>
GAC_KERNEL double accumulate(const void* data, float* previous, float* out, int64_t n, double scale) {
  const T* x = static_cast<const T*>(data);
  constexpr int W = V::W;
  const D2 factor = {V::set(scale), V::set(scale)};
  D2 squares[2] = {zero2(), zero2()};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    for (int u = 0; u < 2; ++u) {
      const int64_t at = i + u * W;
      const D2 added = taken(x + at, previous ? previous + at : nullptr);
      store2(out + at, fma2(factor, added, load2(out + at)));
      squares[u] = fma2(added, added, squares[u]);
    }
  }
  double result = total(add2(squares[0], squares[1]));
  for (; i < n; ++i) {
    double added = to_double(x[i]);
    if (previous) {
      const float now = static_cast<float>(added);
      added = static_cast<double>(now) - static_cast<double>(previous[i]);
      previous[i] = now;
    }
    out[i] = static_cast<float>(out[i] + scale * added);
    result += added * added;
  }
  return result;
}

// exp by Cody and Waite's reduction and the Taylor polynomial of degree 13 on |r| <= ln(2)/2 (remainder 4e-18).
GAC_INLINE V::D exponential(V::D x) {
  const V::D clamped = V::max(V::min(x, V::set(710.0)), V::set(-750.0));
  const V::D n = V::round(V::mul(clamped, V::set(1.4426950408889634)));
  V::D r = V::fma(n, V::set(-6.93147180369123816490e-01), clamped);
  r = V::fma(n, V::set(-1.90821492927058770002e-10), r);
  V::D p = V::set(1.0 / 6227020800.0);
  p = V::fma(p, r, V::set(1.0 / 479001600.0));
  p = V::fma(p, r, V::set(1.0 / 39916800.0));
  p = V::fma(p, r, V::set(1.0 / 3628800.0));
  p = V::fma(p, r, V::set(1.0 / 362880.0));
  p = V::fma(p, r, V::set(1.0 / 40320.0));
  p = V::fma(p, r, V::set(1.0 / 5040.0));
  p = V::fma(p, r, V::set(1.0 / 720.0));
  p = V::fma(p, r, V::set(1.0 / 120.0));
  p = V::fma(p, r, V::set(1.0 / 24.0));
  p = V::fma(p, r, V::set(1.0 / 6.0));
  p = V::fma(p, r, V::set(0.5));
  p = V::fma(p, r, V::set(1.0));
  p = V::fma(p, r, V::set(1.0));
  const V::D half = V::round(V::mul(n, V::set(0.5)));  // in two steps: the result may be subnormal
  const V::D scaled = V::mul(V::mul(p, V::pow2(half)), V::pow2(V::sub(n, half)));
  return V::or_nan(scaled, x);
}

GAC_KERNEL void tokens(const double* logp, const double* advantage, const double* keep, int64_t n, double* out) {
  constexpr int H = V::W / 2;
  V::D s[7];
  for (int k = 0; k < 7; ++k) s[k] = V::zero();
  double tail[3][H] = {};
  for (int64_t i = 0; i < n; i += H) {
    const double *lp = logp + i, *ap = advantage + i, *kp = keep + i;
    if (i + H > n) {
      for (int64_t j = 0; j < n - i; ++j) {
        tail[0][j] = lp[j];
        tail[1][j] = ap[j];
        tail[2][j] = kp[j];
      }
      lp = tail[0];
      ap = tail[1];
      kp = tail[2];
    }
    const V::D m = V::load(kp);
    const V::D l = V::where_nonzero(m, V::load(lp)), a = V::where_nonzero(m, V::load(ap));
    const V::D p = exponential(l);
    const V::D phi = V::where_nonzero(m, V::mul(p, V::sub(V::set(1.0), p)));
    s[0] = V::add(s[0], m);
    s[1] = V::add(s[1], l);
    s[2] = V::add(s[2], a);
    s[3] = V::fma(a, a, s[3]);
    s[4] = V::add(s[4], phi);
    s[5] = V::fma(phi, phi, s[5]);
    s[6] = V::fma(phi, a, s[6]);
  }
  for (int k = 0; k < 7; ++k) out[k] += V::sum(s[k]);
}

GAC_KERNEL double absorb(const float* current, float* previous, float* out, int64_t n, double scale) {
  constexpr int H = V::W / 2;
  const V::D factor = V::set(scale);
  V::D squares = V::zero();
  int64_t i = 0;
  for (; i + H <= n; i += H) {
    V::D delta = V::widen(current + i);
    if (previous) {
      delta = V::sub(delta, V::widen(previous + i));
      for (int j = 0; j < H; ++j) previous[i + j] = current[i + j];
    }
    delta = V::mul(factor, delta);
    V::narrow(out + i, V::add(V::widen(out + i), delta));
    squares = V::fma(delta, delta, squares);
  }
  double result = V::sum(squares);
  for (; i < n; ++i) {
    double delta = current[i];
    if (previous) {
      delta -= previous[i];
      previous[i] = current[i];
    }
    delta *= scale;
    out[i] = static_cast<float>(out[i] + delta);
    result += delta * delta;
  }
  return result;
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          {moments_wide<float>, moments_short<bf16>, moments_short<fp16>, moments_wide<double>, moments_wide<e4m3>,
           moments_wide<e5m2>},
          {pair_wide<float>, pair_short<bf16>, pair_short<fp16>, pair_wide<double>},
          {mix<float>, mix<bf16>, mix<fp16>, mix<double>},
          {sketch<float, float>, sketch<bf16, float>, sketch<fp16, float>, nullptr, sketch<e4m3, float>,
           sketch<e5m2, float>},
          {sketch<float, double>, sketch<bf16, double>, sketch<fp16, double>, sketch<double, double>,
           sketch<e4m3, double>, sketch<e5m2, double>},
          {{sketch_weighted<float, float>, sketch_weighted<float, bf16>, sketch_weighted<float, fp16>},
           {sketch_weighted<bf16, float>, sketch_weighted<bf16, bf16>, sketch_weighted<bf16, fp16>},
           {sketch_weighted<fp16, float>, sketch_weighted<fp16, bf16>, sketch_weighted<fp16, fp16>}},
          weigh,
          {{weigh_short<float, float>, weigh_short<float, bf16>, weigh_short<float, fp16>},
           {weigh_short<bf16, float>, weigh_short<bf16, bf16>, weigh_short<bf16, fp16>},
           {weigh_short<fp16, float>, weigh_short<fp16, bf16>, weigh_short<fp16, fp16>}},
          {accumulate<float>, accumulate<bf16>, accumulate<fp16>, accumulate<double>, accumulate<e4m3>,
           accumulate<e5m2>},
          tokens,
          absorb};
}
