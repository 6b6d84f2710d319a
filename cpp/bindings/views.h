// Python objects as TensorViews, without a copy: torch tensors through the DLPack C exchange API, NumPy arrays (with
// ml_dtypes' dtypes, which have no DLPack form) through __array_interface__.
#pragma once
#include <nanobind/nanobind.h>

#include "../tensor.h"

namespace quark {

/// The view of a tensor. Raises TypeError for anything that isn't one, and for dtypes the core doesn't have.
TensorView view_of(nanobind::handle object, const char* role, size_t index);

}  // namespace quark
