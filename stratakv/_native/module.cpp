// The Python module `stratakv._native._moves`; its stub says what each function does.
#include "frames.h"
#include "gate.h"
#include "grants.h"
#include "headers.h"
#include "keys.h"
#include "moves.h"
#include "serve.h"
#include "walker.h"
#include "wire.h"
#include "xxh3.h"

namespace {

// As in __init__.py: a module that was built from older sources is not used.
constexpr long kInterface = 5;

PyObject* xxh3_64(PyObject*, PyObject* args) {
  return strata::guarded([&]() -> PyObject* {
    PyObject* data;
    unsigned long long seed = 0;
    if (!PyArg_ParseTuple(args, "O|K", &data, &seed)) return nullptr;
    const strata::Bytes bytes(data, false);
    return PyLong_FromUnsignedLongLong(strata::xxh3_64(bytes.data(), bytes.size(), seed));
  });
}

PyObject* use_kernel(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  return PyBool_FromLong(strata::use_kernel(name));
}

PyMethodDef functions[] = {
    {"use_kernel", use_kernel, METH_VARARGS, "Compute checksums by the kernel of this name."},
    {"xxh3_64", xxh3_64, METH_VARARGS, "XXH3-64 of the bytes."},
    {"read_pages", strata::read_pages, METH_VARARGS, "Copy layers of pages out of a segment and verify each."},
    {"write_pages", strata::write_pages, METH_VARARGS, "Copy layers of pages into a segment and checksum each."},
    {"check_headers", strata::check_headers, METH_VARARGS, "Check the headers of many pages."},
    {"pack_headers", strata::pack_headers, METH_VARARGS, "Make the headers of many pages."},
    {"exchange_frames", strata::exchange_frames, METH_VARARGS, "Send a control request and receive its reply."},
    {"fetch_pages", strata::fetch_pages, METH_VARARGS, "Read layers of pages over a socket and verify each."},
    {"push_pages", strata::push_pages, METH_VARARGS, "Write layers of pages over a socket and checksum each."},
    {"serve_frames", strata::serve_frames, METH_VARARGS, "Answer a client until it asks for something else than bytes."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_moves", "KV pages moved, checked and waited for without the interpreter.", -1, functions,
    nullptr,               nullptr,  nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__moves() {
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* const gate_type = strata::make_gate_type();
  PyObject* const grants_type = strata::make_grants_type();
  PyObject* const walker_type = strata::make_walker_type();
  PyObject* const key_table_type = strata::make_key_table_type();
  const bool is_whole = gate_type != nullptr && PyModule_AddObjectRef(module, "Gate", gate_type) == 0 &&
                        grants_type != nullptr && PyModule_AddObjectRef(module, "Grants", grants_type) == 0 &&
                        walker_type != nullptr && PyModule_AddObjectRef(module, "MessageWalker", walker_type) == 0 &&
                        key_table_type != nullptr && PyModule_AddObjectRef(module, "KeyTable", key_table_type) == 0 &&
                        PyModule_AddIntConstant(module, "INTERFACE", kInterface) == 0 &&
                        PyModule_AddStringConstant(module, "KERNEL", strata::kernel_name()) == 0;
  Py_XDECREF(gate_type);
  Py_XDECREF(grants_type);
  Py_XDECREF(walker_type);
  Py_XDECREF(key_table_type);
  if (is_whole) return module;
  Py_DECREF(module);
  return nullptr;
}
