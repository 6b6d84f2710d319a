// How numbers are stored: the types of the dtypes, to and from float32.
//
// Compiled once per CPU level and for every GPU platform, like numerics.h.
#pragma once
#include "numerics.h"

namespace quark::QUARK_LEVEL {
namespace {

template <class T>
struct Stored {
  T raw;
};
struct BFloat16Bits {
  uint16_t raw;
};
struct Float16Bits {
  uint16_t raw;
};

QUARK_INLINE float widen(BFloat16Bits h) { return from_bfloat16(h.raw); }
QUARK_INLINE float widen(Float16Bits h) { return from_float16(h.raw); }
template <class T>
QUARK_INLINE float widen(Stored<T> v) {
  return float(v.raw);
}

// Of a NaN processors keep the sign and the highest bits, and set the first; GPUs' conversions make another one.
QUARK_INLINE float widen(Stored<double> v) {
#if defined(QUARK_ON_GPU)
  uint64_t u;
  __builtin_memcpy(&u, &v.raw, 8);
  if (v.raw != v.raw) return float_of((uint32_t(u >> 32) & kSign) | kNaN | (uint32_t(u >> 29) & (kMinNormal - 1u)));
#endif
  return float(v.raw);
}
QUARK_INLINE void narrow(float x, BFloat16Bits& out) { out.raw = to_bfloat16(x); }
QUARK_INLINE void narrow(float x, Float16Bits& out) { out.raw = to_float16(x); }
QUARK_INLINE void narrow(float x, Stored<float>& out) { out.raw = x; }
QUARK_INLINE void narrow(float x, Stored<double>& out) {
  out.raw = double(x);
#if defined(QUARK_ON_GPU)
  const uint64_t mantissa = bits_of(x) & (kMinNormal - 1u);
  const uint64_t u = uint64_t(sign_of(x) | 0x7ff80000u) << 32 | mantissa << 29;
  if (is_nan(x)) __builtin_memcpy(&out.raw, &u, 8);
#endif
}
template <class T>
QUARK_INLINE void narrow(float x, Stored<T>& out) {
  out.raw = T(int32_t(x));  // integers: x is one, and in range
}

/// The lowest byte of a code.
QUARK_INLINE void narrow(int32_t code, Stored<uint8_t>& out) { out.raw = uint8_t(code); }

/// Calls f with a null pointer of the type that stores `dtype`. fp8 dtypes are bytes here: codes, not values.
template <class F>
QUARK_INLINE void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<Stored<float>*>(nullptr));
    case DType::float64: return f(static_cast<Stored<double>*>(nullptr));
    case DType::float16: return f(static_cast<Float16Bits*>(nullptr));
    case DType::bfloat16: return f(static_cast<BFloat16Bits*>(nullptr));
    case DType::int8: return f(static_cast<Stored<int8_t>*>(nullptr));
    case DType::int16: return f(static_cast<Stored<int16_t>*>(nullptr));
    case DType::uint16: return f(static_cast<Stored<uint16_t>*>(nullptr));
    case DType::int32: return f(static_cast<Stored<int32_t>*>(nullptr));
    case DType::int64: return f(static_cast<Stored<int64_t>*>(nullptr));
    case DType::uint8:
    case DType::float8_e4m3fn:
    case DType::float8_e5m2:
    case DType::float8_e4m3fnuz:
    case DType::float8_e5m2fnuz:
    case DType::float8_e8m0fnu: return f(static_cast<Stored<uint8_t>*>(nullptr));
  }
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
