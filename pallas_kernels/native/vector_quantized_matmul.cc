// x [M, K] times int8 weights [N, K] with one scale an output, by vector registers: x as it is (W8A16), or each of its
// rows rounded to int8 codes, whose sums are exact (W8A8, arXiv:2208.07339). Weights are read once, as they lie: some
// outputs' at a time, which stay in the first-level cache for all rows of x.

#include <type_traits>

#include "dot_products.h"
#include "numbers.h"
#include "quantize.h"

namespace ffi = xla::ffi;

namespace native {
namespace {

typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));
typedef int8_t ManyBytes __attribute__((vector_size(kLanes * 2)));

// Codes of x, widened beforehand, times codes of weights.
struct CodeProducts {
  using Entry = int16_t;
  using Weight = int8_t;
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
  static Sum add(Sum sum, const Entry* x, Right w) {
    Shorts left;
    std::memcpy(&left, x, sizeof(left));
#if defined(__AVX512BW__)
    return sum + bits<Ints>(_mm512_madd_epi16(bits<__m512i>(left), bits<__m512i>(w)));
#elif defined(__AVX2__)
    return sum + bits<Ints>(_mm256_madd_epi16(bits<__m256i>(left), bits<__m256i>(w)));
#else
    const Ints a = bits<Ints>(left), b = bits<Ints>(w);
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  static float total(Sum x) {
    int32_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += x[i];
    return static_cast<float>(total);
  }
};

template <typename Kind, typename X, typename Out>
ffi::Error run(ffi::ThreadPool& pool, const Weights<Kind>& w, const ffi::AnyBuffer& x, Out* out) {
  const X* from = static_cast<const X*>(x.untyped_data());
  Rows<Kind> rows(x.dimensions()[0], w.inputs);
  parallel_for(pool, rows.count, [&](int64_t row) {
    const X* own = from + row * w.inputs;
    auto* to = rows.data.data + row * w.inputs;
    if constexpr (std::is_same_v<Kind, NumberProducts<int8_t>>) {
      copy_row(own, row, rows);
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
  multiply_rows(pool, rows, w, out);
  return ffi::Error::Success();
}

ffi::Error vector_quantized_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> w,
                                   ffi::Buffer<ffi::F32> scales, bool codes, ffi::Result<ffi::AnyBuffer> out) {
  const auto of = [&](auto kind) {
    using Kind = decltype(kind);
    const Weights<Kind> weights{w.typed_data(), scales.typed_data(), w.dimensions()[0], w.dimensions()[1]};
    return of_type(x, [&](auto in) {
      return of_type(*out, [&](auto result) {
        return run<Kind, decltype(in)>(pool, weights, x, static_cast<decltype(result)*>(out->untyped_data()));
      });
    });
  };
  return codes ? of(CodeProducts{}) : of(NumberProducts<int8_t>{});
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
