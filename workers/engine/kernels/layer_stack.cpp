#include "layer_stack.h"

#if defined(__x86_64__)
#include <algorithm>
#include <cstring>

#include "cpu.h"
#include "scratch.h"

#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile")
#include "tiles.h"
#pragma GCC pop_options

namespace strata {
namespace {

constexpr int kBlockRows = 256;     // What so many rows hold between products fits a second-level cache.
constexpr int kThreadRows = 128;    // With fewer for each thread, threads share the columns: each weight is read once.
constexpr int kRowMultiple = 32;    // Memory is kept for whole pairs of tiles.

int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

// Rows at strides of 4 KiB fall on the same lines of the first-level cache; a line more keeps them apart.
int64_t row_stride(int width, size_t number_bytes) {
  return size_t(width) * number_bytes % 1024 == 0 ? width + int64_t(64 / number_bytes) : width;
}

template <typename Number>
void grow(Aligned<Number>& memory, int64_t num_rows, int64_t stride) {
  const size_t size = size_t(round_up(num_rows, kRowMultiple) * stride);
  if (memory.size() < size) memory = Aligned<Number>(size);
}

template <typename Number>
Number* at_address(int64_t address) {
  return reinterpret_cast<Number*>(address);
}

}  // namespace

LayerStack::LayerStack(const StackShape& shape, const StackTables& tables)
    : shape_(shape),
      tables_(tables),
      sums_stride_(row_stride(shape.hidden, sizeof(float))),
      normed_stride_(row_stride(shape.hidden, sizeof(uint16_t))),
      gated_stride_(row_stride(shape.inner, sizeof(uint16_t))) {
  const int64_t per_layer =
      int64_t(shape.hidden) * (int64_t(shape.qkv_width()) + shape.heads_width() + 3 * int64_t(shape.inner));
  memory_ = HugePages(size_t(per_layer * shape.num_layers) * sizeof(uint16_t));
  layers_.reserve(size_t(shape.num_layers));
}

void LayerStack::add(const LayerSource& source) {
  const int hidden = shape_.hidden, dim = shape_.attention.head_dim;
  Layer layer;
  layer.qkv = place(source.qkv, source.qkv_bias, shape_.qkv_width(), hidden, PanelOrder::kPlain);
  layer.output = place(source.output, source.output_bias, hidden, shape_.heads_width(), PanelOrder::kPlain);
  layer.gate_up = place(source.gate_up, source.gate_up_bias, 2 * shape_.inner, hidden, PanelOrder::kHalves);
  layer.down = place(source.down, source.down_bias, hidden, shape_.inner, PanelOrder::kPlain);
  layer.input_norm = {keep(source.input_norm, hidden), shape_.epsilon, hidden};
  layer.post_norm = {keep(source.post_norm, hidden), shape_.epsilon, hidden};
  layer.rotate_write = {shape_.attention, keep(source.q_norm, dim), keep(source.k_norm, dim), shape_.epsilon};
  layers_.push_back(layer);
}

Weight LayerStack::place(const uint16_t* rows, const float* bias, int num_outputs, int num_inputs, PanelOrder order) {
  auto* const packed = reinterpret_cast<uint16_t*>(memory_.get()) + memory_used_;
  memory_used_ += size_t(num_outputs) * size_t(num_inputs);
  pack_weight(rows, num_outputs, num_inputs, order, packed);
  const float* kept = nullptr;
  if (bias != nullptr) {
    std::vector<float> ordered;
    for (int i = 0; i < num_outputs; ++i) ordered.push_back(bias[output_at(i, num_outputs, order)]);
    kept = keep(ordered.data(), num_outputs);
  }
  return {packed, kept, num_inputs, num_outputs / kPanelColumns};
}

const float* LayerStack::keep(const float* numbers, int count) {
  if (numbers == nullptr) return nullptr;
  vectors_.emplace_back(size_t(count));
  memcpy(vectors_.back().get(), numbers, sizeof(float) * size_t(count));
  return vectors_.back().get();
}

void LayerStack::run(const Step& step, Plan& plan, int first, int stop, float* out, int num_threads) {
  step_ = &step;
  plan_ = &plan;
  out_ = out;
  first_ = first;
  stop_ = stop;
  num_rows_ = int(step.token_ids.size());
  next_block_ = 0;
  if (first == 0) reserve(step, num_threads);
  if (first > 0) begin_attention(first - 1);
  run_on_team(
      num_threads,
      [](void* stack, int thread, int count) { static_cast<LayerStack*>(stack)->run_stages(thread, count); }, this);
}

void LayerStack::reserve(const Step& step, int num_threads) {
  const int64_t num_wanted = int64_t(step.wanted.size());
  grow(sums_, num_rows_, sums_stride_);
  grow(q_, num_rows_, shape_.heads_width());
  grow(attended_, num_rows_, shape_.heads_width());
  grow(wanted_sums_, num_wanted, sums_stride_);
  grow(wanted_attended_, num_wanted, shape_.heads_width());
  if (int(scratch_.size()) < num_threads) scratch_.resize(size_t(num_threads));
  const int num_shared = std::min(num_rows_, kThreadRows * num_threads);
  for (size_t i = 0; i < scratch_.size(); ++i) {
    const int rows = i == 0 ? std::max(num_shared, kBlockRows) : kBlockRows;
    grow(scratch_[i].normed, rows, normed_stride_);
    grow(scratch_[i].wide, rows, std::max<int64_t>(gated_stride_, shape_.qkv_width()));
  }
}

void LayerStack::run_stages(int thread, int num_threads) {
  const Tiles tiles;
  for (int stage = first_; stage < stop_; ++stage) {
    if (stage > 0) {
      if (thread == 0) next_block_ = 0;
      plan_->run(thread);
      team_barrier();
    }
    if (stage == shape_.num_layers) {
      if (thread == 0) select_wanted();
      team_barrier();
    }
    run_products(stage, thread, num_threads);
    if (thread == 0 && stage + 1 < stop_) begin_attention(stage);
    team_barrier();
  }
}

// Many rows: each thread takes blocks of them through all products, in its own cache. Few: all threads go through each product
// together, each with columns of its own.
void LayerStack::run_products(int stage, int thread, int num_threads) {
  const int num_rows = stage == shape_.num_layers ? int(step_->wanted.size()) : num_rows_;
  if (num_threads > 1 && num_rows < kThreadRows * num_threads) {
    run_span(stage, {0, num_rows, thread, num_threads, &scratch_[0]});
    return;
  }
  const int num_rounds = ceil_div(num_rows, num_threads * kBlockRows);
  const int block = int(round_up(ceil_div(num_rows, num_rounds * num_threads), kRowMultiple));
  for (int first; (first = next_block_++ * block) < num_rows;) {
    run_span(stage, {first, std::min(block, num_rows - first), 0, 1, &scratch_[size_t(thread)]});
  }
}

void LayerStack::run_span(int stage, const Span& span) {
  if (stage > 0) finish_layer(stage - 1, span);
  if (stage < shape_.num_layers) {
    write_layer(stage, span);
    return;
  }
  const Norm norm{tables_.norm, shape_.epsilon, shape_.hidden};
  for_own_rows(span, [&](int row) {
    normalise(norm, wanted_sums_.get() + row * sums_stride_, out_ + int64_t(row) * shape_.hidden);
  });
}

void LayerStack::finish_layer(int index, const Span& span) {
  const Layer& layer = layers_[size_t(index)];
  const bool is_last = index + 1 == shape_.num_layers;
  const Weight& next = is_last ? layers_[0].qkv : layers_[size_t(index) + 1].qkv;
  float* const sums = (is_last ? wanted_sums_ : sums_).get() + span.first_row * sums_stride_;
  const uint16_t* const attended = (is_last ? wanted_attended_ : attended_).get();
  Scratch& scratch = *span.scratch;
  const int width = shape_.heads_width();
  const auto sync = [&] {
    if (span.num_parts > 1) team_barrier();
  };
  multiply_add(layer.output, {attended + int64_t(span.first_row) * width, width, span.num_rows},
               own_panels(layer.output, layer.gate_up, span), sums, sums_stride_);
  sync();
  for_own_rows(span, [&](int row) {
    const int at = row - span.first_row;
    normalise(layer.post_norm, sums + at * sums_stride_, scratch.normed.get() + at * normed_stride_);
  });
  sync();
  multiply_gated(layer.gate_up, {scratch.normed.get(), normed_stride_, span.num_rows},
                 own_panels(layer.gate_up, layer.down, span), scratch.wide.get(), gated_stride_);
  sync();
  multiply_add(layer.down, {scratch.wide.get(), gated_stride_, span.num_rows}, own_panels(layer.down, next, span), sums,
               sums_stride_);
  sync();
}

void LayerStack::write_layer(int index, const Span& span) {
  const Layer& layer = layers_[size_t(index)];
  Scratch& scratch = *span.scratch;
  const int width = shape_.qkv_width(), half = shape_.attention.head_dim / 2;
  const auto sync = [&] {
    if (span.num_parts > 1) team_barrier();
  };
  for_own_rows(span, [&](int row) {
    float* const sums = sums_.get() + row * sums_stride_;
    if (index == 0) widen_row(tables_.embedding + step_->token_ids[size_t(row)] * shape_.hidden, shape_.hidden, sums);
    normalise(layer.input_norm, sums, scratch.normed.get() + (row - span.first_row) * normed_stride_);
  });
  sync();
  multiply(layer.qkv, {scratch.normed.get(), normed_stride_, span.num_rows}, own_panels(layer.qkv, layer.output, span),
           scratch.wide.get(), width);
  sync();
  auto* const k_cache = at_address<uint16_t>(step_->k_caches[size_t(index)]);
  auto* const v_cache = at_address<uint16_t>(step_->v_caches[size_t(index)]);
  for_own_rows(span, [&](int row) {
    const int64_t angles = step_->positions[size_t(row)] * half, slot = step_->slots[size_t(row)] * shape_.kv_width();
    rotate_write(layer.rotate_write, scratch.wide.get() + int64_t(row - span.first_row) * width, tables_.cosines + angles,
                 tables_.sines + angles,
                 {q_.get() + int64_t(row) * shape_.heads_width(), k_cache + slot, v_cache + slot});
  });
}

void LayerStack::begin_attention(int layer) {
  plan_->begin({q_.get(), at_address<const uint16_t>(step_->k_caches[size_t(layer)]),
                at_address<const uint16_t>(step_->v_caches[size_t(layer)]), attended_.get()});
}

// Behind the last keys and values only these rows go on.
void LayerStack::select_wanted() {
  const int width = shape_.heads_width();
  for (size_t i = 0; i < step_->wanted.size(); ++i) {
    const int64_t row = step_->wanted[i];
    memcpy(wanted_sums_.get() + int64_t(i) * sums_stride_, sums_.get() + row * sums_stride_,
           sizeof(float) * size_t(shape_.hidden));
    memcpy(wanted_attended_.get() + int64_t(i) * width, attended_.get() + row * width, sizeof(uint16_t) * size_t(width));
  }
}

template <typename Body>
void LayerStack::for_own_rows(const Span& span, Body body) const {
  const int first = span.num_rows * span.part / span.num_parts, stop = span.num_rows * (span.part + 1) / span.num_parts;
  for (int row = first; row < stop; ++row) body(span.first_row + row);
}

Panels LayerStack::own_panels(const Weight& weight, const Weight& then, const Span& span) const {
  const auto first = [&](const Weight& of, int part) { return of.num_panels * part / span.num_parts; };
  return {first(weight, span.part), first(weight, span.part + 1), then.panel(first(then, span.part))};
}

}  // namespace strata

#endif
