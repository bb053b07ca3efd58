// The Python module `workers.engine.kernels._kernels`; its stub says what each part does.
#include "python.h"

#if defined(__x86_64__)
#include "head.h"
#include "stack_module.h"
#endif
#include "cpu.h"

namespace {

using strata::Bytes;
using strata::guarded;
using strata::PythonError;

// As in __init__.py: a module that was built from older sources is not used.
constexpr long kInterface = 3;

#if defined(__x86_64__)

template <typename Number>
Number* at(unsigned long long address) {
  return reinterpret_cast<Number*>(address);
}

PyObject* apply_head(PyObject*, PyObject* args) {
  unsigned long long rows, weight, out;
  long long num_rows, vocab, width;
  int num_threads;
  if (!PyArg_ParseTuple(args, "KKLLLKi", &rows, &weight, &num_rows, &vocab, &width, &out, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    {
      const strata::WithoutInterpreter released;
      strata::apply_head({at<const float>(rows), at<const uint16_t>(weight), num_rows, vocab, width, at<float>(out)},
                         num_threads);
    }
    Py_RETURN_NONE;
  });
}

#endif

PyObject* is_supported(PyObject*, PyObject*) { return PyBool_FromLong(strata::has_amx_bf16()); }

PyMethodDef functions[] = {
    {"is_supported", is_supported, METH_NOARGS, "Whether this processor can run the kernels."},
#if defined(__x86_64__)
    {"apply_head", apply_head, METH_VARARGS, "Logits of few rows."},
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
  is_whole = is_whole && strata::add_stack_types(module);
#endif
  if (is_whole) return module;
  Py_DECREF(module);
  return nullptr;
}
