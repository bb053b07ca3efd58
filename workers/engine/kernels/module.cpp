// The Python module `workers.engine.kernels._kernels`; its stub says what each part does.
#include "python.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "attention.h"
#include "head.h"
#include "small_ops.h"
#endif
#include "cpu.h"

namespace {

using strata::Bytes;
using strata::guarded;
using strata::PythonError;

// As in __init__.py: a module that was built from older sources is not used.
constexpr long kInterface = 2;

#if defined(__x86_64__)

struct PlanObject {
  PyObject ob_base;
  strata::Plan* plan;
};

[[noreturn]] void refuse(const char* why) {
  PyErr_SetString(PyExc_ValueError, why);
  throw PythonError();
}

// (rows as int32, runs as int64 pairs of first slot and length, causal_from)
strata::Segment read_segment(PyObject* tuple, int num_rows) {
  PyObject *rows, *runs;
  strata::Segment segment;
  if (!PyArg_ParseTuple(tuple, "OOi", &rows, &runs, &segment.causal_from)) throw PythonError();
  const Bytes row_bytes(rows, false), run_bytes(runs, false);
  const size_t num_segment_rows = row_bytes.size() / sizeof(int32_t), num_runs = run_bytes.size() / 16;
  if (num_segment_rows == 0 || num_runs == 0) refuse("a segment needs rows and keys");
  const auto* const row_numbers = row_bytes.numbers<int32_t>(num_segment_rows, "rows");
  const auto* const run_numbers = run_bytes.numbers<int64_t>(num_runs * 2, "runs");
  segment.rows.assign(row_numbers, row_numbers + num_segment_rows);
  for (const int32_t row : segment.rows) {
    if (row < 0 || row >= num_rows) refuse("a row is outside the step");
  }
  for (size_t i = 0; i < num_runs; ++i) {
    const int64_t first = run_numbers[2 * i], length = run_numbers[2 * i + 1];
    if (first < 0 || length < 1 || length > INT32_MAX - segment.num_keys) refuse("a run is not a run of slots");
    if (first % strata::kGroupKeys != 0 || (i + 1 < num_runs && length % strata::kGroupKeys != 0)) {
      refuse("runs must be whole groups of 16 slots");
    }
    for (int64_t at = 0; at < length; at += strata::kGroupKeys) segment.groups.push_back(first + at);
    segment.num_keys += int(length);
  }
  const int64_t last_seen = segment.causal_from + int64_t(num_segment_rows);
  if (segment.causal_from < -1 || (segment.causal_from >= 0 && last_seen > segment.num_keys)) {
    refuse("a row sees more keys than there are");
  }
  return segment;
}

PyObject* plan_new(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    strata::Shape shape;
    int num_rows, num_threads;
    PyObject* list;
    if (!PyArg_ParseTuple(args, "iiiiiO", &shape.num_heads, &shape.num_kv_heads, &shape.head_dim, &num_rows,
                          &num_threads, &list)) {
      return nullptr;
    }
    if (!strata::has_amx_bf16()) refuse("this processor cannot run the kernels");
    if (shape.num_kv_heads < 1 || shape.num_heads % shape.num_kv_heads != 0 || shape.head_dim < 32 ||
        shape.head_dim % 32 != 0 || num_rows < 1 || num_threads < 1) {
      refuse("not a shape of attention");
    }
    std::vector<strata::Segment> segments;
    const Py_ssize_t num_segments = PySequence_Size(list);
    if (num_segments < 0) return nullptr;
    for (Py_ssize_t i = 0; i < num_segments; ++i) {
      PyObject* const tuple = PySequence_GetItem(list, i);
      if (tuple == nullptr) return nullptr;
      struct Release {
        PyObject* object;
        ~Release() { Py_DECREF(object); }
      } const release{tuple};
      segments.push_back(read_segment(tuple, num_rows));
    }
    auto plan = std::make_unique<strata::Plan>(shape, num_rows, num_threads, std::move(segments));
    auto* const allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* const self = allocate(type, 0);
    if (self != nullptr) reinterpret_cast<PlanObject*>(self)->plan = plan.release();
    return self;
  });
}

void plan_dealloc(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<PlanObject*>(self)->plan;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* plan_attend(PyObject* self, PyObject* args) {
  unsigned long long q, k, v, out;
  if (!PyArg_ParseTuple(args, "KKKK", &q, &k, &v, &out)) return nullptr;
  const auto address = [](unsigned long long number) { return reinterpret_cast<uint16_t*>(number); };
  {
    const strata::WithoutInterpreter released;
    reinterpret_cast<PlanObject*>(self)->plan->attend({address(q), address(k), address(v), address(out)});
  }
  Py_RETURN_NONE;
}

PyObject* make_plan_type() {
  static PyMethodDef methods[] = {{"attend", plan_attend, METH_VARARGS, "Attention of one layer."},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(plan_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(plan_dealloc)},
                                {Py_tp_methods, methods},
                                {0, nullptr}};
  static PyType_Spec spec = {"workers.engine.kernels._kernels.Plan", sizeof(PlanObject), 0, Py_TPFLAGS_DEFAULT, slots};
  return PyType_FromSpec(&spec);
}

template <typename Number>
Number* at(unsigned long long address) {
  return reinterpret_cast<Number*>(address);
}

PyObject* add_norm(PyObject*, PyObject* args) {
  unsigned long long sums, added, weight, out;
  long long num_rows, width;
  float epsilon;
  int num_threads;
  if (!PyArg_ParseTuple(args, "KKKfLLKi", &sums, &added, &weight, &epsilon, &num_rows, &width, &out, &num_threads)) {
    return nullptr;
  }
  {
    const strata::WithoutInterpreter released;
    strata::add_norm({at<float>(sums), at<const uint16_t>(added), at<const float>(weight), epsilon, num_rows, width,
                      at<uint16_t>(out)},
                     num_threads);
  }
  Py_RETURN_NONE;
}

PyObject* rotate_write(PyObject*, PyObject* args) {
  unsigned long long heads, cosines, sines, q_norm, k_norm, slots, q_out, k_cache, v_cache;
  long long num_rows;
  float epsilon;
  strata::Shape shape;
  int num_threads;
  if (!PyArg_ParseTuple(args, "KKKKKfKKKKLiiii", &heads, &cosines, &sines, &q_norm, &k_norm, &epsilon, &slots, &q_out,
                        &k_cache, &v_cache, &num_rows, &shape.num_heads, &shape.num_kv_heads, &shape.head_dim, &num_threads)) {
    return nullptr;
  }
  {
    const strata::WithoutInterpreter released;
    strata::rotate_write(
        {at<const uint16_t>(heads), at<const float>(cosines), at<const float>(sines), at<const float>(q_norm),
         at<const float>(k_norm), epsilon, at<const int64_t>(slots), at<uint16_t>(q_out), at<uint16_t>(k_cache),
         at<uint16_t>(v_cache), num_rows, shape.num_heads, shape.num_kv_heads, shape.head_dim},
        num_threads);
  }
  Py_RETURN_NONE;
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

PyObject* gated(PyObject*, PyObject* args) {
  unsigned long long gate_up, out;
  long long num_rows, width;
  int num_threads;
  if (!PyArg_ParseTuple(args, "KLLKi", &gate_up, &num_rows, &width, &out, &num_threads)) return nullptr;
  {
    const strata::WithoutInterpreter released;
    strata::gated({at<const uint16_t>(gate_up), num_rows, width, at<uint16_t>(out)}, num_threads);
  }
  Py_RETURN_NONE;
}

#endif

PyObject* is_supported(PyObject*, PyObject*) { return PyBool_FromLong(strata::has_amx_bf16()); }

PyMethodDef functions[] = {
    {"is_supported", is_supported, METH_NOARGS, "Whether this processor can run the kernels."},
#if defined(__x86_64__)
    {"add_norm", add_norm, METH_VARARGS, "Add to the residual stream and normalise it."},
    {"rotate_write", rotate_write, METH_VARARGS, "Rotate queries and keys; write keys and values to their slots."},
    {"apply_head", apply_head, METH_VARARGS, "Logits of few rows."},
    {"gated", gated, METH_VARARGS, "silu(gate) * up."},
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
  PyObject* const type = make_plan_type();
  is_whole = is_whole && type != nullptr && PyModule_AddObjectRef(module, "Plan", type) == 0;
  Py_XDECREF(type);
#endif
  if (is_whole) return module;
  Py_DECREF(module);
  return nullptr;
}
