// Memory for vectors.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

namespace strata {

// Cache-line aligned numbers.
template <typename Number>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(size_t size) : size_(size) {
    if (size == 0) return;
    const size_t bytes = (size * sizeof(Number) + 63) / 64 * 64;
    data_ = static_cast<Number*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Aligned(Aligned&& other) noexcept { *this = static_cast<Aligned&&>(other); }
  Aligned& operator=(Aligned&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Aligned() { std::free(data_); }

  Number* get() const { return data_; }
  size_t size() const { return size_; }

 private:
  Number* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace strata
