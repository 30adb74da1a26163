// A register of floats at a time, in the compiler's own vector types: sixteen where there is AVX-512, else eight.
// (Of a vector wider than a register the compiler makes memory.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace native {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
using Lanes = std::make_integer_sequence<int, kLanes>;

template <int... lane>
constexpr Ints numbered(std::integer_sequence<int, lane...>) {
  return Ints{lane...};
}
// The number of each lane.
constexpr Ints kLane = numbered(Lanes{});

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
#if defined(__AVX2__) && !defined(__AVX512F__)  // where the compiler converts one by one
  return bits<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
  Bytes x;
  std::memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Floats);
#endif
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

// One number in memory.
inline float number(float x) { return x; }
inline float number(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }
inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) { *to = to_bfloat16(splat(x))[0]; }

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
#elif defined(__AVX__)
  return bits<Floats>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// sum + a b, rounded once. (Left to the compiler it is that in one loop and not in another.)
inline Floats add_product(Floats sum, Floats a, Floats b) {
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(sum)));
#elif defined(__FMA__)
  return bits<Floats>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(sum)));
#else
  return sum + a * b;
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

// Of each `half` lanes of a and b by turns: the lower ones, and the upper ones.
template <int half, int... lane>
inline Floats lower(Floats a, Floats b, std::integer_sequence<int, lane...>) {
  return __builtin_shuffle(a, b, Ints{(lane & half ? lane + kLanes - half : lane)...});
}
template <int half, int... lane>
inline Floats upper(Floats a, Floats b, std::integer_sequence<int, lane...>) {
  return __builtin_shuffle(a, b, Ints{(lane & half ? lane + kLanes : lane + half)...});
}

// The sums of as many vectors as there are lanes, side by side.
template <int half = kLanes / 2>
inline Floats sums(Floats (&x)[kLanes]) {
  for (int i = 0; i < half; ++i) {
    x[i] = lower<half>(x[i], x[i + half], Lanes{}) + upper<half>(x[i], x[i + half], Lanes{});
  }
  if constexpr (half == 1) {
    return x[0];
  } else {
    return sums<half / 2>(x);
  }
}

// As many vectors as there are lanes, as the rows of a square: its columns.
template <int half = kLanes / 2>
inline void transpose(Floats (&x)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & half) continue;
    const Floats low = lower<half>(x[i], x[i + half], Lanes{});
    x[i + half] = upper<half>(x[i], x[i + half], Lanes{});
    x[i] = low;
  }
  if constexpr (half > 1) transpose<half / 2>(x);
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
