#include "tensor.h"

namespace quark {

const char* name_of(DType dtype) {
  switch (dtype) {
#define QUARK_DTYPE(name, bytes, dlpack, xla) \
  case DType::name: return #name;
    QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
  }
  return "unknown";
}

int64_t bytes_of(DType dtype) {
  switch (dtype) {
#define QUARK_DTYPE(name, bytes, dlpack, xla) \
  case DType::name: return bytes;
    QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
  }
  return 0;
}

}  // namespace quark
