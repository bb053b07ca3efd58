// Attention over the paged cache of one layer, for bf16 on AMX.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "aligned.h"

namespace strata {

constexpr int kGroupKeys = 16;  // Keys that lie one behind the other: a block's size must be a multiple of it.

struct Shape {
  int num_heads, num_kv_heads, head_dim;
  int group() const { return num_heads / num_kv_heads; }
};

// Rows of a step that attend to the same keys. With `causal_from` >= 0 row j sees the first causal_from + j + 1 of them.
struct Segment {
  std::vector<int32_t> rows;
  std::vector<int64_t> groups;  // First slot of every 16 keys.
  int num_keys = 0;
  int causal_from = -1;
};

// Tensors of one layer, in bf16: q and out [rows, heads, head_dim], caches [slots, kv_heads, head_dim].
struct LayerTensors {
  const uint16_t *q, *k, *v;
  uint16_t* out;
};

// How the rows of one step attend; made once, used in every layer, by one thread at a time.
class Plan {
 public:
  Plan(Shape shape, int num_rows, int num_threads, std::vector<Segment> segments);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Says which layer comes next; no thread may be in `run`.
  void begin(const LayerTensors& tensors);
  // The part of one thread of a team of `num_threads`. When all have returned `tensors.out` is whole.
  void run(int thread);

  struct Scratch;

 private:
  struct Item {
    int segment, kv_head, first_column, first_key, stop_key, chunk;
  };
  struct Pack {
    int segment, first_key;
  };

  bool is_wide(const Segment& segment) const;
  void add_items(int index);
  void place_partials(int num_rows);
  void pack_values(const Pack& pack);
  void attend_wide(const Item& item, Scratch& scratch);
  void attend_narrow(const Item& item, Scratch& scratch);
  void load_queries(const Segment& segment, int kv_head, int first_column, int num_tiles, uint32_t* packed) const;
  void find_visible(const Item& item, int first_column, int num_columns, int32_t* visible) const;
  void finish(const Item& item, int kv_head, int column, const float* sums, float top, float total);
  void merge_rows(int thread);
  float log2_scale() const;

  Shape shape_;
  int num_threads_;
  std::vector<Segment> segments_;
  std::vector<Item> items_;
  std::vector<Pack> packs_;
  std::vector<int> chunks_;                            // Of each segment: how many parts its keys are cut into.
  std::vector<int64_t> packed_at_;                     // Of each segment: where its packed values begin; -1: narrow.
  std::vector<std::vector<int32_t>> partials_at_;      // Of each segment and row: its first partial.
  std::vector<int32_t> first_partial_, num_partials_;  // Of each row.
  Aligned<uint16_t> packed_;
  Aligned<float> partial_sums_, partial_tops_, partial_totals_;
  std::vector<std::unique_ptr<Scratch>> scratch_;
  LayerTensors tensors_{};
  std::atomic<int> next_item_{0}, next_pack_{0}, next_merge_{0};
};

}  // namespace strata
