// x [M, K] times weights, by tiles: int8 weights [N, K] with one scale an output, where each row of x is rounded to int8
// by its largest entry and both scales come last (W8A8, arXiv:2208.07339); and bfloat16 weights, [K, N] or [N, K].
//
// Tiles want their right side packed: what is summed side by side in a word. Of weights [N, K] that is a transpose of
// words. For few rows x is the right side instead, and weights are read once, as they lie; for many, a panel of weights at
// a time is packed, which then serves all rows. Of weights [K, N] it is two rows interleaved, cheap enough for any x.

#include "numbers.h"
#include "parallel.h"
#include "quantize.h"
#include "tiles.h"
#include "vectors.h"

namespace ffi = xla::ffi;

#ifdef NATIVE_TILES

namespace native {
namespace {

constexpr int64_t kFew = 48;                // rows, up to which x is the right side
constexpr int64_t kPanel = 32;              // outputs
constexpr int64_t kPiece = 32 << 10;        // bytes of weights that are worth another thread
constexpr int64_t kPacked = 256 << 10;      // bytes of packed weights that stay in a core's cache
constexpr int64_t kDeep = 128, kWide = 24;  // inputs, and panels of outputs, that are packed at once for few rows
constexpr int64_t kAhead = 16;              // rows of weights that are asked of the memory before they are packed

// x as tiles take it: each row is `bytes` long, and those of sixteen rows are tiles, one after another.
struct Rows {
  Rows(int64_t rows, int64_t bytes)
      : rows(rows), bytes(bytes), blocks(ceil_div(rows, 32) * 2), data(blocks * 16 * bytes), scales(blocks * 16) {
    const int64_t last = rows / 16 * 16;
    std::memset(at(last), 0, (blocks * 16 - last) * bytes);
  }
  int8_t* at(int64_t row) { return data.data + row / 16 * 16 * bytes + row % 16 * 64; }
  Left left() const { return {64, 1024, 16 * bytes}; }

  const int64_t rows, bytes, blocks;
  Buffer<int8_t> data;
  Buffer<float> scales;
};

struct Weights {
  const int8_t* data;
  int64_t outputs;
  const float* scales;  // or null
  int64_t stride;       // bytes from row to row
};

// Codes of a row of x, and its scale; NaN where the row has a number that is not finite.
template <typename X>
float quantize_row(const X* x, int64_t size, int8_t* codes) {
  const RowScale row = scale_of_row(x, size);
  const float inverse = 1.0f / row.scale;  // to divide each number takes longer than all the rest
  for (int64_t i = 0; i < size; i += kLanes) store(codes + i / 64 * 1024 + i % 64, load(x + i) * inverse);
  return row.scale + row.nan;
}

// The scales of sixteen outputs; of those past the last one, zeros.
Floats scales_from(const Weights& w, int64_t first) {
  if (!w.scales) return splat(1.0f);
  if (first + kLanes <= w.outputs) return load(w.scales + first);
  Floats some{};
  for (int64_t i = first; i < w.outputs; ++i) some[i - first] = w.scales[i];
  return some;
}

// out[row, first + 0..15] of the sums of one row.
template <Kind kind, typename Out>
inline void finish(const Weights& w, Out* out, int64_t row, int64_t first, __m512i sums, Floats scales,
                   float row_scale) {
  Floats value;
  if constexpr (kind == Kind::kInt8) {
    value = __builtin_convertvector(bits<Ints>(sums), Floats) * scales * row_scale;
  } else {
    value = bits<Floats>(sums);
  }
  Out* to = out + row * w.outputs + first;
  if (first + kLanes <= w.outputs) {
    store(to, value);
  } else if (first < w.outputs) {
    Out whole[kLanes];
    store(whole, value);
    std::memcpy(to, whole, (w.outputs - first) * sizeof(Out));
  }
}

// Rows of weights [N, K] from `first` on, of which a whole panel can be read; past the last one there are zeros.
const int8_t* panel_of(const Weights& w, int64_t first, std::unique_ptr<Buffer<int8_t>>& copy) {
  const int8_t* rows = w.data + first * w.stride;
  if (first + kPanel <= w.outputs) return rows;
  copy = std::make_unique<Buffer<int8_t>>(kPanel * w.stride);
  const int64_t size = (w.outputs - first) * w.stride;
  std::memcpy(copy->data, rows, size);
  std::memset(copy->data + size, 0, kPanel * w.stride - size);
  return copy->data;
}

// A panel of outputs of few rows, which are packed.
template <Kind kind, typename Out>
void few_rows(const Weights& w, const Rows& x, const int8_t* packed, int64_t first, Out* out) {
  Tiles tiles;
  std::unique_ptr<Buffer<int8_t>> copy;
  const int8_t* panel = panel_of(w, first, copy);
  const Left left{w.stride, 64, 16 * w.stride};
  const int64_t blocks = ceil_div(x.rows, 16), depth = x.bytes / 64;
  alignas(64) int32_t sums[kPanel * 32];
  for (int64_t block = 0; block < blocks; block += 2) {
    const int64_t width = std::min<int64_t>(2, blocks - block);
    const int8_t* right = packed + block * 1024;
    if (width == 2) {
      product<kind, 2, 2, false>(panel, left, right, blocks, depth, sums, 128);
    } else {
      product<kind, 2, 1, false>(panel, left, right, blocks, depth, sums, 128);
    }
    for (int64_t a = 0; a < kPanel; a += 16) {
      const Floats scales = scales_from(w, first + a);
      for (int64_t b = 0; b < width; ++b) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + (a + i) * 32 + b * 16);
        transpose(r);
        for (int64_t i = 0, row = (block + b) * 16; i < 16 && row < x.rows; ++i, ++row) {
          finish<kind>(w, out, row, first + a, r[i], scales, x.scales.data[row]);
        }
      }
    }
  }
}

// A panel of outputs of up to 32 rows from `row` on, of their sums in rows of `stride` words.
template <Kind kind, typename Out>
void store_sums(const Weights& w, const Rows& x, const int32_t* sums, int64_t stride, int64_t first, int64_t row,
                int64_t end, Out* out) {
  const Floats low = scales_from(w, first), high = scales_from(w, first + 16);
  for (int64_t i = 0; i < std::min<int64_t>(32, end - row); ++i) {
    const int32_t* own = sums + i * stride;
    finish<kind>(w, out, row + i, first, _mm512_loadu_si512(own), low, x.scales.data[row + i]);
    finish<kind>(w, out, row + i, first + 16, _mm512_loadu_si512(own + 16), high, x.scales.data[row + i]);
  }
}

// A panel of outputs of the rows from `begin` to `end`, with the weights packed.
template <Kind kind, typename Out>
void many_rows(const Weights& w, Rows& x, const int8_t* packed, int64_t first, int64_t begin, int64_t end, Out* out) {
  alignas(64) int32_t sums[32 * kPanel];
  for (int64_t row = begin; row < end; row += 32) {
    product<kind, 2, 2, false>(x.at(row), x.left(), packed, 2, x.bytes / 64, sums, 128);
    store_sums<kind>(w, x, sums, kPanel, first, row, end, out);
  }
}

// x times weights [N, K].
template <Kind kind, typename Out>
void by_rows(ffi::ThreadPool& pool, const Weights& w, Rows& x, Out* out) {
  const int64_t panels = ceil_div(w.outputs, kPanel), depth = x.bytes / 64;
  if (x.rows > kFew) {
    // A panel is packed for each part of the rows anew: they are parted only where panels are too few for the threads.
    const int64_t wanted = std::max<int64_t>(1, 4 * pool.num_threads() / panels);
    const int64_t chunk = ceil_div(ceil_div(x.rows, wanted), 32) * 32, chunks = ceil_div(x.rows, chunk);
    parallel_for(pool, panels * chunks, [&](int64_t i) {
      Tiles tiles;
      const int64_t first = i / chunks * kPanel, begin = i % chunks * chunk;
      std::unique_ptr<Buffer<int8_t>> copy;
      const int8_t* panel = panel_of(w, first, copy);
      Buffer<int8_t> packed(kPanel * x.bytes);
      for (int64_t step = 0; step < depth; ++step) {
        for (int64_t b = 0; b < 2; ++b) {
          pack_rows(panel + b * 16 * w.stride + step * 64, w.stride, packed.data + (step * 2 + b) * 1024);
        }
      }
      many_rows<kind>(w, x, packed.data, first, begin, std::min(x.rows, begin + chunk), out);
    });
    return;
  }
  const int64_t blocks = ceil_div(x.rows, 16);
  Buffer<int8_t> packed(blocks * 16 * x.bytes);
  for (int64_t step = 0; step < depth; ++step) {
    for (int64_t block = 0; block < blocks; ++block) {
      pack_rows(x.at(block * 16) + step * 1024, 64, packed.data + (step * blocks + block) * 1024);
    }
  }
  const int64_t many = std::max<int64_t>(1, kPiece / (kPanel * w.stride));
  parallel_for(pool, ceil_div(panels, many), [&](int64_t i) {
    for (int64_t panel = i * many; panel < std::min(panels, (i + 1) * many); ++panel) {
      few_rows<kind>(w, x, packed.data, panel * kPanel, out);
    }
  });
}

// Rows `from` to `to` of `number` panels of bfloat16 weights [K, N], two rows interleaved. A panel takes `size` bytes.
void pack_columns(const Weights& w, int64_t from, int64_t to, int64_t first, int64_t number, int64_t size,
                  int8_t* packed) {
  alignas(64) static const auto order = [] {
    struct {
      uint16_t low[32], high[32];
    } places;
    for (int i = 0; i < 16; ++i) {
      places.low[2 * i] = i, places.low[2 * i + 1] = 32 + i;
      places.high[2 * i] = 16 + i, places.high[2 * i + 1] = 48 + i;
    }
    return places;
  }();
  const __m512i low = _mm512_loadu_si512(order.low), high = _mm512_loadu_si512(order.high);
  for (int64_t k = 0; k < to - from; k += 2) {
    for (int64_t n = 0; n < number; ++n) {
      const int64_t column = (first + n) * kPanel, left = w.outputs - column;
      const __mmask32 some = left < 32 ? (1u << left) - 1 : ~0u;
      const int8_t* row = w.data + (from + k) * w.stride + column * 2;
      const __m512i a = _mm512_maskz_loadu_epi16(some, row), b = _mm512_maskz_loadu_epi16(some, row + w.stride);
      _mm_prefetch(reinterpret_cast<const char*>(row + kAhead * w.stride), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(row + (kAhead + 1) * w.stride), _MM_HINT_T0);
      int8_t* pair = packed + n * size + k / 32 * 2048 + k % 32 * 32;
      _mm512_storeu_si512(pair, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(pair + 1024, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// x times bfloat16 weights [K, N].
template <typename Out>
void by_columns(ffi::ThreadPool& pool, const Weights& w, Rows& x, int64_t inputs, Out* out) {
  const int64_t panels = ceil_div(w.outputs, kPanel), share = ceil_div(panels, 2 * pool.num_threads());
  const bool few = x.rows <= kFew;
  // For many rows a few panels are packed whole, and stay in a core's cache for all of them. With few rows it is the
  // memory that takes the time, and it is read in long runs: many panels, some of their inputs at a time.
  const int64_t deep = few ? std::min(kDeep, inputs) : inputs, size = kPanel * deep * 2;
  const int64_t together = std::min(share, few ? kWide : std::max<int64_t>(1, kPacked / size));
  parallel_for(pool, ceil_div(panels, together), [&](int64_t i) {
    Tiles tiles;
    const int64_t first = i * together, number = std::min(together, panels - first), stride = number * kPanel;
    Buffer<int8_t> packed(number * size);
    if (!few) {
      pack_columns(w, 0, inputs, first, number, size, packed.data);
      for (int64_t n = 0; n < number; ++n) {
        many_rows<Kind::kBfloat16>(w, x, packed.data + n * size, (first + n) * kPanel, 0, x.rows, out);
      }
      return;
    }
    const int64_t blocks = ceil_div(x.rows, 16);
    Buffer<int32_t> sums(blocks * 16 * stride);
    std::memset(sums.data, 0, blocks * 16 * stride * 4);
    for (int64_t k = 0; k < inputs; k += deep) {
      const int64_t end = std::min(inputs, k + deep);
      pack_columns(w, k, end, first, number, size, packed.data);
      for (int64_t n = 0; n < number; ++n) {
        for (int64_t block = 0; block < blocks; ++block) {
          product<Kind::kBfloat16, 1, 2, true>(x.at(block * 16) + k / 32 * 1024, x.left(), packed.data + n * size, 2,
                                               (end - k) / 32, sums.data + block * 16 * stride + n * kPanel, stride * 4);
        }
      }
    }
    for (int64_t n = 0; n < number; ++n) {
      for (int64_t row = 0; row < x.rows; row += 32) {
        const int32_t* own = sums.data + row * stride + n * kPanel;
        store_sums<Kind::kBfloat16>(w, x, own, stride, (first + n) * kPanel, row, x.rows, out);
      }
    }
  });
}

// put(row) for each row, by as many threads as that is worth.
template <typename Put>
void each_row(ffi::ThreadPool& pool, int64_t rows, int64_t size, const Put& put) {
  const int64_t group = std::max<int64_t>(1, 65536 / size);
  parallel_for(pool, ceil_div(rows, group), [&](int64_t i) {
    for (int64_t row = i * group; row < std::min(rows, (i + 1) * group); ++row) put(row);
  });
}

template <typename X, typename Out>
ffi::Error run_quantized(ffi::ThreadPool& pool, const Weights& w, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const X* from = static_cast<const X*>(x.untyped_data());
  Rows codes(rows, inputs);
  each_row(pool, rows, inputs, [&](int64_t row) {
    codes.scales.data[row] = quantize_row(from + row * inputs, inputs, codes.at(row));
  });
  by_rows<Kind::kInt8>(pool, w, codes, static_cast<Out*>(out->untyped_data()));
  return ffi::Error::Success();
}

ffi::Error quantized_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> w,
                            ffi::Buffer<ffi::F32> scales, ffi::Result<ffi::AnyBuffer> out) {
  const Weights weights{w.typed_data(), w.dimensions()[0], scales.typed_data(), w.dimensions()[1]};
  return of_type(x, [&](auto in) {
    return of_type(*out, [&](auto result) {
      return run_quantized<decltype(in), decltype(result)>(pool, weights, x, out);
    });
  });
}

template <typename Out>
ffi::Error run_bfloat16(ffi::ThreadPool& pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w, bool transposed,
                        ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = w.dimensions()[transposed ? 0 : 1];
  const int8_t* from = static_cast<const int8_t*>(x.untyped_data());
  Rows values(rows, inputs * 2);
  each_row(pool, rows, inputs * 2, [&](int64_t row) {
    int8_t* to = values.at(row);
    for (int64_t i = 0; i < inputs * 2; i += 64) std::memcpy(to + i * 16, from + row * inputs * 2 + i, 64);
  });
  const Weights weights{static_cast<const int8_t*>(w.untyped_data()), outputs, nullptr, w.dimensions()[1] * 2};
  Out* to = static_cast<Out*>(out->untyped_data());
  if (transposed) {
    by_rows<Kind::kBfloat16>(pool, weights, values, to);
  } else {
    by_columns(pool, weights, values, inputs, to);
  }
  return ffi::Error::Success();
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w, bool transposed,
                  ffi::Result<ffi::AnyBuffer> out) {
  return of_type(*out, [&](auto result) { return run_bfloat16<decltype(result)>(pool, x, w, transposed, out); });
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeQuantizedMatmul, native::quantized_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeMatmul, native::matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Attr<bool>("transposed")
                                  .Ret<ffi::AnyBuffer>());

extern "C" int native_has_tiles() { return native::tiles_allowed(); }

#else

extern "C" int native_has_tiles() { return 0; }

#endif
