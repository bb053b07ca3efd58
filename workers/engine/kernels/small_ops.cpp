#include "small_ops.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "cpu.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "vectors.h"

namespace strata {
namespace {

constexpr int64_t kNumbersPerThread = 16384;  // Less is done before a second thread is awake.

template <typename Work>
struct Rows {
  const Work& work;
  void (*body)(const Work&, int64_t row);
};

template <typename Work>
void for_rows(const Work& work, int64_t numbers_per_row, int num_threads, void (*body)(const Work&, int64_t)) {
  Rows<Work> rows{work, body};
  const int64_t useful = work.num_rows * numbers_per_row / kNumbersPerThread;
  if (useful < num_threads) num_threads = useful < 1 ? 1 : int(useful);
  run_on_team(
      num_threads,
      [](void* context, int thread, int count) {
        const auto& rows = *static_cast<Rows<Work>*>(context);
        const int64_t first = rows.work.num_rows * thread / count, stop = rows.work.num_rows * (thread + 1) / count;
        for (int64_t row = first; row < stop; ++row) rows.body(rows.work, row);
      },
      &rows);
}

__m512 from_bf16(const uint16_t* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(widen(from), 16)); }

void to_bf16(uint16_t* to, __m512 numbers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(numbers));
}

float norm_factor(__m512 squares, int64_t count, float epsilon) {
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(count) + epsilon);
}

void add_norm_row(const AddNorm& work, int64_t row) {
  float* const sums = work.sums + row * work.width;
  const uint16_t* const added = work.added + row * work.width;
  uint16_t* const out = work.out + row * work.width;
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < work.width; i += 16) {
    const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(sums + i), from_bf16(added + i));
    _mm512_storeu_ps(sums + i, sum);
    squares = _mm512_fmadd_ps(sum, sum, squares);
  }
  const __m512 factor = _mm512_set1_ps(norm_factor(squares, work.width, work.epsilon));
  for (int64_t i = 0; i < work.width; i += 16) {
    const __m512 normed = _mm512_mul_ps(_mm512_loadu_ps(sums + i), factor);
    to_bf16(out + i, _mm512_mul_ps(normed, _mm512_loadu_ps(work.weight + i)));
  }
}

// One head, normalised if there is a weight, then rotated: its first half against its second.
void rotate_head(const uint16_t* from, const float* cosines, const float* sines, const float* weight, float epsilon,
                 int dim, uint16_t* to) {
  const int half = dim / 2;
  __m512 factor = _mm512_set1_ps(1.0f);
  if (weight != nullptr) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < dim; i += 16) {
      const __m512 number = from_bf16(from + i);
      squares = _mm512_fmadd_ps(number, number, squares);
    }
    factor = _mm512_set1_ps(norm_factor(squares, dim, epsilon));
  }
  for (int i = 0; i < half; i += 16) {
    __m512 first = from_bf16(from + i), second = from_bf16(from + half + i);
    if (weight != nullptr) {
      first = _mm512_mul_ps(_mm512_mul_ps(first, factor), _mm512_loadu_ps(weight + i));
      second = _mm512_mul_ps(_mm512_mul_ps(second, factor), _mm512_loadu_ps(weight + half + i));
    }
    const __m512 cosine = _mm512_loadu_ps(cosines + i), sine = _mm512_loadu_ps(sines + i);
    to_bf16(to + i, _mm512_fmsub_ps(first, cosine, _mm512_mul_ps(second, sine)));
    to_bf16(to + half + i, _mm512_fmadd_ps(second, cosine, _mm512_mul_ps(first, sine)));
  }
}

void rotate_write_row(const RotateWrite& work, int64_t row) {
  const int dim = work.head_dim, num_heads = work.num_heads, num_kv_heads = work.num_kv_heads;
  const uint16_t* const heads = work.heads + row * (num_heads + 2 * num_kv_heads) * dim;
  uint16_t* const q_out = work.q_out + row * num_heads * dim;
  const float *const cosines = work.cosines + row * dim / 2, *const sines = work.sines + row * dim / 2;
  const int64_t slot = work.slots[row] * num_kv_heads * dim;
  for (int head = 0; head < num_heads; ++head) {
    rotate_head(heads + head * dim, cosines, sines, work.q_norm, work.epsilon, dim, q_out + head * dim);
  }
  for (int head = 0; head < num_kv_heads; ++head) {
    const uint16_t* const at = heads + (num_heads + head) * dim;
    rotate_head(at, cosines, sines, work.k_norm, work.epsilon, dim, work.k_cache + slot + head * dim);
  }
  memcpy(work.v_cache + slot, heads + (num_heads + num_kv_heads) * dim, sizeof(uint16_t) * size_t(num_kv_heads) * dim);
}

void gated_row(const Gated& work, int64_t row) {
  const uint16_t* const gate = work.gate_up + row * 2 * work.width;
  const uint16_t* const up = gate + work.width;
  uint16_t* const out = work.out + row * work.width;
  for (int64_t i = 0; i < work.width; i += 16) {
    const __m512 x = from_bf16(gate + i);
    to_bf16(out + i, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), from_bf16(up + i)));
  }
}

}  // namespace

void add_norm(const AddNorm& work, int num_threads) { for_rows(work, work.width, num_threads, add_norm_row); }

void rotate_write(const RotateWrite& work, int num_threads) {
  for_rows(work, int64_t(work.num_heads + 2 * work.num_kv_heads) * work.head_dim, num_threads, rotate_write_row);
}

void gated(const Gated& work, int num_threads) { for_rows(work, 2 * work.width, num_threads, gated_row); }

}  // namespace strata

#pragma GCC pop_options
#endif
