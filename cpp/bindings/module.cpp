// The Python module: tables of what the core has, and one function per operator.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "views.h"
#include "xla_ffi.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quark {

namespace {

void raise_if_error(const Status& status) {
  const char* message = status.message().c_str();
  switch (status.kind()) {
    case ErrorKind::none: return;
    case ErrorKind::type: throw nb::type_error(message);
    case ErrorKind::value: throw nb::value_error(message);
    case ErrorKind::memory: PyErr_SetString(PyExc_MemoryError, message); break;
    case ErrorKind::unsupported: PyErr_SetString(PyExc_NotImplementedError, message); break;
    case ErrorKind::device: PyErr_SetString(PyExc_RuntimeError, message); break;
  }
  throw nb::python_error();
}

constexpr size_t kMostTensors = 8;
constexpr int64_t kReleaseGil = 8192;  // elements; below, handing the GIL over and back costs more than the work

struct Views {
  TensorView views[kMostTensors];
  size_t count = 0;
  int64_t elements = 0;

  Views(const nb::tuple& tensors, const char* role) {
    if (tensors.size() > kMostTensors) throw nb::value_error("too many tensors");
    for (const nb::handle tensor : tensors) {
      views[count] = view_of(tensor, role, count);
      elements += views[count].elements();
      ++count;
    }
  }
  Tensors span() const { return {views, count}; }
};

/// On the stream that is current to the first tensor's framework.
void call_on_gpu(Op op, nb::handle first, const Views& in, const Views& out, const QuantSpec& spec) {
  FrameworkQueue queue(first, in.views[0]);
  Status status;
  {
    const nb::gil_scoped_release released;  // a full stream lets the host wait
    status = run(op, in.span(), out.span(), spec, queue);
  }
  raise_if_error(status);
}

void call(Op op, const nb::tuple& inputs, const nb::tuple& outputs, std::string_view text, int threads) {
  QuantSpec spec;
  raise_if_error(cached_spec(text, spec));
  const Views in(inputs, "input"), out(outputs, "output");
  if (in.count > 0 && in.views[0].device != Device::cpu) return call_on_gpu(op, inputs[0], in, out, spec);
  const auto work = [&] {
    if (threads > 1) {
      OpenMPExecutor executor(threads);
      return run(op, in.span(), out.span(), spec, executor);
    }
    SerialExecutor executor;
    return run(op, in.span(), out.span(), spec, executor);
  };
  if (in.elements < kReleaseGil) return raise_if_error(work());
  Status status;
  {
    const nb::gil_scoped_release released;
    status = work();
  }
  raise_if_error(status);
}

template <Op op>
void bind(nb::module_& m) {
  m.def(
      kOps[int(op)].name,
      [](const nb::tuple& inputs, const nb::tuple& outputs, std::string_view spec, int threads) {
        call(op, inputs, outputs, spec, threads);
      },
      "inputs"_a, "outputs"_a, "spec"_a, "threads"_a = 1);
}

using FormatRow = std::tuple<std::string, int, int, int, int, float, float, std::string, std::string>;

std::vector<FormatRow> format_rows() {
  constexpr const char* kSpecials[] = {"none", "nan", "ieee", "fnuz"};
  std::vector<FormatRow> rows;
  for (const Format& f : formats())
    rows.emplace_back(f.name, f.bits, f.exponent_bits, f.mantissa_bits, f.min_exp, f.lo, f.hi,
                      kSpecials[int(f.specials)], name_of(f.storage));
  return rows;
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The compiled core of quark-kernels. Its functions write into tensors that the caller allocates.";
  m.attr("VERSION") = QUARK_VERSION;
  m.attr("MAX_RANK") = kMaxRank;
#define QUARK_OP(name, ins, outs) bind<Op::name>(m);
#include "../ops.inc"
#undef QUARK_OP
  m.def("formats", &format_rows,
        "Rows of (name, bits, exponent bits, mantissa bits, min_exp, lo, hi, specials, storage dtype).");
  m.def(
      "ops",
      [] {
        std::vector<std::tuple<std::string, std::string, std::string>> rows;
        for (const OpRow& row : kOps) rows.emplace_back(row.name, row.ins, row.outs);
        return rows;
      },
      "Rows of (name, kinds of the inputs, kinds of the outputs).");
  m.def(
      "roundings",
      [] {
        std::vector<std::string> names;
        for (const char* name : rounding_names()) names.emplace_back(name);
        return names;
      },
      "Names of the rounding rules.");
  m.def(
      "cpu_levels",
      [] {
        std::vector<std::tuple<std::string, bool>> levels;
        for (const CpuLevel& level : cpu_levels()) levels.emplace_back(level.name, level.is_supported());
        return levels;
      },
      "The compiled CPU levels, and whether this machine supports each.");
  m.def(
      "cpu_level",
      [] {
        const CpuLevel* level = nullptr;
        raise_if_error(cpu_level(level));
        return std::string(level->name);
      },
      "The CPU level in use. Raises ValueError where QUARK_CPU_LEVEL names none that can be.");
  m.def(
      "gpu_builds",
      [] {
        return std::vector<std::tuple<std::string, std::string>>{{"CUDA", QUARK_CUDA_STATE}, {"HIP", QUARK_HIP_STATE}};
      },
      "For each GPU platform what was compiled, or why nothing was.");
  m.def(
      "check_gpu",
      [](std::string_view name) {
        for (const GpuPlatform* platform : gpu_platforms())
          if (platform->name == name) return raise_if_error(platform->check());
        throw nb::value_error("this build has no kernels for that platform");
      },
      "platform"_a, "Raise RuntimeError, which says why, where a compiled platform has no device to run on.");
  m.def("xla_handlers", &xla_handlers, "platform"_a,
        "XLA FFI handlers by target name, as capsules: for \"cpu\", \"CUDA\" or \"ROCM\". Empty where not compiled.");
  m.def("xla_ffi_api", &xla_ffi_api, "The XLA FFI API (major, minor) that the handlers were compiled for.");
}

}  // namespace quark
