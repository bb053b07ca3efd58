#include "walker.h"

#include <structmember.h>

#include <cstring>

namespace strata {
namespace {

constexpr size_t kHeaderBytes = 5;
constexpr int64_t kLengthMin = 4;
constexpr int64_t kLengthMax = int64_t{1} << 30;
constexpr int kReadyForQuery = 'Z';
constexpr int kIdle = 'I';

struct WalkerObject {
  PyObject_HEAD
  PyObject* error;  // the class of a violation
  size_t skip_bytes;
  size_t partial_bytes;
  uint8_t partial[kHeaderBytes + 1];
  bool watched[256];
  char at_boundary;
  char was_idle;
  int last_kind;
  int transaction_status;
};

WalkerObject& self_walker(PyObject* self) { return *reinterpret_cast<WalkerObject*>(self); }

PyObject* walker_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* kinds;
  PyObject* error;
  if (!PyArg_ParseTuple(args, "OO", &kinds, &error)) return nullptr;
  return guarded([&]() -> PyObject* {
    const Bytes watched(kinds, false);
    PyObject* const self = PyType_GenericAlloc(type, 0);
    if (self == nullptr) return nullptr;
    WalkerObject& walker = self_walker(self);
    Py_INCREF(error);
    walker.error = error;
    walker.at_boundary = 1;
    for (size_t i = 0; i < watched.size(); ++i) walker.watched[watched.data()[i]] = true;
    return self;
  });
}

void walker_dealloc(PyObject* self) {
  auto* const type = Py_TYPE(self);
  Py_XDECREF(self_walker(self).error);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// What was kept of the last feed, and then the new bytes.
struct Stream {
  const WalkerObject& walker;
  const uint8_t* data;
  uint8_t at(size_t position) const {
    return position < walker.partial_bytes ? walker.partial[position] : data[position - walker.partial_bytes];
  }
};

bool report(PyObject*& found, int kind) {
  if (found == nullptr && (found = PyList_New(0)) == nullptr) return false;
  PyObject* const number = PyLong_FromLong(kind);
  const bool is_there = number != nullptr && PyList_Append(found, number) == 0;
  Py_XDECREF(number);
  return is_there;
}

PyObject* walker_feed(PyObject* self, PyObject* object) {
  return guarded([&]() -> PyObject* {
    const Bytes bytes(object, false);
    WalkerObject& walker = self_walker(self);
    const Stream stream{walker, bytes.data()};
    const size_t end = walker.partial_bytes + bytes.size();
    size_t position = walker.skip_bytes;
    PyObject* found = nullptr;
    while (position + kHeaderBytes <= end) {
      const int kind = stream.at(position);
      const int64_t length = static_cast<int32_t>(uint32_t{stream.at(position + 1)} << 24 | uint32_t{stream.at(position + 2)} << 16 |
                                                  uint32_t{stream.at(position + 3)} << 8 | uint32_t{stream.at(position + 4)});
      if (length < kLengthMin || length >= kLengthMax) {
        Py_XDECREF(found);
        PyErr_SetString(walker.error, "invalid message length");
        return nullptr;
      }
      if (walker.watched[kind]) {
        if (kind == kReadyForQuery) {
          if (position + kHeaderBytes == end) break;  // the status is still to come
          walker.transaction_status = stream.at(position + kHeaderBytes);
          if (walker.transaction_status == kIdle) walker.was_idle = 1;
        }
        if (!report(found, kind)) {
          Py_XDECREF(found);
          return nullptr;
        }
      }
      walker.last_kind = kind;
      position += static_cast<size_t>(length) + 1;
    }
    walker.at_boundary = position == end;
    if (position < end) {
      uint8_t kept[sizeof(walker.partial)];
      const size_t count = end - position;
      for (size_t i = 0; i < count; ++i) kept[i] = stream.at(position + i);
      std::memcpy(walker.partial, kept, count);
      walker.partial_bytes = count;
      walker.skip_bytes = 0;
    } else {
      walker.partial_bytes = 0;
      walker.skip_bytes = position - end;
    }
    return found != nullptr ? found : PyTuple_New(0);
  });
}

PyMethodDef methods[] = {{"feed", walker_feed, METH_O, "Kinds of the watched messages whose header ends in the bytes."},
                         {nullptr, nullptr, 0, nullptr}};

PyMemberDef members[] = {
    {"at_boundary", T_BOOL, offsetof(WalkerObject, at_boundary), 0, "Whether the next byte starts a message."},
    {"was_idle", T_BOOL, offsetof(WalkerObject, was_idle), 0, "Some ReadyForQuery has told of no transaction."},
    {"last_kind", T_INT, offsetof(WalkerObject, last_kind), 0, "Of the last message whose header has been seen."},
    {"transaction_status", T_INT, offsetof(WalkerObject, transaction_status), 0, "Of the last ReadyForQuery."},
    {nullptr, 0, 0, 0, nullptr}};

}  // namespace

PyObject* make_walker_type() {
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(walker_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(walker_dealloc)},
                                {Py_tp_methods, methods},
                                {Py_tp_members, members},
                                {0, nullptr}};
  static PyType_Spec spec = {"stratakv._native._moves.MessageWalker", sizeof(WalkerObject), 0, Py_TPFLAGS_DEFAULT, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace strata
