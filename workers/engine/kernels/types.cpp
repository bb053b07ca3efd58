#include "types.h"

#if defined(__x86_64__)
#include <memory>

#include "cpu.h"
#include "head.h"
#include "layer_stack.h"

namespace strata {
namespace {

struct StackObject {
  PyObject ob_base;
  LayerStack* stack;
  long long vocab, num_positions;
};

struct StepObject {
  PyObject ob_base;
  PyObject* stack;
  Step* step;
  Plan* plan;
  int num_threads, next_stage;
};

struct HeadObject {
  PyObject ob_base;
  Head* head;
};

PyTypeObject* step_type = nullptr;

[[noreturn]] void refuse(const char* why) {
  PyErr_SetString(PyExc_ValueError, why);
  throw PythonError();
}

template <typename Number>
Number* at(unsigned long long address) {
  return reinterpret_cast<Number*>(address);
}

template <typename Object>
Object* as(PyObject* self) {
  return reinterpret_cast<Object*>(self);
}

PyObject* allocate(PyTypeObject* type) {
  return reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0);
}

void release(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// (rows as int32, runs as int64 pairs of first slot and length, causal_from)
Segment read_segment(PyObject* tuple, int num_rows) {
  PyObject *rows, *runs;
  Segment segment;
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
    if (first % kGroupKeys != 0 || (i + 1 < num_runs && length % kGroupKeys != 0)) {
      refuse("runs must be whole groups of 16 slots");
    }
    for (int64_t at = 0; at < length; at += kGroupKeys) segment.groups.push_back(first + at);
    segment.num_keys += int(length);
  }
  const int64_t last_seen = segment.causal_from + int64_t(num_segment_rows);
  if (segment.causal_from < -1 || (segment.causal_from >= 0 && last_seen > segment.num_keys)) {
    refuse("a row sees more keys than there are");
  }
  return segment;
}

std::vector<Segment> read_segments(PyObject* list, int num_rows) {
  std::vector<Segment> segments;
  const Py_ssize_t count = PySequence_Size(list);
  if (count < 0) throw PythonError();
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const tuple = PySequence_GetItem(list, i);
    if (tuple == nullptr) throw PythonError();
    struct Release {
      PyObject* object;
      ~Release() { Py_DECREF(object); }
    } const owner{tuple};
    segments.push_back(read_segment(tuple, num_rows));
  }
  return segments;
}

std::vector<int64_t> read_numbers(PyObject* object, size_t count, int64_t below, const char* name) {
  const Bytes bytes(object, false);
  const auto* const numbers = bytes.numbers<int64_t>(count, name);
  for (size_t i = 0; i < count; ++i) {
    if (numbers[i] < 0 || numbers[i] >= below) {
      PyErr_Format(PyExc_ValueError, "%s are out of range", name);
      throw PythonError();
    }
  }
  return {numbers, numbers + count};
}

PyObject* stack_new(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    StackShape shape;
    unsigned long long embedding, norm, cosines, sines;
    long long vocab, num_positions;
    if (!PyArg_ParseTuple(args, "iiiiiifKLKKKL", &shape.attention.num_heads, &shape.attention.num_kv_heads,
                          &shape.attention.head_dim, &shape.hidden, &shape.inner, &shape.num_layers, &shape.epsilon,
                          &embedding, &vocab, &norm, &cosines, &sines, &num_positions)) {
      return nullptr;
    }
    const Shape& heads = shape.attention;
    if (!has_amx_bf16()) refuse("this processor cannot run the kernels");
    if (heads.num_kv_heads < 1 || heads.num_heads < 1 || heads.num_heads % heads.num_kv_heads != 0 ||
        heads.head_dim < 32 || heads.head_dim % 32 != 0) {
      refuse("not a shape of attention");
    }
    if (shape.hidden < 32 || shape.hidden % 32 != 0 || shape.inner < 32 || shape.inner % 32 != 0 || shape.num_layers < 1) {
      refuse("not a shape of layers");
    }
    auto stack = std::make_unique<LayerStack>(
        shape, StackTables{at<const uint16_t>(embedding), at<const float>(norm), at<const float>(cosines), at<const float>(sines)});
    PyObject* const self = allocate(type);
    if (self == nullptr) return nullptr;
    as<StackObject>(self)->stack = stack.release();
    as<StackObject>(self)->vocab = vocab;
    as<StackObject>(self)->num_positions = num_positions;
    return self;
  });
}

void stack_dealloc(PyObject* self) {
  delete as<StackObject>(self)->stack;
  release(self);
}

PyObject* stack_add_layer(PyObject* self, PyObject* args) {
  unsigned long long weights[4], biases[4], norms[4];
  if (!PyArg_ParseTuple(args, "(KKKK)(KKKK)(KKKK)", &weights[0], &weights[1], &weights[2], &weights[3], &biases[0],
                        &biases[1], &biases[2], &biases[3], &norms[0], &norms[1], &norms[2], &norms[3])) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    LayerStack& stack = *as<StackObject>(self)->stack;
    if (stack.num_added() == stack.shape().num_layers) refuse("all layers have been added");
    const auto weight = [&](int i) { return at<const uint16_t>(weights[i]); };
    const auto bias = [&](int i) { return at<const float>(biases[i]); };
    const auto norm = [&](int i) { return at<const float>(norms[i]); };
    stack.add({weight(0), weight(1), weight(2), weight(3), bias(0), bias(1), bias(2), bias(3), norm(0), norm(1), norm(2),
               norm(3)});
    Py_RETURN_NONE;
  });
}

PyObject* stack_begin(PyObject* self, PyObject* args) {
  PyObject *segments, *token_ids, *positions, *slots, *wanted, *k_caches, *v_caches;
  long long num_slots;
  int num_threads;
  if (!PyArg_ParseTuple(args, "OOOOOOOLi", &token_ids, &positions, &slots, &wanted, &segments, &k_caches, &v_caches,
                        &num_slots, &num_threads)) {
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    const auto& owner = *as<StackObject>(self);
    const StackShape& shape = owner.stack->shape();
    if (owner.stack->num_added() != shape.num_layers) refuse("not all layers have been added");
    const size_t num_rows = Bytes(token_ids, false).size() / sizeof(int64_t);
    const size_t num_wanted = Bytes(wanted, false).size() / sizeof(int64_t);
    if (num_rows == 0 || num_rows > 1 << 24 || num_wanted == 0 || num_wanted > num_rows || num_threads < 1) {
      refuse("not a step");
    }
    auto step = std::make_unique<Step>();
    step->token_ids = read_numbers(token_ids, num_rows, owner.vocab, "token ids");
    step->positions = read_numbers(positions, num_rows, owner.num_positions, "positions");
    step->slots = read_numbers(slots, num_rows, num_slots, "slots");
    step->wanted = read_numbers(wanted, num_wanted, int64_t(num_rows), "wanted rows");
    step->k_caches = read_numbers(k_caches, size_t(shape.num_layers), INT64_MAX, "addresses of keys");
    step->v_caches = read_numbers(v_caches, size_t(shape.num_layers), INT64_MAX, "addresses of values");
    auto read = read_segments(segments, int(num_rows));
    for (const Segment& segment : read) {
      for (const int64_t first : segment.groups) {
        if (first + kGroupKeys > num_slots) refuse("a run is outside the cache");
      }
    }
    auto plan = std::make_unique<Plan>(shape.attention, int(num_rows), num_threads, std::move(read));
    PyObject* const made = allocate(step_type);
    if (made == nullptr) return nullptr;
    Py_INCREF(self);
    auto* const fields = as<StepObject>(made);
    fields->stack = self;
    fields->step = step.release();
    fields->plan = plan.release();
    fields->num_threads = num_threads;
    fields->next_stage = 0;
    return made;
  });
}

void step_dealloc(PyObject* self) {
  auto* const fields = as<StepObject>(self);
  delete fields->plan;
  delete fields->step;
  Py_XDECREF(fields->stack);
  release(self);
}

PyObject* step_run(PyObject* self, PyObject* args) {
  int stop;
  unsigned long long out;
  if (!PyArg_ParseTuple(args, "iK", &stop, &out)) return nullptr;
  return guarded([&]() -> PyObject* {
    auto& fields = *as<StepObject>(self);
    LayerStack& stack = *as<StackObject>(fields.stack)->stack;
    if (stop <= fields.next_stage || stop > stack.shape().num_layers + 1) refuse("stages are run in order, once");
    const int first = fields.next_stage;
    fields.next_stage = stop;
    {
      const WithoutInterpreter released;
      stack.run(*fields.step, *fields.plan, first, stop, at<float>(out), fields.num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* head_new(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    unsigned long long weight;
    int vocab, width;
    if (!PyArg_ParseTuple(args, "Kii", &weight, &vocab, &width)) return nullptr;
    if (!has_amx_bf16()) refuse("this processor cannot run the kernels");
    if (vocab < 16 || vocab % 16 != 0 || width < 32 || width % 32 != 0) refuse("not a shape of a head");
    auto head = std::make_unique<Head>(at<const uint16_t>(weight), vocab, width);
    PyObject* const self = allocate(type);
    if (self != nullptr) as<HeadObject>(self)->head = head.release();
    return self;
  });
}

void head_dealloc(PyObject* self) {
  delete as<HeadObject>(self)->head;
  release(self);
}

PyObject* head_apply(PyObject* self, PyObject* args) {
  unsigned long long rows, out;
  int num_rows, num_threads;
  if (!PyArg_ParseTuple(args, "KiKi", &rows, &num_rows, &out, &num_threads)) return nullptr;
  return guarded([&]() -> PyObject* {
    if (num_rows < 1) refuse("a head needs rows");
    {
      const WithoutInterpreter released;
      as<HeadObject>(self)->head->apply(at<const float>(rows), num_rows, at<float>(out), num_threads);
    }
    Py_RETURN_NONE;
  });
}

PyObject* make_type(const char* name, size_t size, void* create, void* dealloc, PyMethodDef* methods) {
  PyType_Slot slots[4] = {{Py_tp_dealloc, dealloc}, {Py_tp_methods, methods}, {0, nullptr}, {0, nullptr}};
  if (create != nullptr) slots[2] = {Py_tp_new, create};
  const unsigned flags = Py_TPFLAGS_DEFAULT | (create == nullptr ? Py_TPFLAGS_DISALLOW_INSTANTIATION : 0);
  PyType_Spec spec = {name, int(size), 0, flags, slots};
  return PyType_FromSpec(&spec);
}

PyMethodDef stack_methods[] = {
    {"add_layer", stack_add_layer, METH_VARARGS, "Copy the tensors of the next layer."},
    {"begin", stack_begin, METH_VARARGS, "A step over some rows."},
    {nullptr, nullptr, 0, nullptr}};
PyMethodDef step_methods[] = {{"run", step_run, METH_VARARGS, "Run the stages before `stop` that have not run yet."},
                              {nullptr, nullptr, 0, nullptr}};
PyMethodDef head_methods[] = {{"apply", head_apply, METH_VARARGS, "Logits of some rows."},
                              {nullptr, nullptr, 0, nullptr}};

bool add_type(PyObject* module, const char* name, PyObject* type) {
  return type != nullptr && PyModule_AddObjectRef(module, name, type) == 0;
}

}  // namespace

// The references to the types that are made here last as long as the process.
bool add_types(PyObject* module) {
  PyObject* const stack = make_type("workers.engine.kernels._kernels.Stack", sizeof(StackObject),
                                    reinterpret_cast<void*>(stack_new), reinterpret_cast<void*>(stack_dealloc), stack_methods);
  PyObject* const step = make_type("workers.engine.kernels._kernels.Step", sizeof(StepObject), nullptr,
                                   reinterpret_cast<void*>(step_dealloc), step_methods);
  PyObject* const head = make_type("workers.engine.kernels._kernels.Head", sizeof(HeadObject),
                                   reinterpret_cast<void*>(head_new), reinterpret_cast<void*>(head_dealloc), head_methods);
  step_type = reinterpret_cast<PyTypeObject*>(step);
  return add_type(module, "Stack", stack) && add_type(module, "Step", step) && add_type(module, "Head", head);
}

}  // namespace strata

#endif
