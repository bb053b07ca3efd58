// Python's stable interface, and small owners for what the functions of the module are given.
#pragma once

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <new>
#include <vector>

namespace strata {

// A Python error is set.
struct PythonError {};

// Contiguous bytes of a Python object, held until the end of the call.
class Bytes {
 public:
  Bytes(PyObject* object, bool writable) {
    if (PyObject_GetBuffer(object, &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) throw PythonError();
  }
  Bytes(Bytes&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  Bytes& operator=(Bytes&&) = delete;
  ~Bytes() {
    if (view_.obj != nullptr) PyBuffer_Release(&view_);
  }

  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }

  // The bytes as `count` numbers. Raises ValueError for another length.
  template <typename Number>
  Number* numbers(size_t count, const char* name) const {
    if (size() != count * sizeof(Number) || reinterpret_cast<uintptr_t>(data()) % alignof(Number) != 0) {
      PyErr_Format(PyExc_ValueError, "%s must be %zu aligned numbers of %zu bytes", name, count, sizeof(Number));
      throw PythonError();
    }
    return reinterpret_cast<Number*>(data());
  }

 private:
  Py_buffer view_;
};

// Lets other threads of Python run during its life.
class WithoutInterpreter {
 public:
  WithoutInterpreter() : state_(PyEval_SaveThread()) {}
  ~WithoutInterpreter() { PyEval_RestoreThread(state_); }
  WithoutInterpreter(const WithoutInterpreter&) = delete;
  WithoutInterpreter& operator=(const WithoutInterpreter&) = delete;

 private:
  PyThreadState* state_;
};

// Runs the body of a function of the module; a PythonError in it becomes NULL.
template <typename Body>
PyObject* guarded(Body body) {
  try {
    return body();
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

}  // namespace strata
