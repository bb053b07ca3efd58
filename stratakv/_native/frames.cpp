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

}  // namespace strata
