// x [M, K] of few rows times weights [K, N], or transposed ones [N, K], of float32 or bfloat16, summed in float32: bound
// by reading the weights, which are read once, as they lie, and not packed. A row's sums do not depend on other rows.

#include <algorithm>

#include "dot_products.h"
#include "numbers.h"
#include "parallel.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace native {
namespace {

constexpr int kDeep = 4;            // inputs whose weights are in registers,
constexpr int kWide = 2 * kLanes;   // of so many outputs
constexpr int64_t kSums = 4 << 10;  // of all rows that are held in the first-level cache
constexpr int64_t kFewest = 256;    // outputs whose sums are held at once
constexpr int64_t kSlice = 256;     // inputs that are summed by themselves, so that sums of many stay exact

// sums [rows, strip] += x's inputs, [rows, kDeep] of them, times weights [deep, columns].
template <int deep, typename W>
void add_products(const float* x, int64_t rows, const W* w, int64_t w_row, int64_t columns, float* sums, int64_t strip) {
  int64_t column = 0;
  for (; column + kWide <= columns; column += kWide) {
    Floats right[deep][2];
#pragma GCC unroll 4
    for (int k = 0; k < deep; ++k) {
      right[k][0] = load(w + k * w_row + column);
      right[k][1] = load(w + k * w_row + column + kLanes);
      __builtin_prefetch(w + (k + 2 * kDeep) * w_row + column);  // the next inputs' lie too far apart to be foreseen
    }
    float* to = sums + column;
    const float* left = x;
    for (int64_t r = 0; r < rows; ++r, to += strip, left += kDeep) {
      Floats first = load(to), second = load(to + kLanes);
#pragma GCC unroll 4
      for (int k = 0; k < deep; ++k) {
        first = add_product(first, splat(left[k]), right[k][0]);
        second = add_product(second, splat(left[k]), right[k][1]);
      }
      store(to, first);
      store(to + kLanes, second);
    }
  }
  for (; column < columns; ++column) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int k = 0; k < deep; ++k) sums[r * strip + column] += x[r * kDeep + k] * number(w[k * w_row + column]);
    }
  }
}

template <typename T>
void by_strips(ffi::ThreadPool& pool, const T* x, int64_t rows, const T* w, int64_t inputs, int64_t outputs, float* out) {
  const int64_t groups = ceil_div(inputs, kDeep);
  Buffer<float> left(groups * rows * kDeep);  // [groups, rows, kDeep]
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < inputs; ++k) left.data[(k / kDeep * rows + r) * kDeep + k % kDeep] = number(x[r * inputs + k]);
  }
  const int64_t most = std::max(kFewest, kSums / rows), bytes = inputs * outputs * sizeof(T);
  const int64_t worth = std::min<int64_t>(2 * pool.num_threads(), ceil_div(bytes, kPiece));
  const int64_t strips = std::max(ceil_div(outputs, most), worth);
  const int64_t strip = ceil_div(ceil_div(outputs, strips), kWide) * kWide;
  parallel_for(pool, ceil_div(outputs, strip), [&](int64_t i) {
    const int64_t first = i * strip, columns = std::min(strip, outputs - first);
    Buffer<float> sums(rows * strip);
    for (int64_t from = 0; from < inputs; from += kSlice) {
      const int64_t end = std::min(inputs, from + kSlice);
      std::fill_n(sums.data, rows * strip, 0.0f);
      int64_t k = from;
      for (; k + kDeep <= end; k += kDeep) {
        add_products<kDeep>(left.data + k * rows, rows, w + k * outputs + first, outputs, columns, sums.data, strip);
      }
      for (; k < end; ++k) {  // one input of a group that is not whole
        const float* own = left.data + k / kDeep * rows * kDeep + k % kDeep;
        add_products<1>(own, rows, w + k * outputs + first, outputs, columns, sums.data, strip);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float* to = out + r * outputs + first;
        for (int64_t c = 0; c < columns; ++c) to[c] = sums.data[r * strip + c] + (from ? to[c] : 0.0f);
      }
    }
  });
}

template <typename T>
ffi::Error run(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, bool w_transposed, float* out) {
  const T *left = static_cast<const T*>(x.untyped_data()), *right = static_cast<const T*>(w.untyped_data());
  const int64_t count = x.dimensions()[0], inputs = x.dimensions()[1];
  if (!w_transposed) {
    by_strips(pool, left, count, right, inputs, w.dimensions()[1], out);
    return ffi::Error::Success();
  }
  using Kind = NumberProducts<T>;
  Rows<Kind> rows(count, inputs);
  for (int64_t row = 0; row < count; ++row) copy_row(left + row * inputs, row, rows);
  multiply_rows(pool, rows, Weights<Kind>{right, nullptr, w.dimensions()[0], inputs}, out);
  return ffi::Error::Success();
}

ffi::Error few_rows_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, bool w_transposed,
                           ffi::Result<ffi::Buffer<ffi::F32>> out) {
  return of_type(x, [&](auto number) {
    return run<decltype(number)>(pool, x, w, w_transposed, out->typed_data());
  });
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeFewRowsMatmul, native::few_rows_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<bool>("w_transposed")
                                  .Ret<ffi::Buffer<ffi::F32>>());
