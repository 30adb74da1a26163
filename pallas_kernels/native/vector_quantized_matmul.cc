// x [M, K] times int8 weights [N, K] with one scale an output, by vector registers: x as it is (W8A16), or each of its
// rows rounded to int8 codes, whose sums are exact (W8A8, arXiv:2208.07339). Weights are read once, as they lie: some
// outputs' at a time, which stay in the first-level cache for all rows of x.

#include <type_traits>

#include "numbers.h"
#include "parallel.h"
#include "quantize.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace native {
namespace {

constexpr int kRows = 4, kOutputs = 2;  // of a block of sums in registers, beside what is multiplied
constexpr int64_t kPanel = 8;         // outputs whose weights meet all rows before the next ones do
constexpr int64_t kPiece = 64 << 10;  // bytes of weights that are worth another thread

typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));
typedef int8_t ManyBytes __attribute__((vector_size(kLanes * 2)));

// Codes of x, widened beforehand, times codes of weights.
struct CodeProducts {
  using Entry = int16_t;
  using Right = Shorts;
  using Sum = Ints;
  static constexpr int kStep = 2 * kLanes;

  static Right right(const int8_t* w) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // where the compiler makes two halves of it
    return bits<Shorts>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
#endif
    ManyBytes codes;
    std::memcpy(&codes, w, sizeof(codes));
    return __builtin_convertvector(codes, Shorts);
  }
  static Sum products(const Entry* x, Right w) {
    Shorts left;
    std::memcpy(&left, x, sizeof(left));
#if defined(__AVX512BW__)
    return bits<Ints>(_mm512_madd_epi16(bits<__m512i>(left), bits<__m512i>(w)));
#elif defined(__AVX2__)
    return bits<Ints>(_mm256_madd_epi16(bits<__m256i>(left), bits<__m256i>(w)));
#else
    const Ints a = bits<Ints>(left), b = bits<Ints>(w);
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  static float total(Sum x) {
    int32_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += x[i];
    return static_cast<float>(total);
  }
};

struct NumberProducts {
  using Entry = float;
  using Right = Floats;
  using Sum = Floats;
  static constexpr int kStep = kLanes;

  static Right right(const int8_t* w) { return load(w); }
  static Sum products(const Entry* x, Right w) { return load(x) * w; }
  static float total(Sum x) { return sum(x); }
};

struct Weights {
  const int8_t* data;
  const float* scales;
  int64_t outputs, inputs;
};

template <typename Kind>
struct Rows {
  Rows(int64_t count, int64_t inputs) : count(count), inputs(inputs), data(count * inputs), scales(count) {}
  const int64_t count, inputs;
  Buffer<typename Kind::Entry> data;
  Buffer<float> scales;
};

// out [rows, outputs] of as many rows and outputs as there are registers for.
template <typename Kind, int rows, int outputs, typename Out>
void block(const Rows<Kind>& x, const Weights& w, int64_t row, int64_t output, Out* out) {
  typename Kind::Sum sums[rows][outputs]{};
  const typename Kind::Entry* left = x.data.data + row * x.inputs;
  const int8_t* codes = w.data + output * w.inputs;
  for (int64_t k = 0; k < w.inputs; k += Kind::kStep) {
    typename Kind::Right right[outputs];
    for (int o = 0; o < outputs; ++o) right[o] = Kind::right(codes + o * w.inputs + k);
    for (int r = 0; r < rows; ++r) {
      for (int o = 0; o < outputs; ++o) sums[r][o] += Kind::products(left + r * x.inputs + k, right[o]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outputs; ++o) {
      const float value = Kind::total(sums[r][o]) * w.scales[output + o] * x.scales.data[row + r];
      put(out + (row + r) * w.outputs + output + o, value);
    }
  }
}

template <typename Kind, int rows, typename Out>
void some_outputs(const Rows<Kind>& x, const Weights& w, int64_t row, int64_t begin, int64_t end, Out* out) {
  constexpr int outputs = rows == 1 ? 2 * kOutputs : kOutputs;
  for (; begin + outputs <= end; begin += outputs) block<Kind, rows, outputs>(x, w, row, begin, out);
  for (; begin < end; ++begin) block<Kind, rows, 1>(x, w, row, begin, out);
}

template <typename Kind, typename Out>
void multiply_all(ffi::ThreadPool& pool, const Rows<Kind>& x, const Weights& w, Out* out) {
  const int64_t panels = ceil_div(w.outputs, kPanel);
  const int64_t many = std::max<int64_t>(1, kPiece / (kPanel * w.inputs * std::max<int64_t>(1, x.count / kRows)));
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

template <typename Kind, typename X, typename Out>
ffi::Error run(ffi::ThreadPool& pool, const Weights& w, const ffi::AnyBuffer& x, Out* out) {
  const X* from = static_cast<const X*>(x.untyped_data());
  Rows<Kind> rows(x.dimensions()[0], w.inputs);
  parallel_for(pool, rows.count, [&](int64_t row) {
    const X* own = from + row * w.inputs;
    auto* to = rows.data.data + row * w.inputs;
    if constexpr (std::is_same_v<Kind, NumberProducts>) {
      for (int64_t i = 0; i < w.inputs; i += kLanes) store(to + i, load(own + i));
      rows.scales.data[row] = 1.0f;
    } else {
      const RowScale scale = scale_of_row(own, w.inputs);
      const float inverse = 1.0f / scale.scale;
      for (int64_t i = 0; i < w.inputs; i += kLanes) {
        int8_t codes[kLanes];
        store(codes, load(own + i) * inverse);
        for (int j = 0; j < kLanes; ++j) to[i + j] = codes[j];
      }
      rows.scales.data[row] = scale.scale + scale.nan;
    }
  });
  multiply_all(pool, rows, w, out);
  return ffi::Error::Success();
}

ffi::Error vector_quantized_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> w,
                                   ffi::Buffer<ffi::F32> scales, bool codes, ffi::Result<ffi::AnyBuffer> out) {
  const Weights weights{w.typed_data(), scales.typed_data(), w.dimensions()[0], w.dimensions()[1]};
  const auto of = [&](auto kind) {
    return of_type(x, [&](auto in) {
      return of_type(*out, [&](auto result) {
        return run<decltype(kind), decltype(in)>(pool, weights, x, static_cast<decltype(result)*>(out->untyped_data()));
      });
    });
  };
  return codes ? of(CodeProducts{}) : of(NumberProducts{});
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeVectorQuantizedMatmul, native::vector_quantized_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("codes")
                                  .Ret<ffi::AnyBuffer>());
