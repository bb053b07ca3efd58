#include "xxh3.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace strata {
namespace {

constexpr uint64_t kPrime32_1 = 0x9E3779B1U, kPrime32_2 = 0x85EBCA77U, kPrime32_3 = 0xC2B2AE3DU;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87ULL, kPrime64_2 = 0xC2B2AE3D27D4EB4FULL,
                   kPrime64_3 = 0x165667B19E3779F9ULL, kPrime64_4 = 0x85EBCA77C2B2AE63ULL,
                   kPrime64_5 = 0x27D4EB2F165667C5ULL;
constexpr uint64_t kPrimeMx1 = 0x165667919E3779F9ULL, kPrimeMx2 = 0x9FB21C651E98DF25ULL;
constexpr size_t kStripesPerBlock = (kSecretBytes - kStripeBytes) / 8;

alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline uint64_t read64(const uint8_t* at) {
  uint64_t value;
  memcpy(&value, at, 8);
  return value;
}

inline uint64_t read32(const uint8_t* at) {
  uint32_t value;
  memcpy(&value, at, 4);
  return value;
}

inline uint64_t rotate_left(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

inline uint64_t multiply_fold(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche_64(uint64_t h) {
  h = (h ^ h >> 33) * kPrime64_2;
  h = (h ^ h >> 29) * kPrime64_3;
  return h ^ h >> 32;
}

inline uint64_t avalanche_3(uint64_t h) {
  h = (h ^ h >> 37) * kPrimeMx1;
  return h ^ h >> 32;
}

inline uint64_t mix_16(const uint8_t* in, const uint8_t* secret, uint64_t seed) {
  return multiply_fold(read64(in) ^ (read64(secret) + seed), read64(in + 8) ^ (read64(secret + 8) - seed));
}

uint64_t hash_up_to_16(const uint8_t* in, size_t size, uint64_t seed) {
  if (size == 0) return avalanche_64(seed ^ read64(kSecret + 56) ^ read64(kSecret + 64));
  if (size <= 3) {
    const uint32_t combined = static_cast<uint32_t>(in[0]) << 16 | static_cast<uint32_t>(in[size >> 1]) << 24 |
                              in[size - 1] | static_cast<uint32_t>(size) << 8;
    return avalanche_64(combined ^ ((read32(kSecret) ^ read32(kSecret + 4)) + seed));
  }
  if (size <= 8) {
    seed ^= static_cast<uint64_t>(__builtin_bswap32(static_cast<uint32_t>(seed))) << 32;
    uint64_t h = (read32(in + size - 4) + (read32(in) << 32)) ^ ((read64(kSecret + 8) ^ read64(kSecret + 16)) - seed);
    h = (h ^ rotate_left(h, 49) ^ rotate_left(h, 24)) * kPrimeMx2;
    h = (h ^ ((h >> 35) + size)) * kPrimeMx2;
    return h ^ h >> 28;
  }
  const uint64_t low = read64(in) ^ ((read64(kSecret + 24) ^ read64(kSecret + 32)) + seed);
  const uint64_t high = read64(in + size - 8) ^ ((read64(kSecret + 40) ^ read64(kSecret + 48)) - seed);
  return avalanche_3(size + __builtin_bswap64(low) + high + multiply_fold(low, high));
}

uint64_t hash_17_to_128(const uint8_t* in, size_t size, uint64_t seed) {
  uint64_t sum = size * kPrime64_1;
  for (size_t pair = (size - 1) / 32 + 1; pair-- > 0;) {
    sum += mix_16(in + 16 * pair, kSecret + 32 * pair, seed);
    sum += mix_16(in + size - 16 * (pair + 1), kSecret + 32 * pair + 16, seed);
  }
  return avalanche_3(sum);
}

uint64_t hash_129_to_240(const uint8_t* in, size_t size, uint64_t seed) {
  uint64_t sum = size * kPrime64_1;
  for (size_t i = 0; i < 8; ++i) sum += mix_16(in + 16 * i, kSecret + 16 * i, seed);
  sum = avalanche_3(sum);
  for (size_t i = 8; i < size / 16; ++i) sum += mix_16(in + 16 * i, kSecret + 16 * (i - 8) + 3, seed);
  return avalanche_3(sum + mix_16(in + size - 16, kSecret + 136 - 17, seed));
}

uint64_t hash_short(const uint8_t* in, size_t size, uint64_t seed) {
  if (size <= 16) return hash_up_to_16(in, size, seed);
  return size <= 128 ? hash_17_to_128(in, size, seed) : hash_129_to_240(in, size, seed);
}

void start_lanes(uint64_t* lanes) {
  const uint64_t start[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                             kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  memcpy(lanes, start, sizeof start);
}

uint64_t merge_lanes(const uint64_t* lanes, const uint8_t* secret, uint64_t size) {
  uint64_t sum = size * kPrime64_1;
  for (size_t i = 0; i < 4; ++i) {
    sum += multiply_fold(lanes[2 * i] ^ read64(secret + 11 + 16 * i), lanes[2 * i + 1] ^ read64(secret + 19 + 16 * i));
  }
  return avalanche_3(sum);
}

// Kernels take `count` whole stripes into the lanes, scrambling them at the end of each block, and store each stripe at `target`
// if there is one. They return the number of stripes since the last scramble.
using Kernel = size_t (*)(uint64_t* lanes, uint8_t* target, const uint8_t* in, size_t count, size_t in_block,
                          const uint8_t* secret);

size_t scalar_stripes(uint64_t* lanes, uint8_t* target, const uint8_t* in, size_t count, size_t in_block,
                      const uint8_t* secret) {
  for (; count; --count, in += kStripeBytes) {
    uint8_t stripe[kStripeBytes];
    memcpy(stripe, in, kStripeBytes);
    if (target != nullptr) {
      memcpy(target, stripe, kStripeBytes);
      target += kStripeBytes;
    }
    for (size_t i = 0; i < 8; ++i) {
      const uint64_t value = read64(stripe + 8 * i), keyed = value ^ read64(secret + 8 * (in_block + i));
      lanes[i ^ 1] += value;
      lanes[i] += (keyed & 0xFFFFFFFFU) * (keyed >> 32);
    }
    if (++in_block == kStripesPerBlock) {
      in_block = 0;
      for (size_t i = 0; i < 8; ++i) {
        lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ read64(secret + kSecretBytes - kStripeBytes + 8 * i)) * kPrime32_1;
      }
    }
  }
  return in_block;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) size_t avx512_stripes(uint64_t* lanes, uint8_t* target, const uint8_t* in,
                                                         size_t count, size_t in_block, const uint8_t* secret) {
  __m512i sum = _mm512_loadu_si512(lanes);
  const __m512i prime = _mm512_set1_epi32(static_cast<int>(kPrime32_1));
  const __m512i scramble = _mm512_loadu_si512(secret + kSecretBytes - kStripeBytes);
  for (; count; --count, in += kStripeBytes) {
    const __m512i value = _mm512_loadu_si512(in);
    if (target != nullptr) {
      _mm512_storeu_si512(target, value);
      target += kStripeBytes;
    }
    const __m512i keyed = _mm512_xor_si512(value, _mm512_loadu_si512(secret + 8 * in_block));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    sum = _mm512_add_epi64(sum, _mm512_shuffle_epi32(value, _MM_PERM_BADC));
    sum = _mm512_add_epi64(sum, product);
    if (++in_block == kStripesPerBlock) {
      in_block = 0;
      sum = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64(sum, 47)), scramble);
      const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(sum, 32), prime);
      sum = _mm512_add_epi64(_mm512_mul_epu32(sum, prime), _mm512_slli_epi64(high, 32));
    }
  }
  _mm512_storeu_si512(lanes, sum);
  return in_block;
}

__attribute__((target("avx2"))) size_t avx2_stripes(uint64_t* lanes, uint8_t* target, const uint8_t* in, size_t count,
                                                    size_t in_block, const uint8_t* secret) {
  auto* const wide = reinterpret_cast<__m256i*>(lanes);
  __m256i sums[2] = {_mm256_loadu_si256(wide), _mm256_loadu_si256(wide + 1)};
  const __m256i prime = _mm256_set1_epi32(static_cast<int>(kPrime32_1));
  for (; count; --count, in += kStripeBytes) {
    for (size_t half = 0; half < 2; ++half) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in) + half);
      if (target != nullptr) _mm256_storeu_si256(reinterpret_cast<__m256i*>(target) + half, value);
      const auto* const key = reinterpret_cast<const __m256i*>(secret + 8 * in_block) + half;
      const __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256(key));
      const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
      sums[half] = _mm256_add_epi64(sums[half], _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2)));
      sums[half] = _mm256_add_epi64(sums[half], product);
    }
    if (target != nullptr) target += kStripeBytes;
    if (++in_block == kStripesPerBlock) {
      in_block = 0;
      for (size_t half = 0; half < 2; ++half) {
        const auto* const key = reinterpret_cast<const __m256i*>(secret + kSecretBytes - kStripeBytes) + half;
        const __m256i mixed = _mm256_xor_si256(sums[half], _mm256_srli_epi64(sums[half], 47));
        const __m256i keyed = _mm256_xor_si256(mixed, _mm256_loadu_si256(key));
        const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
        sums[half] = _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
      }
    }
  }
  _mm256_storeu_si256(wide, sums[0]);
  _mm256_storeu_si256(wide + 1, sums[1]);
  return in_block;
}
#endif

struct Choice {
  Kernel kernel;
  const char* name;
};

// The best one that can run here, or the one of that name.
Choice choose(const char* name) {
  const auto is_wanted = [name](const char* candidate) { return name == nullptr || strcmp(name, candidate) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (is_wanted("avx512") && __builtin_cpu_supports("avx512f")) return {avx512_stripes, "avx512"};
  if (is_wanted("avx2") && __builtin_cpu_supports("avx2")) return {avx2_stripes, "avx2"};
#endif
  return is_wanted("scalar") ? Choice{scalar_stripes, "scalar"} : Choice{nullptr, nullptr};
}

Choice chosen = choose(nullptr);

void last_stripe(uint64_t* lanes, const uint8_t* in, const uint8_t* secret) {
  scalar_stripes(lanes, nullptr, in, 1, 0, secret + kSecretBytes - kStripeBytes - 7);
}

uint64_t hash_long(const uint8_t* in, size_t size, const uint8_t* secret) {
  alignas(64) uint64_t lanes[8];
  start_lanes(lanes);
  chosen.kernel(lanes, nullptr, in, (size - 1) / kStripeBytes, 0, secret);
  last_stripe(lanes, in + size - kStripeBytes, secret);
  return merge_lanes(lanes, secret, size);
}

}  // namespace

const char* kernel_name() { return chosen.name; }

bool use_kernel(const char* name) {
  const Choice choice = choose(name);
  if (choice.kernel != nullptr) chosen = choice;
  return choice.kernel != nullptr;
}

uint64_t xxh3_64(const uint8_t* data, size_t size, uint64_t seed) {
  if (size <= kShortBytesMax) return hash_short(data, size, seed);
  if (seed == 0) return hash_long(data, size, kSecret);
  uint8_t secret[kSecretBytes];
  for (size_t at = 0; at < kSecretBytes; at += 16) {
    const uint64_t pair[2] = {read64(kSecret + at) + seed, read64(kSecret + at + 8) - seed};
    memcpy(secret + at, pair, sizeof pair);
  }
  return hash_long(data, size, secret);
}

SizedHash::SizedHash(size_t size) : size_(size), stripes_left_(size > kShortBytesMax ? (size - 1) / kStripeBytes : 0) {
  start_lanes(lanes_);
}

void SizedHash::copy(uint8_t* target, const uint8_t* source, size_t size) { take<true>(target, source, size); }

void SizedHash::feed(const uint8_t* source, size_t size) { take<false>(nullptr, source, size); }

template <bool kCopies>
void SizedHash::take(uint8_t* target, const uint8_t* source, size_t size) {
  // From `stored` on, the bytes are read where they do not change any more.
  const uint8_t* const stored = kCopies ? target : source;
  size_t at = 0;
  const size_t partial = fed_ % kStripeBytes;
  if (size_ <= kShortBytesMax || (partial != 0 && size < kStripeBytes - partial) || size < kStripeBytes) {
    if (kCopies) memcpy(target, source, size);
  } else {
    if (partial != 0) {
      at = kStripeBytes - partial;
      if (kCopies) memcpy(target, source, at);
      memcpy(partial_ + partial, stored, at);
      if (stripes_left_ != 0) {
        stripe_in_block_ = chosen.kernel(lanes_, nullptr, partial_, 1, stripe_in_block_, kSecret);
        --stripes_left_;
      }
    }
    const size_t whole = (size - at) / kStripeBytes, count = whole < stripes_left_ ? whole : stripes_left_;
    uint8_t* const into = kCopies ? target + at : nullptr;
    stripe_in_block_ = chosen.kernel(lanes_, into, source + at, count, stripe_in_block_, kSecret);
    stripes_left_ -= count;
    at += count * kStripeBytes;
    if (kCopies) memcpy(target + at, source + at, size - at);
    memcpy(partial_, stored + at, (size - at) % kStripeBytes);
    keep_last(stored, size);
    fed_ += size;
    return;
  }
  // A piece that ends within the stripe that is not full yet, or that alone is shorter than a stripe.
  if (size_ <= kShortBytesMax) {
    memcpy(short_ + fed_, stored, size);
  } else {
    const size_t head = size < kStripeBytes - partial ? size : kStripeBytes - partial;
    memcpy(partial_ + partial, stored, head);
    if (partial + head == kStripeBytes) {
      if (stripes_left_ != 0) {
        stripe_in_block_ = chosen.kernel(lanes_, nullptr, partial_, 1, stripe_in_block_, kSecret);
        --stripes_left_;
      }
      memcpy(partial_, stored + head, size - head);
    }
    keep_last(stored, size);
  }
  fed_ += size;
}

void SizedHash::keep_last(const uint8_t* piece, size_t size) {
  if (size >= kStripeBytes) {
    memcpy(last_, piece + size - kStripeBytes, kStripeBytes);
    return;
  }
  memmove(last_, last_ + size, kStripeBytes - size);
  memcpy(last_ + kStripeBytes - size, piece, size);
}

uint64_t SizedHash::digest() const {
  if (size_ <= kShortBytesMax) return hash_short(short_, size_, 0);
  alignas(64) uint64_t lanes[8];
  memcpy(lanes, lanes_, sizeof lanes);
  last_stripe(lanes, last_, kSecret);
  return merge_lanes(lanes, kSecret, size_);
}

}  // namespace strata
