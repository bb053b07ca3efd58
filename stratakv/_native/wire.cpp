#include "wire.h"

#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <thread>

#include "frames.h"
#include "headers.h"
#include "xxh3.h"

namespace strata {
namespace {

constexpr size_t kCallBytes = 256 * 1024;             // asked of one call, so that checksums find the bytes in the cache
constexpr size_t kIovecsMax = 1024;                    // the kernel's IOV_MAX
constexpr size_t kFramesAhead = 2;                     // requests sent before their data is received
constexpr size_t kReplyBytesMax = 64 * 1024;

// One layer of one page is an item; those of some consecutive pages are numbered layer by layer.
class Items {
 public:
  Items(const Batch& batch, size_t first_page, size_t stop_page)
      : batch_(batch), first_page_(first_page), pages_(stop_page - first_page) {}

  size_t count() const { return batch_.layers().size() * pages_; }
  size_t pages() const { return pages_; }
  size_t layer_index(size_t item) const { return item / pages_; }
  const Layer& layer(size_t item) const { return batch_.layers()[layer_index(item)]; }
  size_t page(size_t item) const { return first_page_ + item % pages_; }
  bool ends_layer(size_t item) const { return item % pages_ + 1 == pages_; }
  // Where the item's checksum is in a table [layer][page] of the batch.
  size_t checksum_at(size_t item) const { return layer(item).index * batch_.pages() + page(item); }
  size_t first_page() const { return first_page_; }
  uint64_t offset(size_t item) const {
    return static_cast<uint64_t>(batch_.page_offset(page(item)) + layer(item).page_start);
  }
  const Batch& batch() const { return batch_; }

 private:
  const Batch& batch_;
  size_t first_page_;
  size_t pages_;
};

// How every frame of a batch begins, and what one may carry at most.
struct Framing {
  std::string opening;
  size_t bytes;
  size_t ranges;
};

// Items `first` .. `stop - 1`, which travel in one frame.
struct Frame {
  size_t first;
  size_t stop;
  size_t bytes = 0;
  std::string ranges;

  // As many items as one frame may have, up to `limit`; neighbours in the segment become one range.
  Frame(const Items& items, const Framing& framing, size_t start, size_t limit) : first(start), stop(start) {
    std::vector<WireRange> found;
    for (; stop < limit; ++stop) {
      const size_t size = items.layer(stop).size;
      const uint64_t at = items.offset(stop);
      if (stop > first && bytes + size > framing.bytes) break;
      if (!found.empty() && found.back().offset + found.back().size == at) {
        found.back().size += static_cast<uint32_t>(size);
      } else if (found.size() == framing.ranges) {
        break;
      } else {
        found.push_back({at, static_cast<uint32_t>(size)});
      }
      bytes += size;
    }
    ranges.assign(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(WireRange));
  }
};

// The parts of some items, call by call, and the checksums of the items from what the calls moved.
class Parts {
 public:
  Parts(const Items& items, size_t first, size_t stop) : items_(items), at_(first), hashing_(first), stop_(stop) { begin(); }

  // The next call's parts; none when there is nothing left.
  std::vector<iovec> next() {
    std::vector<iovec> parts;
    ends_item_.clear();
    for (size_t bytes = 0; at_ < stop_ && bytes < kCallBytes && parts.size() < kIovecsMax;) {
      const Layer& layer = items_.layer(at_);
      const Range& range = layer.ranges[range_];
      const size_t size = std::min(range.size - done_, kCallBytes - bytes);
      parts.push_back({items_.batch().at(range, items_.page(at_)) + done_, size});
      bytes += size;
      done_ += size;
      if (done_ == range.size) {
        done_ = 0;
        ++range_;
      }
      ends_item_.push_back(range_ == layer.ranges.size());
      if (ends_item_.back()) {
        range_ = 0;
        ++at_;
      }
    }
    return parts;
  }

  // Takes into account what the last `next` told; `ended(item, checksum)` for each item that is whole, until it says false.
  template <typename Callback>
  bool checksum(const std::vector<iovec>& parts, Callback ended) {
    for (size_t i = 0; i < parts.size(); ++i) {
      hash_.feed(static_cast<const uint8_t*>(parts[i].iov_base), parts[i].iov_len);
      if (!ends_item_[i]) continue;
      if (!ended(hashing_, hash_.digest())) return false;
      ++hashing_;
      begin();
    }
    return true;
  }

 private:
  void begin() {
    if (hashing_ < stop_) hash_ = SizedHash(items_.layer(hashing_).size);
  }

  const Items& items_;
  size_t at_;       // the item whose parts are told next,
  size_t range_ = 0;  // from this range on
  size_t done_ = 0;   // and this byte of it
  size_t hashing_;  // the item whose checksum is being computed
  size_t stop_;
  std::vector<bool> ends_item_;
  SizedHash hash_{0};
};

struct Answer {
  Ended ended = Ended::kWhole;
  size_t layer = 0;
  size_t page = 0;
  std::string said;  // a frame that is no data: its header, and its body if that is short
};

Ended request(const Wire& wire, const Framing& framing, const Frame& frame) {
  return wire.send(frame_header(framing.opening, kRead, frame.ranges.size(), 0) + frame.ranges);
}

// Reads a frame that ought to open with `kind`; what else comes is kept for the caller to read. Says whether it was `kind`.
bool is_next(const Wire& wire, const Framing& framing, Kind kind, size_t payload_bytes, Answer& answer) {
  Header got;
  answer.ended = wire.receive(&got, sizeof got);
  if (answer.ended != Ended::kWhole) return false;
  const bool is_ours = memcmp(got.opening, framing.opening.data(), kOpeningBytes) == 0;
  answer.said.assign(reinterpret_cast<const char*>(&got), sizeof got);
  if (is_ours && got.kind == kReply && got.payload_bytes == 0 && got.body_bytes <= kReplyBytesMax) {
    answer.said.resize(sizeof got + got.body_bytes);
    answer.ended = wire.receive(&answer.said[sizeof got], got.body_bytes);
    if (answer.ended != Ended::kWhole) return false;
    if (kind == kReply) return true;
  } else if (is_ours && got.kind == kind && got.body_bytes == 0 && got.payload_bytes == payload_bytes) {
    return true;
  }
  answer.ended = Ended::kAnswered;
  return false;
}

// Lets a layer through when all lanes have it.
class Arrivals {
 public:
  Arrivals(const Batch& batch, size_t lanes, Gate& done) : missing_(batch.layers().size()), done_(done) {
    for (auto& lanes_left : missing_) lanes_left.store(lanes, std::memory_order_relaxed);
  }
  void arrived(const Items& items, size_t item) {
    if (missing_[items.layer_index(item)].fetch_sub(1) == 1) done_.open(items.layer(item).number + 1);
  }
  bool is_stopped() const { return done_.is_closed(); }

 private:
  std::vector<std::atomic<size_t>> missing_;
  Gate& done_;
};

// The caller's tables for a batch, and what its headers say if they travel along.
struct Sealed {
  uint64_t* checksums;
  const Seals* seals = nullptr;
  uint8_t* headers = nullptr;

  uint8_t* header(size_t page) const { return headers + page * seals->header_bytes(); }
};

Ended check_item(const Items& items, size_t item, uint64_t checksum, const Sealed& sealed, Answer& answer) {
  const Layer& layer = items.layer(item);
  answer.page = items.page(item);
  answer.layer = layer.index;
  if (!layer.is_header) return checksum == sealed.checksums[items.checksum_at(item)] ? Ended::kWhole : Ended::kDamaged;
  answer.layer = sealed.seals->check(answer.page, sealed.header(answer.page), layer.size, sealed.checksums);
  return answer.layer == kGood ? Ended::kWhole : Ended::kHeader;
}

Answer fetch_frame(const Wire& wire, const Items& items, const Frame& frame, const Sealed& sealed, Arrivals& arrivals) {
  Answer answer;
  Parts parts(items, frame.first, frame.stop);
  for (std::vector<iovec> call = parts.next(); !call.empty(); call = parts.next()) {
    std::vector<iovec> filled = call;
    answer.ended = wire.receive(filled);
    if (answer.ended == Ended::kWhole && arrivals.is_stopped()) answer.ended = Ended::kStopped;
    if (answer.ended != Ended::kWhole) return answer;
    const bool is_good = parts.checksum(call, [&](size_t item, uint64_t checksum) {
      answer.ended = check_item(items, item, checksum, sealed, answer);
      if (answer.ended != Ended::kWhole) return false;
      if (!items.layer(item).is_header && items.ends_layer(item)) arrivals.arrived(items, item);
      return true;
    });
    if (!is_good) return answer;
  }
  return answer;
}

Answer fetch_all(const Wire& wire, const Framing& framing, const Items& items, const Sealed& sealed, Arrivals& arrivals) {
  Answer answer;
  std::vector<Frame> frames;
  for (size_t at = 0; at < items.count(); at = frames.back().stop) frames.emplace_back(items, framing, at, items.count());
  for (size_t i = 0; i < std::min(kFramesAhead, frames.size()); ++i) {
    answer.ended = request(wire, framing, frames[i]);
    if (answer.ended != Ended::kWhole) return answer;
  }
  for (size_t i = 0; i < frames.size(); ++i) {
    if (!is_next(wire, framing, kData, frames[i].bytes, answer)) return answer;
    answer = fetch_frame(wire, items, frames[i], sealed, arrivals);
    if (answer.ended == Ended::kWhole && i + kFramesAhead < frames.size()) {
      answer.ended = request(wire, framing, frames[i + kFramesAhead]);
    }
    if (answer.ended != Ended::kWhole) return answer;
  }
  return answer;
}

// Whether all layers of the items' pages have been dealt with when this one has.
bool ends_layers(const Items& items, size_t item) {
  const size_t headers = items.batch().layers().back().is_header ? 1 : 0;
  return !items.layer(item).is_header && items.layer_index(item) + 1 + headers == items.batch().layers().size() &&
         items.ends_layer(item);
}

Ended push_frame(const Wire& wire, const Framing& framing, const std::string& put_id, const Items& items,
                 const Frame& frame, const Sealed& sealed) {
  const std::string opening =
      frame_header(framing.opening, kWrite, put_id.size() + frame.ranges.size(), frame.bytes) + put_id + frame.ranges;
  Ended ended = Ended::kWhole;
  bool is_opened = false;
  Parts parts(items, frame.first, frame.stop);
  for (std::vector<iovec> call = parts.next(); ended == Ended::kWhole && !call.empty(); call = parts.next()) {
    parts.checksum(call, [&](size_t item, uint64_t checksum) {
      if (!items.layer(item).is_header) sealed.checksums[items.checksum_at(item)] = checksum;
      if (sealed.seals != nullptr && ends_layers(items, item)) {
        for (size_t page = items.first_page(); page < items.first_page() + items.pages(); ++page) {
          sealed.seals->pack(page, sealed.checksums, sealed.header(page));
        }
      }
      return true;
    });
    // One message, so that the other end wakes once.
    if (!is_opened) call.insert(call.begin(), {const_cast<char*>(opening.data()), opening.size()});
    is_opened = true;
    ended = wire.send(call);
  }
  return ended;
}

Answer push_all(const Wire& wire, const Framing& framing, const std::string& put_id, const std::string& thanks,
                const Items& items, const Sealed& sealed, Gate& ready, double deadline_s) {
  Answer answer;
  size_t num_frames = 0;
  for (size_t at = 0; at < items.count();) {
    if (!ready.wait(items.layer(at).number + 1, deadline_s)) {
      answer.ended = ready.is_closed() ? Ended::kStopped : Ended::kLate;
      return answer;
    }
    size_t limit = items.layer_index(at) * items.pages();
    while (limit < items.count() && items.layer(limit).number < ready.open_layers()) limit += items.pages();
    const Frame frame(items, framing, at, limit);
    answer.ended = push_frame(wire, framing, put_id, items, frame, sealed);
    if (answer.ended != Ended::kWhole) return answer;
    at = frame.stop;
    ++num_frames;
  }
  // The answers to all frames wait in the socket: they are few and short.
  for (size_t i = 0; i < num_frames; ++i) {
    if (!is_next(wire, framing, kReply, 0, answer)) return answer;
    if (answer.said.compare(sizeof(Header), std::string::npos, thanks) != 0) {
      answer.ended = Ended::kAnswered;
      return answer;
    }
  }
  return answer;
}

Framing framing_of(const Bytes& opening, Py_ssize_t bytes, Py_ssize_t ranges) {
  if (bytes < 1 || bytes > UINT32_MAX || ranges < 1) {
    PyErr_SetString(PyExc_ValueError, "a frame carries at least a byte and a range, and less than 4 GiB");
    throw PythonError();
  }
  return {text(opening, kOpeningBytes, "opening"), static_cast<size_t>(bytes), static_cast<size_t>(ranges)};
}

PyObject* told(const Answer& answer) {
  return Py_BuildValue("(inny#)", static_cast<int>(answer.ended), static_cast<Py_ssize_t>(answer.layer),
                       static_cast<Py_ssize_t>(answer.page), answer.said.data(),
                       static_cast<Py_ssize_t>(answer.said.size()));
}

// Moves a share of the pages over each socket, on a thread of its own; the first that fails ends the others.
template <typename Move>
Answer in_lanes(const std::vector<int>& fds, const Batch& batch, Move move) {
  std::mutex mutex;
  Answer first;
  const auto run = [&](size_t lane) {
    Answer answer;
    try {
      const size_t pages = batch.pages();
      answer = move(fds[lane], Items(batch, pages * lane / fds.size(), pages * (lane + 1) / fds.size()));
    } catch (const std::bad_alloc&) {
      answer.ended = Ended::kGone;
    }
    if (answer.ended == Ended::kWhole) return;
    const std::lock_guard<std::mutex> lock(mutex);
    if (first.ended != Ended::kWhole) return;
    first = answer;
    for (size_t other = 0; other < fds.size(); ++other) {
      if (other != lane) ::shutdown(fds[other], SHUT_RDWR);
    }
  };
  std::vector<std::thread> lanes;
  lanes.reserve(fds.size());
  for (size_t lane = 1; lane < fds.size(); ++lane) {
    try {
      lanes.emplace_back(run, lane);
    } catch (const std::system_error&) {
      run(lane);  // there are too many threads already
    }
  }
  run(0);
  for (std::thread& lane : lanes) lane.join();
  return first;
}

std::vector<int> sockets_of(PyObject* tuple, const Batch& batch) {
  std::vector<int> fds;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) {
    const long fd = PyLong_AsLong(PyTuple_GetItem(tuple, i));
    if (fd == -1 && PyErr_Occurred() != nullptr) throw PythonError();
    fds.push_back(static_cast<int>(fd));
  }
  if (fds.empty() || fds.size() > std::max<size_t>(batch.pages(), 1)) {
    PyErr_SetString(PyExc_ValueError, "a batch takes at least one socket, and no more than it has pages");
    throw PythonError();
  }
  return fds;
}

// Ranges travel with 32 bits of size and are never empty.
bool fits_wire(const Batch& batch, const Framing& framing) {
  return std::all_of(batch.layers().begin(), batch.layers().end(),
                     [&](const Layer& layer) { return layer.size > 0 && layer.size <= framing.bytes; });
}

constexpr size_t kAnySegment = INT64_MAX;  // the daemon knows its size and checks every range

// Has the headers travel along that a tuple (namespace, keys, generations, data_bytes, num_layers) tells of; None: without them.
class Headers {
 public:
  Headers(PyObject* told, Batch& batch, bool before) {
    if (told == Py_None) return;
    PyObject *name_space, *keys, *generations;
    unsigned long long data_bytes;
    Py_ssize_t num_layers;
    if (!PyArg_ParseTuple(told, "OOOKn", &name_space, &keys, &generations, &data_bytes, &num_layers)) throw PythonError();
    seals_ = std::make_unique<Seals>(name_space, keys, generations, data_bytes, num_layers, batch.pages());
    bool is_whole = batch.layers().size() == seals_->num_layers();
    for (const Layer& layer : batch.layers()) is_whole = is_whole && layer.number == static_cast<int64_t>(layer.index);
    if (!is_whole) {
      PyErr_SetString(PyExc_ValueError, "headers travel with all layers of their pages, in order");
      throw PythonError();
    }
    batch.add_headers(memory_, seals_->header_bytes(), before);
  }

  Sealed sealed(uint64_t* checksums) { return {checksums, seals_.get(), memory_.data()}; }

 private:
  std::unique_ptr<Seals> seals_;
  std::vector<uint8_t> memory_;
};

}  // namespace

PyObject* fetch_pages(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *sockets, *opening_bytes, *page_offsets, *layers, *rows, *checksums, *done, *told_headers;
    Py_ssize_t frame_bytes, frame_ranges;
    double deadline_s;
    if (!PyArg_ParseTuple(args, "O!OnnOOOOOdO", &PyTuple_Type, &sockets, &opening_bytes, &frame_bytes, &frame_ranges,
                          &page_offsets, &layers, &rows, &checksums, &done, &deadline_s, &told_headers)) {
      return nullptr;
    }
    Batch batch(page_offsets, layers, rows, true);
    const Bytes sums(checksums, told_headers != Py_None), start(opening_bytes, false);
    auto* const table = sums.numbers<uint64_t>(batch.pages() * batch.layers().size(), "checksums");
    Headers headers(told_headers, batch, true);
    const Sealed sealed = headers.sealed(table);
    const Framing framing = framing_of(start, frame_bytes, frame_ranges);
    Gate& gate = gate_of(done);
    const std::vector<int> fds = sockets_of(sockets, batch);
    Answer answer;
    {
      const WithoutInterpreter released;
      answer.ended = Ended::kOutOfBounds;
      if (fits_wire(batch, framing) && batch.is_within(kAnySegment)) {
        Arrivals arrivals(batch, fds.size(), gate);
        answer = in_lanes(fds, batch, [&](int fd, const Items& items) {
          return fetch_all(Wire(fd, deadline_s), framing, items, sealed, arrivals);
        });
      }
    }
    return told(answer);
  });
}

PyObject* push_pages(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *sockets, *opening_bytes, *put, *thanks_bytes, *page_offsets, *layers, *rows, *checksums, *ready, *told_headers;
    Py_ssize_t frame_bytes, frame_ranges;
    double deadline_s;
    if (!PyArg_ParseTuple(args, "O!OnnOOOOOOOdO", &PyTuple_Type, &sockets, &opening_bytes, &frame_bytes, &frame_ranges, &put,
                          &thanks_bytes, &page_offsets, &layers, &rows, &checksums, &ready, &deadline_s, &told_headers)) {
      return nullptr;
    }
    Batch batch(page_offsets, layers, rows, false);
    const Bytes sums(checksums, true), start(opening_bytes, false), id(put, false), end(thanks_bytes, false);
    auto* const table = sums.numbers<uint64_t>(batch.pages() * batch.layers().size(), "checksums");
    Headers headers(told_headers, batch, false);
    const Sealed sealed = headers.sealed(table);
    const Framing framing = framing_of(start, frame_bytes, frame_ranges);
    const std::string put_id = text(id, kPutIdBytes, "put_id"), thanks = text(end, 0, "thanks");
    Gate& gate = gate_of(ready);
    const std::vector<int> fds = sockets_of(sockets, batch);
    Answer answer;
    {
      const WithoutInterpreter released;
      answer.ended = Ended::kOutOfBounds;
      if (fits_wire(batch, framing) && batch.is_within(kAnySegment)) {
        answer = in_lanes(fds, batch, [&](int fd, const Items& items) {
          return push_all(Wire(fd, deadline_s), framing, put_id, thanks, items, sealed, gate, deadline_s);
        });
      }
    }
    return told(answer);
  });
}

}  // namespace strata
