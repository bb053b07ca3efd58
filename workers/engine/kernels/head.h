// The language-model head: few rows against a large vocabulary.
#pragma once

#include <cstdint>

#include "huge_pages.h"

namespace strata {

class Head {
 public:
  // `weight` [vocab, width] in bf16 is copied. Both are multiples: of 16 and of 32.
  Head(const uint16_t* weight, int vocab, int width);

  int width() const { return width_; }
  // out [rows, vocab] = rows [rows, width] × weightᵀ, as exact as in fp32.
  void apply(const float* rows, int num_rows, float* out, int num_threads) const;

 private:
  struct Work;

  void apply_panel(const Work& work, int panel, int row_tile) const;

  int vocab_, width_;
  HugePages packed_;  // As the weight of a product; the last panel may be filled up with zeros.
};

}  // namespace strata
