#include "headers.h"

#include <cstring>

#include "xxh3.h"

namespace strata {
namespace {

constexpr size_t kNamespaceBytes = 16, kKeyBytes = 32;
constexpr char kMagic[] = "STRATAKV";

#pragma pack(push, 1)
struct Fixed {
  char magic[8];
  uint16_t version;
  uint16_t reserved;
  uint32_t num_layers;
  uint8_t name_space[kNamespaceBytes];
  uint8_t key[kKeyBytes];
  uint64_t generation;
  uint64_t data_bytes;
};
#pragma pack(pop)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "headers are little-endian");

constexpr uint16_t kVersion = 1;
constexpr size_t kLayersMax = (kHeaderBytesMax - sizeof(Fixed) - 8) / 8;

size_t packed_bytes(size_t num_layers) { return sizeof(Fixed) + 8 * num_layers + 8; }

size_t checked_num_layers(Py_ssize_t num_layers) {
  if (num_layers < 1 || static_cast<size_t>(num_layers) > kLayersMax) {
    PyErr_Format(PyExc_ValueError, "a header has room for 1 to %zu layers", kLayersMax);
    throw PythonError();
  }
  return static_cast<size_t>(num_layers);
}

bool seal_is_good(const uint8_t* header, size_t num_layers) {
  uint64_t seal;
  memcpy(&seal, header + packed_bytes(num_layers) - 8, 8);
  return seal == xxh3_64(header, packed_bytes(num_layers) - 8, 0);
}

// `header` is a private copy of `limit` bytes of what lies there.
HeaderState state_of(const uint8_t* header, size_t limit, const Fixed& wanted) {
  Fixed fixed;
  if (limit < sizeof fixed + 8) return kDamaged;
  memcpy(&fixed, header, sizeof fixed);
  const bool is_header = memcmp(fixed.magic, kMagic, 8) == 0 && fixed.version == kVersion;
  if (!is_header || fixed.num_layers > kLayersMax || packed_bytes(fixed.num_layers) > limit) return kDamaged;
  if (!seal_is_good(header, fixed.num_layers)) return kDamaged;
  const bool is_page = memcmp(fixed.name_space, wanted.name_space, kNamespaceBytes) == 0 &&
                       memcmp(fixed.key, wanted.key, kKeyBytes) == 0 && fixed.generation == wanted.generation;
  if (!is_page) return kOtherPage;
  return fixed.data_bytes == wanted.data_bytes && fixed.num_layers == wanted.num_layers ? kGood : kOtherLayout;
}

Fixed fixed_part(const uint8_t* scope, const uint8_t* key, uint64_t generation, uint64_t data_bytes, size_t num_layers) {
  Fixed fixed{};
  memcpy(fixed.magic, kMagic, 8);
  fixed.version = kVersion;
  fixed.num_layers = static_cast<uint32_t>(num_layers);
  memcpy(fixed.name_space, scope, kNamespaceBytes);
  memcpy(fixed.key, key, kKeyBytes);
  fixed.generation = generation;
  fixed.data_bytes = data_bytes;
  return fixed;
}

}  // namespace

Seals::Seals(PyObject* name_space, PyObject* keys, PyObject* generations, unsigned long long data_bytes,
             Py_ssize_t num_layers, size_t pages)
    : name_space_(name_space, false),
      keys_(keys, false),
      generations_(generations, false),
      scope_(name_space_.numbers<uint8_t>(kNamespaceBytes, "namespace")),
      key_(keys_.numbers<uint8_t>(pages * kKeyBytes, "keys")),
      generation_(generations_.numbers<uint64_t>(pages, "generations")),
      data_bytes_(data_bytes),
      num_layers_(checked_num_layers(num_layers)),
      pages_(pages) {}

size_t Seals::header_bytes() const { return packed_bytes(num_layers_); }

void Seals::pack(size_t page, const uint64_t* checksums, uint8_t* to) const {
  const Fixed fixed = fixed_part(scope_, key_ + page * kKeyBytes, generation_[page], data_bytes_, num_layers_);
  memcpy(to, &fixed, sizeof fixed);
  for (size_t layer = 0; layer < num_layers_; ++layer) {
    memcpy(to + sizeof fixed + 8 * layer, &checksums[layer * pages_ + page], 8);
  }
  const uint64_t seal = xxh3_64(to, header_bytes() - 8, 0);
  memcpy(to + header_bytes() - 8, &seal, 8);
}

HeaderState Seals::check(size_t page, const uint8_t* header, size_t limit, uint64_t* checksums) const {
  const Fixed wanted = fixed_part(scope_, key_ + page * kKeyBytes, generation_[page], data_bytes_, num_layers_);
  const HeaderState state = state_of(header, limit, wanted);
  for (size_t layer = 0; state == kGood && layer < num_layers_; ++layer) {
    memcpy(&checksums[layer * pages_ + page], header + sizeof(Fixed) + 8 * layer, 8);
  }
  return state;
}

PyObject* check_headers(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *memory, *offsets, *name_space, *keys, *generations, *checksums;
    unsigned long long data_bytes;
    Py_ssize_t num_layers;
    if (!PyArg_ParseTuple(args, "OOOOOKnO", &memory, &offsets, &name_space, &keys, &generations, &data_bytes, &num_layers,
                          &checksums)) {
      return nullptr;
    }
    const Bytes from(memory, false), places(offsets, false), sums_out(checksums, true);
    const size_t pages = places.size() / sizeof(int64_t);
    const auto* const at = places.numbers<int64_t>(pages, "offsets");
    const Seals seals(name_space, keys, generations, data_bytes, num_layers, pages);
    auto* const sums = sums_out.numbers<uint64_t>(pages * seals.num_layers(), "checksums");
    std::vector<char> states(pages);
    {
      const WithoutInterpreter released;
      uint8_t header[kHeaderBytesMax];
      for (size_t page = 0; page < pages; ++page) {
        if (at[page] < 0 || static_cast<size_t>(at[page]) > from.size()) {
          states[page] = kDamaged;
          continue;
        }
        // Another process may be writing there: what is looked at must not change.
        const size_t left = from.size() - static_cast<size_t>(at[page]);
        const size_t limit = left < seals.header_bytes() ? left : seals.header_bytes();
        memcpy(header, from.data() + at[page], limit);
        states[page] = static_cast<char>(seals.check(page, header, limit, sums));
      }
    }
    return PyBytes_FromStringAndSize(states.data(), static_cast<Py_ssize_t>(pages));
  });
}

PyObject* pack_headers(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    PyObject *name_space, *keys, *generations, *checksums;
    unsigned long long data_bytes;
    Py_ssize_t num_layers;
    if (!PyArg_ParseTuple(args, "OOOKnO", &name_space, &keys, &generations, &data_bytes, &num_layers, &checksums)) {
      return nullptr;
    }
    const Bytes sums_in(checksums, false), ages(generations, false);
    const size_t pages = ages.size() / sizeof(uint64_t);
    const Seals seals(name_space, keys, generations, data_bytes, num_layers, pages);
    const auto* const sums = sums_in.numbers<uint64_t>(pages * seals.num_layers(), "checksums");
    std::vector<uint8_t> packed(pages * seals.header_bytes());
    for (size_t page = 0; page < pages; ++page) seals.pack(page, sums, packed.data() + page * seals.header_bytes());
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(packed.data()), static_cast<Py_ssize_t>(packed.size()));
  });
}

}  // namespace strata
