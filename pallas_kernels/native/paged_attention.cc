// Paged attention (arXiv:2309.06180): the new tokens' keys and values are written into their pages, then each token
// attends to its sequence so far, by a running softmax over blocks of keys (arXiv:2205.14135).
//
// A piece of work is some tokens of one sequence with the query heads of one key head. Where that is a few rows, keys
// are read once for all of them as they lie; where it is many, blocks of keys are packed for products of tiles, or of
// floats where there are no tiles or pages are not bfloat16.

#include <vector>

#include "key_products.h"
#include "numbers.h"
#include "parallel.h"
#include "softmax.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace native {
namespace {

constexpr int64_t kFewRows = 12;
constexpr int64_t kMostRows = 128;  // of a piece of work

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
  return of_type(q, [&](auto number) { return run_with<decltype(number)>(pool, a); });
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
