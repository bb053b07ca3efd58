// Headers of pages: made and checked. `stratakv/layout.py` says what they hold.
#pragma once

#include "python.h"

namespace strata {

constexpr size_t kHeaderBytesMax = 4096;

// `HeaderState` in the Python stub.
enum HeaderState : uint8_t { kGood = 0, kDamaged = 1, kOtherPage = 2, kOtherLayout = 3 };

// What the headers of some pages say besides checksums, which are in a table [layer][page].
class Seals {
 public:
  // Of so many pages. Throws PythonError (ValueError).
  Seals(PyObject* name_space, PyObject* keys, PyObject* generations, unsigned long long data_bytes, Py_ssize_t num_layers,
        size_t pages);

  size_t num_layers() const { return num_layers_; }
  size_t header_bytes() const;
  void pack(size_t page, const uint64_t* checksums, uint8_t* to) const;
  // Of bytes that do not change; the checksums are those of a good header.
  HeaderState check(size_t page, const uint8_t* header, size_t limit, uint64_t* checksums) const;

 private:
  Bytes name_space_, keys_, generations_;
  const uint8_t* scope_;
  const uint8_t* key_;
  const uint64_t* generation_;
  uint64_t data_bytes_;
  size_t num_layers_;
  size_t pages_;
};

PyObject* check_headers(PyObject* module, PyObject* args);
PyObject* pack_headers(PyObject* module, PyObject* args);

}  // namespace strata
