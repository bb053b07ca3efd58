// The Python module `workers.engine.kernels._kernels`; its stub says what each part does.
#include "python.h"

#if defined(__x86_64__)
#include "bounds.h"
#include "types.h"
#endif
#include "cpu.h"

namespace {

// As in __init__.py: a module that was built from older sources is not used.
constexpr long kInterface = 3;

PyObject* is_supported(PyObject*, PyObject*) { return PyBool_FromLong(strata::has_amx_bf16()); }

#if defined(__x86_64__)
PyObject* measure_bounds(PyObject*, PyObject* args) {
  int num_threads;
  if (!PyArg_ParseTuple(args, "i", &num_threads)) return nullptr;
  if (num_threads < 1 || !strata::has_amx_bf16()) {
    PyErr_SetString(PyExc_ValueError, "nothing can be measured here");
    return nullptr;
  }
  return strata::guarded([&]() -> PyObject* {
    strata::Bounds bounds;
    {
      const strata::WithoutInterpreter released;
      bounds = strata::measure_bounds(num_threads);
    }
    return Py_BuildValue("dd", bounds.bytes_per_s, bounds.operations_per_s);
  });
}
#endif

PyMethodDef functions[] = {
    {"is_supported", is_supported, METH_NOARGS, "Whether this processor can run the kernels."},
#if defined(__x86_64__)
    {"measure_bounds", measure_bounds, METH_VARARGS, "What no kernel can do faster here."},
#endif
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", "Kernels of the engine.", -1, functions, nullptr, nullptr,
    nullptr,               nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  bool is_whole = PyModule_AddIntConstant(module, "INTERFACE", kInterface) == 0;
#if defined(__x86_64__)
  is_whole = is_whole && strata::add_types(module);
#endif
  if (is_whole) return module;
  Py_DECREF(module);
  return nullptr;
}
