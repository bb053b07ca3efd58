// Products of activations with weights that were laid out for AMX once.
#pragma once

#include <cstdint>

namespace strata {

constexpr int kPanelColumns = 32;  // Outputs of one panel: two tiles side by side.
constexpr int kStepInputs = 32;    // Inputs that one product of tiles takes.
constexpr int kPanelStep = kPanelColumns * kStepInputs;  // Numbers of a panel for one step.

// A weight [outputs, inputs], as [panels][steps][two tiles][16 pairs of inputs][16 outputs]; `bias` [outputs], in the order of
// the panels, or null.
struct Weight {
  const uint16_t* packed;
  const float* bias;
  int num_inputs, num_panels;

  int num_steps() const { return num_inputs / kStepInputs; }
  int64_t panel_size() const { return int64_t(num_steps()) * kPanelStep; }
  const uint16_t* panel(int index) const { return packed + index * panel_size(); }
};

// Where a panel's outputs come from: side by side, or 16 of the first half of the rows and 16 of the second (gates and ups).
enum class PanelOrder { kPlain, kHalves };

// Which output stands at that place.
inline int output_at(int place, int num_outputs, PanelOrder order) {
  if (order == PanelOrder::kPlain) return place;
  const int panel = place / kPanelColumns, column = place % kPanelColumns, half = kPanelColumns / 2;
  return column / half * num_outputs / 2 + panel * half + column % half;
}

// Lays out `rows` [outputs, inputs] of bf16 at `packed`.
void pack_weight(const uint16_t* rows, int num_outputs, int num_inputs, PanelOrder order, uint16_t* packed);

// Activations in bf16. Memory up to a multiple of 16 rows must be readable, whatever is in it.
struct Inputs {
  const uint16_t* data;
  int64_t stride;
  int num_rows;
};

// Panels `first` .. `stop` - 1; `then` is what the thread reads next from memory.
struct Panels {
  int first, stop;
  const uint16_t* then;
};

// The caller holds `Tiles`.

// out [rows, outputs] = in × weightᵀ + bias.
void multiply(const Weight& weight, const Inputs& in, const Panels& panels, uint16_t* out, int64_t stride);

// sums [rows, outputs] += in × weightᵀ + bias, in fp32. Memory up to a multiple of 16 rows is written.
void multiply_add(const Weight& weight, const Inputs& in, const Panels& panels, float* sums, int64_t stride);

// out [rows, outputs / 2] = silu(gate) × up, where the weight is in halves.
void multiply_gated(const Weight& weight, const Inputs& in, const Panels& panels, uint16_t* out, int64_t stride);

}  // namespace strata
