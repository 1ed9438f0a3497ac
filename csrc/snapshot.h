// Whether Python objects are still what they were, and a hash of memory. For bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

namespace mambaout_kernels {

using Memory = std::vector<std::tuple<std::uintptr_t, std::uint64_t, std::int64_t>>;  // the last is any number
constexpr std::uint64_t kFewestSamples = 64, kBytesPerSample = 32768;

// A hash of some of the values of each (address, bytes): told apart from what it was when all of them have changed, as
// after an optimizer's step, whatever way they were written.
inline std::uint64_t fingerprint(const Memory& memory) {
  std::uint64_t hash = 14695981039346656037u;
  for (const auto& [address, bytes, version] : memory) {
    const auto* words = reinterpret_cast<const std::uint16_t*>(address);
    const std::uint64_t count = bytes / 2, samples = std::min(count, std::max(kFewestSamples, bytes / kBytesPerSample));
    if (samples == 0) continue;
    // The i-th is at i * (count - 1) / (samples - 1), rounded down: by additions, for divisions would be waited for.
    const std::uint64_t gaps = samples > 1 ? samples - 1 : 1, step = (count - 1) / gaps, excess = (count - 1) % gaps;
    std::uint64_t at = 0, beyond = 0;
    for (std::uint64_t i = 0; i < samples; ++i) {
      // Of fp32 both halves: an odd number of words apart, 2 bytes each.
      const std::uint64_t low = words[at & ~std::uint64_t{1}], high = words[at | (at + 1 < count)];
      hash = (hash ^ (low | high << 16)) * 1099511628211u;
      at += step;
      beyond += excess;
      const bool carried = beyond >= gaps;
      at += carried;
      beyond -= carried ? gaps : 0;
    }
  }
  return hash;
}

// What objects were when it was made. They must outlive it: it holds no references, for Python's garbage collector
// would not find them here.
class Snapshot {
 public:
  // entries: (dict, key, value); Ellipsis for a value that is not there. types: (object, its type). sizes: (container,
  // its size). tensors: (tensor, data_ptr, _version or None, dtype, stride). memory: as for fingerprint.
  Snapshot(const pybind11::list& entries, const pybind11::list& types, const pybind11::list& sizes,
           const pybind11::list& tensors, Memory memory)
      : memory_(std::move(memory)), fingerprint_(fingerprint(memory_)) {
    for (const pybind11::handle entry : entries) {
      entries_.push_back({part(entry, 0).ptr(), part(entry, 1).ptr(), part(entry, 2).ptr()});
    }
    for (const pybind11::handle type : types) types_.push_back({part(type, 0).ptr(), part(type, 1).ptr()});
    for (const pybind11::handle size : sizes) sizes_.push_back({part(size, 0).ptr(), part(size, 1).cast<Py_ssize_t>()});
    for (const pybind11::handle tensor : tensors) {
      tensors_.push_back(
          {part(tensor, 0), part(tensor, 1).cast<std::uintptr_t>(), part(tensor, 2), part(tensor, 3), part(tensor, 4)});
    }
  }

  // Whether all is the same, by identity but for numbers and strides, and the memory as far as samples show.
  bool holds() const {
    // After a model's weights went through the caches, hardly any of these objects is in them.
    for (const Size& size : sizes_) __builtin_prefetch(size.container);
    for (const Tensor& tensor : tensors_) __builtin_prefetch(tensor.object.ptr());
    for (const Entry& entry : entries_) {
      const PyObject* found = PyDict_GetItemWithError(entry.dict, entry.key);
      if (found == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
      if (found != entry.value && !(found == nullptr && entry.value == Py_Ellipsis)) return false;
    }
    for (const Type& type : types_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(type.object)) != type.type) return false;
    }
    for (const Size& size : sizes_) {
      if (PyObject_Size(size.container) != size.size) return false;
    }
    for (const Tensor& tensor : tensors_) {
      if (!same(tensor)) return false;
    }
    return fingerprint(memory_) == fingerprint_;
  }

 private:
  struct Entry {
    PyObject *dict, *key, *value;
  };
  struct Type {
    PyObject *object, *type;
  };
  struct Size {
    PyObject* container;
    Py_ssize_t size;
  };
  struct Tensor {
    pybind11::handle object;
    std::uintptr_t address;
    pybind11::handle version, dtype, stride;
  };

  static pybind11::handle part(pybind11::handle tuple, int i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

  static bool same(const Tensor& tensor) {
    static const pybind11::str data_ptr("data_ptr"), version("_version"), dtype("dtype"), stride("stride");
    const auto found = [](PyObject* object) {
      if (object == nullptr) throw pybind11::error_already_set();
      return pybind11::reinterpret_steal<pybind11::object>(object);
    };
    const auto call = [&](const pybind11::str& name) {
      return found(PyObject_CallMethodNoArgs(tensor.object.ptr(), name.ptr()));
    };
    const auto get = [&](const pybind11::str& name) {
      return found(PyObject_GetAttr(tensor.object.ptr(), name.ptr()));
    };
    if (call(data_ptr).cast<std::uintptr_t>() != tensor.address || !get(dtype).is(tensor.dtype)) return false;
    if (!call(stride).equal(tensor.stride)) return false;
    return tensor.version.is_none() || get(version).equal(tensor.version);
  }

  std::vector<Entry> entries_;
  std::vector<Type> types_;
  std::vector<Size> sizes_;
  std::vector<Tensor> tensors_;
  Memory memory_;
  std::uint64_t fingerprint_;
};

}  // namespace mambaout_kernels
