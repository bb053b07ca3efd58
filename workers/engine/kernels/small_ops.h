// What lies between the products of a layer: norms and rotation, row by row.
#pragma once

#include <cstdint>

#include "attention.h"

namespace strata {

// A norm over `width` numbers, which is a multiple of 16.
struct Norm {
  const float* weight;
  float epsilon;
  int width;
};

// `out` (bf16) = `row` normalised, times the weight.
void normalise(const Norm& norm, const float* row, uint16_t* out);
// The same in fp32.
void normalise(const Norm& norm, const float* row, float* out);

// `out` (fp32) = `row` (bf16).
void widen_row(const uint16_t* row, int width, float* out);

// Heads of one token: `heads` [num_heads + 2 * num_kv_heads, head_dim]. q and k are normalised if there are weights, and
// rotated; q goes to `q_out`, k and v to the token's slot.
struct RotateWrite {
  Shape shape;
  const float *q_norm, *k_norm;  // [head_dim], or null.
  float epsilon;
};
struct HeadsOut {
  uint16_t *q, *k, *v;
};
void rotate_write(const RotateWrite& work, const uint16_t* heads, const float* cosines, const float* sines,
                  const HeadsOut& out);

}  // namespace strata
