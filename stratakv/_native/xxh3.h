// XXH3-64, from its published specification, over bytes that arrive in pieces while they are being copied.
//
// The length is known before the first byte, so a hasher holds nothing back but the last 64 bytes. Used by `moves.cpp`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace strata {

constexpr size_t kStripeBytes = 64;
constexpr size_t kSecretBytes = 192;
constexpr size_t kShortBytesMax = 240;

// The hash of bytes that lie together.
uint64_t xxh3_64(const uint8_t* data, size_t size, uint64_t seed);

// The hash, with seed 0, of `size` bytes that are fed in pieces.
class SizedHash {
 public:
  explicit SizedHash(size_t size);

  // Copies the next piece and takes into account exactly the bytes that were stored: `source` may be changing meanwhile.
  void copy(uint8_t* target, const uint8_t* source, size_t size);

  // Takes the next piece into account where it lies; nobody may be changing it.
  void feed(const uint8_t* source, size_t size);

  // Once all bytes were fed.
  uint64_t digest() const;

 private:
  template <bool kCopies>
  void take(uint8_t* target, const uint8_t* source, size_t size);
  void keep_last(const uint8_t* piece, size_t size);

  alignas(64) uint64_t lanes_[8];
  alignas(64) uint8_t partial_[kStripeBytes];  // the stripe that is not full yet
  alignas(64) uint8_t last_[kStripeBytes];     // the last 64 bytes fed
  uint8_t short_[kShortBytesMax];              // everything, if that is little
  size_t size_;
  size_t fed_ = 0;
  size_t stripes_left_;
  size_t stripe_in_block_ = 0;
};

// Which kernel runs here: "avx512", "avx2" or "scalar".
const char* kernel_name();
// Whether the kernel of that name can run here; it does from now on.
bool use_kernel(const char* name);

}  // namespace strata
