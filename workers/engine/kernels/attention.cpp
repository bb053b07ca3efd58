#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "scratch.h"
#include "tiles.h"
#include "vectors.h"

namespace strata {
namespace {

constexpr int kPairKeys = 32;      // Keys of one product with values: 16 pairs.
constexpr int kNarrowKeys = 64;    // As kWideKeys, of a narrow item.
constexpr float kLowest = -1e30f;  // The top of no scores at all.
constexpr float kMasked = -1e30f;  // Finite: the difference of two of them is a number.

// State of a running softmax, by column: the highest score so far, in powers of two, and the sum of weights.
struct Softmax {
  alignas(64) float tops[kTile], totals[kTile];

  Softmax() { set(_mm512_set1_ps(kLowest), _mm512_setzero_ps()); }
  void set(const __m512& top, const __m512& total) {
    _mm512_store_ps(tops, top);
    _mm512_store_ps(totals, total);
  }
};

// Adds values of keys, times their weights, to the sums of `kCount` columns. Of every 32 dimensions the even ones come
// first.
template <int kCount, int kWidth>
void add_values(const int64_t* slots, int num_keys, int64_t key_stride, const uint16_t* values, const float* weights,
                float* sums, int sum_stride) {
  constexpr int kParts = kWidth / 32;
  const __m512i odd_half = _mm512_set1_epi32(int(0xFFFF0000));
  __m512 even[kCount][kParts], odd[kCount][kParts];
  for (int i = 0; i < kCount; ++i) {
    for (int part = 0; part < kParts; ++part) {
      even[i][part] = _mm512_loadu_ps(sums + i * sum_stride + part * 32);
      odd[i][part] = _mm512_loadu_ps(sums + i * sum_stride + part * 32 + kTile);
    }
  }
  for (int key = 0; key < num_keys; ++key) {
    const uint16_t* const value = values + (slots[key / kGroupKeys] + key % kGroupKeys) * key_stride;
    for (int part = 0; part < kParts; ++part) {
      const __m512i both = _mm512_loadu_si512(value + part * 32);
      const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(both, odd_half));
      for (int i = 0; i < kCount; ++i) {
        const __m512 weight = _mm512_set1_ps(weights[key * kTile + i]);
        even[i][part] = _mm512_fmadd_ps(weight, low, even[i][part]);
        odd[i][part] = _mm512_fmadd_ps(weight, high, odd[i][part]);
      }
    }
  }
  for (int i = 0; i < kCount; ++i) {
    for (int part = 0; part < kParts; ++part) {
      _mm512_storeu_ps(sums + i * sum_stride + part * 32, even[i][part]);
      _mm512_storeu_ps(sums + i * sum_stride + part * 32 + kTile, odd[i][part]);
    }
  }
}

// Scores of keys that a column does not see become minus infinity.
void hide(int first_key, int num_keys, const int32_t* num_visible, float* scores, int stride) {
  const __m512i visible = _mm512_load_si512(num_visible);
  for (int key = 0; key < num_keys; ++key, scores += stride) {
    const __mmask16 hidden = _mm512_cmple_epi32_mask(visible, _mm512_set1_epi32(first_key + key));
    _mm512_store_ps(scores, _mm512_mask_mov_ps(_mm512_load_ps(scores), hidden, _mm512_set1_ps(kMasked)));
  }
}

using AddValues = decltype(&add_values<1, 32>);
constexpr AddValues kAddValues[4][2] = {{add_values<1, 32>, add_values<1, 64>},
                                        {add_values<2, 32>, add_values<2, 64>},
                                        {add_values<3, 32>, add_values<3, 64>},
                                        {add_values<4, 32>, add_values<4, 64>}};

}  // namespace

void Plan::begin(const LayerTensors& tensors) {
  tensors_ = tensors;
  next_item_ = next_pack_ = next_merge_ = 0;
}

void Plan::run(int thread) {
  Scratch& scratch = *scratch_[size_t(thread)];
  if (!packs_.empty()) {
    for (int i; (i = next_pack_++) < int(packs_.size());) pack_values(packs_[size_t(i)]);
    team_barrier();
  }
  for (int i; (i = next_item_++) < int(items_.size());) {
    const Item& item = items_[size_t(i)];
    if (packed_at_[size_t(item.segment)] >= 0) {
      attend_wide(item, scratch);
    } else {
      attend_narrow(item, scratch);
    }
  }
  if (partial_sums_.size() == 0) return;
  team_barrier();
  merge_rows(thread);
}

// Values of 32 keys as tiles of 16 dimensions × 32 keys: the first operand of the product with weights.
void Plan::pack_values(const Pack& pack) {
  const Segment& segment = segments_[size_t(pack.segment)];
  const int dim = shape_.head_dim, heads = shape_.num_kv_heads;
  const int num_padded = int(segment.groups.size()) * kGroupKeys;
  const int stop = std::min(pack.first_key + kPackKeys, num_padded);
  for (int head = 0; head < heads; ++head) {
    uint16_t* out =
        packed_.get() + packed_at_[size_t(pack.segment)] + (int64_t(head) * num_padded + pack.first_key) * dim;
    for (int key = pack.first_key; key < stop; key += kPairKeys) {
      const uint16_t* rows[2];
      for (int half = 0; half < 2; ++half) {
        rows[half] = tensors_.v + (segment.groups[size_t(key / kGroupKeys + half)] * heads + head) * dim;
      }
      const int num_valid = std::min(kPairKeys, segment.num_keys - key);
      for (int d = 0; d < dim; d += kTile, out += kTile * kPairKeys) {
        __m512i pairs[kTile];
        for (int pair = 0; pair < kTile; ++pair) {
          const uint16_t* const even = rows[pair / 8] + int64_t(pair % 8 * 2) * heads * dim + d;
          const uint16_t* const odd = even + int64_t(heads) * dim;
          const __m512i low = 2 * pair < num_valid ? widen(even) : _mm512_setzero_si512();
          const __m512i high = 2 * pair + 1 < num_valid ? widen(odd) : _mm512_setzero_si512();
          pairs[pair] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
        transpose(pairs);
        for (int row = 0; row < kTile; ++row) _mm512_store_si512(out + row * kPairKeys, pairs[row]);
      }
    }
  }
}

// Columns are (row, head of the group); `packed` is [dim / 32][columns / 16][16 pairs of dimensions][16 columns].
void Plan::load_queries(const Segment& segment, int kv_head, int first_column, int num_tiles, uint32_t* packed) const {
  const int dim = shape_.head_dim, group = shape_.group();
  const int num_columns = int(segment.rows.size()) * group;
  for (int step = 0; step < dim / 32; ++step) {
    for (int tile = 0; tile < num_tiles; ++tile, packed += kTile * kTile) {
      __m512i columns[kTile];
      for (int i = 0; i < kTile; ++i) {
        const int column = first_column + tile * kTile + i;
        if (column < num_columns) {
          const int64_t row = segment.rows[size_t(column / group)];
          const int head = kv_head * group + column % group;
          columns[i] = _mm512_loadu_si512(tensors_.q + (row * shape_.num_heads + head) * dim + step * 32);
        } else {
          columns[i] = _mm512_setzero_si512();
        }
      }
      transpose(columns);
      for (int i = 0; i < kTile; ++i) _mm512_store_si512(packed + i * kTile, columns[i]);
    }
  }
}

// How many keys each column sees, of those before the item's last.
void Plan::find_visible(const Item& item, int first_column, int num_columns, int32_t* visible) const {
  const Segment& segment = segments_[size_t(item.segment)];
  for (int i = 0; i < num_columns; ++i) {
    const int row = (first_column + i) / shape_.group();
    visible[i] = segment.causal_from < 0 ? item.stop_key : std::min(item.stop_key, segment.causal_from + row + 1);
  }
}

// One block of columns over the keys of an item. The products of the blocks of keys before and after stand ahead of a block's
// exponentials, so that tiles and vectors work at the same time.
class WideItem {
 public:
  WideItem(const uint16_t* keys, int64_t key_stride, const int64_t* groups, const uint16_t* values, int dim, float scale,
           Plan::Scratch& scratch)
      : keys_(keys), key_stride_(key_stride), groups_(groups), values_(values), dim_(dim), scale_(scale), scratch_(scratch) {
    memset(scratch_.sums.get(), 0, sizeof(float) * size_t(dim_) * kWideColumns);
    for (int half = 0; half < 2; ++half) {
      tops_[half] = _mm512_set1_ps(kLowest);
      totals_[half] = _mm512_setzero_ps();
    }
  }

  void run(int first_key, int stop_key) {
    const int least_visible = *std::min_element(scratch_.visible, scratch_.visible + kWideColumns);
    const int num_blocks = ceil_div(stop_key - first_key, kWideKeys);
    const auto num_steps = [&](int block) {
      return ceil_div(std::min(kWideKeys, stop_key - first_key - block * kWideKeys), kPairKeys);
    };
    if (num_blocks > 0) score(first_key, num_steps(0), scratch_.scores[0]);
    for (int block = 0; block < num_blocks; ++block) {
      const int first = first_key + block * kWideKeys;
      if (block > 0) add_values(first - kWideKeys, kWideKeys / kPairKeys, scratch_.weights[(block - 1) % 2]);
      if (block + 1 < num_blocks) score(first + kWideKeys, num_steps(block + 1), scratch_.scores[(block + 1) % 2]);
      const int num_keys = num_steps(block) * kPairKeys;
      for (int half = 0; half < 2; ++half) {
        float* const scores = scratch_.scores[block % 2] + half * kTile;
        if (first + num_keys > least_visible) {
          hide(first, num_keys, scratch_.visible + half * kTile, scores, kWideColumns);
        }
        weigh(num_keys, half, scores, scratch_.weights[block % 2] + half * kTile);
      }
    }
    if (num_blocks > 0) {
      const int last = num_blocks - 1;
      add_values(first_key + last * kWideKeys, num_steps(last), scratch_.weights[last % 2]);
    }
    for (int half = 0; half < 2; ++half) {
      _mm512_store_ps(scratch_.tops + half * kTile, tops_[half]);
      _mm512_store_ps(scratch_.totals + half * kTile, totals_[half]);
    }
  }

 private:
  // Products of keys with queries: scores [keys][columns].
  void score(int first, int num_steps, float* scores) const {
    for (int step = 0; step < num_steps; ++step, scores += kPairKeys * kWideColumns) {
      const int64_t* const slots = groups_ + first / kGroupKeys + step * 2;
      const uint16_t* const low = keys_ + slots[0] * key_stride_;
      const uint16_t* const high = keys_ + slots[1] * key_stride_;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int part = 0; part < dim_ / 32; ++part) {
        const uint32_t* const queries = scratch_.queries.get() + part * 2 * kTile * kTile;
        _tile_loadd(4, low + part * 32, key_stride_ * 2);
        _tile_loadd(6, queries, 64);
        _tile_loadd(5, high + part * 32, key_stride_ * 2);
        _tile_loadd(7, queries + kTile * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, scores, kWideColumns * 4);
      _tile_stored(1, scores + kTile, kWideColumns * 4);
      _tile_stored(2, scores + kTile * kWideColumns, kWideColumns * 4);
      _tile_stored(3, scores + kTile * kWideColumns + kTile, kWideColumns * 4);
    }
  }

  // Scores of 16 columns become weights; what was summed under a lower top is scaled down.
  void weigh(int num_keys, int half, const float* scores, uint32_t* weights) {
    const __m512 scale = _mm512_set1_ps(scale_);
    __m512 highest = _mm512_load_ps(scores), other = _mm512_load_ps(scores + kWideColumns);
    for (int key = 2; key < num_keys; key += 2) {
      highest = _mm512_max_ps(highest, _mm512_load_ps(scores + key * kWideColumns));
      other = _mm512_max_ps(other, _mm512_load_ps(scores + (key + 1) * kWideColumns));
    }
    highest = _mm512_mul_ps(_mm512_max_ps(highest, other), scale);
    const __m512 top = _mm512_max_ps(tops_[half], highest);
    // Weights are summed as they are used, so that their rounding cancels out.
    const __m512i ones = _mm512_set1_epi16(0x3F80);  // 1 in bf16.
    __m512 total = _mm512_setzero_ps();
    for (int key = 0; key < num_keys; key += 2) {
      const float* const at = scores + key * kWideColumns;
      const __m512 even = exp2_coarse(_mm512_fmsub_ps(_mm512_load_ps(at), scale, top));
      const __m512 odd = exp2_coarse(_mm512_fmsub_ps(_mm512_load_ps(at + kWideColumns), scale, top));
      const __m512i both = pair_bf16(even, odd);
      total = _mm512_dpbf16_ps(total, (__m512bh)both, (__m512bh)ones);
      _mm512_store_si512(weights + key / 2 * kWideColumns, both);
    }
    if (_mm512_cmp_ps_mask(top, tops_[half], _CMP_GT_OQ) != 0) {
      const __m512 factor = exp2(_mm512_sub_ps(tops_[half], top));
      totals_[half] = _mm512_mul_ps(totals_[half], factor);
      for (int d = 0; d < dim_; ++d) {
        float* const sum = scratch_.sums.get() + d * kWideColumns + half * kTile;
        _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), factor));
      }
      tops_[half] = top;
    }
    totals_[half] = _mm512_add_ps(totals_[half], total);
  }

  // Adds products of values with weights to the sums [dim][columns].
  void add_values(int first, int num_steps, const uint32_t* weights) const {
    for (int d = 0; d < dim_; d += 2 * kTile) {
      float* const sums = scratch_.sums.get() + d * kWideColumns;
      _tile_loadd(0, sums, kWideColumns * 4);
      _tile_loadd(1, sums + kTile, kWideColumns * 4);
      _tile_loadd(2, sums + kTile * kWideColumns, kWideColumns * 4);
      _tile_loadd(3, sums + kTile * kWideColumns + kTile, kWideColumns * 4);
      for (int step = 0; step < num_steps; ++step) {
        const uint16_t* const tile = values_ + int64_t(first + step * kPairKeys) * dim_ + d * kPairKeys;
        const uint32_t* const pairs = weights + step * kTile * kWideColumns;
        _tile_loadd(4, tile, 64);
        _tile_loadd(6, pairs, kWideColumns * 4);
        _tile_loadd(5, tile + kTile * kPairKeys, 64);
        _tile_loadd(7, pairs + kTile, kWideColumns * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, kWideColumns * 4);
      _tile_stored(1, sums + kTile, kWideColumns * 4);
      _tile_stored(2, sums + kTile * kWideColumns, kWideColumns * 4);
      _tile_stored(3, sums + kTile * kWideColumns + kTile, kWideColumns * 4);
    }
  }

  const uint16_t* const keys_;
  const int64_t key_stride_;
  const int64_t* const groups_;
  const uint16_t* const values_;
  const int dim_;
  const float scale_;
  Plan::Scratch& scratch_;
  __m512 tops_[2], totals_[2];
};

void Plan::attend_wide(const Item& item, Scratch& scratch) {
  const Segment& segment = segments_[size_t(item.segment)];
  const int dim = shape_.head_dim, group = shape_.group();
  const int64_t num_padded = int64_t(segment.groups.size()) * kGroupKeys;
  load_queries(segment, item.kv_head, item.first_column, 2, scratch.queries.get());
  find_visible(item, item.first_column, kWideColumns, scratch.visible);
  WideItem wide(tensors_.k + item.kv_head * dim, int64_t(shape_.num_kv_heads) * dim, segment.groups.data(),
                packed_.get() + packed_at_[size_t(item.segment)] + item.kv_head * num_padded * dim, dim, log2_scale(),
                scratch);
  wide.run(item.first_key, item.stop_key);
  const int num_columns = std::min(kWideColumns, int(segment.rows.size()) * group - item.first_column);
  for (int column = 0; column < num_columns; ++column) {
    for (int d = 0; d < dim; ++d) scratch.column.get()[d] = scratch.sums.get()[d * kWideColumns + column];
    finish(item, item.kv_head, item.first_column + column, scratch.column.get(), scratch.tops[column],
           scratch.totals[column]);
  }
}

// Few columns: the products with values are vector work, and all heads of a key are read one after another.
void Plan::attend_narrow(const Item& item, Scratch& scratch) {
  const Segment& segment = segments_[size_t(item.segment)];
  const int dim = shape_.head_dim, heads = shape_.num_kv_heads;
  const int num_columns = int(segment.rows.size()) * shape_.group();
  const int64_t key_stride = int64_t(heads) * dim;
  const __m512 scale = _mm512_set1_ps(log2_scale());
  std::vector<Softmax> states(static_cast<size_t>(heads));
  for (int head = 0; head < heads; ++head) {
    load_queries(segment, head, 0, 1, scratch.queries.get() + size_t(head) * dim / 2 * kTile);
  }
  find_visible(item, 0, kTile, scratch.visible);
  memset(scratch.sums.get(), 0, sizeof(float) * size_t(heads) * num_columns * dim);

  for (int first = item.first_key; first < item.stop_key; first += kNarrowKeys) {
    const int num_keys = std::min(kNarrowKeys, item.stop_key - first);
    const int num_groups = ceil_div(num_keys, kGroupKeys);
    const int64_t* const slots = &segment.groups[size_t(first / kGroupKeys)];
    for (int head = 0; head < heads; ++head) {
      const uint32_t* const queries = scratch.queries.get() + size_t(head) * dim / 2 * kTile;
      for (int at = 0; at < num_groups; ++at) {
        const uint16_t* const keys = tensors_.k + slots[at] * key_stride + head * dim;
        _tile_zero(0);
        for (int part = 0; part < dim / 32; ++part) {
          _tile_loadd(4, keys + part * 32, key_stride * 2);
          _tile_loadd(6, queries + part * kTile * kTile, 64);
          _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, scratch.scores[0] + at * kGroupKeys * kTile, kTile * 4);
      }
      if (segment.causal_from >= 0) hide(first, num_keys, scratch.visible, scratch.scores[0], kTile);
      Softmax& state = states[size_t(head)];
      const __m512 top_before = _mm512_load_ps(state.tops);
      __m512 total = _mm512_load_ps(state.totals);
      float* const sums = scratch.sums.get() + size_t(head) * num_columns * dim;
      __m512 highest = _mm512_set1_ps(kMasked);
      for (int key = 0; key < num_keys; ++key) {
        highest = _mm512_max_ps(highest, _mm512_load_ps(scratch.scores[0] + key * kTile));
      }
      const __m512 top = _mm512_max_ps(top_before, _mm512_mul_ps(highest, scale));
      if (first > item.first_key && _mm512_cmp_ps_mask(top, top_before, _CMP_GT_OQ) != 0) {
        const __m512 factor = exp2(_mm512_sub_ps(top_before, top));
        total = _mm512_mul_ps(total, factor);
        _mm512_store_ps(scratch.rescale, factor);
        for (int column = 0; column < num_columns; ++column) {
          const __m512 by = _mm512_set1_ps(scratch.rescale[column]);
          for (int d = 0; d < dim; d += kTile) {
            float* const sum = sums + column * dim + d;
            _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), by));
          }
        }
      }
      for (int key = 0; key < num_keys; ++key) {
        float* const at = scratch.scores[0] + key * kTile;
        const __m512 weight = exp2(_mm512_fmsub_ps(_mm512_load_ps(at), scale, top));
        total = _mm512_add_ps(total, weight);
        _mm512_store_ps(at, weight);
      }
      state.set(top, total);
      for (int column = 0; column < num_columns; column += 4) {
        const int count = std::min(4, num_columns - column);
        for (int d = 0; d < dim; d += 64) {
          const AddValues add = kAddValues[count - 1][dim - d >= 64];
          add(slots, num_keys, key_stride, tensors_.v + head * dim + d, scratch.scores[0] + column, sums + column * dim + d,
              dim);
        }
      }
    }
  }
  for (int head = 0; head < heads; ++head) {
    const Softmax& state = states[size_t(head)];
    for (int column = 0; column < num_columns; ++column) {
      const float* const sums = scratch.sums.get() + (size_t(head) * num_columns + column) * dim;
      for (int d = 0; d < dim; d += 32) {
        interleave(sums + d, sums + d + kTile, scratch.column.get() + d);
      }
      finish(item, head, column, scratch.column.get(), state.tops[column], state.totals[column]);
    }
  }
}

// The result of one column over the keys of an item: the answer, if no other item has some of its keys, else a part of it.
void Plan::finish(const Item& item, int kv_head, int column, const float* sums, float top, float total) {
  const Segment& segment = segments_[size_t(item.segment)];
  const int dim = shape_.head_dim, group = shape_.group();
  const int index = column / group, head = kv_head * group + column % group;
  const int32_t row = segment.rows[size_t(index)];
  if (num_partials_[size_t(row)] == 1) {
    store_bf16(sums, 1.0f / total, tensors_.out + (int64_t(row) * shape_.num_heads + head) * dim, dim);
    return;
  }
  const int64_t partial = partials_at_[size_t(item.segment)][size_t(index)] + item.chunk;
  const int64_t at = partial * shape_.num_heads + head;
  memcpy(partial_sums_.get() + at * dim, sums, sizeof(float) * size_t(dim));
  partial_tops_.get()[at] = top;
  partial_totals_.get()[at] = total;
}

void Plan::merge_rows(int thread) {
  const int dim = shape_.head_dim, heads = shape_.num_heads;
  Scratch& scratch = *scratch_[size_t(thread)];
  for (int64_t i; (i = next_merge_++) < int64_t(num_partials_.size());) {
    const int count = num_partials_[size_t(i)];
    if (count <= 1) continue;
    for (int head = 0; head < heads; ++head) {
      const int64_t first = int64_t(first_partial_[size_t(i)]) * heads + head;
      float top = kLowest, total = 0;
      for (int part = 0; part < count; ++part) top = std::max(top, partial_tops_.get()[first + part * heads]);
      memset(scratch.column.get(), 0, sizeof(float) * size_t(dim));
      for (int part = 0; part < count; ++part) {
        const int64_t at = first + int64_t(part) * heads;
        const float factor = std::exp2(partial_tops_.get()[at] - top);
        total += factor * partial_totals_.get()[at];
        const float* const sums = partial_sums_.get() + at * dim;
        for (int d = 0; d < dim; ++d) scratch.column.get()[d] += factor * sums[d];
      }
      store_bf16(scratch.column.get(), 1.0f / total, tensors_.out + (i * heads + head) * dim, dim);
    }
  }
}

float Plan::log2_scale() const { return 1.44269504f / std::sqrt(float(shape_.head_dim)); }

}  // namespace strata

#pragma GCC pop_options
#endif
