// Attention and its gradients, a block of queries against a block of keys at a time (arXiv:2205.14135), in float32 by
// vector registers. Queries lie along the lanes: a score's maximum, sum and mask are then vectors over the queries, and
// every product has keys, or a head's dimensions, as the rows of its left side.

#include <cfloat>

#include "numbers.h"
#include "parallel.h"
#include "products.h"
#include "softmax.h"
#include "vectors.h"

namespace ffi = xla::ffi;

namespace native {
namespace {

constexpr int64_t kQueries = 64, kKeys = 96;  // of a block: its scores stay in the first-level cache

struct Ids {
  const int32_t* data;  // of one sequence, or null
  int32_t least, most;  // of some of its positions
  bool single() const { return least == most; }
};

Ids ids_of(const int32_t* data, int64_t begin, int64_t end) {
  if (!data) return {nullptr, 0, 0};
  const auto [least, most] = std::minmax_element(data + begin, data + end);
  return {data, *least, *most};
}

struct Problem {
  int64_t batch, queries, heads, size, keys, kv_heads;
  const int32_t *offsets, *q_ids, *kv_ids;
  const float* sinks;
  bool causal;
  int64_t window;
  float softcap, scale;

  int64_t group() const { return heads / kv_heads; }
  int64_t padded() const { return ceil_div(size, kLanes) * kLanes; }
  int64_t blocks() const { return ceil_div(queries, kQueries); }
};

// A block of queries of one sequence, and the keys that any of them sees.
struct Block {
  Block(const Problem& p, int64_t sequence, int64_t block)
      : problem(p), start(block * kQueries), size(std::min(kQueries, p.queries - start)),
        place(start + p.offsets[sequence]), begin(0), end(p.keys),
        ids(ids_of(p.q_ids ? p.q_ids + sequence * p.queries : nullptr, start, start + size)),
        kv_ids(p.kv_ids ? p.kv_ids + sequence * p.keys : nullptr) {
    if (p.causal) end = std::clamp<int64_t>(place + size, 0, p.keys);
    if (p.window) begin = std::clamp<int64_t>(place - p.window + 1, 0, end);
  }

  // body(first, size) for each block of keys that some query may see.
  template <typename Body>
  void each(const Body& body) const {
    for (int64_t first = begin / kKeys * kKeys; first < end; first += kKeys) {
      const int64_t number = std::min(kKeys, end - first);
      const Ids keys = ids_of(kv_ids, first, first + number);
      if (keys.data && (keys.most < ids.least || keys.least > ids.most)) continue;
      body(first, number, needs_mask(first, number, keys));
    }
  }

  bool needs_mask(int64_t first, int64_t number, const Ids& keys) const {
    if (problem.causal && first + number - 1 > place) return true;
    if (problem.window && first < place + size - problem.window) return true;
    return keys.data && !(keys.single() && ids.single());
  }

  // Scores [number, kQueries] of keys first.. that a query does not see become -FLT_MAX.
  void hide(float* scores, int64_t first, int64_t number) const {
    for (int64_t lane = 0; lane < size; lane += kLanes) {
      const Ints query = kLane + static_cast<int32_t>(place + lane);
      Ints own{};
      for (int64_t i = lane; ids.data && i < std::min<int64_t>(size, lane + kLanes); ++i) own[i - lane] = ids.data[start + i];
      for (int64_t i = 0; i < number; ++i) {
        const int32_t key = static_cast<int32_t>(first + i);
        Ints seen = Ints{} == 0;
        if (problem.causal) seen &= query >= key;
        if (problem.window) seen &= query < key + static_cast<int32_t>(problem.window);
        if (ids.data) seen &= own == kv_ids[first + i];
        float* at = scores + i * kQueries + lane;
        store(at, seen ? load(at) : splat(-FLT_MAX));
      }
    }
  }

  const Problem& problem;
  const int64_t start, size, place;  // its first query, how many, where the first stands among the keys
  int64_t begin, end;
  const Ids ids;
  const int32_t* kv_ids;
};

// One head's vectors in memory: `stride` apart.
template <typename T>
struct Vectors {
  T* data;
  int64_t stride;
};

// x [sequences, length, heads, size] -> those of one head of one sequence, from a position on.
template <typename T>
Vectors<T> vectors(T* data, int64_t length, int64_t heads, int64_t size, int64_t sequence, int64_t head, int64_t at = 0) {
  return {data + ((sequence * length + at) * heads + head) * size, heads * size};
}

// Rows [count, padded] of float32; what is past `size` is zeros.
template <typename T>
void copy_rows(Vectors<const T> x, int64_t count, int64_t size, int64_t padded, float scale, float* to) {
  for (int64_t row = 0; row < count; ++row, to += padded) {
    const T* from = x.data + row * x.stride;
    for (int64_t i = 0; i < size; ++i) to[i] = number(from[i]) * scale;
    for (int64_t i = size; i < padded; ++i) to[i] = 0;
  }
}

// Rows [kQueries, padded] -> [padded, kQueries]; those past `count` become zeros.
void transpose_rows(const float* rows, int64_t count, int64_t padded, float* to) {
  for (int64_t row = 0; row < kQueries; row += kLanes) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      Floats square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = row + r < count ? load(rows + (row + r) * padded + i) : Floats{};
      transpose(square);
      for (int j = 0; j < kLanes; ++j) store(to + (i + j) * kQueries + row, square[j]);
    }
  }
}

// columns [padded, kQueries] times each query's factor -> vectors.
template <typename T>
void write_columns(const float* columns, const float* factors, int64_t count, int64_t size, Vectors<T> to) {
  for (int64_t row = 0; row < count; row += kLanes) {
    for (int64_t i = 0; i < size; i += kLanes) {
      Floats square[kLanes];
      for (int j = 0; j < kLanes; ++j) square[j] = load(columns + (i + j) * kQueries + row);
      transpose(square);
      for (int r = 0; r < std::min<int64_t>(kLanes, count - row); ++r) {
        T* own = to.data + (row + r) * to.stride + i;
        const Floats value = square[r] * factors[row + r];
        if (i + kLanes <= size) {
          store(own, value);
        } else {
          for (int64_t j = 0; j < size - i; ++j) put(own + j, value[j]);
        }
      }
    }
  }
}

// k and v of each head of each sequence, as float32 rows.
struct KeysAndValues {
  template <typename T>
  KeysAndValues(ffi::ThreadPool& pool, const Problem& p, const T* k, const T* v)
      : size(p.keys * p.padded()), k(p.batch * p.kv_heads * size), v(p.batch * p.kv_heads * size) {
    parallel_for(pool, p.batch * p.kv_heads, [&](int64_t i) {
      for (const auto& [from, to] : {std::pair(k, this->k.data), std::pair(v, this->v.data)}) {
        const auto x = vectors(from, p.keys, p.kv_heads, p.size, i / p.kv_heads, i % p.kv_heads);
        copy_rows(x, p.keys, p.size, p.padded(), 1.0f, to + i * size);
      }
    });
  }
  const int64_t size;
  Buffer<float> k, v;
};

// Scores of keys first.. and a block of queries, capped, hidden where they are not seen.
void score(const Block& block, const float* k, const float* q, int64_t first, int64_t number, bool masked,
           float* scores) {
  const Problem& p = block.problem;
  const int64_t padded = p.padded();
  multiply<false>(number, kQueries, padded, {k + first * padded, padded, 1}, q, kQueries, scores, kQueries, false);
  if (p.softcap > 0) {
    for (int64_t i = 0; i < number * kQueries; i += kLanes) {
      store(scores + i, tanh(load(scores + i) * (1 / p.softcap)) * p.softcap);
    }
  }
  if (masked) block.hide(scores, first, number);
}

// Turns scores into weights, and notes them in each query's largest score and sum. sums [rows, kQueries] fade with them.
void weigh(float* scores, int64_t number, float* top, float* total, float* sums, int64_t rows) {
  for (int64_t lane = 0; lane < kQueries; lane += kLanes) {
    Floats most = load(top + lane);
    const Floats before = most;
    for (int64_t i = 0; i < number; ++i) most = larger(most, load(scores + i * kQueries + lane));
    const Floats fade = exp(before - most);
    Floats sum = load(total + lane) * fade;
    for (int64_t i = 0; i < number; ++i) {
      float* at = scores + i * kQueries + lane;
      const Floats weight = exp(load(at) - most);
      sum += weight;
      store(at, weight);
    }
    store(top + lane, most);
    store(total + lane, sum);
    for (int64_t row = 0; row < rows; ++row) {
      float* at = sums + row * kQueries + lane;
      store(at, load(at) * fade);
    }
  }
}

template <typename T>
void forward_block(const Problem& p, const KeysAndValues& kv, const T* q, int64_t sequence, int64_t head,
                   int64_t number, T* out, float* lse) {
  const int64_t padded = p.padded(), kv_head = sequence * p.kv_heads + head / p.group();
  const float *k = kv.k.data + kv_head * kv.size, *v = kv.v.data + kv_head * kv.size;
  const Block block(p, sequence, number);
  Buffer<float> rows(kQueries * padded), columns(padded * kQueries), sums(padded * kQueries), scores(kKeys * kQueries);
  alignas(64) float top[kQueries], total[kQueries], factors[kQueries];
  std::fill_n(top, kQueries, p.sinks ? p.sinks[head] : kLeast);
  std::fill_n(total, kQueries, p.sinks ? 1.0f : 0.0f);
  std::memset(sums.data, 0, padded * kQueries * sizeof(float));
  copy_rows(vectors(q, p.queries, p.heads, p.size, sequence, head, block.start), block.size, p.size, padded, p.scale,
            rows.data);
  transpose_rows(rows.data, block.size, padded, columns.data);
  block.each([&](int64_t first, int64_t some, bool masked) {
    score(block, k, columns.data, first, some, masked, scores.data);
    weigh(scores.data, some, top, total, sums.data, padded);
    multiply<true>(padded, kQueries, some, {v + first * padded, 1, padded}, scores.data, kQueries, sums.data, kQueries,
                   true);
  });
  for (int64_t i = 0; i < block.size; ++i) {
    factors[i] = total[i] == 0 ? 0.0f : 1 / total[i];
    lse[(sequence * p.heads + head) * p.queries + block.start + i] = total[i] == 0 ? kLeast : top[i] + std::log(total[i]);
  }
  write_columns(sums.data, factors, block.size, p.size,
                vectors(out, p.queries, p.heads, p.size, sequence, head, block.start));
}

template <typename T>
struct Given {
  const T *q, *d_out;
  const float *lse, *delta;
};

// Adds to the gradients of one head's k and v, and writes those of a block of queries.
struct Backward {
  explicit Backward(const Problem& p)
      : p(p), padded(p.padded()), q_rows(kQueries * padded), q(kQueries * padded), g_rows(kQueries * padded),
        g(kQueries * padded), dq(kQueries * padded), scores(kKeys * kQueries), slopes(kKeys * kQueries) {}

  template <typename T>
  void run(const KeysAndValues& kv, const Given<T>& given, int64_t sequence, int64_t head, int64_t number, T* d_q,
           float* dk, float* dv) {
    const int64_t kv_head = sequence * p.kv_heads + head / p.group();
    const float *k = kv.k.data + kv_head * kv.size, *v = kv.v.data + kv_head * kv.size;
    const Block block(p, sequence, number);
    const auto of_block = [&](auto* x) {
      return vectors(x, p.queries, p.heads, p.size, sequence, head, block.start);
    };
    take(of_block(given.q), block.size, p.scale, q_rows.data, q.data);
    take(of_block(given.d_out), block.size, 1.0f, g_rows.data, g.data);
    alignas(64) float lse[kQueries]{}, delta[kQueries]{}, factors[kQueries];
    const int64_t at = (sequence * p.heads + head) * p.queries + block.start;
    std::copy_n(given.lse + at, block.size, lse);
    std::copy_n(given.delta + at, block.size, delta);
    std::fill_n(factors, kQueries, p.scale);
    std::memset(dq.data, 0, padded * kQueries * sizeof(float));
    block.each([&](int64_t first, int64_t some, bool masked) {
      score(block, k, q.data, first, some, masked, scores.data);
      multiply<false>(some, kQueries, padded, {v + first * padded, padded, 1}, g.data, kQueries, slopes.data, kQueries,
                      false);
      for (int64_t i = 0; i < some * kQueries; i += kLanes) differentiate(i, lse, delta);
      const LeftSide weights{scores.data, kQueries, 1}, of_scores{slopes.data, kQueries, 1};
      multiply<false>(some, padded, block.size, weights, g_rows.data, padded, dv + first * padded, padded, true);
      multiply<false>(some, padded, block.size, of_scores, q_rows.data, padded, dk + first * padded, padded, true);
      multiply<true>(padded, kQueries, some, {k + first * padded, 1, padded}, slopes.data, kQueries, dq.data, kQueries,
                     true);
    });
    write_columns(dq.data, factors, block.size, p.size, of_block(d_q));
  }

 private:
  template <typename T>
  void take(Vectors<const T> x, int64_t count, float scale, float* rows, float* columns) {
    copy_rows(x, count, p.size, padded, scale, rows);
    transpose_rows(rows, count, padded, columns);
  }

  // A register of scores become weights, and the gradients of weights become those of scores.
  void differentiate(int64_t i, const float* lse, const float* delta) {
    const Floats s = load(scores.data + i), weight = exp(s - load(lse + i % kQueries));
    Floats slope = weight * (load(slopes.data + i) - load(delta + i % kQueries));
    if (p.softcap > 0) slope = slope * (weight > 0 ? 1.0f - s * s * (1 / (p.softcap * p.softcap)) : Floats{});
    store(scores.data + i, weight);
    store(slopes.data + i, slope);
  }

  const Problem& p;
  const int64_t padded;
  Buffer<float> q_rows, q, g_rows, g, dq, scores, slopes;
};

template <typename T>
void forward(ffi::ThreadPool& pool, const Problem& p, const T* q, const T* k, const T* v, T* out, float* lse) {
  const KeysAndValues kv(pool, p, k, v);
  parallel_for(pool, p.batch * p.heads * p.blocks(), [&](int64_t i) {
    const int64_t head = i / p.blocks(), block = p.blocks() - 1 - i % p.blocks();  // the last have the most keys
    forward_block(p, kv, q, head / p.heads, head % p.heads, block, out, lse);
  });
}

template <typename T>
void backward(ffi::ThreadPool& pool, const Problem& p, const Given<T>& given, const T* k, const T* v, T* dq, T* dk,
              T* dv) {
  const KeysAndValues kv(pool, p, k, v);
  // The queries of a key head in parts, if heads are too few for the threads: each has sums of its own.
  const int64_t heads = p.batch * p.kv_heads, of_head = p.group() * p.blocks();
  const int64_t parts = std::clamp<int64_t>(ceil_div(4 * pool.num_threads(), heads), 1, of_head);
  Buffer<float> dks(heads * parts * kv.size), dvs(heads * parts * kv.size);
  parallel_for(pool, heads * parts, [&](int64_t i) {
    const int64_t kv_head = i / parts, part = i % parts;
    float *own_dk = dks.data + i * kv.size, *own_dv = dvs.data + i * kv.size;
    std::memset(own_dk, 0, kv.size * sizeof(float));
    std::memset(own_dv, 0, kv.size * sizeof(float));
    Backward work(p);
    for (int64_t j = part; j < of_head; j += parts) {
      const int64_t head = kv_head % p.kv_heads * p.group() + j / p.blocks();
      work.run(kv, given, kv_head / p.kv_heads, head, j % p.blocks(), dq, own_dk, own_dv);
    }
  });
  parallel_for(pool, heads, [&](int64_t i) {
    const int64_t padded = p.padded();
    for (const auto& [sums, to] : {std::pair(dks.data, dk), std::pair(dvs.data, dv)}) {
      float* whole = sums + i * parts * kv.size;
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t j = 0; j < kv.size; j += kLanes) store(whole + j, load(whole + j) + load(whole + part * kv.size + j));
      }
      const auto rows = vectors(to, p.keys, p.kv_heads, p.size, i / p.kv_heads, i % p.kv_heads);
      for (int64_t row = 0; row < p.keys; ++row) {
        for (int64_t j = 0; j < p.size; ++j) put(rows.data + row * rows.stride + j, whole[row * padded + j]);
      }
    }
  });
}

using Int32s = ffi::Buffer<ffi::S32>;
using Float32s = ffi::Buffer<ffi::F32>;

Problem problem(ffi::AnyBuffer q, ffi::AnyBuffer k, Int32s offsets, Int32s q_ids, Int32s kv_ids, bool causal,
                int64_t window, float softcap, float scale) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const auto given = [](const Int32s& ids) { return ids.element_count() ? ids.typed_data() : nullptr; };
  return {of_q[0],         of_q[1], of_q[2], of_q[3], of_k[1], of_k[2], offsets.typed_data(), given(q_ids),
          given(kv_ids), nullptr, causal,  window,  softcap, scale};
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Int32s offsets,
                     Int32s q_ids, Int32s kv_ids, Float32s sinks, bool causal, int64_t window, float softcap,
                     float scale, int64_t /*flops*/, ffi::Result<ffi::AnyBuffer> out, ffi::Result<Float32s> lse) {
  Problem p = problem(q, k, offsets, q_ids, kv_ids, causal, window, softcap, scale);
  if (sinks.element_count()) p.sinks = sinks.typed_data();
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    const auto at = [](ffi::AnyBuffer x) { return static_cast<const T*>(x.untyped_data()); };
    forward(pool, p, at(q), at(k), at(v), static_cast<T*>(out->untyped_data()), lse->typed_data());
  };
  of_type(q, run);
  return ffi::Error::Success();
}

ffi::Error attention_backward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                              ffi::AnyBuffer d_out, Float32s lse, Float32s delta, Int32s offsets, Int32s q_ids,
                              Int32s kv_ids, bool causal, int64_t window, float softcap, float scale, int64_t /*flops*/,
                              ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                              ffi::Result<ffi::AnyBuffer> dv) {
  const Problem p = problem(q, k, offsets, q_ids, kv_ids, causal, window, softcap, scale);
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    const auto at = [](ffi::AnyBuffer x) { return static_cast<const T*>(x.untyped_data()); };
    const auto to = [](ffi::Result<ffi::AnyBuffer>& x) { return static_cast<T*>(x->untyped_data()); };
    const Given<T> given{at(q), at(d_out), lse.typed_data(), delta.typed_data()};
    backward(pool, p, given, at(k), at(v), to(dq), to(dk), to(dv));
  };
  of_type(q, run);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace native

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeAttention, native::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("causal")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("flops")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(NativeAttentionBackward, native::attention_backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<bool>("causal")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("flops")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
