// The definitions that the tests compare with, in double, where every step is exact.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "spec.h"

namespace reference {

using quark::DType;
using quark::QuantSpec;
using quark::Rounding;
using quark::ScaleFormat;

/// R(t). -0 may become +0.
inline double rounded(Rounding r, double t) {
  const double down = std::floor(t);
  switch (r) {
    case Rounding::half_even: return std::nearbyint(t);
    case Rounding::half_up: return t - down >= 0.5 ? down + 1 : down;
    case Rounding::half_away: return std::copysign(rounded(Rounding::half_up, std::fabs(t)), t);
    case Rounding::floor: return down;
    case Rounding::ceil: return std::ceil(t);
    case Rounding::toward_zero: return std::trunc(t);
  }
  return 0;
}

/// What the exponent field of x's dtype says: floor(log2 |x|), of zero and subnormals one less than of any other.
/// Infinities and NaN count as zero.
inline int exponent_field(double x, DType dtype) {
  const int least = dtype == DType::float16 ? -15 : -127;
  return !std::isfinite(x) || std::fabs(x) < std::ldexp(1.0, least + 1) ? least : std::ilogb(x);
}

/// The scale of a block whose scale is a power of two.
inline double block_scale(const QuantSpec& spec, DType dtype, const std::vector<float>& block) {
  const int bits = spec.format.bits;
  double amax = 0;
  bool finite = true;
  int field = exponent_field(0, dtype);
  for (const float x : block) {
    finite = finite && std::isfinite(x);
    if (std::isfinite(x)) amax = std::max(amax, std::fabs(double(x)));
    field = std::max(field, exponent_field(x, dtype));
  }
  if (spec.scale_format == ScaleFormat::microexponents) return std::ldexp(1.0, field - bits + 2);
  if (spec.scale_format == ScaleFormat::e8m0) {
    if (!finite) return std::numeric_limits<double>::quiet_NaN();
    const double hi = spec.format.is_integer() ? spec.quant_max : spec.format.hi;
    return std::ldexp(1.0, amax == 0 ? -127 : std::clamp(std::ilogb(amax) - std::ilogb(hi), -127, 127));
  }
  const double least = 0x1p-149, end = std::ldexp(1.0, bits - 1);
  const double s = amax == 0 ? least : std::max(least, std::ldexp(1.0, std::ilogb(amax) - bits + 2));
  for (const float x : block) {
    const double q = std::isfinite(x) ? std::nearbyint(x / s) : 0;
    if (q < -end || q > end - 1) return 2 * s;
  }
  return s;
}

/// The code of an integer format whose quotient is v.
inline float integer_code(const QuantSpec& spec, float v, float z) {
  const float nan = spec.ieee ? NAN : 0.0f;
  if (std::isnan(v)) v = nan;
  if (spec.shifted) v += z;
  if (std::isnan(v)) v = nan;
  const double r = rounded(spec.rounding, v), q = spec.shifted ? r : double(float(r + z));
  return std::isnan(q) ? NAN : float(std::clamp(q, double(spec.quant_min), double(spec.quant_max)) + 0.0);
}

/// An element of a block with the scale s, a power of two that stands for an exponent. `partner` is the other element
/// of its pair.
inline float shared_exponent_value(const QuantSpec& spec, DType dtype, float x, float partner, float s, float limit) {
  const bool has_pairs = spec.scale_format == ScaleFormat::microexponents;
  if (!std::isfinite(x)) return !has_pairs ? 0.0f : std::isnan(x) ? std::copysign(NAN, x) : x;
  const int exponent = std::ilogb(s) + spec.format.bits - 2;
  const bool halved = has_pairs && exponent_field(x, dtype) < exponent && exponent_field(partner, dtype) < exponent;
  const double t = halved ? double(s) / 2 : double(s);
  const double q = std::clamp(std::nearbyint(x / t), double(spec.quant_min), double(spec.quant_max));
  return std::clamp(float((q + 0.0) * t), -limit, limit);
}

/// What an element contributes to the gradients: to x's, and the term of the sum for its scale's.
struct Learned {
  float dx;
  double term;
};
inline Learned learned(const QuantSpec& spec, float x, float grad, float s, float z) {
  const float v = spec.shifted ? x / s + z : x / s;
  const double whole = rounded(spec.rounding, v), r = spec.shifted ? whole : double(float(whole + z));
  if (std::isnan(r)) return {0.0f, 0.0};
  if (r < spec.quant_min) return {0.0f, double(grad) * double(spec.quant_min - z)};
  if (r > spec.quant_max) return {0.0f, double(grad) * double(spec.quant_max - z)};
  return {grad, double(grad) * double(float(whole - v))};
}

}  // namespace reference
