#include "keys.h"

#include <cstring>
#include <string>

namespace strata {
namespace {

constexpr uint64_t kMixer = 0x9E3779B97F4A7C15ULL;
constexpr uint32_t kEmpty = 0xFFFFFFFFU;
constexpr int kBitsAtStart = 4;
constexpr size_t kAhead = 8;  // lookups whose memory is asked for before it is needed

struct Entry {
  uint32_t tag;
  uint32_t row;
};

// Open addressing, linear probing. An entry holds 32 bits of its key's hash and the row that has the whole key.
class KeyTable {
 public:
  KeyTable(size_t row_words, size_t first_word, size_t num_words)
      : row_words_(row_words), first_word_(first_word), num_words_(num_words), entries_(size_t{1} << bits_, {0, kEmpty}) {}

  size_t size() const { return size_; }
  size_t size_bytes() const { return entries_.size() * sizeof(Entry); }
  size_t num_words() const { return num_words_; }
  size_t row_words() const { return row_words_; }

  void find(const uint8_t* wanted, size_t count, const uint64_t* rows, size_t num_rows, int64_t* found) const {
    std::vector<uint32_t> tags(count);
    for (size_t i = 0; i < count; ++i) tags[i] = tag_of(wanted + i * key_bytes());
    for (size_t i = 0; i < count + 2 * kAhead; ++i) {
      if (i < count) __builtin_prefetch(&entries_[home(tags[i])]);
      if (i >= kAhead && i - kAhead < count) {
        const Entry& first = entries_[home(tags[i - kAhead])];
        if (first.row < num_rows && first.tag == tags[i - kAhead]) __builtin_prefetch(key_at(rows, first.row));
      }
      if (i >= 2 * kAhead) {
        const size_t at = i - 2 * kAhead;
        const size_t place = place_of(tags[at], wanted + at * key_bytes(), rows, num_rows);
        found[at] = entries_[place].row == kEmpty ? -1 : static_cast<int64_t>(entries_[place].row);
      }
    }
  }

  // Whether the key was not there before.
  bool enter(int64_t row, const uint64_t* rows, size_t num_rows) {
    if ((size_ + 1) * 4 > entries_.size() * 3) grow();
    const auto* const key = reinterpret_cast<const uint8_t*>(key_at(rows, static_cast<size_t>(row)));
    const uint32_t tag = tag_of(key);
    const size_t place = place_of(tag, key, rows, num_rows);
    if (entries_[place].row != kEmpty) return false;
    entries_[place] = {tag, static_cast<uint32_t>(row)};
    ++size_;
    return true;
  }

  // Does nothing if the key leads to another row, or nowhere.
  void leave(int64_t row, const uint64_t* rows, size_t num_rows) {
    const auto* const key = reinterpret_cast<const uint8_t*>(key_at(rows, static_cast<size_t>(row)));
    size_t hole = place_of(tag_of(key), key, rows, num_rows);
    if (entries_[hole].row != static_cast<uint32_t>(row)) return;
    for (size_t next = hole;;) {
      next = (next + 1) & mask();
      if (entries_[next].row == kEmpty) break;
      // An entry may move back to the hole unless its home lies behind it.
      if (((next - home(entries_[next].tag)) & mask()) >= ((next - hole) & mask())) {
        entries_[hole] = entries_[next];
        hole = next;
      }
    }
    entries_[hole].row = kEmpty;
    --size_;
  }

 private:
  size_t mask() const { return entries_.size() - 1; }
  size_t key_bytes() const { return num_words_ * sizeof(uint64_t); }
  size_t home(uint32_t tag) const { return tag >> (32 - bits_); }
  const uint64_t* key_at(const uint64_t* rows, size_t row) const { return rows + row * row_words_ + first_word_; }

  static uint32_t tag_of(const uint8_t* key) {
    uint64_t word;
    std::memcpy(&word, key, sizeof word);
    return static_cast<uint32_t>((word * kMixer) >> 32);
  }

  // Of the entry with the key, or of the empty one where it would be.
  size_t place_of(uint32_t tag, const uint8_t* key, const uint64_t* rows, size_t num_rows) const {
    for (size_t place = home(tag);; place = (place + 1) & mask()) {
      const Entry& entry = entries_[place];
      if (entry.row == kEmpty) return place;
      if (entry.tag == tag && entry.row < num_rows && std::memcmp(key_at(rows, entry.row), key, key_bytes()) == 0) {
        return place;
      }
    }
  }

  void grow() {
    std::vector<Entry> old(entries_.size() * 2, {0, kEmpty});
    old.swap(entries_);
    ++bits_;
    for (const Entry& entry : old) {
      if (entry.row == kEmpty) continue;
      size_t place = home(entry.tag);
      while (entries_[place].row != kEmpty) place = (place + 1) & mask();
      entries_[place] = entry;
    }
  }

  size_t row_words_, first_word_, num_words_;
  int bits_ = kBitsAtStart;
  size_t size_ = 0;
  std::vector<Entry> entries_;
};

struct KeyTableObject {
  PyObject_HEAD
  KeyTable* table;
};

KeyTable& table_of(PyObject* self) { return *reinterpret_cast<KeyTableObject*>(self)->table; }

[[noreturn]] void refuse(const char* why) {
  PyErr_SetString(PyExc_ValueError, why);
  throw PythonError();
}

// The rows of keys, and numbers of some of them.
class Rows {
 public:
  Rows(const KeyTable& table, PyObject* rows) : bytes_(rows, false) {
    const size_t row_bytes = table.row_words() * sizeof(uint64_t);
    count = bytes_.size() / row_bytes;
    keys = bytes_.numbers<uint64_t>(count * table.row_words(), "rows");
    if (count >= kEmpty) refuse("there are too many rows");
  }
  void check(const int64_t* numbers, size_t num_numbers) const {
    for (size_t i = 0; i < num_numbers; ++i) {
      if (numbers[i] < 0 || static_cast<size_t>(numbers[i]) >= count) refuse("there is no such row");
    }
  }
  size_t count;
  const uint64_t* keys;

 private:
  Bytes bytes_;
};

PyObject* table_new(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    Py_ssize_t row_words, first_word, num_words;
    if (!PyArg_ParseTuple(args, "nnn", &row_words, &first_word, &num_words)) return nullptr;
    if (first_word < 0 || num_words < 1 || first_word > row_words - num_words) refuse("a key must lie within its row");
    auto* const self = reinterpret_cast<KeyTableObject*>(PyType_GenericAlloc(type, 0));
    if (self == nullptr) return nullptr;
    try {
      self->table = new KeyTable(static_cast<size_t>(row_words), static_cast<size_t>(first_word),
                                 static_cast<size_t>(num_words));
    } catch (const std::bad_alloc&) {
      Py_DECREF(self);
      throw;
    }
    return reinterpret_cast<PyObject*>(self);
  });
}

void table_dealloc(PyObject* object) {
  auto* const type = Py_TYPE(object);
  delete reinterpret_cast<KeyTableObject*>(object)->table;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

PyObject* table_find(PyObject* self, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *wanted, *rows, *found;
    if (!PyArg_ParseTuple(args, "OOO", &wanted, &rows, &found)) return nullptr;
    const KeyTable& table = table_of(self);
    const Bytes wanted_bytes(wanted, false), found_bytes(found, true);
    const Rows all(table, rows);
    const size_t key_bytes = table.num_words() * sizeof(uint64_t);
    const size_t count = wanted_bytes.size() / key_bytes;
    if (wanted_bytes.size() % key_bytes != 0) refuse("the keys are not whole");
    table.find(wanted_bytes.data(), count, all.keys, all.count, found_bytes.numbers<int64_t>(count, "found"));
    Py_RETURN_NONE;
  });
}

PyObject* table_enter(PyObject* self, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *numbers, *rows;
    if (!PyArg_ParseTuple(args, "OO", &numbers, &rows)) return nullptr;
    const Bytes number_bytes(numbers, false);
    const size_t count = number_bytes.size() / sizeof(int64_t);
    const auto* const wanted = number_bytes.numbers<int64_t>(count, "numbers");
    const Rows all(table_of(self), rows);
    all.check(wanted, count);
    std::string entered(count, '\0');
    for (size_t i = 0; i < count; ++i) entered[i] = table_of(self).enter(wanted[i], all.keys, all.count) ? 1 : 0;
    return PyBytes_FromStringAndSize(entered.data(), static_cast<Py_ssize_t>(count));
  });
}

PyObject* table_leave(PyObject* self, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *numbers, *rows;
    if (!PyArg_ParseTuple(args, "OO", &numbers, &rows)) return nullptr;
    const Bytes number_bytes(numbers, false);
    const size_t count = number_bytes.size() / sizeof(int64_t);
    const auto* const wanted = number_bytes.numbers<int64_t>(count, "numbers");
    const Rows all(table_of(self), rows);
    all.check(wanted, count);
    for (size_t i = 0; i < count; ++i) table_of(self).leave(wanted[i], all.keys, all.count);
    Py_RETURN_NONE;
  });
}

Py_ssize_t table_length(PyObject* self) { return static_cast<Py_ssize_t>(table_of(self).size()); }

PyObject* table_size_bytes(PyObject* self, void*) { return PyLong_FromSize_t(table_of(self).size_bytes()); }

PyMethodDef table_methods[] = {
    {"find", table_find, METH_VARARGS, "Of each key, its row; -1 if there is none."},
    {"enter", table_enter, METH_VARARGS, "Enter rows; a byte for each: 0 if its key was there."},
    {"leave", table_leave, METH_VARARGS, "Take rows out."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef table_properties[] = {{"size_bytes", table_size_bytes, nullptr, "Memory of the table.", nullptr},
                                  {nullptr, nullptr, nullptr, nullptr, nullptr}};

}  // namespace

PyObject* make_key_table_type() {
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(table_new)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(table_dealloc)},
                                {Py_sq_length, reinterpret_cast<void*>(table_length)},
                                {Py_tp_methods, table_methods},
                                {Py_tp_getset, table_properties},
                                {0, nullptr}};
  static PyType_Spec spec = {"stratakv._native._moves.KeyTable", sizeof(KeyTableObject), 0, Py_TPFLAGS_DEFAULT, slots};
  return PyType_FromSpec(&spec);
}

}  // namespace strata
