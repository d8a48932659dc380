// Attention of many queries, in products of matrices (oneDNN's, through ATen).
//
// One pass over the keys (as flash attention does) gives the output, and the probabilities that the group of query
// heads of a KV head pays to each token: the unnormalised probabilities wait in a buffer that fits the second-level
// cache until the row's sum is known.

#pragma once

#include "packing.h"
#include "softmax.h"

namespace {

template <typename T, typename S>
struct Worker {
  static constexpr bool PAIRED = std::is_same_v<T, BFloat16>;
  // What is observed waits here until the row's sum is known: float16 has three bits more than bfloat16.
  using Observed = std::conditional_t<PAIRED, at::Half, float>;

  const Call& call;
  std::vector<T> query, block;
  std::vector<Observed> attn;
  std::vector<float> logits, out, top, sum, tops;

  explicit Worker(const Call& call, bool observe) : call(call) {
    const int64_t m = call.part * call.groups, blocks = (call.padded + COLUMNS - 1) / COLUMNS;
    query.resize(m * call.depth);
    block.resize(m * std::min(call.padded, COLUMNS));
    attn.resize(observe ? m * call.padded : 0);
    logits.resize(m * COLUMNS);
    out.resize(m * call.value_width);
    top.resize(m), sum.resize(m), tops.resize(m * blocks);
  }

  // Queries [first, first + n) of one KV head.
  void run(int64_t row, int64_t head, int64_t first, int64_t n, const Tensor& q, const T* keys, const T* values,
           S* result, float* observed) {
    const int64_t groups = call.groups, m = groups * n, D = call.depth, V = call.value_width;
    const int64_t length = call.lengths[row * call.kv_heads + head];
    auto limit = [&](int64_t i) { return call.ahead ? std::max<int64_t>(0, length - *call.ahead + first + i) : length; };
    const int64_t last = limit(n - 1), blocks = (last + COLUMNS - 1) / COLUMNS;

    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < n; ++i) {
        const S* from = q.const_data_ptr<S>() + row * q.stride(0) + (head * groups + g) * q.stride(1) +
                        (first + i) * q.stride(2);
        T* to = query.data() + (g * n + i) * D;
        for (int64_t d = 0; d < call.width; ++d) to[d] = T(float(from[d]));
        for (int64_t d = call.width; d < D; ++d) to[d] = T(0.0f);
        const bool sink = call.sinks != nullptr;
        top[g * n + i] = sink ? call.sinks[head * groups + g] * LOG2E : LOWEST;
        sum[g * n + i] = sink ? 1.0f : 0.0f;
      }
    std::fill(out.begin(), out.begin() + m * V, 0.0f);

    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t start = j * COLUMNS, columns = std::min(COLUMNS, call.padded - start);
      const int64_t used = std::min(columns, padded_columns(last - start));
      at::native::cpublas::brgemm(
          m, used, D, D, columns, used, false, query.data(), keys + start * D, logits.data(), PAIRED);
      T* p = block.data();  // [m, used]
      Observed* twin = observed == nullptr ? nullptr : attn.data() + m * start;
      for (int64_t x = 0; x < m; ++x) {
        const int64_t i = x % n, own = std::clamp<int64_t>(limit(i) - start, 0, used);
        float* s = logits.data() + x * used;
        const bool* mask = call.mask == nullptr ? nullptr
                                                : call.mask + row * call.mask_row + head * call.mask_head +
                                                      (first + i) * call.tokens + start;
        const float scale = bend(s, own, mask, call.scale, call.softcap);
        const float high = std::max(top[x], peak(s, own, scale));
        if (high <= LOWEST) {  // nothing to attend to so far
          std::fill(p + x * used, p + (x + 1) * used, T(0.0f));
          if (twin != nullptr) std::fill(twin + x * used, twin + (x + 1) * used, Observed(0.0f));
          tops[x * blocks + j] = LOWEST;
          continue;
        }
        const float mass =
            powers(s, own, used, scale, high, p + x * used, twin == nullptr ? nullptr : twin + x * used);
        if (high > top[x]) {
          const float shrink = std::exp2(std::max(top[x] - high, -126.0f)) * (top[x] > LOWEST);
          sum[x] *= shrink;
          for (int64_t v = 0; v < V; ++v) out[x * V + v] *= shrink;
          top[x] = high;
        }
        sum[x] += mass;
        tops[x * blocks + j] = high;
      }
      at::native::cpublas::brgemm(m, V, used, used, V, V, true, p, values + start * V, out.data(), PAIRED);
    }

    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t x = g * n + i;
        const float scale = sum[x] > 0 ? 1.0f / sum[x] : 0.0f;
        S* to = result + ((head * groups + g) * call.count + first + i) * V;
        for (int64_t v = 0; v < V; ++v) to[v] = S(out[x * V + v] * scale);
        for (int64_t j = 0; j < blocks; ++j) {  // from here on: what a block's entries have to be multiplied by
          float& t = tops[x * blocks + j];
          t = t > LOWEST ? std::exp2(std::max(t - top[x], -126.0f)) * scale / groups : 0.0f;
        }
      }
    if (observed == nullptr) return;
    for (int64_t i = 0; i < n; ++i) {
      float* to = observed + (first + i) * call.tokens;
      for (int64_t j = 0; j < blocks; ++j) {
        const int64_t start = j * COLUMNS, columns = std::min(COLUMNS, call.padded - start);
        const int64_t used = std::min(columns, padded_columns(last - start));
        const Observed* p = attn.data() + m * start + i * used;
        const int64_t whole = std::min(used, call.tokens - start) / LANES * LANES;
        for (int64_t c = 0; c < whole; c += LANES) {
          vf mean = load(p + c) * tops[i * blocks + j];
          for (int64_t g = 1; g < groups; ++g) mean += load(p + g * n * used + c) * tops[(g * n + i) * blocks + j];
          store(to + start + c, mean);
        }
        for (int64_t c = whole; c < std::min(used, call.tokens - start); ++c) {
          float mean = 0;
          for (int64_t g = 0; g < groups; ++g) mean += float(p[g * n * used + c]) * tops[(g * n + i) * blocks + j];
          to[start + c] = mean;
        }
      }
      const int64_t written = blocks == 0 ? 0 : std::min(call.tokens, (blocks - 1) * COLUMNS + padded_columns(last - (blocks - 1) * COLUMNS));
      std::fill(to + written, to + call.tokens, 0.0f);
    }
  }
};

template <typename T, typename S>
void attend_all(const Call& call, const Tensor& query, const Tensor& keys, const Tensor& values, Tensor& out, Tensor& attn) {
  const int64_t parts = (call.count + call.part - 1) / call.part;
  const bool observe = attn.numel() > 0;
  at::parallel_for(0, call.rows * call.kv_heads * parts, 1, [&](int64_t begin, int64_t end) {
    Worker<T, S> worker(call, observe);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts / call.kv_heads, head = task / parts % call.kv_heads;
      const int64_t first = task % parts * call.part, pair = row * call.kv_heads + head;
      worker.run(row, head, first, std::min(call.part, call.count - first), query,
                 keys.const_data_ptr<T>() + pair * keys.size(2), values.const_data_ptr<T>() + pair * values.size(2),
                 out.data_ptr<S>() + row * call.heads * call.count * call.value_width,
                 observe ? attn.data_ptr<float>() + pair * call.count * call.tokens : nullptr);
    }
    at::native::cpublas::brgemm_release(Worker<T, S>::PAIRED);
  });
}

}  // namespace
