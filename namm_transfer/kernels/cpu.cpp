// Attention that is observed, the spectrum of what was observed, and the storing of tokens, for CPUs.
//
// One pass over the keys (as flash attention does) gives the output, and the probabilities that the group of query
// heads of a KV head pays to each token: the unnormalised probabilities wait in a buffer that fits the second-level
// cache until the row's sum is known. The spectrum is a 32-point FFT with one token in each vector lane.
//
// Shape legend: R rows, H query heads, K KV heads, G = H / K, t queries of a tile, N tokens, D key width, V value width.
// Matrix products are oneDNN's, through ATen; nothing here depends on the instruction set.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t LANES = 16;
constexpr int64_t HOP = 16;
constexpr int64_t BINS = 17;
constexpr int64_t COLUMNS = 512;  // tokens of a block of keys
constexpr int64_t STEP = 64;      // a last block is padded to a multiple of this
constexpr float LOWEST = -1e30f;  // instead of minus infinity, which fast math excludes

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

// -- bfloat16 ---------------------------------------------------------------------------------------------------------

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

// -- packing ----------------------------------------------------------------------------------------------------------
// A block of keys becomes the second factor of query * key^T, [D, columns]; a block of values that of probability *
// value, [columns, V]. For bfloat16 two neighbouring rows are interleaved, as the processors' dot products want it.

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

// -- attention --------------------------------------------------------------------------------------------------------

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

// A few queries (decoding): no product of matrices pays here, the keys and values are read as they lie.

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

// Attention of a tile.
//
// query [R, H, t, D]; key [T, D] and value [T, V], those of head (r, k) from starts[r, k] on, lengths [R, K] of them in
// use, tokens = N at most; packed: key and value as made by `pack`, or none for a few queries; `ahead`: tokens newer than
// the first query (causal), or none (every query sees every token); mask [R | 1, K | 1, t, N] bool; softcap 0: none;
// sinks [H] float32.
// Returns the output [R, H, t, V], and the probabilities averaged over each group, [R, K, t, N] float32, if asked for.
std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& starts,
                                  const Tensor& lengths, int64_t tokens, const std::optional<Tensor>& packed_key,
                                  const std::optional<Tensor>& packed_value, std::optional<int64_t> ahead,
                                  const std::optional<Tensor>& mask, double scale, double softcap,
                                  const std::optional<Tensor>& sinks, bool observe) {
  Call call{};
  call.rows = query.size(0), call.heads = query.size(1), call.count = query.size(2), call.width = query.size(3);
  call.kv_heads = lengths.size(1), call.groups = call.heads / call.kv_heads, call.tokens = tokens;
  call.padded = padded_columns(call.tokens), call.depth = (call.width + 1) / 2 * 2, call.value_width = value.size(1);
  call.part = std::min(call.count, std::max<int64_t>(8, 64 / call.groups / 8 * 8));
  call.ahead = ahead, call.scale = float(scale), call.softcap = float(softcap);
  call.starts = starts.const_data_ptr<int64_t>(), call.lengths = lengths.const_data_ptr<int64_t>();
  if (sinks) call.sinks = sinks->const_data_ptr<float>();
  if (mask) {
    call.mask = mask->const_data_ptr<bool>();
    call.mask_row = mask->size(0) > 1 ? mask->stride(0) : 0;
    call.mask_head = mask->size(1) > 1 ? mask->stride(1) : 0;
  }
  Tensor out = at::empty({call.rows, call.heads, call.count, call.value_width}, query.options());
  Tensor attn = at::empty({call.rows, call.kv_heads, call.count, observe ? call.tokens : 0},
                          query.options().dtype(at::kFloat));
  const at::ScalarType type = query.scalar_type();
  if (!packed_key) {
    if (type == at::kBFloat16)
      attend_few<BFloat16>(call, query, key, value, out, attn);
    else if (type == at::kHalf)
      attend_few<at::Half>(call, query, key, value, out, attn);
    else
      attend_few<float>(call, query, key, value, out, attn);
  } else if (packed_key->scalar_type() == at::kBFloat16) {
    attend_all<BFloat16, BFloat16>(call, query, *packed_key, *packed_value, out, attn);
  } else if (type == at::kBFloat16) {
    attend_all<float, BFloat16>(call, query, *packed_key, *packed_value, out, attn);
  } else if (type == at::kHalf) {
    attend_all<float, at::Half>(call, query, *packed_key, *packed_value, out, attn);
  } else {
    attend_all<float, float>(call, query, *packed_key, *packed_value, out, attn);
  }
  return {out, attn};
}

// -- spectrum ---------------------------------------------------------------------------------------------------------

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
// ema, previous as of `advance_`, waiting [R, K, N, 16] of their type; attn [R, K, t, N] float32, contiguous; row r has
// made queries[r] queries before these, and is left alone unless moving[r].
void listen_(Tensor ema, Tensor previous, Tensor waiting, const Tensor& attn, at::IntArrayRef queries,
             const c10::List<bool>& moving, double decay, double scale) {
  if (ema.scalar_type() == at::kHalf)
    listen_all<at::Half>(ema, previous, waiting, attn, queries, moving, float(decay), float(scale));
  else
    listen_all<float>(ema, previous, waiting, attn, queries, moving, float(decay), float(scale));
}

// -- storing ----------------------------------------------------------------------------------------------------------

// The length of the fullest head, of the emptiest, and the free places of the head with the fewest.
std::tuple<int64_t, int64_t, int64_t> extent(const Tensor& lengths, const Tensor& room) {
  const int64_t *used = lengths.const_data_ptr<int64_t>(), *held = room.const_data_ptr<int64_t>();
  int64_t most = 0, fewest = std::numeric_limits<int64_t>::max(), free = fewest;
  for (int64_t i = 0; i < lengths.numel(); ++i) {
    most = std::max(most, used[i]), fewest = std::min(fewest, used[i]);
    free = std::min(free, held[i] - used[i]);
  }
  return {most, fewest, free};
}

// Append n tokens to every head of the rows that are `moving`, row r's at the positions from seen[r] on.
//
// keys [T, D] and values [T, V], those of head (r, k) from starts[r, k] on; positions [R, K, C] int32 and state [R, K,
// C, ...], which starts at zero; lengths [R, K] tokens in use, counted on; new_keys [R, K, n, D], new_values [R, K, n, V].
// Returns the `extent`.
std::tuple<int64_t, int64_t, int64_t> append_(Tensor keys, Tensor values, const Tensor& starts, const Tensor& room,
                                              Tensor lengths, Tensor positions, at::TensorList state,
                                              const Tensor& new_keys, const Tensor& new_values,
                                              at::IntArrayRef seen, const c10::List<bool>& moving) {
  const int64_t heads = lengths.size(1), count = new_keys.size(2);
  const auto fits = [&](const Tensor& wide, const Tensor& fresh) {
    return fresh.size(0) == lengths.size(0) && fresh.size(1) == heads && fresh.size(2) == count &&
           fresh.size(3) == wide.size(1) && fresh.scalar_type() == wide.scalar_type();
  };
  TORCH_CHECK(fits(keys, new_keys) && fits(values, new_values), "append_: tokens do not fit the store");
  int64_t* used = lengths.data_ptr<int64_t>();
  auto copy = [&](Tensor& to, const Tensor& from, int64_t row, int64_t head, int64_t place) {
    const int64_t size = from.element_size();
    const char* source = static_cast<const char*>(from.const_data_ptr()) +
                         (row * from.stride(0) + head * from.stride(1)) * size;
    char* target = static_cast<char*>(to.mutable_data_ptr()) + place * to.stride(0) * size;
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(target + i * to.stride(0) * size, source + i * from.stride(2) * size, from.size(3) * size);
  };
  for (int64_t row = 0; row < lengths.size(0); ++row) {
    if (!moving[row]) continue;
    for (int64_t head = 0; head < heads; ++head) {
      int64_t& length = used[row * heads + head];
      const int64_t place = starts.const_data_ptr<int64_t>()[row * heads + head] + length;
      copy(keys, new_keys, row, head, place);
      copy(values, new_values, row, head, place);
      int32_t* p = positions.data_ptr<int32_t>() + row * positions.stride(0) + head * positions.stride(1) + length;
      for (int64_t i = 0; i < count; ++i) p[i] = int32_t(seen[row] + i);
      for (const Tensor& field : state) {
        const int64_t size = field.element_size(), step = field.stride(2);
        const int64_t at = row * field.stride(0) + head * field.stride(1) + length * step;
        std::memset(static_cast<char*>(field.mutable_data_ptr()) + at * size, 0, count * step * size);
      }
      length += count;
    }
  }
  return extent(lengths, room);
}

// Forget the tokens outside `mask` [R, K, N]; the others move to the front of their head's places, in their order.
//
// keys, values, starts, lengths as of `append_`; fields [R, K, C, ...], all of the padded ones.
// Returns the `extent`.
std::tuple<int64_t, int64_t, int64_t> keep_(Tensor keys, Tensor values, const Tensor& starts, const Tensor& room,
                                            Tensor lengths, at::TensorList fields, const Tensor& mask) {
  const int64_t heads = lengths.size(1);
  at::parallel_for(0, lengths.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t row = pair / heads, head = pair % heads;
      const bool* kept = mask.const_data_ptr<bool>() + row * mask.stride(0) + head * mask.stride(1);
      int64_t& length = lengths.data_ptr<int64_t>()[pair];
      int64_t left = 0;
      auto close_up = [&](const Tensor& field, int64_t from, int64_t step) {
        const int64_t size = step * field.element_size();
        char* data = static_cast<char*>(field.mutable_data_ptr()) + from * field.element_size();
        int64_t to = 0;
        for (int64_t i = 0; i < length; ++i) {
          if (!kept[i * mask.stride(2)]) continue;
          if (i != to) std::memcpy(data + to * size, data + i * size, size);
          ++to;
        }
        left = to;
      };
      const int64_t place = starts.const_data_ptr<int64_t>()[pair];
      close_up(keys, place * keys.stride(0), keys.stride(0));
      close_up(values, place * values.stride(0), values.stride(0));
      for (const Tensor& field : fields)
        close_up(field, row * field.stride(0) + head * field.stride(1), field.stride(2));
      length = left;
    }
  });
  return extent(lengths, room);
}

}  // namespace

TORCH_LIBRARY(namm_transfer, m) {
  m.def("pack(Tensor key, Tensor value, Tensor starts, Tensor lengths, int tokens) -> (Tensor, Tensor)", &pack);
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor starts, Tensor lengths, int tokens, Tensor? packed_key, "
      "Tensor? packed_value, int? ahead, Tensor? mask, float scale, float softcap, Tensor? sinks, bool observe) -> "
      "(Tensor, Tensor)",
      &attend);
  m.def("advance_(Tensor(a!) ema, Tensor(b!) previous, Tensor attn, float decay, float scale) -> ()", &advance_);
  m.def(
      "listen_(Tensor(a!) ema, Tensor(b!) previous, Tensor(c!) waiting, Tensor attn, int[] queries, bool[] moving, "
      "float decay, float scale) -> ()",
      &listen_);
  m.def(
      "append_(Tensor(a!) keys, Tensor(b!) values, Tensor starts, Tensor room, Tensor(c!) lengths, Tensor(d!) "
      "positions, Tensor(e!)[] state, Tensor new_keys, Tensor new_values, int[] seen, bool[] moving) -> (int, int, int)",
      &append_);
  m.def(
      "keep_(Tensor(a!) keys, Tensor(b!) values, Tensor starts, Tensor room, Tensor(c!) lengths, Tensor(d!)[] fields, "
      "Tensor mask) -> (int, int, int)",
      &keep_);
}
