// Layers of many pages between an engine's memory and a segment, copied and checked in one pass over the bytes.
#pragma once

#include <memory>

#include "gate.h"

namespace strata {

// How a batch ended; `Ended` in the Python stub.
enum class Ended : int { kWhole = 0, kDamaged = 1, kOutOfBounds = 2, kLate = 3, kStopped = 4, kGone = 5, kAnswered = 6, kHeader = 7 };

// One range of a layer in the engine's memory: `size` bytes at `start + row × stride`. Of headers, rows are numbers of pages.
struct Range {
  uint8_t* memory;
  size_t memory_size;
  int64_t start;
  int64_t stride;
  size_t size;
  bool is_by_page = false;
};

struct Layer {
  int64_t number;
  size_t index;        // its row in tables [layer][page]
  bool is_header;      // no layer at all, but the headers of the pages
  int64_t page_start;  // where the layer begins in a page
  size_t size;
  std::vector<Range> ranges;
};

// What a batch moves: `layers` of pages at `page_offsets` of a segment, page i being row `rows[i]` of the engine's memory.
// Keeps all Python buffers alive.
class Batch {
 public:
  Batch(PyObject* page_offsets, PyObject* layers, PyObject* rows, bool is_read);

  size_t pages() const { return pages_; }
  const std::vector<Layer>& layers() const { return layers_; }
  int64_t page_offset(size_t page) const { return page_offsets_[page]; }
  uint8_t* at(const Range& range, size_t page) const { return range.memory + range.start + row(range, page) * range.stride; }
  // Moves the pages' headers too, between their places and `memory`: before all layers or behind them.
  void add_headers(std::vector<uint8_t>& memory, size_t header_bytes, bool before);
  // Whether every byte lies within its buffer and, with the pages, within a segment of so many bytes.
  bool is_within(size_t segment_size) const;

 private:
  void add_layer(PyObject* item, bool is_read);
  int64_t row(const Range& range, size_t page) const { return range.is_by_page ? static_cast<int64_t>(page) : rows_[page]; }

  std::vector<Bytes> held_;
  std::vector<Layer> layers_;
  size_t pages_ = 0;
  const int64_t* page_offsets_ = nullptr;
  const int64_t* rows_ = nullptr;
};

// Looks after the daemon's life and the deadline, every so many bytes.
class Watch {
 public:
  Watch(int fd, double deadline_s) : fd_(fd), deadline_s_(deadline_s) {}
  // kWhole while all is well.
  Ended look() const;
  // The same, but only when enough bytes have gone by since it looked last.
  Ended passed(size_t size);

 private:
  int fd_;
  double deadline_s_;
  size_t since_ = 0;
};

PyObject* read_pages(PyObject* module, PyObject* args);
PyObject* write_pages(PyObject* module, PyObject* args);

}  // namespace strata
