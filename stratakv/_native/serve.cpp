#include "serve.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace strata {
namespace {

// What the daemon has told about itself, and one client's socket.
struct Service {
  int fd;
  uint8_t* segment;
  size_t segment_size;
  Grants& grants;
  std::string opening;
  std::string done;  // the whole frame that answers a write
  size_t control_bytes_max;
  size_t ranges_max;
  size_t transfer_bytes_max;
  double idle_s;   // negative: for ever
  double frame_s;  // what one frame may take
  int64_t* traffic;  // [flow][ranges, bytes, nanoseconds]
};

// A frame that is not dealt with here, or why there will be none.
struct Handed {
  Ended ended = Ended::kWhole;
  std::string header;
  std::string body;
};

// Whether another frame begins: false when the client has left, or fallen silent for too long.
bool is_next(const Service& service, Header& header, size_t& got) {
  for (;;) {
    pollfd polled = {service.fd, POLLIN, 0};
    const int timeout_ms = service.idle_s < 0 ? -1 : static_cast<int>(std::fmin(service.idle_s * 1e3, 2e9));
    const int ready = ::poll(&polled, 1, timeout_ms);
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return false;
    const ssize_t received = ::recv(service.fd, &header, sizeof header, MSG_DONTWAIT);
    if (received < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)) continue;
    if (received <= 0) return false;
    got = static_cast<size_t>(received);
    return true;
  }
}

bool is_within_limits(const Service& service, const Header& header) {
  if (memcmp(header.opening, service.opening.data(), kOpeningBytes) != 0) return false;
  const size_t ranges_bytes = service.ranges_max * sizeof(WireRange);
  switch (header.kind) {
    case kControl: return header.body_bytes <= service.control_bytes_max && header.payload_bytes == 0;
    case kRead: return header.body_bytes <= ranges_bytes && header.payload_bytes == 0;
    case kWrite:
      return header.body_bytes <= kPutIdBytes + ranges_bytes && header.payload_bytes <= service.transfer_bytes_max;
    default: return false;
  }
}

// The ranges and how long they are together; false unless all lie in the segment and one frame may carry them.
bool parse(const Service& service, const char* packed, size_t size, std::vector<WireRange>& ranges, size_t& total) {
  if (size == 0 || size % sizeof(WireRange) != 0) return false;
  ranges.resize(size / sizeof(WireRange));
  memcpy(ranges.data(), packed, size);
  total = 0;
  for (const WireRange& range : ranges) {
    if (range.size == 0 || range.offset >= service.segment_size || range.size > service.segment_size - range.offset) return false;
    total += range.size;
  }
  return total <= service.transfer_bytes_max;
}

void add_parts(const Service& service, const std::vector<WireRange>& ranges, std::vector<iovec>& parts) {
  parts.reserve(parts.size() + ranges.size());
  for (const WireRange& range : ranges) parts.push_back({service.segment + range.offset, range.size});
}

enum Flow { kReadFlow = 0, kWrittenFlow = 1 };

// Other threads may be reading the numbers.
void count(const Service& service, Flow flow, size_t ranges, size_t bytes, double since_s) {
  const int64_t amounts[3] = {static_cast<int64_t>(ranges), static_cast<int64_t>(bytes),
                              static_cast<int64_t>((monotonic_s() - since_s) * 1e9)};
  for (size_t i = 0; i < 3; ++i) __atomic_fetch_add(&service.traffic[3 * flow + i], amounts[i], __ATOMIC_RELAXED);
}

// Whether the frame was answered; if not, nothing has been done about it.
bool read(const Service& service, const Wire& wire, const std::string& body, Ended& ended) {
  std::vector<WireRange> ranges;
  size_t total;
  if (!parse(service, body.data(), body.size(), ranges, total)) return false;
  const std::string header = frame_header(service.opening, kData, 0, total);
  std::vector<iovec> parts{{const_cast<char*>(header.data()), header.size()}};
  add_parts(service, ranges, parts);
  const double since_s = monotonic_s();
  ended = wire.send(parts);
  if (ended == Ended::kWhole) count(service, kReadFlow, ranges.size(), total, since_s);
  return true;
}

// Whether the frame was taken; if not, its payload is still to come.
bool write(const Service& service, const Wire& wire, const Header& header, const std::string& body, Ended& ended) {
  if (body.size() < kPutIdBytes) return false;
  const std::string put_id = body.substr(0, kPutIdBytes);
  std::vector<WireRange> ranges;
  size_t total;
  if (!parse(service, body.data() + kPutIdBytes, body.size() - kPutIdBytes, ranges, total)) return false;
  std::vector<iovec> parts;
  add_parts(service, ranges, parts);
  if (total != header.payload_bytes || service.grants.enter(put_id, ranges, monotonic_s()) != Entered::kYes) return false;
  const double since_s = monotonic_s();
  ended = wire.receive(parts);
  service.grants.leave(put_id);
  if (ended != Ended::kWhole) return true;
  count(service, kWrittenFlow, ranges.size(), total, since_s);
  ended = wire.send(service.done);
  return true;
}

Handed serve(const Service& service) {
  Handed handed;
  Header header;
  size_t got = 0;
  while (is_next(service, header, got)) {
    const Wire wire(service.fd, monotonic_s() + service.frame_s);
    if (got < sizeof header) handed.ended = wire.receive(reinterpret_cast<uint8_t*>(&header) + got, sizeof header - got);
    if (handed.ended != Ended::kWhole) return handed;
    const bool is_known = is_within_limits(service, header);
    handed.body.resize(is_known ? header.body_bytes : 0);
    if (!handed.body.empty()) handed.ended = wire.receive(&handed.body[0], handed.body.size());
    if (handed.ended != Ended::kWhole) return handed;
    const bool is_served = is_known && ((header.kind == kRead && read(service, wire, handed.body, handed.ended)) ||
                                        (header.kind == kWrite && write(service, wire, header, handed.body, handed.ended)));
    if (!is_served) {
      handed.header.assign(reinterpret_cast<const char*>(&header), sizeof header);
      return handed;
    }
    if (handed.ended != Ended::kWhole) return handed;
  }
  return handed;
}

}  // namespace

PyObject* serve_frames(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    int fd;
    PyObject *segment, *grants, *opening, *done, *traffic;
    Py_ssize_t control_bytes_max, ranges_max, transfer_bytes_max;
    double idle_s, frame_s;
    if (!PyArg_ParseTuple(args, "iOOOO(nnn)ddO", &fd, &segment, &grants, &opening, &done, &control_bytes_max, &ranges_max,
                          &transfer_bytes_max, &idle_s, &frame_s, &traffic)) {
      return nullptr;
    }
    const Bytes memory(segment, true), start(opening, false), end(done, false), counters(traffic, true);
    const Service service{fd,
                          memory.data(),
                          memory.size(),
                          grants_of(grants),
                          text(start, kOpeningBytes, "opening"),
                          text(end, 0, "done"),
                          static_cast<size_t>(control_bytes_max),
                          static_cast<size_t>(ranges_max),
                          static_cast<size_t>(transfer_bytes_max),
                          idle_s,
                          frame_s,
                          counters.numbers<int64_t>(9, "traffic")};
    Handed handed;
    {
      const WithoutInterpreter released;
      handed = serve(service);
    }
    return Py_BuildValue("(iy#y#)", static_cast<int>(handed.ended), handed.header.data(),
                         static_cast<Py_ssize_t>(handed.header.size()), handed.body.data(),
                         static_cast<Py_ssize_t>(handed.body.size()));
  });
}

}  // namespace strata
