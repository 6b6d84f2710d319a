// What the core knows of a tensor: where it is, its dtype, shape and strides. It never owns memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quark {

// QUARK_DTYPES(X): X(name, bytes, DLPack type code, XLA element type). `name` is NumPy's (or ml_dtypes') name.
#define QUARK_DTYPES(X)                 \
  X(float32, 4, 2, F32)                 \
  X(float16, 2, 2, F16)                 \
  X(bfloat16, 2, 4, BF16)               \
  X(float64, 8, 2, F64)                 \
  X(int8, 1, 0, S8)                     \
  X(uint8, 1, 1, U8)                    \
  X(int16, 2, 0, S16)                   \
  X(uint16, 2, 1, U16)                  \
  X(int32, 4, 0, S32)                   \
  X(int64, 8, 0, S64)                   \
  X(float8_e4m3fn, 1, 10, F8E4M3FN)     \
  X(float8_e5m2, 1, 12, F8E5M2)         \
  X(float8_e4m3fnuz, 1, 11, F8E4M3FNUZ) \
  X(float8_e5m2fnuz, 1, 13, F8E5M2FNUZ) \
  X(float8_e8m0fnu, 1, 14, F8E8M0FNU)

enum class DType : uint8_t {
#define QUARK_DTYPE(name, bytes, dlpack, xla) name,
  QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
};

const char* name_of(DType dtype);
int64_t bytes_of(DType dtype);

/// The most axes a tensor may have.
inline constexpr int kMaxRank = 16;

enum class Device : uint8_t { cpu, cuda, hip };

/// Where a tensor is.
struct Place {
  Device device = Device::cpu;
  int number = 0;  ///< of GPUs

  bool operator==(const Place&) const = default;
};

/// A tensor somebody else owns. Strides are in elements and may be zero (inputs) or negative.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device = Device::cpu;
  int device_number = 0;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};

  Place place() const { return {device, device_number}; }

  // Always inlined: CPU levels must not share its code.
  [[gnu::always_inline]] int64_t elements() const {
    int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= shape[d];
    return n;
  }
};

}  // namespace quark
