// Whether Python objects are still what they were. For bindings.cpp only.
#pragma once

#include <pybind11/pybind11.h>

namespace mambaout_kernels {

// entries: (dict, key, value); Ellipsis for a value that is not there. types: (object, its type). empty: containers.
// tensors: (tensor, data_ptr, _version or None, dtype, stride). All compared by identity but for numbers and strides.
inline bool unchanged(const pybind11::list& entries, const pybind11::list& types, const pybind11::list& empty,
                      const pybind11::list& tensors) {
  static const pybind11::str data_ptr("data_ptr"), version("_version"), dtype("dtype"), stride("stride");
  for (const pybind11::handle entry : entries) {
    const auto part = [&](int i) { return PyTuple_GET_ITEM(entry.ptr(), i); };
    const PyObject* found = PyDict_GetItemWithError(part(0), part(1));
    if (found == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    if (found != part(2) && !(found == nullptr && part(2) == Py_Ellipsis)) return false;
  }
  for (const pybind11::handle type : types) {
    PyObject* object = PyTuple_GET_ITEM(type.ptr(), 0);
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != PyTuple_GET_ITEM(type.ptr(), 1)) return false;
  }
  for (const pybind11::handle container : empty) {
    if (PyObject_Size(container.ptr()) != 0) return false;
  }
  for (const pybind11::handle tensor : tensors) {
    const auto part = [&](int i) { return pybind11::handle(PyTuple_GET_ITEM(tensor.ptr(), i)); };
    const auto call = [&](const pybind11::str& name) {
      return pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(part(0).ptr(), name.ptr()));
    };
    const auto get = [&](const pybind11::str& name) {
      return pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(part(0).ptr(), name.ptr()));
    };
    const auto same = [&](const pybind11::object& found, int i) {
      if (!found) throw pybind11::error_already_set();
      return found.is(part(i)) || found.equal(part(i));
    };
    if (!same(call(data_ptr), 1) || !get(dtype).is(part(3)) || !same(call(stride), 4)) return false;
    if (!part(2).is_none() && !same(get(version), 2)) return false;
  }
  return true;
}

}  // namespace mambaout_kernels
