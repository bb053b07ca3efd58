#include "frames.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace strata {
namespace {

constexpr size_t kIovecsMax = 1024;  // the kernel's IOV_MAX

// The frame that answers a request: its header, and its body if it is a reply that is not too long.
Ended exchange(const Wire& wire, const std::string& asked, size_t reply_bytes_max, std::string& header, std::string& body) {
  Ended ended = wire.send(asked);
  Header got;
  if (ended == Ended::kWhole) ended = wire.receive(&got, sizeof got);
  if (ended != Ended::kWhole) return ended;
  header.assign(reinterpret_cast<const char*>(&got), sizeof got);
  const bool is_reply = header.compare(0, kOpeningBytes, asked, 0, kOpeningBytes) == 0 && got.kind == kReply;
  if (!is_reply || got.body_bytes > reply_bytes_max || got.body_bytes == 0) return ended;
  body.resize(got.body_bytes);
  return wire.receive(&body[0], body.size());
}

}  // namespace

std::string frame_header(const std::string& opening, Kind kind, size_t body_bytes, size_t payload_bytes) {
  Header made{};
  memcpy(made.opening, opening.data(), kOpeningBytes);
  made.kind = kind;
  made.body_bytes = static_cast<uint32_t>(body_bytes);
  made.payload_bytes = payload_bytes;
  return {reinterpret_cast<const char*>(&made), sizeof made};
}

Ended Wire::send(const std::string& bytes) const {
  std::vector<iovec> one{{const_cast<char*>(bytes.data()), bytes.size()}};
  return send(one);
}

Ended Wire::receive(void* into, size_t size) const {
  std::vector<iovec> one{{into, size}};
  return receive(one);
}

Ended Wire::move(std::vector<iovec>& parts, bool sends) const {
  size_t first = 0;
  while (first < parts.size()) {
    if (!bound(sends ? SO_SNDTIMEO : SO_RCVTIMEO)) return Ended::kLate;
    msghdr message{};
    message.msg_iov = &parts[first];
    message.msg_iovlen = std::min(parts.size() - first, kIovecsMax);
    const ssize_t moved = sends ? ::sendmsg(fd_, &message, MSG_NOSIGNAL) : ::recvmsg(fd_, &message, MSG_WAITALL);
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Ended::kLate;
    if (moved <= 0) return Ended::kGone;
    size_t left = static_cast<size_t>(moved);
    while (first < parts.size() && left >= parts[first].iov_len) left -= parts[first++].iov_len;
    if (left != 0) {
      parts[first].iov_base = static_cast<uint8_t*>(parts[first].iov_base) + left;
      parts[first].iov_len -= left;
    }
  }
  return Ended::kWhole;
}

// The kernel keeps the time of the next call. False if there is none left.
bool Wire::bound(int option) const {
  const double left_s = std::fmin(deadline_s_ - monotonic_s(), 1e6);
  if (left_s <= 0) return false;
  timeval time{};
  time.tv_sec = static_cast<time_t>(left_s);
  time.tv_usec = std::max<suseconds_t>(1000, static_cast<suseconds_t>((left_s - std::floor(left_s)) * 1e6));
  return ::setsockopt(fd_, SOL_SOCKET, option, &time, sizeof time) == 0;
}

std::string text(const Bytes& bytes, size_t size, const char* name) {
  if (size != 0) bytes.numbers<uint8_t>(size, name);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

PyObject* exchange_frames(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    int fd;
    PyObject* frame;
    Py_ssize_t reply_bytes_max;
    double deadline_s;
    if (!PyArg_ParseTuple(args, "iOnd", &fd, &frame, &reply_bytes_max, &deadline_s)) return nullptr;
    const Bytes request(frame, false);
    const std::string asked = text(request, 0, "frame");
    if (asked.size() < sizeof(Header)) {
      PyErr_SetString(PyExc_ValueError, "a frame begins with its header");
      return nullptr;
    }
    std::string header, body;
    Ended ended;
    {
      const WithoutInterpreter released;
      ended = exchange(Wire(fd, deadline_s), asked, static_cast<size_t>(reply_bytes_max), header, body);
    }
    return Py_BuildValue("(iy#y#)", static_cast<int>(ended), header.data(), static_cast<Py_ssize_t>(header.size()),
                         body.data(), static_cast<Py_ssize_t>(body.size()));
  });
}

}  // namespace strata
