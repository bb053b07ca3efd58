// Memory that is read from end to end again and again: in pages of 2 MiB where the system gives them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

namespace strata {

class HugePages {
 public:
  HugePages() = default;
  explicit HugePages(size_t size_bytes) : size_((size_bytes + kPage - 1) / kPage * kPage) {
    if (size_ == 0) return;
    // One page more, of which the parts before and behind an aligned range are given back.
    void* const all = mmap(nullptr, size_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    char* const start = static_cast<char*>(all);
    const size_t skipped = (kPage - reinterpret_cast<size_t>(start) % kPage) % kPage;
    data_ = start + skipped;
    if (skipped != 0) munmap(start, skipped);
    munmap(data_ + size_, kPage - skipped);
    madvise(data_, size_, MADV_HUGEPAGE);  // A wish: without it the pages are small.
  }
  HugePages(HugePages&& other) noexcept { *this = static_cast<HugePages&&>(other); }
  HugePages& operator=(HugePages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~HugePages() {
    if (data_ != nullptr) munmap(data_, size_);
  }

  char* get() const { return data_; }

 private:
  static constexpr size_t kPage = size_t(2) << 20;

  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace strata
