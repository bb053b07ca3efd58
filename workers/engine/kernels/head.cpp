#include "head.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <atomic>

#include "aligned.h"
#include "cpu.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#include "tiles.h"
#include "vectors.h"

namespace strata {
namespace {

constexpr int kParts = 3;           // A row in fp32 is the sum of so many in bf16: 24 bits of 8 each.
constexpr int kStep = 32;           // Numbers of the width that one product of tiles takes.
constexpr int kTokensPerTask = 1024;  // Of the vocabulary.

struct Work {
  const Head& head;
  int num_row_tiles;
  Aligned<uint32_t> packed;  // [row tiles][width / 32][parts][16 pairs of numbers][16 rows]
  std::atomic<int64_t> next{0};
};

// Splits the rows into parts of bf16, laid out as the second operand of a product.
void pack_rows(Work& work) {
  const Head& head = work.head;
  uint32_t* out = work.packed.get();
  for (int tile = 0; tile < work.num_row_tiles; ++tile) {
    for (int64_t at = 0; at < head.width; at += kStep) {
      __m512i parts[kParts][kTile];
      for (int i = 0; i < kTile; ++i) {
        const int64_t row = int64_t(tile) * kTile + i;
        const float* const from = head.rows + row * head.width + at;
        __m512 low = row < head.num_rows ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
        __m512 high = row < head.num_rows ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
        for (auto& part : parts) {
          part[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
          low = _mm512_sub_ps(low, from_bf16(_mm512_castsi512_si256(part[i])));
          high = _mm512_sub_ps(high, from_bf16(_mm512_extracti64x4_epi64(part[i], 1)));
        }
      }
      for (auto& part : parts) {
        transpose(part);
        for (int i = 0; i < kTile; ++i, out += kTile) _mm512_store_si512(out, part[i]);
      }
    }
  }
}

// Logits of 16 tokens for 16 rows.
void apply_tile(const Work& work, int64_t token, int row_tile) {
  const Head& head = work.head;
  const uint16_t* const weight = head.weight + token * head.width;
  const uint32_t* rows = work.packed.get() + int64_t(row_tile) * head.width / kStep * kParts * kTile * kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (int64_t at = 0; at < head.width; at += kStep, rows += kParts * kTile * kTile) {
    _tile_loadd(3, weight + at, head.width * 2);
    _tile_loadd(4, rows, 64);
    _tile_loadd(5, rows + kTile * kTile, 64);
    _tile_loadd(6, rows + 2 * kTile * kTile, 64);
    _tile_dpbf16ps(0, 3, 4);
    _tile_dpbf16ps(1, 3, 5);
    _tile_dpbf16ps(2, 3, 6);
  }
  alignas(64) float sums[3][kTile * kTile];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  __m512i logits[kTile];
  for (int i = 0; i < kTile; ++i) {
    const __m512 small = _mm512_add_ps(_mm512_load_ps(sums[1] + i * kTile), _mm512_load_ps(sums[2] + i * kTile));
    logits[i] = _mm512_castps_si512(_mm512_add_ps(_mm512_load_ps(sums[0] + i * kTile), small));
  }
  transpose(logits);
  const int64_t num_rows = std::min<int64_t>(kTile, head.num_rows - int64_t(row_tile) * kTile);
  for (int64_t i = 0; i < num_rows; ++i) {
    _mm512_storeu_ps(head.out + (int64_t(row_tile) * kTile + i) * head.vocab + token, _mm512_castsi512_ps(logits[i]));
  }
}

void run(void* context, int, int) {
  Work& work = *static_cast<Work*>(context);
  const Tiles tiles;
  for (int64_t first; (first = work.next.fetch_add(kTokensPerTask)) < work.head.vocab;) {
    const int64_t stop = std::min(first + kTokensPerTask, work.head.vocab);
    for (int64_t token = first; token < stop; token += kTile) {
      for (int tile = 0; tile < work.num_row_tiles; ++tile) apply_tile(work, token, tile);
    }
  }
}

}  // namespace

void apply_head(const Head& head, int num_threads) {
  const int num_row_tiles = int((head.num_rows + kTile - 1) / kTile);
  Work work{head, num_row_tiles, Aligned<uint32_t>(size_t(num_row_tiles) * kTile * kParts * size_t(head.width) / 2)};
  pack_rows(work);
  run_on_team(num_threads, run, &work);
}

}  // namespace strata

#pragma GCC pop_options
#endif
