// One call of the C++ API from a fuzzer's bytes, and what must hold of any.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "ops.h"

namespace fuzz {

/// What became of the calls so far.
struct Counts {
  int64_t refused_specs = 0;
  std::array<int64_t, quark::kOpCount> accepted{}, refused{};
};
const Counts& counts();
void print_counts();

/// Parses a spec and makes a call; `is_verbose` prints both. Ends the process where something doesn't hold.
void run(const uint8_t* data, size_t size, bool is_verbose = false);

}  // namespace fuzz
