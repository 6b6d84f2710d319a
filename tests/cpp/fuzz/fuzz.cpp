// The libFuzzer target: clang++ with -fsanitize=fuzzer (CMake preset `fuzz`).
#include <cstdlib>

#include "calls.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit(fuzz::print_counts);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::run(data, size);
  return 0;
}
