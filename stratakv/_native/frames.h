// Frames of the pool protocol (`stratakv/pool/messages.py`) on blocking sockets, until a deadline. Used by both ends.
#pragma once

#include <sys/uio.h>

#include <string>
#include <vector>

#include "moves.h"

namespace strata {

constexpr size_t kOpeningBytes = 6;  // magic and version
constexpr size_t kPutIdBytes = 16;

enum Kind : uint16_t { kControl = 1, kRead = 2, kWrite = 3, kReply = 4, kData = 5 };

#pragma pack(push, 1)
struct Header {
  uint8_t opening[kOpeningBytes];
  uint16_t kind;
  uint32_t body_bytes;
  uint64_t payload_bytes;
};
struct WireRange {
  uint64_t offset;
  uint32_t size;
};
#pragma pack(pop)

// The fixed part of a frame, as bytes.
std::string frame_header(const std::string& opening, Kind kind, size_t body_bytes, size_t payload_bytes);

// A socket, until a deadline.
class Wire {
 public:
  Wire(int fd, double deadline_s) : fd_(fd), deadline_s_(deadline_s) {}

  // Every byte of the parts, which are used up.
  Ended send(std::vector<iovec>& parts) const { return move(parts, true); }
  Ended receive(std::vector<iovec>& parts) const { return move(parts, false); }
  Ended send(const std::string& bytes) const;
  Ended receive(void* into, size_t size) const;

 private:
  Ended move(std::vector<iovec>& parts, bool sends) const;
  bool bound(int option) const;

  int fd_;
  double deadline_s_;
};

PyObject* exchange_frames(PyObject* module, PyObject* args);

// The bytes of an argument; of exactly `size`, if that is not 0. Throws PythonError (ValueError).
std::string text(const Bytes& bytes, size_t size, const char* name);

}  // namespace strata
