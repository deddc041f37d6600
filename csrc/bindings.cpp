// The Python module condense_core._C. The only file that knows of pybind11; nothing here knows of torch.
//
// A tensor arrives as the tuple (address, dtype code, shape, strides) or as None; condense_core/ops/native.py makes it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

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
  PYBIND11_TYPE_CASTER(condense::View, const_name("View | None"));

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
    const long code = PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 1));
    if (!PyErr_Occurred() && (code < 0 || code >= condense::kDtypes)) return false;
    value.dtype = static_cast<condense::Dtype>(code);
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

// A kernel of the table as a function of the module, run without the interpreter's lock. Python calls it by the names
// of its parameters, which are those of cpu/table.h; pybind11 counts them when it is compiled.
template <auto Member, class... Arguments, class... Names>
void bind_cpu(py::module_& module, const char* op, void (*Table::*)(Arguments...), Names... names) {
  const auto call = [op](Arguments... arguments) {
    const int threads = std::get<sizeof...(Arguments) - 1>(std::tie(arguments...));
    CONDENSE_CHECK_POSITIVE(threads);
    py::gil_scoped_release released;
    (condense::cpu::table().*Member)(arguments...);
  };
  module.def(op, call, py::arg(names)..., py::arg("threads"));
}

#if CONDENSE_WITH_CUDA
template <class... Arguments, class... Names>
void bind_cuda(py::module_& module, const char* op, void (*function)(Arguments...), Names... names) {
  module.def(op, function, py::call_guard<py::gil_scoped_release>(), py::arg(names)..., py::arg("stream"));
}
#endif

}  // namespace

#define CONDENSE_CPU(op, ...) bind_cpu<&Table::op>(cpu, #op, &Table::op, __VA_ARGS__)
#define CONDENSE_CUDA(op, ...) bind_cuda(cuda, #op, condense::cuda::op, __VA_ARGS__)

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Kernels of condense_core. Private: condense_core.ops checks arguments and calls them.";
  module.attr("version") = CONDENSE_VERSION;
  module.attr("has_cuda") = bool(CONDENSE_WITH_CUDA);

  py::module_ cpu = module.def_submodule("cpu");
  cpu.def("instruction_sets", condense::cpu::instruction_sets);
  cpu.def("instruction_set", condense::cpu::instruction_set);
  cpu.def("use_instruction_set", condense::cpu::use_instruction_set, py::arg("name"));
  cpu.def("share_openmp", condense::cpu::share_openmp, py::arg("gomp_parallel"));
  cpu.def("scratch_peak", condense::cpu::scratch_peak, py::arg("reset") = false);
  CONDENSE_CPU(attention_pool, "x", "q", "ratio", "cu_seqlens", "row_offsets", "halo", "scale", "norm_weight",
               "window_bias", "eps", "out", "lse");
  CONDENSE_CPU(attention_pool_backward, "grad", "x", "q", "lse", "ratio", "cu_seqlens", "row_offsets", "halo", "scale",
               "norm_weight", "window_bias", "eps", "dx", "dq", "dw", "dbias");
  CONDENSE_CPU(cross_pool, "x", "q", "blocks", "scale", "norm_weight", "eps", "out", "lse");
  CONDENSE_CPU(window_scores, "q_win", "k", "scale", "kernel_size", "bounds", "out");
  CONDENSE_CPU(non_causal_chunks, "q", "k", "chunk_size", "scale", "bounds", "out");
  CONDENSE_CPU(query_moments, "q", "cos", "sin", "sink", "bounds", "mu", "cov");
  CONDENSE_CPU(expected_attention, "k", "v", "mu", "cov", "mean_cos", "mean_sin", "scale", "epsilon", "sink", "bounds",
               "out");
  CONDENSE_CPU(value_projection_norm, "v", "w_o", "bounds", "out");
  CONDENSE_CPU(key_norm, "k", "sink", "window", "bounds", "out");
  CONDENSE_CPU(key_similarity, "k", "sink", "window", "bounds", "out");
  CONDENSE_CPU(lag_scores, "k", "v", "lag_size", "sink", "bounds", "out");
  CONDENSE_CPU(select, "scores", "budget", "across_heads", "protect", "indices", "counts");
  CONDENSE_CPU(compact, "k", "v", "cu_seqlens", "indices", "cu_indices", "cos", "sin", "first", "k_out", "v_out");
  CONDENSE_CPU(compact_, "k", "v", "cu_seqlens", "indices", "cu_indices", "cos", "sin", "first", "check_only");
  CONDENSE_CPU(ragged_append, "k", "v", "cu_seqlens", "lengths", "k_new", "v_new");
  CONDENSE_CPU(ragged_decode_attention, "q", "k", "v", "cu_seqlens", "lengths", "scale", "out");

#if CONDENSE_WITH_CUDA
  py::module_ cuda = module.def_submodule("cuda");
  CONDENSE_CUDA(attention_pool, "x", "q", "ratio", "seqlen", "cu_seqlens", "row_offsets", "halo", "scale",
                "norm_weight", "window_bias", "eps", "out", "lse");
  CONDENSE_CUDA(select, "scores", "budget", "across_heads", "protect", "indices", "counts");
  CONDENSE_CUDA(compact, "k", "v", "cu_seqlens", "indices", "cu_indices", "cos", "sin", "first", "k_out", "v_out");
  CONDENSE_CUDA(compact_, "k", "v", "cu_seqlens", "indices", "cu_indices", "cos", "sin", "first");
  CONDENSE_CUDA(ragged_append, "k", "v", "cu_seqlens", "lengths", "k_new", "v_new");
#endif
}
