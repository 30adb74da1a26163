// Products of small float32 matrices in the processor's vector registers: what larger ones are made of.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace native {

#ifdef __AVX512F__
constexpr int kTileRows = 12;  // rows of sums that are in registers, each of two: 24 of 32
#else
constexpr int kTileRows = 6;  // 12 of 16
#endif
constexpr int kTileColumns = 2 * kLanes;

// A matrix as the left side: its entry (r, k) is data[r * row + k * step].
struct LeftSide {
  const float* data;
  int64_t row, step;
};

// c [rows, wide registers] = a b, or with that added; one of a's strides is known to be 1.
template <int rows, int wide, bool rows_together>
inline void tile(const LeftSide& a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool add) {
  Floats sums[rows][wide]{};
  if (add) {  // they are read when the sums are whole
    for (int r = 0; r < rows; ++r) __builtin_prefetch(c + r * c_row);
  }
  const int64_t row = rows_together ? 1 : a.row, step = rows_together ? a.step : 1;
  const float* left = a.data;
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, left += step, b += b_row) {
    Floats right[wide];
    for (int w = 0; w < wide; ++w) right[w] = load(b + w * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      for (int w = 0; w < wide; ++w) sums[r][w] += left[r * row] * right[w];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int w = 0; w < wide; ++w) {
      float* to = c + r * c_row + w * kLanes;
      if (add) sums[r][w] += load(to);
      store(to, sums[r][w]);
    }
  }
}

template <int wide, bool rows_together>
inline void some_rows(int64_t rows, const LeftSide& a, const float* b, int64_t b_row, int64_t depth, float* c,
                      int64_t c_row, bool add) {
  static_assert(kTileRows == 6 || kTileRows == 12);
  switch (rows) {
#define NATIVE_CASE(n) \
  case n: \
    return tile<n, wide, rows_together>(a, b, b_row, depth, c, c_row, add);
    NATIVE_CASE(1)
    NATIVE_CASE(2)
    NATIVE_CASE(3)
    NATIVE_CASE(4)
    NATIVE_CASE(5)
    NATIVE_CASE(6)
#ifdef __AVX512F__
    NATIVE_CASE(7)
    NATIVE_CASE(8)
    NATIVE_CASE(9)
    NATIVE_CASE(10)
    NATIVE_CASE(11)
    NATIVE_CASE(12)
#endif
#undef NATIVE_CASE
  }
}

// c [rows, columns] = a [rows, depth] b [depth, columns], or with that added. Columns are filled up to whole registers.
template <bool rows_together>
void multiply(int64_t rows, int64_t columns, int64_t depth, LeftSide a, const float* b, int64_t b_row, float* c,
              int64_t c_row, bool add) {
  const int64_t a_row = rows_together ? 1 : a.row;
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    const bool whole = columns - column > kLanes;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t some = std::min<int64_t>(kTileRows, rows - row);
      const LeftSide left{a.data + row * a_row, a.row, a.step};
      float* to = c + row * c_row + column;
      if (whole) {
        some_rows<2, rows_together>(some, left, b + column, b_row, depth, to, c_row, add);
      } else {
        some_rows<1, rows_together>(some, left, b + column, b_row, depth, to, c_row, add);
      }
    }
  }
}

}  // namespace native
