// Work is cut at positions of the region, never of the tensors: a unit is a run of whole slabs, or, where slabs are
// long, a part of one slab. Each unit is one task. A unit of whole slabs writes its buckets itself; the parts of a split
// slab leave their lanes in float64, and a second pass adds them in order.
#include "sketch.h"

#include <cstring>
#include <memory>

#include "weights.h"

namespace gac {
namespace {

constexpr int64_t kUnitRows = 64;     // rows of a sketch unit when slabs are short
constexpr int64_t kSplitRows = 256;   // longer slabs are split; also the rows that float lanes add up at most
constexpr int64_t kSplits = 64;       // parts of a slab at most
constexpr int64_t kAbsorbCells = 32;  // cells of a task of absorb

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

// One contiguous run of weighted elements in float32, or in float64 lanes and hence arithmetic; returns its squares.
double sketch_weighted_run(const Weights& weights, int dtype, int second, const char* x, const char* v, int64_t n,
                           float* lanes, SketchRun run) {
  if (dtype < kPaired && second < kPaired)
    return kernels().sketch_weighted[dtype][second](x, v, n, weights.eps, lanes, run);
  double squares = 0;
  weights.for_short_blocks(dtype, second, x, v, n, [&](const float* y, const float* w, int64_t m) {
    squares += kernels().sketch_weighted[kFloat32][kFloat32](y, w, m, weights.eps, lanes, run);
    run.index += static_cast<uint64_t>(m);
    run.lane = (run.lane + m) % run.lanes;
  });
  return squares;
}
double sketch_weighted_run(const Weights& weights, int dtype, int second, const char* x, const char* v, int64_t n,
                           double* lanes, SketchRun run) {
  double squares = 0;
  weights.for_blocks(dtype, second, x, v, n, [&](const double* y, int64_t m) {
    squares += kernels().sketch_double[kFloat64](y, m, lanes, run);
    run.index += static_cast<uint64_t>(m);
    run.lane = (run.lane + m) % run.lanes;
  });
  return squares;
}

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
  double* cells;           // squares of what totals gain, where there are such
  int64_t n = tensors.size();
  int64_t slab = map.lanes * map.rows_per_slab;
  bool split = map.rows_per_slab > kSplitRows;
  int64_t parts = split ? std::min(kSplits, ceil_div(map.rows_per_slab, kSplitRows)) : 1;  // of a slab
  int64_t part_rows = ceil_div(map.rows_per_slab, parts);
  int64_t unit_slabs = split ? 1 : std::max<int64_t>(1, kUnitRows / map.rows_per_slab);
  std::vector<Segment> segments{};
  std::vector<double> squares{}, nonfinite{};  // one for each segment
  std::vector<Unit> units{};
  std::vector<double> partials{};

  int64_t bucket_offset(int64_t k) const { return pieces[k]; }
  int64_t index_offset(int64_t k) const { return pieces[n + k]; }
  int64_t region_numel(int64_t k) const { return pieces[2 * n + k]; }
  int64_t start(int64_t k) const { return pieces[3 * n + k]; }
  // Cells of the slab that position j opens.
  double* cells_of(int64_t k, int64_t j) const {
    return cells ? cells + pieces[4 * n + k] + j / slab * ceil_div(map.lanes, kCellLanes) : nullptr;
  }

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
  void write(int64_t k, int64_t at, int64_t count, const S* lanes) const;
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
  if (weights && weights->of(segment.tensor)) {
    const Tensor v = weights->seconds[segment.tensor];
    if (v.dtype == kScale)
      return weights->for_scaled<A>(t, v, from, end - begin, [&](const A* y, int64_t position, int64_t count) {
        if constexpr (sizeof(A) == sizeof(double))
          squares[number] += kernels().sketch_double[kFloat64](y, count, lanes, run_at(position));
        else
          squares[number] += kernels().sketch_float[kFloat32](y, count, lanes, run_at(position));
      });
    for_pair_runs(t, v, from, end - begin, [&](const char* x, const char* y, int64_t position, int64_t count) {
      squares[number] += sketch_weighted_run(*weights, t.dtype, v.dtype, x, y, count, lanes, run_at(position));
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
  if (!weights || !weights->of(segment.tensor)) {
    nonfinite[number] = nonfinite_in(t, segment.offset, segment.count, squares[number]);
    return;
  }
  double sums[2];
  weights->moments(t, weights->seconds[segment.tensor], segment.offset, segment.count, sums);
  squares[number] = sums[0];
  nonfinite[number] = sums[1];
}

// Writes the buckets of the slab that position `at` of region k opens, or has totals gain what they gained.
template <class S>
void Sketch::write(int64_t k, int64_t at, int64_t count, const S* lanes) const {
  const int64_t bucket = bucket_of(k, at);
  if (map.total) {
    double* cell = cells_of(k, at);
    float now[kCellLanes];
    for (int64_t i = 0; i < count; i += kCellLanes) {
      const int64_t m = std::min(kCellLanes, count - i);
      for (int64_t j = 0; j < m; ++j) now[j] = static_cast<float>(lanes[i + j]);
      if (map.fresh & 1) std::memset(map.total + bucket + i, 0, m * sizeof(float));  // it stays in the cache
      if (map.fresh & 2) std::memset(static_cast<float*>(map.out) + bucket + i, 0, m * sizeof(float));
      *cell++ += kernels().absorb(now, static_cast<float*>(map.out) + bucket + i, map.total + bucket + i, m, map.scale);
    }
  } else if (map.out_double) {
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
      write(k, at, count, lanes.data);
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
  write(k, at, std::min(map.lanes, region_numel(k) - at), sum);
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

void run(const Table& tensors, const int64_t* pieces, const gac_sketch_map& map, const Weights* weights,
         double* moments, int threads) {
  Sketch work{tensors, pieces, map, weights, map.total ? moments + 2 : nullptr};
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
  if (!map.accumulate && !map.total) work.fill_gaps();
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
}

}  // namespace

void sketch(const Table& tensors, const int64_t* pieces, const gac_sketch_map& map, double* moments, int threads) {
  run(tensors, pieces, map, nullptr, moments, threads);
}

void sketch_weighted(const Table& tensors, const Table& seconds, const int64_t* pieces, const gac_sketch_map& map,
                     double eps, double* moments, int threads) {
  const Weights weights = {seconds, eps};
  run(tensors, pieces, map, &weights, moments, threads);
}

void absorb(const float* current, float* previous, float* total, int64_t m, double scale, double* out, bool add,
            int threads) {
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
}

}  // namespace gac
