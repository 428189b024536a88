// The operations: cuts lists of tensors into fixed chunks, runs the inner loops on them and combines the partial sums in
// a fixed order.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "gac_cpu.h"
#include "threads.h"

namespace gac {
namespace {

constexpr int64_t kChunk = 1 << 14;       // elements of a reduction's chunk
constexpr int64_t kMixShare = 1 << 15;    // elements that make a thread worth its start in a mix
constexpr int64_t kBlock = 1024;          // elements converted, or mixed after their sums are taken, at a time
constexpr int64_t kTokensBlock = 512;     // tokens converted at a time
constexpr int64_t kUnitRows = 64;         // rows of a sketch unit when slabs are short
constexpr int64_t kSplitRows = 256;       // longer slabs are split; also the rows that float lanes add up at most
constexpr int64_t kSplits = 64;           // parts of a slab at most
constexpr int64_t kAbsorbCell = 1024;     // elements of one sum of absorb_
constexpr int64_t kAbsorbCells = 32;      // cells of a task

struct Tensor {
  char* data;
  int64_t numel;
  int dtype;
  int64_t columns;  // elements of a contiguous run
  int64_t stride;   // between the starts of runs
};

class Table {
 public:
  Table(const int64_t* rows, int64_t n, int form) : rows_(rows), n_(n), form_(form) {}
  Tensor operator[](int64_t k) const {
    const int64_t numel = rows_[n_ + k];
    const int dtype = form_ >= 2 ? form_ - 2 : static_cast<int>(rows_[2 * n_ + k]);
    const bool strided = form_ == 1;
    return {reinterpret_cast<char*>(rows_[k]), numel, dtype, strided ? rows_[3 * n_ + k] : numel,
            strided ? rows_[4 * n_ + k] : 0};
  }
  int64_t size() const { return n_; }
  // A tensor without memory of its own (a wrapper subclass) must not be read.
  bool readable() const {
    for (int64_t k = 0; k < n_; ++k)
      if (!rows_[k] && rows_[n_ + k]) return false;
    return true;
  }

 private:
  const int64_t* rows_;
  int64_t n_;
  int form_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(address, position, count) for the contiguous runs of elements [begin, begin + count).
template <class Body>
void for_runs(const Tensor& t, int64_t begin, int64_t count, Body&& body) {
  const int64_t size = bytes_of(t.dtype);
  if (t.columns >= t.numel) {
    body(t.data + begin * size, begin, count);
    return;
  }
  while (count > 0) {
    const int64_t row = begin / t.columns, column = begin % t.columns, run = std::min(count, t.columns - column);
    body(t.data + (row * t.stride + column) * size, begin, run);
    begin += run;
    count -= run;
  }
}

template <class T>
int64_t count_nonfinite(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += !is_finite_bits(x[i]);
  return count;
}

int64_t count_nonfinite(int dtype, const void* data, int64_t n) {
  switch (dtype) {
    case kFloat32: return count_nonfinite<float>(data, n);
    case kBFloat16: return count_nonfinite<bf16>(data, n);
    case kFloat16: return count_nonfinite<fp16>(data, n);
    default: return count_nonfinite<double>(data, n);
  }
}

// NaN and infinity make the sum of squares non-finite, so counting is needed only then.
double nonfinite_in(const Tensor& t, int64_t begin, int64_t count, double squares) {
  if (std::isfinite(squares)) return 0;
  int64_t found = 0;
  for_runs(t, begin, count, [&](const char* x, int64_t, int64_t n) { found += count_nonfinite(t.dtype, x, n); });
  return static_cast<double>(found);
}

// Chunks of a list of tensors, numbered through; length(tensor) says how many elements a chunk of it has.
class Chunks {
 public:
  explicit Chunks(const Table& table) : Chunks(table, [](int64_t) { return kChunk; }) {}
  template <class Length>
  Chunks(const Table& table, Length&& length) : first_(table.size() + 1) {
    for (int64_t k = 0; k < table.size(); ++k) first_[k + 1] = first_[k] + ceil_div(table[k].numel, length(k));
  }
  int64_t size() const { return first_.back(); }
  int64_t first(int64_t tensor) const { return first_[tensor]; }
  int64_t tensor_of(int64_t chunk) const {
    return std::upper_bound(first_.begin(), first_.end(), chunk) - first_.begin() - 1;
  }

 private:
  std::vector<int64_t> first_;
};

// Runs chunk(tensor, begin, count, sums) over the list and adds `width` sums in order of position.
template <int width, class Chunk>
void reduce(const Table& table, bool per_tensor, double* out, int threads, Chunk&& chunk) {
  const Chunks chunks(table);
  std::vector<double> partials(chunks.size() * width);
  auto body = [&](int64_t c) {
    const int64_t k = chunks.tensor_of(c), begin = (c - chunks.first(k)) * kChunk;
    chunk(k, begin, std::min(kChunk, table[k].numel - begin), &partials[c * width]);
  };
  parallel_for(threads, chunks.size(), body);
  std::fill(out, out + (per_tensor ? table.size() * width : width), 0.0);
  for (int64_t k = 0; k < table.size(); ++k) {
    double sums[width] = {};
    for (int64_t c = chunks.first(k); c < chunks.first(k + 1); ++c)
      for (int w = 0; w < width; ++w) sums[w] += partials[c * width + w];
    for (int w = 0; w < width; ++w) out[(per_tensor ? k * width : 0) + w] += sums[w];
  }
}

template <class T, class A>
void convert(const void* data, int64_t n, A* out) {
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(to_double(x[i]));
}

void to_doubles(int dtype, const void* x, int64_t n, double* out) {
  switch (dtype) {
    case kFloat32: return convert<float>(x, n, out);
    case kBFloat16: return convert<bf16>(x, n, out);
    case kFloat16: return convert<fp16>(x, n, out);
    default: return convert<double>(x, n, out);
  }
}

template <class T>
void round_doubles(const double* x, int64_t n, void* out) {
  T* y = static_cast<T*>(out);
  for (int64_t i = 0; i < n; ++i) y[i] = from_double<T>(x[i]);
}

void from_doubles(int dtype, const double* x, int64_t n, void* out) {
  switch (dtype) {
    case kFloat32: return round_doubles<float>(x, n, out);
    case kBFloat16: return round_doubles<bf16>(x, n, out);
    case kFloat16: return round_doubles<fp16>(x, n, out);
    default: return round_doubles<double>(x, n, out);
  }
}

// Calls body(x, y, position, count) for the runs contiguous in both tensors.
template <class Body>
void for_pair_runs(const Tensor& a, const Tensor& b, int64_t begin, int64_t count, Body&& body) {
  for_runs(a, begin, count, [&](char* x, int64_t position, int64_t n) {
    for_runs(b, position, n, [&](char* y, int64_t at, int64_t m) {
      body(x + (at - position) * bytes_of(a.dtype), y, at, m);
    });
  });
}

void pair_run(int dtype_a, int dtype_b, const char* x, const char* y, int64_t n, double* sums) {
  const Kernels& table = kernels();
  if (dtype_a == dtype_b) return table.pair[dtype_a](x, y, n, sums);
  double left[kBlock], right[kBlock], part[3];
  std::fill(sums, sums + 3, 0.0);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = std::min(kBlock, n - i);
    to_doubles(dtype_a, x + i * bytes_of(dtype_a), m, left);
    to_doubles(dtype_b, y + i * bytes_of(dtype_b), m, right);
    table.pair[kFloat64](left, right, m, part);
    for (int w = 0; w < 3; ++w) sums[w] += part[w];
  }
}

void mix_run(int dtype_a, int dtype_b, char* x, const char* y, int64_t n, double mu, double* sums) {
  const Kernels& table = kernels();
  const double rest = 1 - mu;
  if (dtype_a == dtype_b && !sums) return table.mix[dtype_a](x, y, n, mu, rest);
  double left[kBlock], right[kBlock], part[3];
  if (sums) std::fill(sums, sums + 3, 0.0);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = std::min(kBlock, n - i);
    char* target = x + i * bytes_of(dtype_a);
    const char* source = y + i * bytes_of(dtype_b);
    if (sums) {  // the block stays in the first-level cache until it is mixed
      pair_run(dtype_a, dtype_b, target, source, m, part);
      for (int w = 0; w < 3; ++w) sums[w] += part[w];
    }
    if (dtype_a == dtype_b) {
      table.mix[dtype_a](target, source, m, mu, rest);
    } else {
      to_doubles(dtype_a, target, m, left);
      to_doubles(dtype_b, source, m, right);
      table.mix[kFloat64](left, right, m, mu, rest);
      from_doubles(dtype_a, left, m, target);
    }
  }
}

void moments_chunk(const Tensor& t, int64_t begin, int64_t count, double* sums) {
  const auto kernel = kernels().moments[t.dtype];
  double squares = 0;
  for_runs(t, begin, count, [&](const char* x, int64_t, int64_t n) { squares += kernel(x, n); });
  sums[0] = squares;
  sums[1] = nonfinite_in(t, begin, count, squares);
}

// Turns C++ errors into codes: none may cross the C interface.
template <class Body>
int guarded(Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return GAC_NO_MEMORY;
  }
}

// ---------------------------------------------------------------------------------------------------------- sketch
//
// Work is cut at positions of the region, never of the tensors: a unit is a run of whole slabs, or, where slabs are
// long, a part of one slab. Each unit is one task. A unit of whole slabs writes its buckets itself; the parts of a split
// slab leave their lanes in float64, and a second pass adds them in order.

struct Segment {  // elements of one tensor inside one unit
  int64_t tensor;
  int64_t offset;  // of its first element in the tensor
  int64_t start;   // of its first element in the region
  int64_t count;
};

struct Unit {
  int64_t region;  // index of a piece of the region: its columns of the table describe it
  int64_t number;  // within the region
  int64_t first;   // its segments: [first, next unit's first)
  int64_t part;    // row of the partial lanes, -1 when the unit writes buckets
};

// Elements count as x / (sqrt(v) + eps), as 0 where v is 0.
struct Weights {
  const Table& seconds;
  double eps;

  // One contiguous run in float32, or float64 lanes and hence arithmetic; returns its sum of squares.
  double sketch(int dtype, int second, const char* x, const char* v, int64_t n, float* lanes, SketchRun run) const {
    return kernels().sketch_weighted[dtype][second](x, v, n, eps, lanes, run);
  }
  double sketch(int dtype, int second, const char* x, const char* v, int64_t n, double* lanes, SketchRun run) const {
    double squares = 0;
    for_blocks(dtype, second, x, v, n, [&](const double* y, int64_t m) {
      squares += kernels().sketch_double[kFloat64](y, m, lanes, run);
      run.index += static_cast<uint64_t>(m);
      run.lane = (run.lane + m) % run.lanes;
    });
    return squares;
  }

  // Calls body(y, count) for blocks of weighted elements in float64.
  template <class Body>
  void for_blocks(int dtype, int second, const char* x, const char* v, int64_t n, Body&& body) const {
    double value[kBlock], moment[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t m = std::min(kBlock, n - i);
      to_doubles(dtype, x + i * bytes_of(dtype), m, value);
      to_doubles(second, v + i * bytes_of(second), m, moment);
      kernels().weigh(value, moment, m, eps);
      body(value, m);
    }
  }
};

// Accumulators of a row, on a cache line's edge and half a page away from the elements at `data`: split lines and loads
// that look like one of the last stores by their place in the page cost up to a third (docs/kernels.md).
template <class A>
struct Lanes {
  Lanes(int64_t count, const char* source) : storage(new A[count + kPage / sizeof(A)]) {
    const auto begin = reinterpret_cast<uintptr_t>(storage.get());
    const uintptr_t wanted = reinterpret_cast<uintptr_t>(source) / kLine * kLine + kPage / 2;
    data = reinterpret_cast<A*>(begin + (wanted - begin) % kPage);
  }
  std::unique_ptr<A[]> storage;
  A* data;
};

struct Sketch {
  const Table& tensors;
  const int64_t* pieces;
  const gac_sketch_map& map;
  const Weights* weights;  // null: elements count as they are
  int64_t n = tensors.size();
  int64_t slab = map.lanes * map.rows_per_slab;
  bool split = map.rows_per_slab > kSplitRows;
  int64_t parts = split ? std::min(kSplits, ceil_div(map.rows_per_slab, kSplitRows)) : 1;  // of a slab
  int64_t part_rows = ceil_div(map.rows_per_slab, parts);
  int64_t unit_slabs = split ? 1 : std::max<int64_t>(1, kUnitRows / map.rows_per_slab);
  std::vector<Segment> segments;
  std::vector<double> squares, nonfinite;  // one for each segment
  std::vector<Unit> units;
  std::vector<double> partials;

  int64_t bucket_offset(int64_t k) const { return pieces[k]; }
  int64_t index_offset(int64_t k) const { return pieces[n + k]; }
  int64_t region_numel(int64_t k) const { return pieces[2 * n + k]; }
  int64_t start(int64_t k) const { return pieces[3 * n + k]; }

  int64_t unit_of(int64_t j) const {
    if (!split) return j / (slab * unit_slabs);
    return j / slab * parts + j % slab / (part_rows * map.lanes);
  }
  int64_t unit_begin(int64_t unit) const {
    if (!split) return unit * slab * unit_slabs;
    return unit / parts * slab + std::min(unit % parts * part_rows * map.lanes, slab);
  }
  // First bucket of the slab that position j opens, or the end of the region's buckets.
  int64_t bucket_of(int64_t k, int64_t j) const {
    return bucket_offset(k) + std::min(j / slab * map.lanes, region_size(k));
  }
  int64_t region_size(int64_t k) const {
    const int64_t numel = region_numel(k);
    const int64_t slabs = ceil_div(numel, slab);
    return slabs ? (slabs - 1) * map.lanes + std::min(map.lanes, numel - (slabs - 1) * slab) : 0;
  }

  void plan();
  template <class A>
  void run_unit(const Unit& unit, const Unit& next);
  template <class A>
  void add(const Segment& segment, int64_t begin, int64_t end, A* lanes, int64_t number);
  void check(int64_t number);
  const char* address(const Segment& segment) const {  // of its first element, gaps aside
    const Tensor t = tensors[segment.tensor];
    return t.data + segment.offset * bytes_of(t.dtype);
  }
  void combine(int64_t begin, int64_t end);
  void fill_gaps();
  template <class S>
  void write(int64_t bucket, int64_t count, const S* lanes) const;
  void write_zero(int64_t begin, int64_t end) const;
};

void Sketch::plan() {
  std::vector<int64_t> order(n);
  for (int64_t k = 0; k < n; ++k) order[k] = k;
  // A region is known by its first sign index, except that empty regions share theirs; those hold nothing.
  const auto before = [&](int64_t a, int64_t b) {
    return index_offset(a) != index_offset(b) ? index_offset(a) < index_offset(b) : start(a) < start(b);
  };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::stable_sort(order.begin(), order.end(), before);
  struct Keyed {
    int64_t region, unit;
    Segment segment;
  };
  std::vector<Keyed> keyed;
  bool sorted = true;
  for (int64_t k : order) {
    const int64_t numel = tensors[k].numel;
    for (int64_t done = 0; done < numel;) {
      const int64_t j = start(k) + done, unit = unit_of(j);
      const int64_t count = std::min(numel - done, unit_begin(unit + 1) - j);
      if (!keyed.empty() && index_offset(keyed.back().region) == index_offset(k) && keyed.back().unit > unit)
        sorted = false;  // overlapping pieces
      keyed.push_back({k, unit, {k, done, j, count}});
      done += count;
    }
  }
  if (!sorted)
    std::stable_sort(keyed.begin(), keyed.end(), [&](const Keyed& a, const Keyed& b) {
      const int64_t x = index_offset(a.region), y = index_offset(b.region);
      return x != y ? x < y : a.unit < b.unit;
    });
  segments.reserve(keyed.size());
  int64_t part = 0;
  for (const Keyed& item : keyed) {
    if (units.empty() || units.back().number != item.unit ||
        index_offset(units.back().region) != index_offset(item.region))
      units.push_back({item.region, item.unit, static_cast<int64_t>(segments.size()), split ? part++ : -1});
    segments.push_back(item.segment);
  }
  squares.assign(segments.size(), 0.0);
  nonfinite.assign(segments.size(), 0.0);
  partials.resize(part * map.lanes);
}

// Adds the segment's elements inside [begin, end), positions of the region within one slab, to the lanes.
template <class A>
void Sketch::add(const Segment& segment, int64_t begin, int64_t end, A* lanes, int64_t number) {
  begin = std::max(begin, segment.start);
  end = std::min(end, segment.start + segment.count);
  if (begin >= end) return;
  const Tensor t = tensors[segment.tensor];
  const int64_t from = segment.offset + begin - segment.start;
  const auto run_at = [&](int64_t position) -> SketchRun {
    const int64_t j = segment.start + position - segment.offset;
    return {map.lanes, j % map.lanes, static_cast<uint64_t>(index_offset(segment.tensor) + j),
            static_cast<uint32_t>(map.seed)};
  };
  if (weights) {
    const Tensor v = weights->seconds[segment.tensor];
    for_pair_runs(t, v, from, end - begin, [&](const char* x, const char* y, int64_t position, int64_t count) {
      squares[number] += weights->sketch(t.dtype, v.dtype, x, y, count, lanes, run_at(position));
    });
    return;
  }
  for_runs(t, from, end - begin, [&](const char* x, int64_t position, int64_t count) {
    const SketchRun run = run_at(position);
    if constexpr (sizeof(A) == sizeof(double))
      squares[number] += kernels().sketch_double[t.dtype](x, count, lanes, run);
    else
      squares[number] += kernels().sketch_float[t.dtype](x, count, lanes, run);
  });
}

// Counts the non-finite elements of a segment. Weighted ones are looked at in float64, which has room for those that
// float32 has not; their squares are then taken again.
void Sketch::check(int64_t number) {
  if (std::isfinite(squares[number])) return;
  const Segment& segment = segments[number];
  const Tensor t = tensors[segment.tensor];
  if (!weights) {
    nonfinite[number] = nonfinite_in(t, segment.offset, segment.count, squares[number]);
    return;
  }
  const Tensor v = weights->seconds[segment.tensor];
  double sum = 0;
  int64_t found = 0;
  for_pair_runs(t, v, segment.offset, segment.count, [&](const char* x, const char* y, int64_t, int64_t count) {
    weights->for_blocks(t.dtype, v.dtype, x, y, count, [&](const double* block, int64_t m) {
      sum += kernels().moments[kFloat64](block, m);
      found += count_nonfinite<double>(block, m);
    });
  });
  squares[number] = sum;
  nonfinite[number] = static_cast<double>(found);
}

template <class S>
void Sketch::write(int64_t bucket, int64_t count, const S* lanes) const {
  if (map.out_double) {
    double* out = static_cast<double*>(map.out) + bucket;
    for (int64_t i = 0; i < count; ++i) out[i] = (map.accumulate ? out[i] : 0.0) + map.scale * lanes[i];
  } else {
    float* out = static_cast<float*>(map.out) + bucket;
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<float>((map.accumulate ? out[i] : 0.0) + map.scale * lanes[i]);
  }
}

void Sketch::write_zero(int64_t begin, int64_t end) const {
  if (begin >= end) return;
  if (map.out_double)
    std::fill(static_cast<double*>(map.out) + begin, static_cast<double*>(map.out) + end, 0.0);
  else
    std::fill(static_cast<float*>(map.out) + begin, static_cast<float*>(map.out) + end, 0.0f);
}

template <class A>
void Sketch::run_unit(const Unit& unit, const Unit& next) {
  const int64_t k = unit.region;
  const int64_t begin = unit_begin(unit.number), end = std::min(unit_begin(unit.number + 1), region_numel(k));
  const int64_t step = split ? kSplitRows * map.lanes : slab;  // float lanes are emptied after a step
  const Lanes<A> lanes(map.lanes, address(segments[unit.first]));
  int64_t first = unit.first;
  for (int64_t at = begin; at < end; at += step) {
    while (first < next.first && segments[first].start + segments[first].count <= at) ++first;
    if (split) {  // a part may be huge and hold little
      if (first == next.first) break;
      at += std::max<int64_t>(0, segments[first].start - at) / step * step;
    }
    const int64_t stop = std::min(at + step, end);
    const int64_t count = std::min(map.lanes, stop - at);
    std::fill(lanes.data, lanes.data + map.lanes, A(0));
    for (int64_t s = first; s < next.first && segments[s].start < stop; ++s) add(segments[s], at, stop, lanes.data, s);
    if (!split) {
      write(bucket_of(k, at), count, lanes.data);
    } else {
      double* partial = &partials[unit.part * map.lanes];
      for (int64_t i = 0; i < map.lanes; ++i) partial[i] += lanes.data[i];
    }
  }
  for (int64_t s = unit.first; s < next.first; ++s) check(s);
}

// Adds the partial lanes of units [begin, end), all of one slab, and writes its buckets.
void Sketch::combine(int64_t begin, int64_t end) {
  double* sum = &partials[units[begin].part * map.lanes];
  for (int64_t u = begin + 1; u < end; ++u) {
    const double* more = &partials[units[u].part * map.lanes];
    for (int64_t i = 0; i < map.lanes; ++i) sum[i] += more[i];
  }
  const int64_t k = units[begin].region, at = unit_begin(units[begin].number) / slab * slab;
  write(bucket_of(k, at), std::min(map.lanes, region_numel(k) - at), sum);
}

// Zeroes the buckets of the named regions that no unit writes, and those beyond the layout.
void Sketch::fill_gaps() {
  std::vector<int64_t> named(n);
  for (int64_t k = 0; k < n; ++k) named[k] = k;
  std::sort(named.begin(), named.end(), [&](int64_t a, int64_t b) {
    return bucket_offset(a) != bucket_offset(b) ? bucket_offset(a) < bucket_offset(b)
                                                : region_numel(a) < region_numel(b);
  });
  size_t u = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = named[i];
    if (i && bucket_offset(named[i - 1]) == bucket_offset(k) && region_numel(named[i - 1]) == region_numel(k)) continue;
    int64_t written = bucket_offset(k);
    for (; u < units.size() && index_offset(units[u].region) == index_offset(k) && region_numel(k); ++u) {
      const int64_t begin = unit_begin(units[u].number), end = std::min(unit_begin(units[u].number + 1), region_numel(k));
      write_zero(written, bucket_of(k, begin));
      written = std::max(written, bucket_of(k, ceil_div(end, slab) * slab));
    }
    write_zero(written, bucket_offset(k) + region_size(k));
  }
  write_zero(map.used, map.out_size);
}

int sketch(const Table& tensors, const int64_t* pieces, const gac_sketch_map& map, const Weights* weights,
           double* moments, int threads) {
  Sketch work{tensors, pieces, map, weights};
  work.plan();
  bool wide = map.out_double != 0;
  for (int64_t k = 0; k < work.n; ++k)
    wide = wide || tensors[k].dtype == kFloat64 || (weights && weights->seconds[k].dtype == kFloat64);
  const Unit end = {0, 0, static_cast<int64_t>(work.segments.size()), -1};
  const int64_t count = static_cast<int64_t>(work.units.size());
  auto body = [&](int64_t u) {
    const Unit& next = u + 1 < count ? work.units[u + 1] : end;
    wide ? work.run_unit<double>(work.units[u], next) : work.run_unit<float>(work.units[u], next);
  };
  parallel_for(threads, count, body);
  if (work.split) {
    std::vector<int64_t> slabs;  // first unit of each slab
    for (int64_t u = 0; u < count; ++u)
      if (!u || work.index_offset(work.units[u].region) != work.index_offset(work.units[u - 1].region) ||
          work.units[u].number / work.parts != work.units[u - 1].number / work.parts)
        slabs.push_back(u);
    slabs.push_back(count);
    auto finish = [&](int64_t s) { work.combine(slabs[s], slabs[s + 1]); };
    parallel_for(threads, static_cast<int64_t>(slabs.size()) - 1, finish);
  }
  if (!map.accumulate) work.fill_gaps();
  // A tensor's segments are in order of position.
  std::vector<double> sums(2 * work.n);
  for (size_t s = 0; s < work.segments.size(); ++s) {
    sums[2 * work.segments[s].tensor] += work.squares[s];
    sums[2 * work.segments[s].tensor + 1] += work.nonfinite[s];
  }
  if (!map.per_tensor) {
    for (int64_t i = 2; i < 2 * work.n; ++i) sums[i % 2] += sums[i];
    sums.resize(2);  // an empty list has sums, too
  }
  for (size_t i = 0; i < sums.size(); ++i) moments[i] = (map.add ? moments[i] : 0.0) + sums[i];
  return GAC_OK;
}

// ---------------------------------------------------------------------------------------------------------- tokens

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
}  // namespace gac

using namespace gac;

int gac_abi(void) { return 6; }

int gac_select(const char* isa) { return select(isa) ? 0 : 1; }

const char* gac_isa(void) { return kernels().name; }

const char* gac_threading(void) { return threading_name(); }

void gac_prefer_pool(int pool) { prefer_pool(pool != 0); }

int gac_moments(const int64_t* table, int64_t n, int form, int per_tensor, double* out, int threads) {
  return guarded([&]() -> int {
    const Table tensors(table, n, form);
    if (!tensors.readable()) return GAC_NULL_POINTER;
    reduce<2>(tensors, per_tensor != 0, out, threads, [&](int64_t k, int64_t begin, int64_t count, double* sums) {
      moments_chunk(tensors[k], begin, count, sums);
    });
    return GAC_OK;
  });
}

int gac_moments_one(const void* x, int64_t packed, double* out) {
  const int64_t numel = packed >> 16;
  const int dtype = static_cast<int>(packed & 15), threads = static_cast<int>(packed >> 4 & 0xfff);
  if (numel > kChunk) {
    const int64_t table[] = {static_cast<int64_t>(reinterpret_cast<intptr_t>(x)), numel};
    return gac_moments(table, 1, 2 + dtype, 0, out, threads);
  }
  if (!x && numel) return GAC_NULL_POINTER;
  moments_chunk({static_cast<char*>(const_cast<void*>(x)), numel, dtype, numel, 0}, 0, numel, out);
  return GAC_OK;
}

int gac_pair_moments(const int64_t* a, const int64_t* b, int64_t n, int form, int per_tensor, double* out,
                     int threads) {
  return guarded([&]() -> int {
    const Table left(a, n, form & 15), right(b, n, form >> 4);
    if (!left.readable() || !right.readable()) return GAC_NULL_POINTER;
    reduce<3>(left, per_tensor != 0, out, threads, [&](int64_t k, int64_t begin, int64_t count, double* sums) {
      const Tensor x = left[k], y = right[k];
      for_pair_runs(x, y, begin, count, [&](const char* p, const char* q, int64_t, int64_t m) {
        double part[3];
        pair_run(x.dtype, y.dtype, p, q, m, part);
        for (int w = 0; w < 3; ++w) sums[w] += part[w];
      });
    });
    return GAC_OK;
  });
}

int gac_pair_moments_one(const void* a, const void* b, int64_t packed, double* out) {
  const int64_t numel = packed >> 16;
  const int dtype = static_cast<int>(packed & 15), threads = static_cast<int>(packed >> 4 & 0xfff);
  if (numel > kChunk) {
    const int64_t left[] = {static_cast<int64_t>(reinterpret_cast<intptr_t>(a)), numel};
    const int64_t right[] = {static_cast<int64_t>(reinterpret_cast<intptr_t>(b)), numel};
    return gac_pair_moments(left, right, 1, 17 * (2 + dtype), 0, out, threads);
  }
  if ((!a || !b) && numel) return GAC_NULL_POINTER;
  pair_run(dtype, dtype, static_cast<const char*>(a), static_cast<const char*>(b), numel, out);
  return GAC_OK;
}

int gac_mix(const int64_t* a, const int64_t* b, int64_t n, int form, double mu, double* out, int threads) {
  return guarded([&]() -> int {
    const Table left(a, n, form & 15), right(b, n, form >> 4);
    if (!left.readable() || !right.readable()) return GAC_NULL_POINTER;
    if (out) {
      reduce<3>(left, false, out, threads, [&](int64_t k, int64_t begin, int64_t count, double* sums) {
        const Tensor x = left[k], y = right[k];
        for_pair_runs(x, y, begin, count, [&](char* p, const char* q, int64_t, int64_t m) {
          double part[3];
          mix_run(x.dtype, y.dtype, p, q, m, mu, part);
          for (int w = 0; w < 3; ++w) sums[w] += part[w];
        });
      });
      return GAC_OK;
    }
    // Nothing is summed, so chunks may depend on the number of threads: longer ones are 1% faster. Not where a tensor has
    // gaps: chunks cut its runs there, and the last elements of a run are rounded in another way.
    int64_t numel = 0;
    for (int64_t k = 0; k < n; ++k) numel += left[k].numel;
    const int64_t workers = std::clamp<int64_t>(numel / kMixShare, 1, std::max(threads, 1));
    const auto length = [&](int64_t k) {
      const Tensor x = left[k], y = right[k];
      const int64_t share = ceil_div(x.numel, 4 * workers * kChunk) * kChunk;
      return std::min(x.columns, y.columns) < x.numel ? kChunk : std::clamp(share, 2 * kChunk, 8 * kChunk);
    };
    const Chunks chunks(left, length);
    auto body = [&](int64_t c) {
      const int64_t k = chunks.tensor_of(c);
      const Tensor x = left[k], y = right[k];
      const int64_t step = length(k), begin = (c - chunks.first(k)) * step;
      for_pair_runs(x, y, begin, std::min(step, x.numel - begin), [&](char* p, const char* q, int64_t, int64_t m) {
        mix_run(x.dtype, y.dtype, p, q, m, mu, nullptr);
      });
    };
    parallel_for(static_cast<int>(workers), chunks.size(), body);
    return GAC_OK;
  });
}

int gac_mix_one(void* a, const void* b, int64_t packed, double mu, double* out) {
  const int64_t numel = packed >> 16;
  const int dtype = static_cast<int>(packed & 15), threads = static_cast<int>(packed >> 4 & 0xfff);
  if (numel > (out ? kChunk : 2 * kMixShare - 1)) {
    const int64_t left[] = {static_cast<int64_t>(reinterpret_cast<intptr_t>(a)), numel};
    const int64_t right[] = {static_cast<int64_t>(reinterpret_cast<intptr_t>(b)), numel};
    return gac_mix(left, right, 1, 17 * (2 + dtype), mu, out, threads);
  }
  if ((!a || !b) && numel) return GAC_NULL_POINTER;
  mix_run(dtype, dtype, static_cast<char*>(a), static_cast<const char*>(b), numel, mu, out);
  return GAC_OK;
}

int gac_sketch(const int64_t* table, const int64_t* pieces, int64_t n, int form, const gac_sketch_map* map,
               double* moments, int threads) {
  return guarded([&]() -> int {
    const Table tensors(table, n, form);
    if (!tensors.readable() || (!map->out && map->out_size)) return GAC_NULL_POINTER;
    return gac::sketch(tensors, pieces, *map, nullptr, moments, threads);
  });
}

int gac_sketch_weighted(const int64_t* table, const int64_t* seconds, const int64_t* pieces, int64_t n, int form,
                        const gac_sketch_map* map, double eps, double* moments, int threads) {
  return guarded([&]() -> int {
    const Table tensors(table, n, form & 15), second_moments(seconds, n, form >> 4);
    if (!tensors.readable() || !second_moments.readable() || (!map->out && map->out_size)) return GAC_NULL_POINTER;
    const Weights weights = {second_moments, eps};
    return gac::sketch(tensors, pieces, *map, &weights, moments, threads);
  });
}

int gac_token_moments(const gac_tokens* tokens, double* out, int threads) {
  if (tokens->rows && tokens->length && (!tokens->logprobs || !tokens->advantages || !tokens->mask || !tokens->is_expert))
    return GAC_NULL_POINTER;
  if (!tokens->length) {
    std::fill(out, out + 7 * tokens->rows, 0.0);
    return GAC_OK;
  }
  auto body = [&](int64_t row) { token_row(*tokens, row, out + 7 * row); };
  parallel_for(threads, tokens->rows, body);
  return GAC_OK;
}

int gac_absorb(const float* current, float* previous, float* total, int64_t m, double scale, double* out, int add,
               int threads) {
  if (m && (!current || !total)) return GAC_NULL_POINTER;
  const auto kernel = kernels().absorb;
  const int64_t cells = ceil_div(m, kAbsorbCell);
  auto body = [&](int64_t task) {
    for (int64_t c = task * kAbsorbCells; c < std::min(cells, (task + 1) * kAbsorbCells); ++c) {
      const int64_t at = c * kAbsorbCell, count = std::min(kAbsorbCell, m - at);
      const double squares = kernel(current + at, previous ? previous + at : nullptr, total + at, count, scale);
      out[c] = add ? out[c] + squares : squares;
    }
  };
  parallel_for(threads, ceil_div(cells, kAbsorbCells), body);
  return GAC_OK;
}
