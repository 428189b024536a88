// Lists of tensors: their tables as gac_cpu.h describes them, and the passes over them in fixed chunks, whose sums are
// combined in a fixed order.
#pragma once

#include <algorithm>
#include <vector>

#include "threads.h"
#include "types.h"

namespace gac {

constexpr int64_t kChunk = 1 << 14;  // elements of a reduction's chunk

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
  bool readable() const;

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

// Calls body(x, y, position, count) for the runs contiguous in both tensors.
template <class Body>
void for_pair_runs(const Tensor& a, const Tensor& b, int64_t begin, int64_t count, Body&& body) {
  for_runs(a, begin, count, [&](char* x, int64_t position, int64_t n) {
    for_runs(b, position, n, [&](char* y, int64_t at, int64_t m) {
      body(x + (at - position) * bytes_of(a.dtype), y, at, m);
    });
  });
}

// Non-finite elements among [begin, begin + count), whose sum of squares is given.
double nonfinite_in(const Tensor& t, int64_t begin, int64_t count, double squares);

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

}  // namespace gac
