#include "grants.h"

#include <algorithm>
#include <new>

namespace strata {
namespace {

struct GrantsObject {
  PyObject_HEAD
  Grants* grants;
};

PyTypeObject* grants_type = nullptr;

Grants& self_grants(PyObject* self) { return *reinterpret_cast<GrantsObject*>(self)->grants; }

PyObject* grants_new(PyTypeObject* type, PyObject*, PyObject*) {
  auto* const self = reinterpret_cast<GrantsObject*>(PyType_GenericAlloc(type, 0));
  if (self == nullptr) return nullptr;
  self->grants = new (std::nothrow) Grants();
  if (self->grants == nullptr) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  return reinterpret_cast<PyObject*>(self);
}

void grants_dealloc(PyObject* object) {
  auto* const type = Py_TYPE(object);
  delete reinterpret_cast<GrantsObject*>(object)->grants;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

PyObject* grants_open(PyObject* self, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *put, *starts, *ends;
    double deadline_s;
    if (!PyArg_ParseTuple(args, "OOOd", &put, &starts, &ends, &deadline_s)) return nullptr;
    const Bytes id(put, false), from(starts, false), to(ends, false);
    const size_t count = from.size() / sizeof(uint64_t);
    const auto* const start = from.numbers<uint64_t>(count, "starts");
    const auto* const end = to.numbers<uint64_t>(count, "ends");
    std::vector<Grants::Run> runs;
    runs.reserve(count);
    for (size_t i = 0; i < count; ++i) runs.push_back({start[i], end[i]});
    self_grants(self).open(text(id, 0, "put_id"), std::move(runs), deadline_s);
    Py_RETURN_NONE;
  });
}

PyObject* grants_close(PyObject* self, PyObject* put) {
  return guarded([&]() -> PyObject* {
    const Bytes id(put, false);
    return PyBool_FromLong(self_grants(self).close(text(id, 0, "put_id")));
  });
}

PyObject* grants_enter(PyObject* self, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *put, *offsets, *sizes;
    double now_s;
    if (!PyArg_ParseTuple(args, "OOOd", &put, &offsets, &sizes, &now_s)) return nullptr;
    const Bytes id(put, false), at(offsets, false), length(sizes, false);
    const size_t count = at.size() / sizeof(uint64_t);
    const auto* const offset = at.numbers<uint64_t>(count, "offsets");
    const auto* const size = length.numbers<uint32_t>(count, "sizes");
    std::vector<WireRange> ranges;
    ranges.reserve(count);
    for (size_t i = 0; i < count; ++i) ranges.push_back({offset[i], size[i]});
    return PyLong_FromLong(static_cast<long>(self_grants(self).enter(text(id, 0, "put_id"), ranges, now_s)));
  });
}

PyObject* grants_leave(PyObject* self, PyObject* put) {
  return guarded([&]() -> PyObject* {
    const Bytes id(put, false);
    self_grants(self).leave(text(id, 0, "put_id"));
    Py_RETURN_NONE;
  });
}

PyMethodDef methods[] = {{"open", grants_open, METH_VARARGS, "Let these runs of bytes be written until a deadline."},
                         {"close", grants_close, METH_O, "Let no write begin; says whether none is running."},
                         {"enter", grants_enter, METH_VARARGS, "Whether these ranges may be written now."},
                         {"leave", grants_leave, METH_O, "A write that was let in is over."},
                         {nullptr, nullptr, 0, nullptr}};

bool covers(const std::vector<Grants::Run>& runs, const WireRange& range) {
  const uint64_t offset = range.offset;
  auto run = std::upper_bound(runs.begin(), runs.end(), offset, [](uint64_t at, const Grants::Run& r) { return at < r.start; });
  if (run == runs.begin()) return false;
  --run;
  return offset < run->end && range.size <= run->end - offset;
}

}  // namespace

void Grants::open(const std::string& put_id, std::vector<Run> runs, double deadline_s) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Grant& grant = grants_[put_id];
  grant.runs = std::move(runs);
  grant.deadline_s = deadline_s;
  grant.is_closed = false;
}

bool Grants::close(const std::string& put_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = grants_.find(put_id);
  if (found == grants_.end()) return true;
  found->second.is_closed = true;
  if (found->second.writers != 0) return false;
  grants_.erase(found);
  return true;
}

Entered Grants::enter(const std::string& put_id, const std::vector<WireRange>& ranges, double now_s) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = grants_.find(put_id);
  if (found == grants_.end() || found->second.is_closed || found->second.deadline_s < now_s) return Entered::kRefused;
  Grant& grant = found->second;
  const bool is_inside = std::all_of(ranges.begin(), ranges.end(), [&](const WireRange& range) { return covers(grant.runs, range); });
  if (!is_inside) return Entered::kOutside;
  ++grant.writers;
  return Entered::kYes;
}

void Grants::leave(const std::string& put_id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = grants_.find(put_id);
  if (found == grants_.end() || found->second.writers == 0) return;
  if (--found->second.writers == 0 && found->second.is_closed) grants_.erase(found);
}

PyObject* make_grants_type() {
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(grants_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(grants_dealloc)},
                                {Py_tp_methods, methods},
                                {0, nullptr}};
  static PyType_Spec spec = {"stratakv._native._moves.Grants", sizeof(GrantsObject), 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* const type = PyType_FromSpec(&spec);
  grants_type = reinterpret_cast<PyTypeObject*>(type);
  return type;
}

Grants& grants_of(PyObject* object) {
  if (Py_TYPE(object) != grants_type) {
    PyErr_SetString(PyExc_TypeError, "Grants are needed");
    throw PythonError();
  }
  return self_grants(object);
}

}  // namespace strata
