// Rows of x with rows of weights, both with their inputs innermost: weights are read once, as they lie, some outputs'
// at a time, which stay in the first-level cache for all rows of x.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "vectors.h"

namespace native {

constexpr int kRows = 4, kOutputs = 2;  // of a block of sums in registers, beside what is multiplied
constexpr int64_t kPanel = 8;           // outputs whose weights meet all rows before the next ones do
constexpr int64_t kPiece = 64 << 10;    // bytes of weights that are worth another thread

// Numbers of x times weights that are widened as they are read.
template <typename W>
struct NumberProducts {
  using Entry = float;
  using Weight = W;
  using Right = Floats;
  using Sum = Floats;
  static constexpr int kStep = kLanes;

  static Right right(const Weight* w) { return load(w); }
  static Sum add(Sum sum, const Entry* x, Right w) { return add_product(sum, load(x), w); }
  static float total(Sum x) { return sum(x); }
};

template <typename Kind>
struct Weights {
  const typename Kind::Weight* data;
  const float* scales;  // one an output, or none at all
  int64_t outputs, inputs;
};

template <typename Kind>
struct Rows {
  Rows(int64_t count, int64_t inputs) : count(count), inputs(inputs), data(count * inputs), scales(count) {}
  const int64_t count, inputs;
  Buffer<typename Kind::Entry> data;
  Buffer<float> scales;
};

template <typename Kind, typename X>
void copy_row(const X* from, int64_t row, Rows<Kind>& rows) {
  float* to = rows.data.data + row * rows.inputs;
  for (int64_t i = 0; i < rows.inputs; i += kLanes) store(to + i, load(from + i));
  rows.scales.data[row] = 1.0f;
}

// out [rows, outputs] of as many rows and outputs as there are registers for.
template <typename Kind, int rows, int outputs, typename Out>
void block(const Rows<Kind>& x, const Weights<Kind>& w, int64_t row, int64_t output, Out* out) {
  typename Kind::Sum sums[rows][outputs]{};
  const typename Kind::Entry* left = x.data.data + row * x.inputs;
  const typename Kind::Weight* codes = w.data + output * w.inputs;
  for (int64_t k = 0; k < w.inputs; k += Kind::kStep) {
    typename Kind::Right right[outputs];
    for (int o = 0; o < outputs; ++o) right[o] = Kind::right(codes + o * w.inputs + k);
    for (int r = 0; r < rows; ++r) {
      for (int o = 0; o < outputs; ++o) sums[r][o] = Kind::add(sums[r][o], left + r * x.inputs + k, right[o]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outputs; ++o) {
      const float scale = w.scales ? w.scales[output + o] * x.scales.data[row + r] : 1.0f;
      put(out + (row + r) * w.outputs + output + o, Kind::total(sums[r][o]) * scale);
    }
  }
}

template <typename Kind, int rows, typename Out>
void some_outputs(const Rows<Kind>& x, const Weights<Kind>& w, int64_t row, int64_t begin, int64_t end, Out* out) {
  constexpr int outputs = rows == 1 ? 2 * kOutputs : kOutputs;
  for (; begin + outputs <= end; begin += outputs) block<Kind, rows, outputs>(x, w, row, begin, out);
  for (; begin < end; ++begin) block<Kind, rows, 1>(x, w, row, begin, out);
}

template <typename Kind, typename Out>
void multiply_rows(xla::ffi::ThreadPool& pool, const Rows<Kind>& x, const Weights<Kind>& w, Out* out) {
  const int64_t panels = ceil_div(w.outputs, kPanel), row_bytes = w.inputs * sizeof(typename Kind::Weight);
  const int64_t many = std::max<int64_t>(1, kPiece / (kPanel * row_bytes * std::max<int64_t>(1, x.count / kRows)));
  parallel_for(pool, ceil_div(panels, many), [&](int64_t i) {
    for (int64_t panel = i * many; panel < std::min(panels, (i + 1) * many); ++panel) {
      const int64_t begin = panel * kPanel, end = std::min(w.outputs, begin + kPanel);
      int64_t row = 0;
      for (; row + kRows <= x.count; row += kRows) some_outputs<Kind, kRows>(x, w, row, begin, end, out);
      const int64_t left = x.count - row;
      if (left == 3) some_outputs<Kind, 3>(x, w, row, begin, end, out);
      if (left == 2) some_outputs<Kind, 2>(x, w, row, begin, end, out);
      if (left == 1) some_outputs<Kind, 1>(x, w, row, begin, end, out);
    }
  });
}

}  // namespace native
