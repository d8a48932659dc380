// Sixteen float32 lanes at a time, in the compiler's own vectors: nothing here depends on the instruction set.

#pragma once

#include <ATen/core/Tensor.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <utility>

namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t LANES = 16;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

inline vf splat(float x) { return vf{} + x; }

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }

inline vf maximum(vf a, vf b) { return a > b ? a : b; }

inline float highest(vf x) {
  float m = x[0];
  for (int i = 1; i < LANES; ++i) m = std::max(m, x[i]);
  return m;
}

inline float total(vf x) {
  float s = 0;
  for (int i = 0; i < LANES; ++i) s += x[i];
  return s;
}

// Lanes whose numbers differ in the bit `s` change places.
template <int s, int... lane>
inline vf swapped(vf x, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, x, (lane ^ s)...);
#else
  return __builtin_shuffle(x, vi{(lane ^ s)...});
#endif
}

// A round of transposing and adding: of the first 2 s vectors, x[i] and x[i + s] become one whose lanes with the bit `s`
// hold sums of the latter, the others sums of the former.
template <int s>
inline void fold(vf* x) {
  constexpr std::make_integer_sequence<int, LANES> lanes;
  const vi set = (vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} & s) != 0;
  for (int i = 0; i < s; ++i) x[i] = (set ? x[i + s] : x[i]) + swapped<s>(set ? x[i] : x[i + s], lanes);
}

// The totals of 16 vectors, one in each lane; overwrites them.
inline vf totals(vf* x) {
  fold<8>(x), fold<4>(x), fold<2>(x), fold<1>(x);
  return x[0];
}

// 2^x for x <= 0: relative error 2e-7, or 8e-5 where the result is rounded to half precision anyway.
template <bool rough>
inline vf exp2v(vf x) {
  x = maximum(x, splat(-126.0f));
  const vi n = __builtin_convertvector(x - 0.5f, vi);  // towards zero, so to the nearest
  const vf f = x - __builtin_convertvector(n, vf);
  const vi bits = (n + 127) << 23;
  vf scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  vf p;  // on [-0.5, 0.5]
  if constexpr (rough) {
    p = 5.5088680e-2f * f + 2.4260405e-1f;
    p = p * f + 6.9327624e-1f;
    p = p * f + 9.9992894e-1f;
  } else {
    p = 1.5403530e-4f * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
  }
  return p * scale;
}

// Half precision in memory.

typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(64)));

inline vf load(const BFloat16* p) {
  vh h;
  std::memcpy(&h, p, sizeof(h));
  const vu wide = __builtin_convertvector(h, vu) << 16;
  vf x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

inline void store(BFloat16* p, vf x) {  // rounds to nearest even; no NaN comes here
#ifdef __AVX512BF16__
  const __m256bh narrow = _mm512_cvtneps_pbh(__m512(x));
  std::memcpy(p, &narrow, sizeof(narrow));
#else
  vu bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vh h = __builtin_convertvector(rounded, vh);
  std::memcpy(p, &h, sizeof(h));
#endif
}

inline vf load(const at::Half* p) {
#ifdef __AVX512F__
  __m256i h;
  std::memcpy(&h, p, sizeof(h));
  return vf(_mm512_cvtph_ps(h));
#else
  vf x;
  for (int i = 0; i < LANES; ++i) x[i] = float(p[i]);
  return x;
#endif
}

inline void store(at::Half* p, vf x) {
#ifdef __AVX512F__
  const __m256i h = _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof(h));
#else
  for (int i = 0; i < LANES; ++i) p[i] = x[i];
#endif
}

}  // namespace
