// An attention call, and the softmax of a row of its logits.

#pragma once

#include <cmath>
#include <optional>

#include "vectors.h"

namespace {

constexpr float LOWEST = -1e30f;  // instead of minus infinity, which fast math excludes

struct Call {
  int64_t rows, heads, kv_heads, groups, count, tokens, padded, depth, width, value_width;
  int64_t part;                   // queries of a task
  std::optional<int64_t> ahead;   // stored tokens newer than the first query; without it every query sees all
  float scale, softcap;           // softcap 0: none
  const float* sinks;             // [H] or null
  const bool* mask;               // [R | 1, K | 1, t, N] or null
  int64_t mask_row, mask_head;    // its strides
  const int64_t *starts, *lengths;  // [R, K]
};

constexpr float LOG2E = 1.4426950408889634f;

// The softmax of a row goes through three steps: `bend` what is not plain, find the `peak`, take `powers`. Logits stay
// as they come; `scale` brings them to the base 2.

// Softcap, mask: what only some calls have. Returns the scale of the logits from now on.
float bend(float* s, int64_t limit, const bool* mask, float scale, float softcap) {
  if (softcap > 0) {
    for (int64_t c = 0; c < limit; ++c) s[c] = softcap * std::tanh(s[c] * scale / softcap);
    scale = 1.0f;
  }
  if (mask != nullptr)
    for (int64_t c = 0; c < limit; ++c) s[c] = mask[c] ? s[c] : LOWEST;
  return scale * LOG2E;
}

// The greatest of the first `limit` logits, to the base 2; the row is readable up to the next multiple of LANES.
float peak(float* s, int64_t limit, float scale) {
  const int64_t whole = limit / LANES * LANES;
  for (int64_t c = limit; c < std::min(whole + LANES, (limit + LANES - 1) / LANES * LANES); ++c) s[c] = LOWEST;
  vf m = splat(LOWEST);
  for (int64_t c = 0; c < limit; c += LANES) m = maximum(m, load(s + c));
  const float high = highest(m);
  return high > LOWEST / 2 ? high * scale : LOWEST;
}

// 2^(logit - high), zero from `limit` to `columns` and where it was masked; returns the sum. Callers have called `peak`.
// A second copy, for the observer, goes to `twin` unless it is null.
template <typename T, typename O = float>
float powers(const float* s, int64_t limit, int64_t columns, float scale, float high, T* out, O* twin = nullptr) {
  vf mass{};
  int64_t c = 0;
  for (; c < limit; c += LANES) {
    const vf logit = load(s + c), e = exp2v<!std::is_same_v<T, float>>(logit * scale - high);
    const vf kept = logit > LOWEST / 2 ? e : vf{};
    store(out + c, kept);
    if (twin != nullptr) store(twin + c, kept);
    mass += kept;
  }
  for (; c < columns; c += LANES) {
    store(out + c, vf{});
    if (twin != nullptr) store(twin + c, vf{});
  }
  return total(mass);
}

}  // namespace
