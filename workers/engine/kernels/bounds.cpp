#include "bounds.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu.h"
#include "huge_pages.h"

#pragma GCC push_options
#pragma GCC target("avx512f,amx-tile,amx-bf16")
#include "tiles.h"

namespace strata {
namespace {

constexpr int kRounds = 7;                     // The best one counts.
constexpr size_t kReadBytes = size_t(256) << 20;  // As many as the weights of a small model.
constexpr size_t kAheadBytes = 1024;
constexpr int kProducts = 200000;
constexpr double kProductOperations = 2.0 * kTile * kTile * 2 * kTile;

struct Reading {
  const char* data;
  uint32_t sums[1024];
};

void read(void* context, int thread, int count) {
  Reading& reading = *static_cast<Reading*>(context);
  const char* const stop = reading.data + kReadBytes / 64 * size_t(thread + 1) / size_t(count) * 64;
  __m512i sum = _mm512_setzero_si512();
  for (const char* at = reading.data + kReadBytes / 64 * size_t(thread) / size_t(count) * 64; at < stop; at += 64) {
    _mm_prefetch(at + kAheadBytes, _MM_HINT_T0);
    sum = _mm512_xor_si512(sum, _mm512_load_si512(at));
  }
  reading.sums[thread % 1024] = uint32_t(_mm512_reduce_add_epi32(sum));  // So that the reads are not left out.
}

void multiply(void*, int, int) {
  const Tiles tiles;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int i = 0; i < kProducts; i += 4) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

double best_s(int num_threads, void (*body)(void*, int, int), void* context) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const auto began = std::chrono::steady_clock::now();
    run_on_team(num_threads, body, context);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  return best;
}

}  // namespace

Bounds measure_bounds(int num_threads) {
  const HugePages memory(kReadBytes + kAheadBytes);
  memset(memory.get(), 1, kReadBytes);
  Reading reading{memory.get(), {}};
  const double read_s = best_s(num_threads, read, &reading);
  const double multiply_s = best_s(num_threads, multiply, nullptr);
  return {double(kReadBytes) / read_s, kProducts * kProductOperations * num_threads / multiply_s};
}

}  // namespace strata

#pragma GCC pop_options
#endif
