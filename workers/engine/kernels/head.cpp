#include "head.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "aligned.h"
#include "cpu.h"
#include "products.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "tiles.h"
#include "vectors.h"

namespace strata {
namespace {

constexpr int kParts = 3;           // A row in fp32 is the sum of so many in bf16: 24 bits of 8 each.
constexpr int kPanelsPerTask = 32;
constexpr int kStepLines = kPanelStep * 2 / 64;

// Splits the rows into parts of bf16: [row tiles][width / 32][parts][16 rows][32].
void split_rows(const float* rows, int num_rows, int width, uint16_t* out) {
  for (int first = 0; first < num_rows; first += kTile) {
    for (int at = 0; at < width; at += kStepInputs, out += kParts * kTile * kStepInputs) {
      for (int i = 0; i < kTile; ++i) {
        const float* const from = rows + int64_t(first + i) * width + at;
        const bool is_row = first + i < num_rows;
        __m512 low = is_row ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
        __m512 high = is_row ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
        for (int part = 0; part < kParts; ++part) {
          const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
          _mm512_store_si512(out + (part * kTile + i) * kStepInputs, rounded);
          low = _mm512_sub_ps(low, from_bf16(_mm512_castsi512_si256(rounded)));
          high = _mm512_sub_ps(high, from_bf16(_mm512_extracti64x4_epi64(rounded, 1)));
        }
      }
    }
  }
}

}  // namespace

struct Head::Work {
  const Head* head;
  const uint16_t* rows;  // Split.
  int num_rows;
  float* out;
  std::atomic<int> next{0};
};

Head::Head(const uint16_t* weight, int vocab, int width) : vocab_(vocab), width_(width) {
  const int num_whole = vocab / kPanelColumns * kPanelColumns, num_left = vocab - num_whole;
  packed_ = HugePages(size_t(num_whole + (num_left > 0 ? kPanelColumns : 0)) * size_t(width) * sizeof(uint16_t));
  auto* const packed = reinterpret_cast<uint16_t*>(packed_.get());
  pack_weight(weight, num_whole, width, PanelOrder::kPlain, packed);
  if (num_left == 0) return;
  std::vector<uint16_t> last(size_t(kPanelColumns) * size_t(width));
  memcpy(last.data(), weight + int64_t(num_whole) * width, sizeof(uint16_t) * size_t(num_left) * size_t(width));
  pack_weight(last.data(), kPanelColumns, width, PanelOrder::kPlain, packed + int64_t(num_whole) * width);
}

// Logits of 32 tokens for 16 rows. The first parts are summed apart from the others, which are small.
void Head::apply_panel(const Work& work, int panel, int row_tile) const {
  const int num_steps = width_ / kStepInputs;
  const uint16_t* weight = reinterpret_cast<const uint16_t*>(packed_.get()) + int64_t(panel) * num_steps * kPanelStep;
  const uint16_t* rows = work.rows + int64_t(row_tile) * num_steps * kParts * kTile * kStepInputs;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < num_steps; ++step, weight += kPanelStep, rows += kParts * kTile * kStepInputs) {
    _tile_loadd(6, weight, 64);
    _tile_loadd(7, weight + kTile * kStepInputs, 64);
    _tile_loadd(4, rows, 64);
    _tile_loadd(5, rows + kTile * kStepInputs, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, rows + 2 * kTile * kStepInputs, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
    if (row_tile == 0) {
      const uint16_t* const ahead = weight + int64_t(num_steps) * kPanelStep;
      for (int line = 0; line < kStepLines; ++line) _mm_prefetch(ahead + line * 32, _MM_HINT_T1);
    }
  }
  alignas(64) float sums[4][kTile * kTile];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  const int num_rows = std::min(kTile, work.num_rows - row_tile * kTile);
  const bool is_whole = panel * kPanelColumns + kTile < vocab_;
  float* out = work.out + int64_t(row_tile) * kTile * vocab_ + panel * kPanelColumns;
  for (int i = 0; i < num_rows; ++i, out += vocab_) {
    const int at = i * kTile;
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_load_ps(sums[0] + at), _mm512_load_ps(sums[2] + at)));
    if (!is_whole) continue;
    _mm512_storeu_ps(out + kTile, _mm512_add_ps(_mm512_load_ps(sums[1] + at), _mm512_load_ps(sums[3] + at)));
  }
}

void Head::apply(const float* rows, int num_rows, float* out, int num_threads) const {
  const int num_row_tiles = (num_rows + kTile - 1) / kTile;
  const Aligned<uint16_t> split(size_t(num_row_tiles) * kTile * kParts * size_t(width_));
  split_rows(rows, num_rows, width_, split.get());
  Work work{this, split.get(), num_rows, out};
  run_on_team(
      num_threads,
      [](void* context, int, int) {
        Work& work = *static_cast<Work*>(context);
        const Tiles tiles;
        const int num_panels = (work.head->vocab_ + kPanelColumns - 1) / kPanelColumns;
        const int num_row_tiles = (work.num_rows + kTile - 1) / kTile;
        for (int first; (first = work.next.fetch_add(kPanelsPerTask)) < num_panels;) {
          for (int panel = first; panel < std::min(first + kPanelsPerTask, num_panels); ++panel) {
            for (int tile = 0; tile < num_row_tiles; ++tile) work.head->apply_panel(work, panel, tile);
          }
        }
      },
      &work);
}

}  // namespace strata

#pragma GCC pop_options
#endif
