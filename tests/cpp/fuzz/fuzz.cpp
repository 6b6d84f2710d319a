// The libFuzzer target: clang++ with -fsanitize=fuzzer (CMake preset `fuzz`).
#include <cstdlib>

#include "calls.h"

static bool has_run = false;  // with -jobs the first process only starts others

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit([] {
    if (has_run) fuzz::print_counts();
  });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  has_run = true;
  fuzz::run(data, size);
  return 0;
}
