// Attention that is observed, the spectrum of what was observed, and the storing of tokens, for CPUs: the operators.
//
// Shape legend: R rows, H query heads, K KV heads, G = H / K, t queries of a tile, N tokens, D key width, V value width.

#include <torch/library.h>

#include "attend_blocks.h"
#include "attend_few.h"
#include "spectrum.h"
#include "storing.h"

namespace {

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
