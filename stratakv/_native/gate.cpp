#include "gate.h"

#include <time.h>

#include <chrono>
#include <cmath>
#include <new>

namespace strata {
namespace {

constexpr double kFarS = 1e6;

struct GateObject {
  PyObject_HEAD
  Gate* gate;
};

PyTypeObject* gate_type = nullptr;

PyObject* gate_new(PyTypeObject* type, PyObject*, PyObject*) {
  auto* const self = reinterpret_cast<GateObject*>(PyType_GenericAlloc(type, 0));
  if (self == nullptr) return nullptr;
  self->gate = new (std::nothrow) Gate();
  if (self->gate == nullptr) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  return reinterpret_cast<PyObject*>(self);
}

void gate_dealloc(PyObject* object) {
  auto* const type = Py_TYPE(object);
  delete reinterpret_cast<GateObject*>(object)->gate;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

Gate& self_gate(PyObject* self) { return *reinterpret_cast<GateObject*>(self)->gate; }

PyObject* gate_open(PyObject* self, PyObject* layers) {
  const long long value = PyLong_AsLongLong(layers);
  if (value == -1 && PyErr_Occurred() != nullptr) return nullptr;
  self_gate(self).open(value);
  Py_RETURN_NONE;
}

PyObject* gate_close(PyObject* self, PyObject*) {
  self_gate(self).close();
  Py_RETURN_NONE;
}

PyObject* gate_wait(PyObject* self, PyObject* args) {
  long long layers;
  double deadline_s;
  if (!PyArg_ParseTuple(args, "Ld", &layers, &deadline_s)) return nullptr;
  Gate& gate = self_gate(self);
  if (gate.open_layers() >= layers) Py_RETURN_TRUE;
  bool is_open;
  {
    const WithoutInterpreter released;
    is_open = gate.wait(layers, deadline_s);
  }
  return PyBool_FromLong(is_open);
}

PyObject* gate_open_layers(PyObject* self, void*) { return PyLong_FromLongLong(self_gate(self).open_layers()); }

PyObject* gate_is_closed(PyObject* self, void*) { return PyBool_FromLong(self_gate(self).is_closed()); }

PyMethodDef gate_methods[] = {
    {"open", gate_open, METH_O, "Let layers below `layers` pass."},
    {"close", gate_close, METH_NOARGS, "Open no more; everybody who waits returns."},
    {"wait", gate_wait, METH_VARARGS, "Whether `layers` may pass, by the deadline."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef gate_properties[] = {{"open_layers", gate_open_layers, nullptr, "How many layers may pass.", nullptr},
                                 {"is_closed", gate_is_closed, nullptr, "Whether no more will open.", nullptr},
                                 {nullptr, nullptr, nullptr, nullptr, nullptr}};

}  // namespace

double monotonic_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void Gate::open(int64_t layers) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (layers > open_.load(std::memory_order_relaxed)) {
    open_.store(layers, std::memory_order_release);
    changed_.notify_all();
  }
}

void Gate::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_.store(true, std::memory_order_release);
  changed_.notify_all();
}

bool Gate::wait(int64_t layers, double deadline_s) {
  const double left_s = std::fmin(deadline_s - monotonic_s(), kFarS);
  std::unique_lock<std::mutex> lock(mutex_);
  if (left_s > 0) {
    const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(left_s));
    changed_.wait_until(lock, std::chrono::steady_clock::now() + left,
                        [&] { return is_closed() || open_layers() >= layers; });
  }
  return open_layers() >= layers;
}

PyObject* make_gate_type() {
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(gate_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(gate_dealloc)},
                                {Py_tp_methods, gate_methods},
                                {Py_tp_getset, gate_properties},
                                {0, nullptr}};
  static PyType_Spec spec = {"stratakv._native._moves.Gate", sizeof(GateObject), 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* const type = PyType_FromSpec(&spec);
  gate_type = reinterpret_cast<PyTypeObject*>(type);
  return type;
}

Gate& gate_of(PyObject* object) {
  if (Py_TYPE(object) != gate_type) {
    PyErr_SetString(PyExc_TypeError, "a Gate is needed");
    throw PythonError();
  }
  return self_gate(object);
}

}  // namespace strata
