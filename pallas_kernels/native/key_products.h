// How many rows of queries multiply a block of keys and values. Scores [rows, kBlock] and sums [rows, dim] are floats.
#pragma once

#include <cstdint>

#include "products.h"
#include "tiles.h"
#include "vectors.h"

namespace native {

constexpr int64_t kBlock = 128;  // keys

#ifdef NATIVE_TILES

// Queries and weights in bfloat16 from the left; keys and values packed in pairs.
struct TileProducts {
  using Weight = uint16_t;
  static constexpr int64_t kRows = 32;  // that rows are filled up to

  TileProducts(int64_t rows, int64_t dim) : rows(rows), dim(dim), keys(kBlock * dim), values(kBlock * dim) {}

  static bool takes(int64_t dim) { return dim % 32 == 0 && tiles_allowed(); }

  void pack(const uint16_t* const* from_keys, const uint16_t* const* from_values, int64_t size) {
    for (int64_t s = 0; s < size; s += 16) {
      for (int64_t d = 0; d < dim; d += 32) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from_keys[s + i] + d);
        transpose(r);
        uint16_t* to = keys.data + (d / 32 * (kBlock / 16) + s / 16) * 512;
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, r[i]);
      }
    }
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t s = 0; s < size; s += 2) {
      for (int64_t d = 0; d < dim; d += 16) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from_values[s] + d));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from_values[s + 1] + d));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        uint16_t* to = values.data + (s / 32 * (dim / 16) + d / 16) * 512 + s % 32 / 2 * 32;
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(pairs, both));
      }
    }
  }

  void score(const uint16_t* queries, float* scores, int64_t size) {
    for (int64_t r = 0; r < rows; r += 32) {
      for (int64_t s = 0; s < size; s += 32) {
        const Left left{dim * 2, 64, dim * 32};
        const uint16_t* right = keys.data + s / 16 * 512;
        float* out = scores + r * kBlock + s;
        product<Kind::kBfloat16, 2, 2, false>(queries + r * dim, left, right, kBlock / 16, dim / 32, out, kBlock * 4);
      }
    }
  }

  void add(const uint16_t* weights, float* sums, int64_t size) {
    for (int64_t r = 0; r < rows; r += 32) {
      for (int64_t d = 0; d < dim; d += 32) {
        const Left left{kBlock * 2, 64, kBlock * 32};
        const uint16_t* right = values.data + d / 16 * 512;
        float* out = sums + r * dim + d;
        product<Kind::kBfloat16, 2, 2, true>(weights + r * kBlock, left, right, dim / 16, size / 32, out, dim * 4);
      }
    }
  }

  const int64_t rows, dim;
  Buffer<uint16_t> keys, values;
  Tiles tiles;
};

#endif

struct FloatProducts {
  using Weight = float;
  static constexpr int64_t kRows = 1;

  FloatProducts(int64_t rows, int64_t dim) : rows(rows), dim(dim), keys(kBlock * dim), values(kBlock * dim) {}

  template <typename P>
  void pack(const P* const* from_keys, const P* const* from_values, int64_t size) {
    for (int64_t s = 0; s < size; ++s) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        const Floats key = load(from_keys[s] + d);
        for (int64_t i = 0; i < kLanes; ++i) keys.data[(d + i) * kBlock + s] = key[i];
        store(values.data + s * dim + d, load(from_values[s] + d));
      }
    }
  }

  void score(const float* queries, float* scores, int64_t size) {
    multiply<false>(rows, size, dim, {queries, dim, 1}, keys.data, kBlock, scores, kBlock, false);
  }

  void add(const float* weights, float* sums, int64_t size) {
    multiply<false>(rows, dim, size, {weights, kBlock, 1}, values.data, dim, sums, dim, true);
  }

  const int64_t rows, dim;
  Buffer<float> keys, values;
};

}  // namespace native
