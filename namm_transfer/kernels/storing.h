// Tokens that come and go: the store's fields in one pass, wherever its rows are.

#pragma once

#include <ATen/Parallel.h>

#include <limits>
#include <tuple>

#include "vectors.h"

namespace {

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
