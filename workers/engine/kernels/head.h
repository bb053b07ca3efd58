// The language-model head: few rows against a large vocabulary.
#pragma once

#include <cstdint>

namespace strata {

// out [rows, vocab] = rows [rows, width] (fp32) times weight [vocab, width] (bf16), as exact as in fp32.
struct Head {
  const float* rows;
  const uint16_t* weight;
  int64_t num_rows, vocab, width;
  float* out;
};
void apply_head(const Head& work, int num_threads);

}  // namespace strata
