// Keys and values laid out for products of matrices.
//
// A block of keys becomes the second factor of query * key^T, [D, columns]; a block of values that of probability *
// value, [columns, V]. For bfloat16 two neighbouring rows are interleaved, as the processors' dot products want it.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t COLUMNS = 512;  // tokens of a block of keys
constexpr int64_t STEP = 64;      // a last block is padded to a multiple of this

constexpr int64_t pair(const float*) { return 1; }
constexpr int64_t pair(const BFloat16*) { return 2; }

template <typename T, typename S>
void pack_keys(const S* key, int64_t stride, int64_t count, int64_t columns, int64_t width, int64_t padded, T* out) {
  constexpr int64_t P = pair(static_cast<const T*>(nullptr));
  for (int64_t d = 0; d < padded; d += P)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t p = 0; p < P; ++p)
        out[d * columns + c * P + p] = c < count && d + p < width ? T(float(key[c * stride + d + p])) : T(0.0f);
}

template <typename T, typename S>
void pack_values(const S* value, int64_t stride, int64_t count, int64_t columns, int64_t width, T* out) {
  constexpr int64_t P = pair(static_cast<const T*>(nullptr));
  for (int64_t c = 0; c < columns; c += P)
    for (int64_t v = 0; v < width; ++v)
      for (int64_t p = 0; p < P; ++p)
        out[c * width + v * P + p] = c + p < count ? T(float(value[(c + p) * stride + v])) : T(0.0f);
}

// Whether oneDNN's product of bfloat16 blocks runs here (else its fallback reads the second factor unpaired).
bool takes_pairs() {
  static const bool answer = [] {
    constexpr int64_t n = 32;
    std::vector<BFloat16> a(n * n), b(n * n);
    std::vector<float> c(n * n, 0.0f);
    for (int64_t i = 0; i < n * n; ++i) a[i] = float(i % 7), b[i] = float(i % 11);
    at::native::cpublas::brgemm(n, n, n, n, n, n, false, a.data(), b.data(), c.data(), true);
    at::native::cpublas::brgemm_release(true);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        float expected = 0;
        for (int64_t k = 0; k < n; ++k) expected += float(a[i * n + k]) * float(b[k / 2 * 2 * n + j * 2 + k % 2]);
        if (c[i * n + j] != expected) return false;
      }
    return true;
  }();
  return answer;
}

int64_t padded_columns(int64_t tokens) { return (tokens + STEP - 1) / STEP * STEP; }

template <typename T, typename S>
void pack_all(const Tensor& key, const Tensor& value, const Tensor& starts, const Tensor& lengths, int64_t tokens,
              Tensor& keys, Tensor& values) {
  const int64_t pairs = lengths.numel(), width = key.size(1), value_width = value.size(1);
  const int64_t padded = padded_columns(tokens), depth = keys.size(2) / std::max<int64_t>(padded, 1);
  const int64_t blocks = (padded + COLUMNS - 1) / COLUMNS;
  at::parallel_for(0, pairs * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / blocks, first = task % blocks * COLUMNS;
      const int64_t columns = std::min(COLUMNS, padded - first);
      const int64_t count = std::clamp<int64_t>(lengths.const_data_ptr<int64_t>()[pair] - first, 0, columns);
      const int64_t place = starts.const_data_ptr<int64_t>()[pair] + first;
      T* k = keys.data_ptr<T>() + pair * keys.size(2) + first * depth;
      T* v = values.data_ptr<T>() + pair * values.size(2) + first * value_width;
      pack_keys(key.const_data_ptr<S>() + place * key.stride(0), key.stride(0), count, columns, width, depth, k);
      pack_values(value.const_data_ptr<S>() + place * value.stride(0), value.stride(0), count, columns, value_width, v);
    }
  });
}

// Keys [T, D] and values [T, V], those of head (r, k) from starts[r, k] on, laid out for `attend`: [R, K, N' * D'] and
// [R, K, N' * V], N = tokens of the fullest head.
std::tuple<Tensor, Tensor> pack(const Tensor& key, const Tensor& value, const Tensor& starts, const Tensor& lengths,
                                int64_t tokens) {
  const bool half = key.scalar_type() == at::kBFloat16 && takes_pairs();
  const int64_t padded = padded_columns(tokens), depth = (key.size(1) + 1) / 2 * 2;
  const auto options = key.options().dtype(half ? at::kBFloat16 : at::kFloat);
  Tensor keys = at::empty({lengths.size(0), lengths.size(1), padded * depth}, options);
  Tensor values = at::empty({lengths.size(0), lengths.size(1), padded * value.size(1)}, options);
  if (half)
    pack_all<BFloat16, BFloat16>(key, value, starts, lengths, tokens, keys, values);
  else if (key.scalar_type() == at::kBFloat16)
    pack_all<float, BFloat16>(key, value, starts, lengths, tokens, keys, values);
  else if (key.scalar_type() == at::kHalf)
    pack_all<float, at::Half>(key, value, starts, lengths, tokens, keys, values);
  else
    pack_all<float, float>(key, value, starts, lengths, tokens, keys, values);
  return {keys, values};
}

}  // namespace
