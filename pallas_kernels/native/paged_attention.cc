// Paged attention (arXiv:2309.06180): the new tokens' keys and values are written into their pages, then each token
// attends to its sequence so far, by a running softmax over blocks of keys (arXiv:2205.14135).
//
// A piece of work is some tokens of one sequence with the query heads of one key head. Where that is a few rows, keys
// are read once for all of them as they lie; where it is many, blocks of keys are packed for products of tiles, or of
// floats where there are no tiles or pages are not bfloat16.

#include <cfloat>
#include <vector>

#include "parallel.h"
#include "tiles.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace native {
namespace {

constexpr int64_t kFewRows = 12;
constexpr int64_t kMostRows = 128;  // of a piece of work
constexpr int64_t kBlock = 128;     // keys
constexpr float kLeast = -1e30f;    // of a row that has not seen a key

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes as in `paged_attention`: q [tokens, heads, dim], data [pages, kv_heads, 2, page_size, dim].
template <typename Q, typename P>
struct Problem {
  int64_t tokens, heads, kv_heads, dim, num_pages, page_size, rows, columns;
  const Q *q, *k_new, *v_new;
  P* data;
  const int32_t *tables, *lengths, *starts;
  int64_t num_sequences;
  const float* sinks;  // or null
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
  Q* out;

  int64_t group() const { return heads / kv_heads; }
  int64_t count(int64_t row) const { return starts[row + 1] - starts[row]; }
  int64_t first_position(int64_t row) const { return lengths[row] - count(row); }
  P* key_row(int64_t row, int64_t head, int64_t position, int64_t values) const {
    const int64_t number = tables[row * columns + position / page_size];
    return data + (((number * kv_heads + head) * 2 + values) * page_size + position % page_size) * dim;
  }
};

struct Piece {
  int64_t row, head, first, tokens;  // of the sequence's new tokens, from `first` on
};

template <typename Q, typename P>
void write_token(const Problem<Q, P>& p, int64_t row, int64_t token) {
  const int64_t position = p.first_position(row) + token;
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    const int64_t from = ((p.starts[row] + token) * p.kv_heads + head) * p.dim;
    P *key = p.key_row(row, head, position, 0), *value = p.key_row(row, head, position, 1);
    for (int64_t i = 0; i < p.dim; i += kLanes) {
      store(key + i, load(p.k_new + from + i));
      store(value + i, load(p.v_new + from + i));
    }
  }
}

// What a row of queries has gathered: largest score, sum of exp(score - largest), and that of values.
struct Row {
  float top, total;
  int64_t begin, end;  // keys it sees
  float* sum;
};

// Queries as the products take them: those of bfloat16 pages are rounded to it, which is what tiles multiply.
template <typename P>
Floats rounded(Floats query) {
  if constexpr (!std::is_same_v<P, uint16_t>) return query;
  uint16_t bits[kLanes];
  store(bits, query);
  return load(bits);
}

// Rows of a piece, token by token, before any key.
template <typename Q, typename P, typename Weight>
void start_rows(const Problem<Q, P>& p, const Piece& piece, Weight* queries, float* sums, Row* rows) {
  const int64_t group = p.group(), position = p.first_position(piece.row) + piece.first;
  std::memset(sums, 0, piece.tokens * group * p.dim * sizeof(float));
  for (int64_t i = 0; i < piece.tokens * group; ++i) {
    const int64_t head = piece.head * group + i % group, end = position + i / group + 1;
    rows[i] = {kLeast, 0.0f, p.window ? std::max<int64_t>(0, end - p.window) : 0, end, sums + i * p.dim};
    if (p.sinks) {
      rows[i].top = p.sinks[head];
      rows[i].total = 1.0f;
    }
    const Q* q = p.q + ((p.starts[piece.row] + piece.first + i / group) * p.heads + head) * p.dim;
    for (int64_t d = 0; d < p.dim; d += kLanes) store(queries + i * p.dim + d, rounded<P>(load(q + d)));
  }
}

template <typename Q, typename P>
void finish(const Problem<Q, P>& p, const Piece& piece, const Row* rows) {
  const int64_t group = p.group();
  for (int64_t i = 0; i < piece.tokens * group; ++i) {
    const float factor = 1.0f / rows[i].total;  // a token sees itself at least
    const int64_t head = piece.head * group + i % group;
    Q* out = p.out + ((p.starts[piece.row] + piece.first + i / group) * p.heads + head) * p.dim;
    for (int64_t d = 0; d < p.dim; d += kLanes) store(out + d, load(rows[i].sum + d) * factor);
  }
}

// Scores of keys first.. as they enter the softmax: scaled, capped, and -FLT_MAX where the row does not see the key.
void prepare(const Row& row, float* scores, int64_t first, int64_t size, float scale, float softcap) {
  const Floats lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float begin = static_cast<float>(row.begin - first), end = static_cast<float>(row.end - first);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats place = lanes + static_cast<float>(i);
    Floats score = load(scores + i) * scale;
    if (softcap > 0) score = tanh(score / softcap) * softcap;
    score = place < end ? score : splat(-FLT_MAX);
    store(scores + i, place >= begin ? score : splat(-FLT_MAX));
  }
}

// Turns products of keys first.. into weights and notes them in the row. Returns what its sum so far is to be multiplied by.
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

// The sums of sixteen vectors, side by side.
Floats sums(Floats (&x)[kLanes]) {
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

// Scores [kRows, kBlock] of keys, each of which is read once.
template <int kRows, typename P>
void score_keys(const float* queries, int64_t dim, const P* const* keys, int64_t size, float* scores) {
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats dots[kRows][kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      Floats part[kRows] = {};
      for (int64_t d = 0; d < dim; d += kLanes) {
        const Floats key = load(keys[i + lane] + d);
        for (int r = 0; r < kRows; ++r) part[r] += load(queries + r * dim + d) * key;
      }
      for (int r = 0; r < kRows; ++r) dots[r][lane] = part[r];
    }
    for (int r = 0; r < kRows; ++r) store(scores + r * kBlock + i, sums(dots[r]));
  }
}

// rows' sums = sums * fade + weights [kRows, kBlock] values, in kWidth vectors from `at` on.
template <int kRows, int kWidth, typename P>
void add_values(Row* rows, const float* fade, const float* weights, const P* const* values, int64_t size, int64_t at) {
  Floats part[kRows][kWidth];
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWidth; ++w) part[r][w] = load(rows[r].sum + at + w * kLanes) * fade[r];
  }
  for (int64_t i = 0; i < size; ++i) {
    for (int w = 0; w < kWidth; ++w) {
      const Floats value = load(values[i] + at + w * kLanes);
      for (int r = 0; r < kRows; ++r) part[r][w] += weights[r * kBlock + i] * value;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWidth; ++w) store(rows[r].sum + at + w * kLanes, part[r][w]);
  }
}

// One block of keys for kRows rows.
template <int kRows, typename Q, typename P>
void attend_block(const Problem<Q, P>& p, const float* queries, Row* rows, const P* const* keys, const P* const* values,
                  int64_t first, int64_t size) {
  alignas(64) float scores[kRows * kBlock];
  float fade[kRows];
  const int64_t whole = ceil_div(size, kLanes) * kLanes;
  score_keys<kRows>(queries, p.dim, keys, size, scores);
  for (int r = 0; r < kRows; ++r) {
    float* own = scores + r * kBlock;
    fade[r] = weigh(rows[r], own, own, first, whole, p.scale, p.softcap);
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= p.dim; d += 4 * kLanes) add_values<kRows, 4>(rows, fade, scores, values, size, d);
  for (; d < p.dim; d += kLanes) add_values<kRows, 1>(rows, fade, scores, values, size, d);
}

template <typename Q, typename P>
void attend_few(const Problem<Q, P>& p, const Piece& piece) {
  const int64_t group = p.group(), count = piece.tokens * group;
  Buffer<float> queries(count * p.dim), sums_of(count * p.dim);
  Row rows[kFewRows];
  start_rows(p, piece, queries.data, sums_of.data, rows);
  const P *keys[kBlock], *values[kBlock];
  const int64_t end = rows[count - 1].end;
  for (int64_t first = rows[0].begin; first < end; first += kBlock) {
    const int64_t size = std::min(kBlock, end - first);
    for (int64_t i = 0; i < ceil_div(size, kLanes) * kLanes; ++i) {
      const int64_t position = std::min(first + i, end - 1);
      keys[i] = p.key_row(piece.row, piece.head, position, 0);
      values[i] = p.key_row(piece.row, piece.head, position, 1);
    }
    int64_t r = 0;
    const auto some = [&](auto number) {
      constexpr int kRows = decltype(number)::value;
      for (; r + kRows <= count; r += kRows) {
        attend_block<kRows>(p, queries.data + r * p.dim, rows + r, keys, values, first, size);
      }
    };
    some(std::integral_constant<int, 4>{});
    some(std::integral_constant<int, 3>{});
    some(std::integral_constant<int, 2>{});
    some(std::integral_constant<int, 1>{});
  }
  finish(p, piece, rows);
}

// How many rows of queries multiply blocks of keys. Scores [rows, kBlock] and sums [rows, dim] are float.

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
        product<Kind::kBfloat16, 2, 2, false>(queries + r * dim, {dim * 2, 64, dim * 32}, keys.data + s / 16 * 512, kBlock / 16, dim / 32,
                                              scores + r * kBlock + s, kBlock * 4);
      }
    }
  }

  void add(const uint16_t* weights, float* sums, int64_t size) {
    for (int64_t r = 0; r < rows; r += 32) {
      for (int64_t d = 0; d < dim; d += 32) {
        product<Kind::kBfloat16, 2, 2, true>(weights + r * kBlock, {kBlock * 2, 64, kBlock * 32}, values.data + d / 16 * 512, dim / 16,
                                             size / 32, sums + r * dim + d, dim * 4);
      }
    }
  }

  const int64_t rows, dim;
  Buffer<uint16_t> keys, values;
  Tiles tiles;
};

#endif

// c [rows, columns] (+)= a [rows, depth] b [depth, columns], rows of a and c whole steps of 4, columns of 16.
template <bool add_to>
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
              int64_t rows, int64_t depth, int64_t columns) {
  constexpr int kRowsAtOnce = 4;
  const auto part = [&](auto width, int64_t r, int64_t at) {
    constexpr int kWidth = decltype(width)::value;
    Floats x[kRowsAtOnce][kWidth];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      for (int w = 0; w < kWidth; ++w) x[i][w] = add_to ? load(c + (r + i) * c_stride + at + w * kLanes) : Floats{};
    }
    for (int64_t k = 0; k < depth; ++k) {
      for (int w = 0; w < kWidth; ++w) {
        const Floats right = load(b + k * b_stride + at + w * kLanes);
        for (int i = 0; i < kRowsAtOnce; ++i) x[i][w] += a[(r + i) * a_stride + k] * right;
      }
    }
    for (int i = 0; i < kRowsAtOnce; ++i) {
      for (int w = 0; w < kWidth; ++w) store(c + (r + i) * c_stride + at + w * kLanes, x[i][w]);
    }
  };
  for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
    int64_t at = 0;
    for (; at + 4 * kLanes <= columns; at += 4 * kLanes) part(std::integral_constant<int, 4>{}, r, at);
    for (; at < columns; at += kLanes) part(std::integral_constant<int, 1>{}, r, at);
  }
}

struct FloatProducts {
  using Weight = float;
  static constexpr int64_t kRows = 4;

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
    multiply<false>(queries, dim, keys.data, kBlock, scores, kBlock, rows, dim, size);
  }

  void add(const float* weights, float* sums, int64_t size) {
    multiply<true>(weights, kBlock, values.data, dim, sums, dim, rows, size, dim);
  }

  const int64_t rows, dim;
  Buffer<float> keys, values;
};

template <typename Products, typename Q, typename P>
void attend_many(const Problem<Q, P>& p, const Piece& piece) {
  using Weight = typename Products::Weight;
  const int64_t group = p.group(), count = piece.tokens * group, dim = p.dim;
  const int64_t padded = ceil_div(count, Products::kRows) * Products::kRows;
  Products products(padded, dim);
  Buffer<float> sums(padded * dim), scores(padded * kBlock);
  Buffer<Weight> queries(padded * dim), weights(padded * kBlock);
  Buffer<P> zeros(dim);  // in the place of values that no key has
  std::memset(zeros.data, 0, dim * sizeof(P));
  std::memset(queries.data + count * dim, 0, (padded - count) * dim * sizeof(Weight));
  std::memset(weights.data, 0, padded * kBlock * sizeof(Weight));
  std::memset(sums.data + count * dim, 0, (padded - count) * dim * sizeof(float));
  std::vector<Row> rows(count);
  start_rows(p, piece, queries.data, sums.data, rows.data());
  const P *keys[kBlock], *values[kBlock];
  const int64_t end = rows[count - 1].end;
  for (int64_t first = rows[0].begin; first < end; first += kBlock) {
    const int64_t size = std::min(kBlock, ceil_div(end - first, 32) * 32);
    for (int64_t i = 0; i < size; ++i) {
      const bool real = first + i < end;
      keys[i] = real ? p.key_row(piece.row, piece.head, first + i, 0) : zeros.data;
      values[i] = real ? p.key_row(piece.row, piece.head, first + i, 1) : zeros.data;
    }
    products.pack(keys, values, size);
    products.score(queries.data, scores.data, size);
    for (int64_t i = 0; i < count; ++i) {
      float* score = scores.data + i * kBlock;
      const float fade = weigh(rows[i], score, weights.data + i * kBlock, first, size, p.scale, p.softcap);
      if (fade == 1.0f) continue;
      for (int64_t d = 0; d < dim; d += kLanes) store(rows[i].sum + d, load(rows[i].sum + d) * fade);
    }
    products.add(weights.data, sums.data, size);
  }
  finish(p, piece, rows.data());
}

template <typename Q, typename P>
void attend_piece(const Problem<Q, P>& p, const Piece& piece) {
  if (piece.tokens * p.group() <= kFewRows) return attend_few(p, piece);
#ifdef NATIVE_TILES
  if constexpr (std::is_same_v<P, uint16_t>) {
    if (TileProducts::takes(p.dim)) return attend_many<TileProducts>(p, piece);
  }
#endif
  attend_many<FloatProducts>(p, piece);
}

template <typename Q, typename P>
void attend(ffi::ThreadPool& pool, const Problem<Q, P>& p) {
  std::vector<Piece> pieces;
  const int64_t most = std::max<int64_t>(1, kMostRows / p.group());
  for (int64_t row = 0; row < p.num_sequences; ++row) {
    for (int64_t first = 0; first < p.count(row); first += most) {
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        pieces.push_back({row, head, first, std::min(most, p.count(row) - first)});
      }
    }
  }
  const int64_t used = p.num_sequences ? p.starts[p.num_sequences] : 0;
  for (int64_t row = 0; row < p.num_sequences; ++row) {
    for (int64_t token = 0; token < p.count(row); ++token) write_token(p, row, token);
  }
  std::memset(p.out + used * p.heads * p.dim, 0, (p.tokens - used) * p.heads * p.dim * sizeof(Q));
  // The last of a sequence see most: they come first, so that threads end together.
  std::reverse(pieces.begin(), pieces.end());
  parallel_for(pool, pieces.size(), [&](int64_t i) { attend_piece(p, pieces[i]); });
}

struct Arguments {
  ffi::AnyBuffer q, k_new, v_new, data;
  ffi::Buffer<ffi::S32> tables, lengths, starts, num_sequences;
  ffi::Buffer<ffi::F32> sinks;
  float scale, softcap;
  int64_t window;
  ffi::Result<ffi::AnyBuffer> out, pages;
};

template <typename Q, typename P>
ffi::Error run(ffi::ThreadPool& pool, Arguments& a) {
  const auto q = a.q.dimensions(), data = a.data.dimensions(), tables = a.tables.dimensions();
  P* pages = static_cast<P*>(a.pages->untyped_data());
  if (pages != a.data.untyped_data()) std::memcpy(pages, a.data.untyped_data(), a.data.size_bytes());
  const Problem<Q, P> p{q[0],
                        q[1],
                        data[1],
                        q[2],
                        data[0],
                        data[3],
                        tables[0],
                        tables[1],
                        static_cast<const Q*>(a.q.untyped_data()),
                        static_cast<const Q*>(a.k_new.untyped_data()),
                        static_cast<const Q*>(a.v_new.untyped_data()),
                        pages,
                        a.tables.typed_data(),
                        a.lengths.typed_data(),
                        a.starts.typed_data(),
                        std::min<int64_t>(a.num_sequences.typed_data()[0], tables[0]),
                        a.sinks.element_count() ? a.sinks.typed_data() : nullptr,
                        a.scale,
                        a.softcap,
                        a.window,
                        static_cast<Q*>(a.out->untyped_data())};
  attend(pool, p);
  return ffi::Error::Success();
}

template <typename Q>
ffi::Error run_with(ffi::ThreadPool& pool, Arguments& a) {
  switch (a.data.element_type()) {
    case ffi::U16:
      return run<Q, uint16_t>(pool, a);
    case ffi::BF16:
      return run<Q, uint16_t>(pool, a);
    case ffi::F32:
      return run<Q, float>(pool, a);
    case ffi::S8:
      return run<Q, int8_t>(pool, a);
    default:
      return ffi::Error::InvalidArgument("pages must be bfloat16, its bits, float32 or int8");
  }
}

ffi::Error paged_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_new, ffi::AnyBuffer v_new,
                           ffi::AnyBuffer data, ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::S32> lengths,
                           ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> num_sequences,
                           ffi::Buffer<ffi::F32> sinks, float scale, float softcap, int64_t window,
                           ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> pages) {
  Arguments a{q,     k_new, v_new, data,    tables, lengths, starts, num_sequences,
              sinks, scale, softcap, window, out,    pages};
  return q.element_type() == ffi::F32 ? run_with<float>(pool, a) : run_with<uint16_t>(pool, a);
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativePagedAttention, native::paged_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
