// Which thread may do what: the keys and columns of a step cut into items.
#if defined(__x86_64__)
#include "scratch.h"

namespace strata {
namespace {

constexpr int kNarrowChunk = 512;  // Keys of a narrow item, so that one long sequence keeps all threads busy.

}  // namespace

Plan::Plan(Shape shape, int num_rows, int num_threads, std::vector<Segment> segments)
    : shape_(shape), num_threads_(num_threads), segments_(std::move(segments)) {
  size_t packed_size = 0;
  for (auto& segment : segments_) {
    if (segment.groups.size() % 2 != 0) segment.groups.push_back(segment.groups.back());
    packed_at_.push_back(is_wide(segment) ? int64_t(packed_size) : -1);
    if (is_wide(segment)) packed_size += segment.groups.size() * kGroupKeys * shape_.head_dim * shape_.num_kv_heads;
  }
  packed_ = Aligned<uint16_t>(packed_size);
  for (size_t i = 0; i < segments_.size(); ++i) add_items(int(i));
  place_partials(num_rows);
  for (int i = 0; i < num_threads_; ++i) scratch_.push_back(std::make_unique<Scratch>(shape_));
}

Plan::~Plan() = default;

bool Plan::is_wide(const Segment& segment) const { return int(segment.rows.size()) * shape_.group() > kNarrowColumns; }

void Plan::add_items(int index) {
  const Segment& segment = segments_[size_t(index)];
  if (!is_wide(segment)) {
    const int num_chunks = ceil_div(segment.num_keys, kNarrowChunk);
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const int first = chunk * kNarrowChunk;
      items_.push_back({index, 0, 0, first, std::min(first + kNarrowChunk, segment.num_keys), chunk});
    }
    chunks_.push_back(num_chunks);
    return;
  }
  for (int first = 0; first < segment.num_keys; first += kPackKeys) packs_.push_back({index, first});
  const int num_columns = int(segment.rows.size()) * shape_.group();
  const int num_blocks = ceil_div(num_columns, kWideColumns) * shape_.num_kv_heads;
  // Few blocks of columns would leave threads idle: then the keys are cut too.
  const int wanted = num_blocks >= 4 * num_threads_ ? 1 : ceil_div(4 * num_threads_, num_blocks);
  const int chunk_keys = std::max(4, ceil_div(ceil_div(segment.num_keys, wanted), kWideKeys)) * kWideKeys;
  const int num_chunks = wanted == 1 ? 1 : ceil_div(segment.num_keys, chunk_keys);
  chunks_.push_back(num_chunks);
  // Blocks of columns go by while the keys and values of one head stay in near memory; those that see most keys come first.
  for (int head = 0; head < shape_.num_kv_heads; ++head) {
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      for (int first = (num_columns - 1) / kWideColumns * kWideColumns; first >= 0; first -= kWideColumns) {
        const int last_row = std::min(first + kWideColumns, num_columns) - 1;
        const int end = segment.causal_from < 0
                            ? segment.num_keys
                            : std::min(segment.num_keys, segment.causal_from + last_row / shape_.group() + 1);
        const int first_key = num_chunks == 1 ? 0 : std::min(end, chunk * chunk_keys);
        const int stop_key = chunk + 1 == num_chunks ? end : std::min(end, first_key + chunk_keys);
        items_.push_back({index, head, first, first_key, stop_key, chunk});
      }
    }
  }
}

void Plan::place_partials(int num_rows) {
  num_partials_.assign(size_t(num_rows), 0);
  for (size_t i = 0; i < segments_.size(); ++i) {
    for (const int32_t row : segments_[i].rows) num_partials_[size_t(row)] += chunks_[i];
  }
  first_partial_.resize(size_t(num_rows));
  int32_t total = 0;
  for (size_t row = 0; row < first_partial_.size(); ++row) {
    first_partial_[row] = total;
    if (num_partials_[row] > 1) total += num_partials_[row];
  }
  std::vector<int32_t> next = first_partial_;
  for (size_t i = 0; i < segments_.size(); ++i) {
    auto& places = partials_at_.emplace_back();
    for (const int32_t row : segments_[i].rows) {
      places.push_back(next[size_t(row)]);
      next[size_t(row)] += chunks_[i];
    }
  }
  partial_sums_ = Aligned<float>(size_t(total) * shape_.num_heads * shape_.head_dim);
  partial_tops_ = Aligned<float>(size_t(total) * shape_.num_heads);
  partial_totals_ = Aligned<float>(size_t(total) * shape_.num_heads);
}

}  // namespace strata

#endif
