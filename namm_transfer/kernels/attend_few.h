// Attention of a few queries (decoding): no product of matrices pays here, the keys and values are read as they lie.

#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "softmax.h"

namespace {

// Of AVX-512's 32 registers, 3 * 8 hold sums.
//
// m sums of `count` rows of n * LANES values, each times a weight: those of sum x from weights + x * padded on, the sum
// to out + x * width.
template <int m, int n, typename S>
inline void weigh(const float* weights, int64_t padded, const S* values, int64_t stride, int64_t count, float* out,
                  int64_t width) {
  vf sums[m][n] = {};
  for (int64_t c = 0; c < count; ++c)
#pragma GCC unroll 8
    for (int a = 0; a < n; ++a) {
      const vf value = load(values + c * stride + a * LANES);
#pragma GCC unroll 3
      for (int x = 0; x < m; ++x) sums[x][a] += weights[x * padded + c] * value;
    }
  for (int x = 0; x < m; ++x)
    for (int a = 0; a < n; ++a) store(out + x * width + a * LANES, sums[x][a]);
}

// The same of any width.
template <int m, typename S>
void weigh_all(const float* weights, int64_t padded, const S* values, int64_t stride, int64_t count, float* out,
               int64_t width) {
  int64_t d = 0;
  for (; d + 8 * LANES <= width; d += 8 * LANES) weigh<m, 8>(weights, padded, values + d, stride, count, out + d, width);
  for (; d + 4 * LANES <= width; d += 4 * LANES) weigh<m, 4>(weights, padded, values + d, stride, count, out + d, width);
  for (; d + LANES <= width; d += LANES) weigh<m, 1>(weights, padded, values + d, stride, count, out + d, width);
  for (; d < width; ++d)
    for (int x = 0; x < m; ++x) {
      float sum = 0;
      for (int64_t c = 0; c < count; ++c) sum += weights[x * padded + c] * float(values[c * stride + d]);
      out[x * width + d] = sum;
    }
}

template <typename S>
void attend_few(const Call& call, const Tensor& query, const Tensor& key, const Tensor& value, Tensor& out,
                Tensor& attn) {
  constexpr int64_t CHUNK = 256;
  const int64_t m = call.groups * call.count, N = call.tokens, D = call.width, V = call.value_width;
  const int64_t chunks = (N + CHUNK - 1) / CHUNK, pairs = call.rows * call.kv_heads;
  const int64_t padded = chunks * CHUNK, whole = D / LANES * LANES;
  std::vector<float> p(pairs * m * padded), top(pairs * m * chunks), sum(pairs * m * chunks);
  std::vector<float> outs(pairs * chunks * m * V), q(pairs * m * D);
  for (int64_t x = 0; x < pairs * m; ++x) {
    const int64_t row = x / m / call.kv_heads, head = x / m % call.kv_heads * call.groups + x % m / call.count;
    const S* from = query.const_data_ptr<S>() + row * query.stride(0) + head * query.stride(1) +
                    x % call.count * query.stride(2);
    for (int64_t d = 0; d < D; ++d) q[x * D + d] = float(from[d]);
  }
  auto limit = [&](int64_t pair, int64_t i) {
    return call.ahead ? std::max<int64_t>(0, call.lengths[pair] - *call.ahead + i) : call.lengths[pair];
  };
  at::parallel_for(0, pairs * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / chunks, row = pair / call.kv_heads, head = pair % call.kv_heads;
      const int64_t start = task % chunks * CHUNK, last = std::min(N, start + CHUNK);
      const S* k = key.const_data_ptr<S>() + call.starts[pair] * key.stride(0);
      const S* v = value.const_data_ptr<S>() + call.starts[pair] * value.stride(0);
      float* logits = p.data() + pair * m * padded + start;
      const int64_t used = std::clamp<int64_t>(limit(pair, call.count - 1) - start, 0, last - start);
      for (int64_t c = 0; c < used; c += LANES) {  // sixteen keys at a time, so that their sums are taken together
        const S* from[LANES];
        for (int64_t l = 0; l < LANES; ++l) from[l] = k + (start + std::min(c + l, used - 1)) * key.stride(0);
        for (int64_t x = 0; x < m; ++x) {
          const float* own = q.data() + (pair * m + x) * D;
          vf dot[LANES] = {};
          for (int64_t d = 0; d < whole; d += LANES) {
            const vf part = load(own + d);
#pragma GCC unroll 16
            for (int64_t l = 0; l < LANES; ++l) dot[l] += part * load(from[l] + d);
          }
          vf sums = totals(dot);
          for (int64_t d = whole; d < D; ++d)
            for (int64_t l = 0; l < LANES; ++l) sums[l] += own[d] * float(from[l][d]);
          store(logits + x * padded + c, sums);
        }
      }
      for (int64_t x = 0; x < m; ++x) {
        const int64_t i = x % call.count, columns = (used + LANES - 1) / LANES * LANES;
        const bool* mask = call.mask == nullptr
                               ? nullptr
                               : call.mask + row * call.mask_row + head * call.mask_head + i * N + start;
        float* s = logits + x * padded;
        const int64_t own = std::clamp<int64_t>(limit(pair, i) - start, 0, used);
        const float scale = bend(s, own, mask, call.scale, call.softcap);
        const float high = peak(s, own, scale);
        sum[(pair * m + x) * chunks + task % chunks] = powers(s, own, columns, scale, high, s);
        top[(pair * m + x) * chunks + task % chunks] = high;
      }
      float* o = outs.data() + task * m * V;
      const S* from = v + start * value.stride(0);
      int64_t x = 0;  // queries that share a pass over the values
      for (; x + 3 <= m; x += 3) weigh_all<3>(logits + x * padded, padded, from, value.stride(0), used, o + x * V, V);
      for (; x < m; ++x) weigh_all<1>(logits + x * padded, padded, from, value.stride(0), used, o + x * V, V);
    }
  });
  std::vector<float> factor(m * chunks), whole_out(V);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t x = 0; x < m; ++x) {
      const float* t = top.data() + (pair * m + x) * chunks;
      const float* s = sum.data() + (pair * m + x) * chunks;
      const int64_t head = pair % call.kv_heads * call.groups + x / call.count;
      float high = call.sinks == nullptr ? LOWEST : call.sinks[head] * LOG2E;
      for (int64_t c = 0; c < chunks; ++c) high = std::max(high, t[c]);
      float mass = call.sinks == nullptr ? 0.0f : std::exp2(std::max(call.sinks[head] * LOG2E - high, -126.0f));
      for (int64_t c = 0; c < chunks; ++c) {
        factor[x * chunks + c] = t[c] > LOWEST ? std::exp2(std::max(t[c] - high, -126.0f)) : 0.0f;
        mass += factor[x * chunks + c] * s[c];
      }
      for (int64_t c = 0; c < chunks; ++c) factor[x * chunks + c] *= mass > 0 ? 1.0f / mass : 0.0f;
      S* to = out.data_ptr<S>() + ((pair / call.kv_heads * call.heads + head) * call.count + x % call.count) * V;
      std::fill(whole_out.begin(), whole_out.end(), 0.0f);
      for (int64_t c = 0; c < chunks; ++c) {
        const float* part = outs.data() + ((pair * chunks + c) * m + x) * V;
        for (int64_t d = 0; d < V; ++d) whole_out[d] += factor[x * chunks + c] * part[d];
      }
      for (int64_t d = 0; d < V; ++d) to[d] = S(whole_out[d]);
    }
    if (attn.numel() == 0) continue;
    for (int64_t i = 0; i < call.count; ++i) {
      float* to = attn.data_ptr<float>() + (pair * call.count + i) * N;
      const float* from = p.data() + pair * m * padded;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t start = c * CHUNK, n = std::min(CHUNK, N - start);
        const int64_t used = std::clamp<int64_t>(limit(pair, call.count - 1) - start, 0, n);
        std::fill(to + start, to + start + n, 0.0f);
        for (int64_t g = 0; g < call.groups; ++g) {
          const int64_t x = g * call.count + i;
          const float share = factor[x * chunks + c] / call.groups;
          for (int64_t j = start; j < start + used; ++j) to[j] += share * from[x * padded + j];
        }
      }
    }
  }
}

}  // namespace
