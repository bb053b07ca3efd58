// What lies between the products of a layer: norms, rotation, gates. One pass over memory each.
#pragma once

#include <cstdint>

namespace strata {

// sums [rows, width] += added (bf16); out = sums normalised, times weight.
struct AddNorm {
  float* sums;
  const uint16_t* added;
  const float* weight;
  float epsilon;
  int64_t num_rows, width;
  uint16_t* out;
};
void add_norm(const AddNorm& work, int num_threads);

// heads [rows, num_heads + 2 * num_kv_heads, head_dim]: q and k are normalised if there are weights, and rotated; q goes to
// q_out [rows, num_heads, head_dim], k and v to their slots of the caches.
struct RotateWrite {
  const uint16_t* heads;
  const float *cosines, *sines;  // [rows, head_dim / 2]
  const float *q_norm, *k_norm;  // [head_dim], or null.
  float epsilon;
  const int64_t* slots;
  uint16_t *q_out, *k_cache, *v_cache;
  int64_t num_rows;
  int num_heads, num_kv_heads, head_dim;
};
void rotate_write(const RotateWrite& work, int num_threads);

// out [rows, width] = silu(gate) * up, of gate_up [rows, 2 * width].
struct Gated {
  const uint16_t* gate_up;
  int64_t num_rows, width;
  uint16_t* out;
};
void gated(const Gated& work, int num_threads);

}  // namespace strata
