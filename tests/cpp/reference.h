// The definitions that the tests compare with, in double, where every step is exact.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "spec.h"

namespace reference {

using quark::DType;
using quark::QuantSpec;
using quark::Rounding;
using quark::ScaleFormat;
using quark::ScaleRule;

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// x / y in float32: the double quotient has enough bits to round twice.
inline float divided(double x, double y) { return float(x / y); }

// ---- random numbers -----------------------------------------------------------------------------------------------

/// Philox4x32-10 with a whole counter.
using Counter = std::array<uint32_t, 4>;
inline Counter philox(Counter c, std::array<uint32_t, 2> key) {
  for (uint32_t round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53) * c[0], b = uint64_t(0xCD9E8D57) * c[2];
    const uint32_t k0 = key[0] + round * 0x9E3779B9u, k1 = key[1] + round * 0xBB67AE85u;
    c = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
  }
  return c;
}

/// The random word of element `flat`.
inline uint32_t random_word(uint64_t flat, std::array<uint32_t, 2> key) {
  return philox({uint32_t(flat / 4), uint32_t(flat / 4 >> 32), 0, 0}, key)[flat % 4];
}

// ---- rounding -----------------------------------------------------------------------------------------------------

/// R(t). -0 may become +0.
inline double rounded(Rounding r, double t, uint32_t random = 0) {
  const double down = std::floor(t);
  switch (r) {
    case Rounding::half_even: return std::nearbyint(t);
    case Rounding::half_up: return t - down >= 0.5 ? down + 1 : down;
    case Rounding::half_away: return std::copysign(rounded(Rounding::half_up, std::fabs(t)), t);
    case Rounding::floor: return down;
    case Rounding::ceil: return std::ceil(t);
    case Rounding::toward_zero: return std::trunc(t);
    case Rounding::stochastic: {
      const double part = std::fabs(t - std::trunc(t));
      return std::trunc(t) + (random < std::floor(part * 0x1p32) ? std::copysign(1.0, t) : 0.0);
    }
  }
  return 0;
}

// ---- scales -------------------------------------------------------------------------------------------------------

/// A group's scale: the number that its elements are divided by, and what is stored where that isn't the number. Powers
/// of two and exponents have the code exponent + 127, or 255.
struct Scale {
  float number = 1;
  uint32_t code = 0;
  double zero_point = 0;
};

/// max(-x, 0) and max(x, 0) of a group, NaN where there is one.
struct Bounds {
  float low = 0, high = 0;

  bool are_finite() const { return std::isfinite(low) && std::isfinite(high); }
};
inline Bounds bounds_of(const std::vector<float>& group) {
  Bounds b;
  for (const float x : group) {
    float& to = std::signbit(x) ? b.low : b.high;
    if (!(std::fabs(x) <= to) && !std::isnan(to)) to = std::fabs(x);
  }
  return b;
}

/// The end of the range that the largest magnitude of a group lands on.
inline double top_of(const QuantSpec& spec) { return spec.format.is_integer() ? spec.quant_max : spec.format.hi; }

inline Scale float32_scale(const QuantSpec& spec, const Bounds& b) {
  const double hi = top_of(spec), lo = spec.quant_min, steps = hi - lo;
  const bool symmetric = spec.symmetric;
  Scale r{1, 0, symmetric ? 0 : lo};
  if (!b.are_finite()) return {kNaN, 0, r.zero_point};
  if (b.low == 0 && b.high == 0) return r;
  if (symmetric) {
    const double top = spec.scale_format == ScaleFormat::global ? double(float(hi * 448)) : hi;
    r.number = std::max(divided(std::max(b.low, b.high), top), 0x1p-126f);
    return r;
  }
  const auto width = float(double(b.low) + double(b.high));
  r.number =
      std::isinf(width) ? float(double(divided(b.high, steps)) + double(divided(b.low, steps))) : divided(width, steps);
  r.number = std::clamp(r.number, 0x1p-126f, std::numeric_limits<float>::max());
  r.zero_point = std::clamp(lo + std::nearbyint(double(divided(b.low, r.number))), lo, hi);
  return r;
}

/// By what each rule is for, not by the fractions that it comes down to.
inline int power_for(const QuantSpec& spec, double amax) {
  if (amax == 0) return -127;
  const double top = top_of(spec);
  const int emax = std::ilogb(top), least = std::ilogb(amax) - emax;
  const int mantissa = spec.format.is_integer() ? emax : spec.format.mantissa_bits;
  bool up = false;
  if (spec.scale_rule == ScaleRule::ceil) up = std::ldexp(1.0, least + emax) < amax;
  if (spec.scale_rule == ScaleRule::rceil) up = std::ldexp(top, least) < amax;
  if (spec.scale_rule == ScaleRule::even) {
    const double spacing = std::ldexp(1.0, least + emax - mantissa);
    up = std::ilogb(std::nearbyint(amax / spacing) * spacing) > least + emax;
  }
  return std::clamp(least + up, -127, 127);
}

/// The value of an E4M3 code.
inline double e4m3_value(uint32_t code) {
  const int fraction = int(code & 7), field = int(code >> 3 & 15);
  const double m = field == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, field - 10);
  return (code & 0x7f) == 0x7f ? double(kNaN) : code & 0x80 ? -m : m;
}

inline Scale e4m3_scale(const QuantSpec& spec, const Bounds& b, float tensor_scale) {
  const float v = divided(divided(std::max(b.low, b.high), top_of(spec)), tensor_scale);
  if (!b.are_finite() || std::isnan(v)) return {kNaN, 0x7f, 0};
  const double bounded = std::clamp(double(v), 0x1p-9, 448.0);
  uint32_t code = 1;
  while (e4m3_value(code) < bounded) ++code;
  const double above = e4m3_value(code) - bounded, below = bounded - e4m3_value(code - 1);
  if (below < above || (below == above && code % 2 == 1)) --code;
  return {float(e4m3_value(code) * double(tensor_scale)), code, 0};
}

/// What the exponent field of x's dtype says: floor(log2 |x|), of zero and subnormals one less than of any other.
/// Infinities and NaN count as zero.
inline int exponent_field(double x, DType dtype) {
  const int least = dtype == DType::float16 ? -15 : -127;
  return !std::isfinite(x) || std::fabs(x) < std::ldexp(1.0, least + 1) ? least : std::ilogb(x);
}

/// The scale that the extremes of a group ask for. `dtype` is x's.
inline Scale scale_of(const QuantSpec& spec, DType dtype, const Bounds& b, float tensor_scale) {
  const auto power = [&](int e, int of_code_1) -> Scale {
    if (!b.are_finite()) return {kNaN, 255, 0};
    return {std::ldexp(1.0f, e + of_code_1), uint32_t(e + 127), 0};
  };
  const double amax = std::max(b.low, b.high);
  const int of_code_1 = 2 - spec.format.bits;
  switch (spec.scale_format) {
    case ScaleFormat::float32:
    case ScaleFormat::global: return spec.format.is_cast() ? Scale() : float32_scale(spec, b);
    case ScaleFormat::e8m0: return power(power_for(spec, b.are_finite() ? amax : 0), 0);
    case ScaleFormat::e4m3: return e4m3_scale(spec, b, tensor_scale);
    case ScaleFormat::exponent: return power(amax == 0 ? -126 : std::clamp(std::ilogb(amax), -126, 127), of_code_1);
    case ScaleFormat::microexponents: return power(exponent_field(amax, dtype), of_code_1);
  }
  return {};
}

/// The exponent that fits every code, of a block's finite elements.
inline Scale fitting_scale(const QuantSpec& spec, const std::vector<float>& block) {
  const double least = 0x1p-149, end = std::ldexp(1.0, spec.format.bits - 1);
  double s = least;
  for (const float x : block)
    if (x != 0) s = std::max(s, std::ldexp(1.0, std::ilogb(x) - spec.format.bits + 2));
  for (const float x : block) {
    const double q = std::nearbyint(x / s);
    if (q < -end || q > end - 1) return {float(2 * s), 0, 0};
  }
  return {float(s), 0, 0};
}

inline Scale scale_of_group(const QuantSpec& spec, DType dtype, std::vector<float> group, float tensor_scale = 1) {
  if (spec.shares_exponent() && spec.ieee) std::erase_if(group, [](float x) { return !std::isfinite(x); });
  if (spec.scale_rule == ScaleRule::fit) return fitting_scale(spec, group);
  return scale_of(spec, dtype, bounds_of(group), tensor_scale);
}

/// Whether x lies below the exponent of a block with that scale.
inline bool is_below(const QuantSpec& spec, DType dtype, float x, float s) {
  return !std::isnan(s) && exponent_field(x, dtype) < std::ilogb(s) + spec.format.bits - 2;
}

/// The nearest-rank percentiles of -x and of x, or of |x|.
inline Bounds percentiles_of(const QuantSpec& spec, const std::vector<float>& group) {
  const auto n = double(group.size());
  const auto k = size_t(std::clamp(std::ceil(spec.percentile / 100.0 * n), 1.0, n));
  const auto select = [&](const auto& side_of) {
    std::vector<float> sides;
    for (const float x : group) sides.push_back(side_of(x));
    std::sort(sides.begin(), sides.end());
    return sides[k - 1];
  };
  if (spec.symmetric) return {0, select([](float x) { return std::fabs(x); })};
  return {select([](float x) { return std::max(-x, 0.0f); }), select([](float x) { return std::max(x, 0.0f); })};
}

// ---- elements -----------------------------------------------------------------------------------------------------

/// The code of an integer format whose quotient is v.
inline float integer_code(const QuantSpec& spec, float v, float z, uint32_t random = 0) {
  const float nan = spec.ieee ? kNaN : 0.0f;
  if (std::isnan(v)) v = nan;
  if (spec.shifted) v += z;
  if (std::isnan(v)) v = nan;
  const double r = rounded(spec.rounding, v, random), q = spec.shifted ? r : double(float(r + z));
  return std::isnan(q) ? kNaN : float(std::clamp(q, double(spec.quant_min), double(spec.quant_max)) + 0.0);
}

/// An element of a block whose exponent is that of its finite elements.
inline float finite_value(const QuantSpec& spec, float x, float s, float limit) {
  if (!std::isfinite(x)) return !spec.has_pairs() ? 0.0f : std::isnan(x) ? std::copysign(kNaN, x) : x;
  const double q = std::clamp(std::nearbyint(double(x / s)), double(spec.quant_min), double(spec.quant_max));
  const auto y = float((q + 0.0) * double(s));
  return std::isnan(y) ? std::copysign(kNaN, x) : std::clamp(y, -limit, limit);
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
