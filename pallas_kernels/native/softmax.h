// The running softmax of one row of queries over blocks of keys (arXiv:2205.14135).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "vectors.h"

namespace native {

constexpr float kLeast = -1e30f;  // the top of a row that has not seen a key

// What a row of queries has gathered: largest score, sum of exp(score - largest), and that of values.
struct Row {
  float top, total;
  int64_t begin, end;  // keys it sees
  float* sum;
};

// Scores of keys first.. as they enter the softmax: scaled, capped, and -FLT_MAX where the row does not see the key.
inline void prepare(const Row& row, float* scores, int64_t first, int64_t size, float scale, float softcap) {
  const Floats lanes = __builtin_convertvector(kLane, Floats);
  const float begin = static_cast<float>(row.begin - first), end = static_cast<float>(row.end - first);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats place = lanes + static_cast<float>(i);
    Floats score = load(scores + i) * scale;
    if (softcap > 0) score = tanh(score / softcap) * softcap;
    score = place < end ? score : splat(-FLT_MAX);
    store(scores + i, place >= begin ? score : splat(-FLT_MAX));
  }
}

// Turns products of keys first.. into weights and notes them in the row. Returns what its sum so far is multiplied by.
template <typename Weight>
float weigh(Row& row, float* scores, Weight* weights, int64_t first, int64_t size, float scale, float softcap) {
  if (softcap > 0 || scale <= 0 || row.begin > first || row.end < first + size) {
    prepare(row, scores, first, size, scale, softcap);
    scale = 1;
  }
  Floats most = load(scores);
  for (int64_t i = kLanes; i < size; i += kLanes) most = larger(most, load(scores + i));
  const float top = std::max(row.top, largest(most) * scale);
  Floats total{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats weight = exp(load(scores + i) * scale - top);
    total += weight;
    store(weights + i, weight);
  }
  const float fade = top == row.top ? 1.0f : exp(splat(row.top - top))[0];
  row.top = top;
  row.total = row.total * fade + sum(total);
  return fade;
}

}  // namespace native
