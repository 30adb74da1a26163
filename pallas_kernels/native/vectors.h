// Sixteen floats at a time, in the compiler's own vector types: AVX-512 registers where there are any.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace native {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

inline Floats splat(float x) { return x - Floats{}; }

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Numbers in memory: float, the bits of bfloat16, int8.
inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline Floats load(const uint16_t* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return bits<Floats>(__builtin_convertvector(x, Words) << 16);
}
inline Floats load(const int8_t* from) {
  Bytes x;
  std::memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Floats);
}

inline Halves to_bfloat16(Floats x) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
  return bits<Halves>(_mm512_cvtneps_pbh(bits<__m512>(x)));
#else
  const Words word = bits<Words>(x);
  const Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0, Halves);
#endif
}

// Integers within 2^22 of zero, to the nearest, ties to even.
inline Floats round_even(Floats x) { return (x + 12582912.0f) - 12582912.0f; }

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }
inline void store(uint16_t* to, Floats x) {
  const Halves half = to_bfloat16(x);
  std::memcpy(to, &half, sizeof(half));
}
inline void store(int8_t* to, Floats x) {  // kept within -127..127
  x = x > 127.0f ? splat(127.0f) : x;
  x = x < -127.0f ? splat(-127.0f) : x;
  const Bytes byte = __builtin_convertvector(__builtin_convertvector(round_even(x), Ints), Bytes);
  std::memcpy(to, &byte, sizeof(byte));
}

inline Floats larger(Floats a, Floats b) {
#ifdef __AVX512F__
  return bits<Floats>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}

inline float sum(Floats x) {
  float total = 0;
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  total = x[0];
  return total;
}
inline float largest(Floats x) {
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  }
  return x[0];
}

// e^x of x at most 88, relative error below 3e-7; 0 below -87, NaN of NaN. 2^n by the exponent's bits, times e^f by its
// Taylor series.
inline Floats exp(Floats x) {
  const Floats n = round_even(x * 1.44269504f);
  Floats f = x - n * 0.693359375f;  // ln 2 in two parts
  f = f + n * 2.12194440e-4f;
  Floats p = splat(1.0f / 720);
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const Floats y = bits<Floats>(bits<Ints>(p) + (__builtin_convertvector(n, Ints) << 23));
  return x < -87.0f ? Floats{} : y;
}

inline Floats tanh(Floats x) {
  Floats y = x > 20.0f ? splat(20.0f) : x;
  y = y < -20.0f ? splat(-20.0f) : y;
  return 1.0f - 2.0f / (exp(y * 2.0f) + 1.0f);
}

// The sums of sixteen vectors, side by side.
inline Floats sums(Floats (&x)[kLanes]) {
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) {
      Floats &a = x[i], &b = x[i + half];
      Floats low, high;
      switch (half) {
        case 8:
          low = __builtin_shuffle(a, b, Ints{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
          high = __builtin_shuffle(a, b, Ints{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
          break;
        case 4:
          low = __builtin_shuffle(a, b, Ints{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27});
          high = __builtin_shuffle(a, b, Ints{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
          break;
        case 2:
          low = __builtin_shuffle(a, b, Ints{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
          high = __builtin_shuffle(a, b, Ints{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
          break;
        default:
          low = __builtin_shuffle(a, b, Ints{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30});
          high = __builtin_shuffle(a, b, Ints{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
      }
      a = low + high;
    }
  }
  return x[0];
}

// Memory of a call that begins where a register's worth of it may be loaded.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t size) : data(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 127) / 64 * 64))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const data;
};

}  // namespace native
