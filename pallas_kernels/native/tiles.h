// Products of tiles by AMX: sixteen rows of 64 bytes times sixteen columns, of which each word holds four int8 or two
// bfloat16 that are summed over (Intel, Intrinsics Guide; Architecture Instruction Set Extensions, chapter 3).
#pragma once

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512F__)
#define NATIVE_TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace native {

// Linux gives a process the use of tiles when it asks.
inline bool tiles_allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// All eight tiles are 16 x 64 bytes while one of these lives; what the thread had configured comes back after it.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes of a row
      config[48 + tile] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  ~Tiles() {
    if (before_[0]) {
      _tile_loadconfig(before_);
    } else {
      _tile_release();
    }
  }

 private:
  alignas(64) uint8_t before_[64];
};

// 16 x 16 words transposed.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The right side of a product: sixteen rows [16, 64 bytes], `stride` bytes apart, with their words transposed.
inline void pack_rows(const void* rows, int64_t stride, void* packed) {
  __m512i r[16];
  const char* from = static_cast<const char*>(rows);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
  transpose(r);
  char* to = static_cast<char*>(packed);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 64, r[i]);
}

enum class Kind { kInt8, kBfloat16 };

// c += a b; the numbers of tiles are written into the instruction, so they must be plain numbers.
#define NATIVE_MULTIPLY(kind, c, a, b)      \
  if constexpr (kind == Kind::kInt8) {      \
    _tile_dpbssd(c, a, b);                  \
  } else {                                  \
    _tile_dpbf16ps(c, a, b);                \
  }

// Where the left side's tiles lie, in bytes: from row to row, from a step over depth to the next, to sixteen rows below.
struct Left {
  int64_t row, step, below;
};

// c (+)= a b with a [16 kA, 64 depth bytes], b in tiles at b + 1024 (step * b_step + column block), and c [16 kA, 16 kB]
// words in rows `c_stride` bytes apart. kA and kB are 1 or 2.
template <Kind kind, int kA, int kB, bool add>
inline void product(const void* a, Left at, const void* b, int64_t b_step, int64_t depth, void* c, int64_t c_stride) {
  const char* left = static_cast<const char*>(a);
  const char* right = static_cast<const char*>(b);
  char* out = static_cast<char*>(c);
  const int64_t below = 16 * c_stride;
  if constexpr (add) {
    _tile_loadd(0, out, c_stride);
    if constexpr (kB > 1) _tile_loadd(1, out + 64, c_stride);
    if constexpr (kA > 1) _tile_loadd(2, out + below, c_stride);
    if constexpr (kA > 1 && kB > 1) _tile_loadd(3, out + below + 64, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (kB > 1) _tile_zero(1);
    if constexpr (kA > 1) _tile_zero(2);
    if constexpr (kA > 1 && kB > 1) _tile_zero(3);
  }
  for (int64_t step = 0; step < depth; ++step) {
    _tile_loadd(4, left + at.step * step, at.row);
    if constexpr (kA > 1) _tile_loadd(5, left + at.step * step + at.below, at.row);
    _tile_loadd(6, right + 1024 * step * b_step, 64);
    if constexpr (kB > 1) _tile_loadd(7, right + 1024 * (step * b_step + 1), 64);
    NATIVE_MULTIPLY(kind, 0, 4, 6)
    if constexpr (kB > 1) { NATIVE_MULTIPLY(kind, 1, 4, 7) }
    if constexpr (kA > 1) { NATIVE_MULTIPLY(kind, 2, 5, 6) }
    if constexpr (kA > 1 && kB > 1) { NATIVE_MULTIPLY(kind, 3, 5, 7) }
  }
  _tile_stored(0, out, c_stride);
  if constexpr (kB > 1) _tile_stored(1, out + 64, c_stride);
  if constexpr (kA > 1) _tile_stored(2, out + below, c_stride);
  if constexpr (kA > 1 && kB > 1) _tile_stored(3, out + below + 64, c_stride);
}

#undef NATIVE_MULTIPLY

}  // namespace native

#endif
