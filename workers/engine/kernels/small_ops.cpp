#include "small_ops.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "vectors.h"

namespace strata {
namespace {

__m512 load_bf16(const uint16_t* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(widen(from), 16)); }

void store(uint16_t* to, __m512 numbers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(numbers));
}

void store(float* to, __m512 numbers) { _mm512_storeu_ps(to, numbers); }

float norm_factor(__m512 squares, int count, float epsilon) {
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(count) + epsilon);
}

template <typename Number>
void normalise_to(const Norm& norm, const float* row, Number* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < norm.width; i += 16) {
    const __m512 number = _mm512_loadu_ps(row + i);
    squares = _mm512_fmadd_ps(number, number, squares);
  }
  const __m512 factor = _mm512_set1_ps(norm_factor(squares, norm.width, norm.epsilon));
  for (int i = 0; i < norm.width; i += 16) {
    const __m512 normed = _mm512_mul_ps(_mm512_loadu_ps(row + i), factor);
    store(out + i, _mm512_mul_ps(normed, _mm512_loadu_ps(norm.weight + i)));
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
      const __m512 number = load_bf16(from + i);
      squares = _mm512_fmadd_ps(number, number, squares);
    }
    factor = _mm512_set1_ps(norm_factor(squares, dim, epsilon));
  }
  for (int i = 0; i < half; i += 16) {
    __m512 first = load_bf16(from + i), second = load_bf16(from + half + i);
    if (weight != nullptr) {
      first = _mm512_mul_ps(_mm512_mul_ps(first, factor), _mm512_loadu_ps(weight + i));
      second = _mm512_mul_ps(_mm512_mul_ps(second, factor), _mm512_loadu_ps(weight + half + i));
    }
    const __m512 cosine = _mm512_loadu_ps(cosines + i), sine = _mm512_loadu_ps(sines + i);
    store(to + i, _mm512_fmsub_ps(first, cosine, _mm512_mul_ps(second, sine)));
    store(to + half + i, _mm512_fmadd_ps(second, cosine, _mm512_mul_ps(first, sine)));
  }
}

}  // namespace

void normalise(const Norm& norm, const float* row, uint16_t* out) { normalise_to(norm, row, out); }
void normalise(const Norm& norm, const float* row, float* out) { normalise_to(norm, row, out); }

void widen_row(const uint16_t* row, int width, float* out) {
  for (int i = 0; i < width; i += 16) store(out + i, load_bf16(row + i));
}

void rotate_write(const RotateWrite& work, const uint16_t* heads, const float* cosines, const float* sines,
                  const HeadsOut& out) {
  const int dim = work.shape.head_dim;
  for (int head = 0; head < work.shape.num_heads; ++head, heads += dim) {
    rotate_head(heads, cosines, sines, work.q_norm, work.epsilon, dim, out.q + head * dim);
  }
  for (int head = 0; head < work.shape.num_kv_heads; ++head, heads += dim) {
    rotate_head(heads, cosines, sines, work.k_norm, work.epsilon, dim, out.k + head * dim);
  }
  memcpy(out.v, heads, sizeof(uint16_t) * size_t(work.shape.num_kv_heads) * dim);
}

}  // namespace strata

#pragma GCC pop_options
#endif
