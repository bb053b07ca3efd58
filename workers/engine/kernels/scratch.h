// What one thread keeps while it attends.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"

namespace strata {

constexpr int kWideColumns = 32;    // Queries × heads that a wide item takes at once.
constexpr int kWideKeys = 64;       // Scores of so many keys are kept at once.
constexpr int kNarrowColumns = 16;  // Rows × heads of a group that are still narrow.
constexpr int kPackKeys = 256;      // Keys whose values one thread packs at a time.

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Plan::Scratch {
  alignas(64) float scores[2][kWideKeys * kWideColumns];  // Of two blocks of keys.
  alignas(64) uint32_t weights[2][kWideKeys / 2 * kWideColumns];  // Pairs of keys, as the second operand of a product.
  alignas(64) float tops[kWideColumns], totals[kWideColumns], rescale[kWideColumns];
  alignas(64) int32_t visible[kWideColumns];
  Aligned<uint32_t> queries;  // Pairs of dimensions, as the second operand of a product.
  Aligned<float> sums;
  Aligned<float> column;

  explicit Scratch(const Shape& shape)
      : queries(size_t(shape.head_dim) * kNarrowColumns * std::max(2, shape.num_kv_heads)),
        sums(size_t(shape.head_dim) * std::max(kWideColumns, kNarrowColumns * shape.num_kv_heads)),
        column(size_t(shape.head_dim)) {}
};

}  // namespace strata
