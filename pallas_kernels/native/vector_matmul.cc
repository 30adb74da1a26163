// a b of large matrices, float32 or bfloat16, summed in float32 by vector registers; either side may lie transposed.
//
// The right side is packed by all threads, a million entries at a time, in panels as wide as a tile of sums
// (Goto and van de Geijn, doi:10.1145/1356052.1356053). Then each thread packs a block of the left side that stays in
// its second-level cache, and takes the panels past it. How the work is shared out does not change any sum's order.

#include "numbers.h"
#include "parallel.h"
#include "products.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace native {
namespace {

constexpr int64_t kDepth = 256;       // inputs of a panel that stay in the first-level cache
constexpr int64_t kBlock = 192;       // rows of the left side that are packed at once
constexpr int64_t kGroup = 1024;      // outputs that such a block is packed for
constexpr int64_t kDeep = 2048;       // inputs, and
constexpr int64_t kPacked = 1 << 20;  // entries of the right side that are packed at once
constexpr int64_t kTogether = 16;     // of its inputs and panels, which share lines of the cache

template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
  bool transposed;
};

// Rows `from`.. of a [K, ...] matrix, `width` columns from `first` on, as panel[k * width + column]; columns past `size`
// are zeros. What follows the panel in memory may be written too, up to a register: it is packed later, or not used.
template <int width, typename T>
void pack(const Operand<T>& x, int64_t from, int64_t depth, int64_t first, int64_t size, float* panel) {
  const bool whole = size >= width;
  if (!x.transposed && whole) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = x.data + (from + k) * x.stride + first;
      for (int i = 0; i < width; ++i) panel[k * width + i] = number(row[i]);
    }
    return;
  }
  int64_t k = 0;
  if (x.transposed && whole) {
    for (; k + kLanes <= depth; k += kLanes) {
      for (int at = 0; at < width; at += kLanes) {
        Floats square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          square[i] = at + i < width ? load(x.data + (first + at + i) * x.stride + from + k) : Floats{};
        }
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * width + at, square[i]);
      }
    }
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t row = x.transposed ? first + i : from + k, column = x.transposed ? from + k : first + i;
      panel[k * width + i] = i < size ? number(x.data[row * x.stride + column]) : 0.0f;
    }
  }
}

// out [rows, columns] from `row`, `column` on, of packed blocks [depth, ...] of both sides, added where this is not the first.
struct Out {
  float* data;
  int64_t rows, columns;
};

void multiply_panel(const float* a, const float* b, int64_t depth, const Out& out, int64_t row, int64_t column,
                    bool add) {
  const LeftSide left{a, 1, kTileRows};
  float* to = out.data + row * out.columns + column;
  if (out.rows - row >= kTileRows && out.columns - column >= kTileColumns) {
    tile<kTileRows, 2, true>(left, b, kTileColumns, depth, to, out.columns, add);
    return;
  }
  alignas(64) float sums[kTileRows * kTileColumns];
  tile<kTileRows, 2, true>(left, b, kTileColumns, depth, sums, kTileColumns, false);
  for (int64_t r = 0; r < std::min<int64_t>(kTileRows, out.rows - row); ++r) {
    for (int64_t c = 0; c < std::min<int64_t>(kTileColumns, out.columns - column); ++c) {
      float& sum = to[r * out.columns + c];
      sum = sums[r * kTileColumns + c] + (add ? sum : 0.0f);
    }
  }
}

template <typename T>
void multiply_all(ffi::ThreadPool& pool, const Operand<T>& a, const Operand<T>& b, int64_t inputs, const Out& out) {
  const int64_t deep = std::min(kDeep, inputs), panels = ceil_div(out.columns, kTileColumns);
  const int64_t many = std::min(panels, std::max<int64_t>(1, kPacked / (deep * kTileColumns)));  // panels at once
  const int64_t groups = ceil_div(many * kTileColumns, kGroup), group = ceil_div(many, groups);
  // Blocks of rows, alike, enough of them for all threads.
  const int64_t tiles = ceil_div(out.rows, kTileRows), wanted = ceil_div(4 * pool.num_threads(), groups);
  const int64_t most = ceil_div(tiles, ceil_div(tiles, std::max(wanted, ceil_div(out.rows, kBlock))));
  const int64_t block = std::min(kBlock / kTileRows, ceil_div(tiles, most));
  const int64_t blocks = ceil_div(tiles, block);
  Buffer<float> right(many * kTileColumns * deep);
  for (int64_t panel = 0; panel < panels; panel += many) {
    const int64_t here = std::min(many, panels - panel);
    for (int64_t from = 0; from < inputs; from += deep) {
      const int64_t depth = std::min(deep, inputs - from);
      const int64_t slice = ceil_div(depth, ceil_div(depth, kDepth));  // alike: a short one moves sums for little work
      parallel_for(pool, ceil_div(here, kTogether), [&](int64_t i) {
        const int64_t end = std::min(here, (i + 1) * kTogether);
        for (int64_t k = 0; k < depth; k += kTogether) {
          for (int64_t p = i * kTogether; p < end; ++p) {
            const int64_t column = (panel + p) * kTileColumns, some = std::min(kTogether, depth - k);
            float* to = right.data + (p * depth + k) * kTileColumns;
            pack<kTileColumns>(b, from + k, some, column, out.columns - column, to);
          }
        }
      });
      parallel_for(pool, blocks * ceil_div(here, group), [&](int64_t i) {
        const int64_t begin = i % blocks * block, end = std::min(tiles, begin + block);
        const int64_t first = i / blocks * group, last = std::min(here, first + group);
        Buffer<float> left(block * kTileRows * kDepth + kLanes);
        for (int64_t k = 0; k < depth; k += slice) {
          const int64_t some = std::min(slice, depth - k);
          for (int64_t t = begin; t < end; ++t) {
            pack<kTileRows>(a, from + k, some, t * kTileRows, out.rows - t * kTileRows,
                            left.data + (t - begin) * kTileRows * some);
          }
          for (int64_t p = first; p < last; ++p) {
            const float* part = right.data + (p * depth + k) * kTileColumns;
            for (int64_t t = begin; t < end; ++t) {
              multiply_panel(left.data + (t - begin) * kTileRows * some, part, some, out, t * kTileRows,
                             (panel + p) * kTileColumns, from + k > 0);
            }
          }
        }
      });
    }
  }
}

template <typename T>
ffi::Error run(ffi::ThreadPool& pool, ffi::AnyBuffer a, ffi::AnyBuffer b, bool a_transposed, bool b_transposed,
               ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const auto operand = [](const ffi::AnyBuffer& x, bool transposed) {
    return Operand<T>{static_cast<const T*>(x.untyped_data()), x.dimensions()[1], transposed};
  };
  const int64_t inputs = a.dimensions()[a_transposed ? 0 : 1];
  // `pack` takes both sides as [K, ...]: a left side [M, K] is the transpose of that, a right side [K, N] is not.
  multiply_all(pool, operand(a, !a_transposed), operand(b, b_transposed), inputs,
               Out{out->typed_data(), out->dimensions()[0], out->dimensions()[1]});
  return ffi::Error::Success();
}

ffi::Error vector_matmul(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, bool a_transposed, bool b_transposed,
                         ffi::Result<ffi::Buffer<ffi::F32>> out) {
  return of_type(a, [&](auto number) {
    return run<decltype(number)>(pool, a, b, a_transposed, b_transposed, out);
  });
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeVectorMatmul, native::vector_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<bool>("a_transposed")
                                  .Attr<bool>("b_transposed")
                                  .Ret<ffi::Buffer<ffi::F32>>());
