// The operators as XLA FFI handlers.
#pragma once
#include <nanobind/nanobind.h>

#include <string_view>
#include <tuple>

namespace quark {

/// By target name, as capsules, for XLA's name of a platform: "cpu", "CUDA" or "ROCM". Empty where not compiled.
nanobind::dict xla_handlers(std::string_view platform);

/// The XLA FFI API (major, minor) that the handlers were compiled for.
std::tuple<int, int> xla_ffi_api();

}  // namespace quark
