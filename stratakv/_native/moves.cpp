#include "moves.h"

#include <poll.h>

#include "xxh3.h"

#ifndef POLLRDHUP
#define POLLRDHUP 0x2000
#endif

namespace strata {
namespace {

constexpr size_t kStepBytes = 1024 * 1024;

struct Outcome {
  Ended ended = Ended::kWhole;
  size_t layer = 0;
  size_t page = 0;
};

PyObject* told(const Outcome& outcome) {
  return Py_BuildValue("(inn)", static_cast<int>(outcome.ended), static_cast<Py_ssize_t>(outcome.layer),
                       static_cast<Py_ssize_t>(outcome.page));
}

uint64_t copy_out(const Batch& batch, const Layer& layer, size_t page, const uint8_t* segment) {
  SizedHash hash(layer.size);
  const uint8_t* from = segment + batch.page_offset(page) + layer.page_start;
  for (const Range& range : layer.ranges) {
    hash.copy(batch.at(range, page), from, range.size);
    from += range.size;
  }
  return hash.digest();
}

uint64_t copy_in(const Batch& batch, const Layer& layer, size_t page, uint8_t* segment) {
  SizedHash hash(layer.size);
  uint8_t* to = segment + batch.page_offset(page) + layer.page_start;
  for (const Range& range : layer.ranges) {
    hash.copy(to, batch.at(range, page), range.size);
    to += range.size;
  }
  return hash.digest();
}

Outcome read_all(const Batch& batch, const uint8_t* segment, const uint64_t* checksums, Gate& done, Watch watch) {
  Outcome outcome;
  outcome.ended = watch.look();
  for (; outcome.ended == Ended::kWhole && outcome.layer < batch.layers().size(); ++outcome.layer) {
    const Layer& layer = batch.layers()[outcome.layer];
    for (outcome.page = 0; outcome.page < batch.pages(); ++outcome.page) {
      if (copy_out(batch, layer, outcome.page, segment) != checksums[outcome.layer * batch.pages() + outcome.page]) {
        outcome.ended = Ended::kDamaged;
        return outcome;
      }
      outcome.ended = done.is_closed() ? Ended::kStopped : watch.passed(layer.size);
      if (outcome.ended != Ended::kWhole) return outcome;
    }
    outcome.ended = watch.look();
    if (outcome.ended != Ended::kWhole) return outcome;
    done.open(layer.number + 1);
  }
  return outcome;
}

Outcome write_all(const Batch& batch, uint8_t* segment, uint64_t* checksums, Gate& ready, Watch watch, double deadline_s) {
  Outcome outcome;
  for (; outcome.layer < batch.layers().size(); ++outcome.layer) {
    const Layer& layer = batch.layers()[outcome.layer];
    if (!ready.wait(layer.number + 1, deadline_s)) {
      outcome.ended = ready.is_closed() ? Ended::kStopped : Ended::kLate;
      return outcome;
    }
    outcome.ended = watch.look();
    for (outcome.page = 0; outcome.ended == Ended::kWhole && outcome.page < batch.pages(); ++outcome.page) {
      checksums[outcome.layer * batch.pages() + outcome.page] = copy_in(batch, layer, outcome.page, segment);
      outcome.ended = watch.passed(layer.size);
    }
    if (outcome.ended != Ended::kWhole) return outcome;
  }
  outcome.ended = watch.look();
  return outcome;
}

}  // namespace

Batch::Batch(PyObject* page_offsets, PyObject* layers, PyObject* rows, bool is_read) {
  held_.emplace_back(page_offsets, false);
  pages_ = held_.back().size() / sizeof(int64_t);
  page_offsets_ = held_.back().numbers<int64_t>(pages_, "page_offsets");
  held_.emplace_back(rows, false);
  rows_ = held_.back().numbers<int64_t>(pages_, "rows");
  const Py_ssize_t count = PySequence_Size(layers);
  if (count < 0) throw PythonError();
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const item = PySequence_GetItem(layers, i);
    if (item == nullptr) throw PythonError();
    try {
      add_layer(item, is_read);
    } catch (...) {
      Py_DECREF(item);
      throw;
    }
    Py_DECREF(item);
  }
}

void Batch::add_layer(PyObject* item, bool is_read) {
  Layer layer{};
  long long number, page_start;
  PyObject* ranges;
  if (!PyArg_ParseTuple(item, "LLO!", &number, &page_start, &PyTuple_Type, &ranges)) throw PythonError();
  layer.number = number;
  layer.index = layers_.size();
  layer.page_start = page_start;
  for (Py_ssize_t i = 0; i < PyTuple_Size(ranges); ++i) {
    PyObject* memory;
    long long start, stride, size;
    if (!PyArg_ParseTuple(PyTuple_GetItem(ranges, i), "OLLL", &memory, &start, &stride, &size)) throw PythonError();
    held_.emplace_back(memory, is_read);
    const Bytes& bytes = held_.back();
    layer.ranges.push_back({bytes.data(), bytes.size(), start, stride, static_cast<size_t>(size), false});
    layer.size += static_cast<size_t>(size);
  }
  layers_.push_back(std::move(layer));
}

void Batch::add_headers(std::vector<uint8_t>& memory, size_t header_bytes, bool before) {
  memory.resize(pages_ * header_bytes);
  Layer layer{};
  layer.number = layers_.empty() ? 0 : layers_.back().number;
  layer.is_header = true;
  layer.size = header_bytes;
  layer.ranges.push_back({memory.data(), memory.size(), 0, static_cast<int64_t>(header_bytes), header_bytes, true});
  layers_.insert(before ? layers_.begin() : layers_.end(), std::move(layer));
}

bool Batch::is_within(size_t segment_size) const {
  const auto is_inside = [](int64_t start, size_t size, size_t limit) {
    return start >= 0 && size <= limit && static_cast<size_t>(start) <= limit - size;
  };
  for (const Layer& layer : layers_) {
    for (size_t page = 0; page < pages_; ++page) {
      int64_t at;
      if (__builtin_add_overflow(page_offsets_[page], layer.page_start, &at)) return false;
      if (layer.page_start < 0 || page_offsets_[page] < 0 || !is_inside(at, layer.size, segment_size)) return false;
    }
    for (const Range& range : layer.ranges) {
      for (size_t page = 0; page < pages_; ++page) {
        int64_t at;
        if (__builtin_mul_overflow(row(range, page), range.stride, &at)) return false;
        if (__builtin_add_overflow(at, range.start, &at)) return false;
        if (!is_inside(at, range.size, range.memory_size)) return false;
      }
    }
  }
  return true;
}

Ended Watch::look() const {
  if (monotonic_s() >= deadline_s_) return Ended::kLate;
  if (fd_ < 0) return Ended::kWhole;
  pollfd polled = {fd_, POLLRDHUP, 0};
  return ::poll(&polled, 1, 0) > 0 ? Ended::kGone : Ended::kWhole;
}

Ended Watch::passed(size_t size) {
  since_ += size;
  if (since_ < kStepBytes) return Ended::kWhole;
  since_ = 0;
  return look();
}

PyObject* read_pages(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *segment, *page_offsets, *layers, *rows, *checksums, *done;
    int watch_fd;
    double deadline_s;
    if (!PyArg_ParseTuple(args, "OOOOOOid", &segment, &page_offsets, &layers, &rows, &checksums, &done, &watch_fd,
                          &deadline_s)) {
      return nullptr;
    }
    const Batch batch(page_offsets, layers, rows, true);
    const Bytes from(segment, false), expected(checksums, false);
    const auto* const sums = expected.numbers<uint64_t>(batch.pages() * batch.layers().size(), "checksums");
    Gate& gate = gate_of(done);
    Outcome outcome;
    {
      const WithoutInterpreter released;
      outcome.ended = Ended::kOutOfBounds;
      if (batch.is_within(from.size())) {
        outcome = read_all(batch, from.data(), sums, gate, Watch(watch_fd, deadline_s));
      }
    }
    return told(outcome);
  });
}

PyObject* write_pages(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *segment, *page_offsets, *layers, *rows, *checksums, *ready;
    int watch_fd;
    double deadline_s;
    if (!PyArg_ParseTuple(args, "OOOOOOid", &segment, &page_offsets, &layers, &rows, &checksums, &ready, &watch_fd,
                          &deadline_s)) {
      return nullptr;
    }
    const Batch batch(page_offsets, layers, rows, false);
    const Bytes to(segment, true), sums_out(checksums, true);
    auto* const sums = sums_out.numbers<uint64_t>(batch.pages() * batch.layers().size(), "checksums");
    Gate& gate = gate_of(ready);
    Outcome outcome;
    {
      const WithoutInterpreter released;
      outcome.ended = Ended::kOutOfBounds;
      if (batch.is_within(to.size())) {
        outcome = write_all(batch, to.data(), sums, gate, Watch(watch_fd, deadline_s), deadline_s);
      }
    }
    return told(outcome);
  });
}

}  // namespace strata
