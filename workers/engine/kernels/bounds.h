// What no kernel can do faster on this machine, measured.
#pragma once

namespace strata {

struct Bounds {
  double bytes_per_s;       // Read from memory, once, in order.
  double operations_per_s;  // Of the matrix units: multiplications and additions of bf16.
};

// Takes about half a second.
Bounds measure_bounds(int num_threads);

}  // namespace strata
