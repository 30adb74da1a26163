// Rows of x with rows of weights, both with their inputs innermost: weights are read once, as they lie, some outputs'
// at a time, which stay in the first-level cache for all rows of x, a part of the inputs at a time.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "vectors.h"

namespace native {

constexpr int kRows = 4, kOutputs = 2;  // of a block of sums in registers, beside what is multiplied
constexpr int64_t kPanel = 8;           // outputs whose weights meet all rows before the next ones do
constexpr int64_t kInputs = 4096;       // bytes of a row of x that stay in the cache with those of the others
constexpr int64_t kPiece = 64 << 10;    // bytes of weights that are worth another thread

// Numbers of x times weights that are widened as they are read. Kinds of products have these members.
template <typename W>
struct NumberProducts {
  using Entry = float;  // of a row of x
  using Weight = W;
  using Right = Floats;
  using Sum = Floats;
  using Total = float;
  static constexpr int kStep = kLanes;  // inputs at once

  static Right right(const Weight* w) { return load(w); }
  static Sum add(Sum sum, const Entry* x, Right w) { return add_product(sum, load(x), w); }
  static Total total(Sum x) { return sum(x); }
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

// Inputs `from`.. of a panel of outputs.
struct Part {
  int64_t output, from, depth;
};

// The panel's totals [rows, kPanel], of as many rows and outputs as there are registers for, or with that added.
template <typename Kind, int rows, int outputs>
void block(const Rows<Kind>& x, const Weights<Kind>& w, const Part& part, int64_t row, int64_t output,
           typename Kind::Total* totals) {
  typename Kind::Sum sums[rows][outputs]{};
  const typename Kind::Entry* left = x.data.data + row * x.inputs + part.from;
  const typename Kind::Weight* right = w.data + (part.output + output) * w.inputs + part.from;
  for (int64_t k = 0; k < part.depth; k += Kind::kStep) {
    typename Kind::Right some[outputs];
    for (int o = 0; o < outputs; ++o) some[o] = Kind::right(right + o * w.inputs + k);
    for (int r = 0; r < rows; ++r) {
      for (int o = 0; o < outputs; ++o) sums[r][o] = Kind::add(sums[r][o], left + r * x.inputs + k, some[o]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outputs; ++o) {
      auto& total = totals[(row + r) * kPanel + output + o];
      total = Kind::total(sums[r][o]) + (part.from ? total : 0);
    }
  }
}

template <typename Kind, int rows>
void some_outputs(const Rows<Kind>& x, const Weights<Kind>& w, const Part& part, int64_t row, int64_t end,
                  typename Kind::Total* totals) {
  constexpr int outputs = rows == 1 ? 2 * kOutputs : kOutputs;
  int64_t output = 0;
  for (; output + outputs <= end; output += outputs) block<Kind, rows, outputs>(x, w, part, row, output, totals);
  for (; output < end; ++output) block<Kind, rows, 1>(x, w, part, row, output, totals);
}

// out [M, N]. The inputs are a whole number of steps.
template <typename Kind, typename Out>
void multiply_rows(xla::ffi::ThreadPool& pool, const Rows<Kind>& x, const Weights<Kind>& w, Out* out) {
  const int64_t panels = ceil_div(w.outputs, kPanel), row_bytes = w.inputs * sizeof(typename Kind::Weight);
  const int64_t many = std::max<int64_t>(1, kPiece / (kPanel * row_bytes * std::max<int64_t>(1, x.count / kRows)));
  constexpr int64_t deep = kInputs / sizeof(typename Kind::Entry);
  parallel_for(pool, ceil_div(panels, many), [&](int64_t i) {
    Buffer<typename Kind::Total> totals(x.count * kPanel);
    for (int64_t panel = i * many; panel < std::min(panels, (i + 1) * many); ++panel) {
      const int64_t first = panel * kPanel, end = std::min(w.outputs - first, kPanel);
      for (int64_t from = 0; from < w.inputs; from += deep) {
        const Part part{first, from, std::min(deep, w.inputs - from)};
        int64_t row = 0;
        for (; row + kRows <= x.count; row += kRows) some_outputs<Kind, kRows>(x, w, part, row, end, totals.data);
        const int64_t left = x.count - row;
        if (left == 3) some_outputs<Kind, 3>(x, w, part, row, end, totals.data);
        if (left == 2) some_outputs<Kind, 2>(x, w, part, row, end, totals.data);
        if (left == 1) some_outputs<Kind, 1>(x, w, part, row, end, totals.data);
      }
      for (int64_t row = 0; row < x.count; ++row) {
        for (int64_t o = 0; o < end; ++o) {
          const float scale = w.scales ? w.scales[first + o] * x.scales.data[row] : 1.0f;
          put(out + row * w.outputs + first + o, static_cast<float>(totals.data[row * kPanel + o]) * scale);
        }
      }
    }
  });
}

}  // namespace native
