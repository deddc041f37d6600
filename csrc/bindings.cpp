// The Python module condense_core._C. The only file that knows of pybind11; nothing here knows of torch.
//
// A tensor arrives as the tuple (address, dtype code, shape, strides) or as None; condense_core/ops/native.py makes it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "condense/tensor.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/table.h"
#if CONDENSE_WITH_CUDA
#include "cuda/cuda.h"
#endif

namespace py = pybind11;

namespace pybind11::detail {

template <>
struct type_caster<condense::View> {
  PYBIND11_TYPE_CASTER(condense::View, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]] | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    PyObject* shape = PyTuple_GET_ITEM(source.ptr(), 2);
    PyObject* strides = PyTuple_GET_ITEM(source.ptr(), 3);
    if (!PyTuple_Check(shape) || !PyTuple_Check(strides)) return false;
    const Py_ssize_t rank = PyTuple_GET_SIZE(shape);
    if (rank > condense::View::kMaxRank || rank != PyTuple_GET_SIZE(strides)) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.dtype = static_cast<condense::Dtype>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 1)));
    value.rank = static_cast<int>(rank);
    for (Py_ssize_t i = 0; i < rank; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

using condense::cpu::Table;

// A kernel of the table as a function of the module, run without the interpreter's lock.
template <auto Member, class... Arguments>
void bind_cpu(py::module_& module, const char* name, void (*Table::*)(Arguments...)) {
  module.def(name, [](Arguments... arguments) {
    py::gil_scoped_release released;
    (condense::cpu::table().*Member)(arguments...);
  });
}

#if CONDENSE_WITH_CUDA
template <class... Arguments>
void bind_cuda(py::module_& module, const char* name, void (*function)(Arguments...)) {
  module.def(name, function, py::call_guard<py::gil_scoped_release>());
}
#endif

}  // namespace

#define CONDENSE_CPU(name) bind_cpu<&Table::name>(cpu, #name, &Table::name)

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Kernels of condense_core. Private: condense_core.ops checks arguments and calls them.";
  module.attr("version") = CONDENSE_VERSION;
  module.attr("has_cuda") = bool(CONDENSE_WITH_CUDA);

  py::module_ cpu = module.def_submodule("cpu");
  cpu.def("instruction_sets", condense::cpu::instruction_sets);
  cpu.def("instruction_set", condense::cpu::instruction_set);
  cpu.def("use_instruction_set", condense::cpu::use_instruction_set);
  cpu.def("share_openmp", condense::cpu::share_openmp);
  cpu.def("scratch_peak", condense::cpu::scratch_peak, py::arg("reset") = false);
  CONDENSE_CPU(attention_pool);
  CONDENSE_CPU(attention_pool_backward);
  CONDENSE_CPU(cross_pool);
  CONDENSE_CPU(window_scores);
  CONDENSE_CPU(non_causal_chunks);
  CONDENSE_CPU(query_moments);
  CONDENSE_CPU(expected_attention);
  CONDENSE_CPU(value_projection_norm);
  CONDENSE_CPU(key_norm);
  CONDENSE_CPU(key_similarity);
  CONDENSE_CPU(lag_scores);
  CONDENSE_CPU(select);
  CONDENSE_CPU(compact);
  CONDENSE_CPU(compact_in_place);
  CONDENSE_CPU(ragged_append);
  CONDENSE_CPU(ragged_decode_attention);

#if CONDENSE_WITH_CUDA
  py::module_ cuda = module.def_submodule("cuda");
  bind_cuda(cuda, "attention_pool", condense::cuda::attention_pool);
  bind_cuda(cuda, "select", condense::cuda::select);
  bind_cuda(cuda, "compact", condense::cuda::compact);
  bind_cuda(cuda, "compact_", condense::cuda::compact_in_place);
  bind_cuda(cuda, "ragged_append", condense::cuda::ragged_append);
#endif
}
