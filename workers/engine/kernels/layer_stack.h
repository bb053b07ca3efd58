// All layers of a decoder over the rows of a step, on one team of threads and without a word of Python between them.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "attention.h"
#include "huge_pages.h"
#include "products.h"
#include "small_ops.h"

namespace strata {

struct StackShape {
  Shape attention;
  int hidden, inner, num_layers;
  float epsilon;

  int heads_width() const { return attention.num_heads * attention.head_dim; }
  int kv_width() const { return attention.num_kv_heads * attention.head_dim; }
  int qkv_width() const { return heads_width() + 2 * kv_width(); }
};

// Tensors of one layer as a model file has them: weights [outputs, inputs] in bf16, q, k and v under each other as gate and up
// are; biases and norms in fp32. Biases and norms of heads may be null.
struct LayerSource {
  const uint16_t *qkv, *output, *gate_up, *down;
  const float *qkv_bias, *output_bias, *gate_up_bias, *down_bias;
  const float *input_norm, *post_norm, *q_norm, *k_norm;
};

// What belongs to no layer; not owned.
struct StackTables {
  const uint16_t* embedding;     // [vocab, hidden]
  const float* norm;             // [hidden], behind the last layer.
  const float *cosines, *sines;  // [positions, head_dim / 2]
};

// One row for each new token.
struct Step {
  std::vector<int64_t> token_ids, positions, slots;
  std::vector<int64_t> wanted;              // Rows whose final state is asked for.
  std::vector<int64_t> k_caches, v_caches;  // Addresses, by layer, of bf16 [slots, kv_heads, head_dim].
};

class LayerStack {
 public:
  LayerStack(const StackShape& shape, const StackTables& tables);

  const StackShape& shape() const { return shape_; }
  int num_added() const { return int(layers_.size()); }
  // The next layer; its tensors are copied.
  void add(const LayerSource& source);

  // Runs stages `first` .. `stop` - 1 of `step`. Stage i finishes layer i - 1 and writes the keys and values of layer i, so there
  // is one more than layers. The last leaves the normalised states of the wanted rows in `out` [wanted, hidden]. Between the
  // stages of a step nothing else may be run.
  void run(const Step& step, Plan& plan, int first, int stop, float* out, int num_threads);

 private:
  struct Layer {
    Weight qkv, output, gate_up, down;
    Norm input_norm, post_norm;
    RotateWrite rotate_write;
  };
  // What passes between two products, for the rows of a block.
  struct Scratch {
    Aligned<uint16_t> normed, wide;  // `wide` holds what is gated, then the heads of the next layer.
  };
  // Rows that a thread takes through the products, and which share of each product is its own.
  struct Span {
    int first_row, num_rows, part, num_parts;
    Scratch* scratch;
  };

  Weight place(const uint16_t* rows, const float* bias, int num_outputs, int num_inputs, PanelOrder order);
  const float* keep(const float* numbers, int count);
  void reserve(const Step& step, int num_threads);
  void run_stages(int thread, int num_threads);
  void run_products(int stage, int thread, int num_threads);
  void run_span(int stage, const Span& span);
  void finish_layer(int layer, const Span& span);
  void write_layer(int layer, const Span& span);
  void begin_attention(int layer);
  void select_wanted();
  template <typename Body>
  void for_own_rows(const Span& span, Body body) const;
  Panels own_panels(const Weight& weight, const Weight& then, const Span& span) const;

  StackShape shape_;
  StackTables tables_;
  HugePages memory_;
  size_t memory_used_ = 0;
  std::vector<Aligned<float>> vectors_;
  std::vector<Layer> layers_;
  int64_t sums_stride_, normed_stride_, gated_stride_;

  // Of the running step.
  const Step* step_ = nullptr;
  Plan* plan_ = nullptr;
  float* out_ = nullptr;
  int first_ = 0, stop_ = 0, num_rows_ = 0;
  bool has_selected_ = false;
  Aligned<float> sums_, wanted_sums_;  // The residual stream.
  Aligned<uint16_t> q_, attended_, wanted_attended_;
  std::vector<Scratch> scratch_;
  std::atomic<int> next_block_{0};
};

}  // namespace strata
