// The spectrum of attention over time: a 32-point FFT with one token in each vector lane.

#pragma once

#include <ATen/Parallel.h>

#include <cmath>

#include "vectors.h"

namespace {

constexpr int64_t HOP = 16;
constexpr int64_t BINS = 17;

struct Twiddles {
  float window[32];       // periodic Hann
  float cosine[32], sine[32];  // of 2 pi i / 32
  Twiddles() {
    for (int i = 0; i < 32; ++i) {
      const double angle = 2 * M_PI * i / 32;
      window[i] = float(0.5 - 0.5 * std::cos(angle));
      cosine[i] = float(std::cos(angle)), sine[i] = float(std::sin(angle));
    }
  }
};

struct Complex {
  vf re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex turned(Complex a) { return {a.im, -a.re}; }  // times -i

// The four-point transform in place.
inline void four(Complex& a, Complex& b, Complex& c, Complex& d) {
  const Complex s = a + c, t = a - c, u = b + d, v = turned(b - d);
  a = s + u, b = t + v, c = s - u, d = t - v;
}

// |X_k|, k = 0 ... 16, of 32 real numbers a lane: a complex transform of 16, taken apart.
inline void magnitudes(const vf* x, const Twiddles& w, vf* out) {
  Complex z[16];
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) z[n] = {x[2 * n], x[2 * n + 1]};
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) four(z[n], z[n + 4], z[n + 8], z[n + 12]);
#pragma GCC unroll 3
  for (int k = 1; k < 4; ++k)
#pragma GCC unroll 3
    for (int n = 1; n < 4; ++n) {
      Complex& v = z[n + 4 * k];
      const float c = w.cosine[2 * n * k], s = w.sine[2 * n * k];
      v = {v.re * c + v.im * s, v.im * c - v.re * s};
    }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) four(z[4 * k], z[4 * k + 1], z[4 * k + 2], z[4 * k + 3]);
  auto Z = [&](int k) -> const Complex& { return z[4 * (k % 4) + k / 4]; };
  auto size = [](vf re, vf im) {
    vf p = re * re + im * im;
    for (int i = 0; i < LANES; ++i) p[i] = std::sqrt(p[i]);
    return p;
  };
  auto positive = [](vf a) { return maximum(a, -a); };
  out[0] = positive(Z(0).re + Z(0).im);
  out[16] = positive(Z(0).re - Z(0).im);
  out[8] = size(Z(8).re, Z(8).im);
#pragma GCC unroll 7
  for (int k = 1; k < 8; ++k) {
    const Complex a = Z(k), b = Z(16 - k);
    const vf er = 0.5f * (a.re + b.re), ei = 0.5f * (a.im - b.im);  // of the even numbers
    const vf or_ = 0.5f * (a.im + b.im), oi = 0.5f * (b.re - a.re);  // of the odd ones
    const float c = w.cosine[k], s = w.sine[k];
    const vf tr = or_ * c + oi * s, ti = oi * c - or_ * s;
    out[k] = size(er + tr, ei + ti);
    out[16 - k] = size(er - tr, ti - ei);
  }
}

// Token-major state [n, width] to lanes [width], a token in each, and back.

template <typename S>
inline void to_lanes(const S* from, int64_t n, int64_t width, float scale, vf* to) {
  for (int64_t i = 0; i < n; ++i) {
    const vf row = load(from + i * width) * scale;
    for (int64_t b = 0; b < LANES; ++b) to[b][i] = row[b];
    if (width > LANES) to[LANES][i] = float(from[i * width + LANES]) * scale;
  }
}

template <typename S>
inline void from_lanes(const vf* from, int64_t n, int64_t width, float scale, S* to) {
  for (int64_t i = 0; i < n; ++i) {
    vf row;
    for (int64_t b = 0; b < LANES; ++b) row[b] = from[b][i];
    store(to + i * width, row * scale);
    if (width > LANES) to[i * width + LANES] = S(from[LANES][i] * scale);
  }
}

// Fold the frame of two neighbouring hops into the average.
inline void fold_frame(vf* average, const vf* before, const vf* now, const Twiddles& w, float keep) {
  vf x[2 * HOP], found[BINS];
  for (int64_t i = 0; i < HOP; ++i) {
    x[i] = before[i] * w.window[i];
    x[HOP + i] = now[i] * w.window[HOP + i];
  }
  magnitudes(x, w, found);
  for (int64_t b = 0; b < BINS; ++b) average[b] = keep * average[b] + (1.0f - keep) * found[b];
}

const Twiddles& twiddles() {
  static const Twiddles made;
  return made;
}

template <typename S>
void advance_all(Tensor& ema, Tensor& previous, const Tensor& attn, float keep, float scale) {
  const int64_t kv_heads = attn.size(1), hops = attn.size(2) / HOP, tokens = attn.size(3);
  constexpr int64_t CHUNK = 128;
  const int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
  const Twiddles& w = twiddles();
  at::parallel_for(0, attn.size(0) * kv_heads * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / chunks / kv_heads, head = task / chunks % kv_heads, first = task % chunks * CHUNK;
      S* e = ema.data_ptr<S>() + row * ema.stride(0) + head * ema.stride(1);
      S* last = previous.data_ptr<S>() + row * previous.stride(0) + head * previous.stride(1);
      const float* rows = attn.const_data_ptr<float>() + (row * kv_heads + head) * attn.size(2) * tokens;
      for (int64_t c = first; c < std::min(first + CHUNK, tokens); c += LANES) {
        const int64_t n = std::min(LANES, tokens - c);
        vf average[BINS] = {}, hop[2][HOP] = {};
        to_lanes(e + c * BINS, n, BINS, 1.0f / scale, average);
        to_lanes(last + c * HOP, n, HOP, 1.0f / scale, hop[1]);
        for (int64_t t = 0; t < hops; ++t) {
          vf *now = hop[t % 2], *before = hop[1 - t % 2];
          for (int64_t i = 0; i < HOP; ++i) {
            const float* from = rows + (t * HOP + i) * tokens + c;
            if (n == LANES)
              now[i] = load(from);
            else
              for (int64_t l = 0; l < n; ++l) now[i][l] = from[l];
          }
          fold_frame(average, before, now, w, keep);
        }
        from_lanes(average, n, BINS, scale, e + c * BINS);
        from_lanes(hop[(hops - 1) % 2], n, HOP, scale, last + c * HOP);
      }
    }
  });
}

// Fold whole hops of attention into the moving average of the spectrum, in place.
//
// ema [R, K, N, 17], previous [R, K, N, 16], float32 or float16, holding `scale` times their values, tokens contiguous;
// attn [R, K, 16 T, N] float32.
void advance_(Tensor ema, Tensor previous, const Tensor& attn, double decay, double scale) {
  if (ema.scalar_type() == at::kHalf)
    advance_all<at::Half>(ema, previous, attn, float(decay), float(scale));
  else
    advance_all<float>(ema, previous, attn, float(decay), float(scale));
}

template <typename S>
void listen_all(Tensor& ema, Tensor& previous, Tensor& waiting, const Tensor& attn, at::IntArrayRef queries,
                const c10::List<bool>& moving, float keep, float scale) {
  const int64_t kv_heads = attn.size(1), count = attn.size(2), tokens = attn.size(3);
  const Twiddles& w = twiddles();
  auto of = [](Tensor& field, int64_t row, int64_t head) {
    return field.data_ptr<S>() + row * field.stride(0) + head * field.stride(1);
  };
  at::parallel_for(0, attn.size(0) * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t row = pair / kv_heads, head = pair % kv_heads;
      if (!moving[row]) continue;
      S *e = of(ema, row, head), *last = of(previous, row, head), *wait = of(waiting, row, head);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t phase = (queries[row] + i) % HOP;
        const float* from = attn.const_data_ptr<float>() + (pair * count + i) * tokens;
        for (int64_t c = 0; c < tokens; ++c) wait[c * HOP + phase] = S(from[c] * scale);
        if (phase + 1 < HOP) continue;
        for (int64_t c = 0; c < tokens; c += LANES) {
          const int64_t n = std::min(LANES, tokens - c);
          vf average[BINS] = {}, before[HOP] = {}, now[HOP] = {};
          to_lanes(e + c * BINS, n, BINS, 1.0f / scale, average);
          to_lanes(last + c * HOP, n, HOP, 1.0f / scale, before);
          to_lanes(wait + c * HOP, n, HOP, 1.0f / scale, now);
          fold_frame(average, before, now, w, keep);
          from_lanes(average, n, BINS, scale, e + c * BINS);
        }
        std::memcpy(last, wait, tokens * HOP * sizeof(S));
        std::fill(wait, wait + tokens * HOP, S(0.0f));
      }
    }
  });
}

// Note the attention of a few queries in `waiting`, and fold each hop of 16 that they finish as `advance_` does.
//
// ema, previous as of `advance_`, waiting [R, K, N, 16] of their type, all of N places or more; attn [R, K, t, N] float32, contiguous; row r has
// made queries[r] queries before these, and is left alone unless moving[r].
void listen_(Tensor ema, Tensor previous, Tensor waiting, const Tensor& attn, at::IntArrayRef queries,
             const c10::List<bool>& moving, double decay, double scale) {
  if (ema.scalar_type() == at::kHalf)
    listen_all<at::Half>(ema, previous, waiting, attn, queries, moving, float(decay), float(scale));
  else
    listen_all<float>(ema, previous, waiting, attn, queries, moving, float(decay), float(scale));
}

}  // namespace
