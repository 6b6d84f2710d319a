// The C++ API: one signature for every operator of ops.inc.
#pragma once
#include <span>

#include "parallel.h"
#include "spec.h"

namespace quark {

enum class Op : uint8_t {
#define QUARK_OP(name, ins, outs) name,
#include "ops.inc"
#undef QUARK_OP
};

/// One row of ops.inc.
struct OpRow {
  const char* name;
  const char* ins;
  const char* outs;
};
inline constexpr OpRow kOps[] = {
#define QUARK_OP(name, ins, outs) {#name, ins, outs},
#include "ops.inc"
#undef QUARK_OP
};
inline constexpr int kOpCount = int(sizeof(kOps) / sizeof(kOps[0]));

using Tensors = std::span<const TensorView>;

/// Checks the tensors against the operator's row and the spec, then runs the kernel for their device. Outputs are
/// written, inputs never; a data output may be the very same view as a data input, any other overlap is an error.
Status run(Op op, Tensors in, Tensors out, const QuantSpec& spec, Executor& executor);

/// A kernel behind an operator; what it is given has been checked.
using Kernel = Status (*)(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor);

/// The kernels of one CPU level, in the order of ops.inc.
struct CpuLevel {
  const char* name;
  const Kernel* kernels;
  bool (*is_supported)();
};

/// The compiled levels, lowest first.
std::span<const CpuLevel> cpu_levels();

/// The level in use: the highest this machine supports, or the one QUARK_CPU_LEVEL names.
Status cpu_level(const CpuLevel*& level);

}  // namespace quark
