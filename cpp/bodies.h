// What an operator does with one element, in which order of computing, and where results end.
//
// Compiled once per CPU level and for every GPU platform, like numerics.h.
#pragma once
#include "numerics.h"

namespace quark::QUARK_LEVEL {
namespace {

// What a loop does with one element. `other` is the second data operand, where there is one: a gradient. kOrders: the
// body serves every order of computing, not just that of the everyday functions; kFinite: and Arithmetic::finite;
// kRounds: it rounds.

struct QuantizeBody {
  static constexpr bool kOrders = true, kFinite = false, kRounds = true;
  template <Arithmetic A, Rounding R>
  static QUARK_INLINE float apply(float x, float, float s, float z, float, uint32_t random, const Grid& g) {
    return quantize_value<A, R>(x, s, z, random, g);
  }
};

struct FakeQuantizeBody {
  static constexpr bool kOrders = true, kFinite = true, kRounds = true;
  template <Arithmetic A, Rounding R>
  static QUARK_INLINE float apply(float x, float, float s, float z, float limit, uint32_t random, const Grid& g) {
    if constexpr (A == Arithmetic::finite) return fake_quantize_finite<R>(x, s, limit, g);
    return fake_quantize_value<A, R>(x, s, z, limit, random, g);
  }
};

struct FakeQuantizeBackwardBody {
  static constexpr bool kOrders = false, kFinite = false, kRounds = true;
  template <Arithmetic A, Rounding R>
  static QUARK_INLINE float apply(float x, float other, float s, float z, float, uint32_t random, const Grid& g) {
    return is_inside<A, R>(x, s, z, random, g) ? other : 0.0f;
  }
};

struct DequantizeBody {
  static constexpr bool kOrders = false, kFinite = false, kRounds = false;
  template <Arithmetic A, Rounding R>
  static QUARK_INLINE float apply(float y, float, float s, float z, float limit, uint32_t, const Grid&) {
    return dequantize_value<A>(y, s, z, limit);
  }
};

/// An order of computing.
struct Order {
  Arithmetic arithmetic;
  Rounding rounding;
};

/// The order for a spec and x's dtype. What can only round to nearest even has one order.
template <class Body>
Order order_of(const QuantSpec& spec, DType data, bool has_zero_point) {
  constexpr Rounding kNearest = Rounding::half_even;
  const Rounding rounding = Body::kRounds ? spec.rounding : kNearest;
  const Format& f = spec.format;
  if (f.storage == DType::float16) return {Arithmetic::float16, kNearest};
  if (f.storage == DType::bfloat16) return {Arithmetic::bfloat16, kNearest};
  if (Body::kOrders) {
    if (Body::kFinite && spec.shares_exponent() && spec.ieee) return {Arithmetic::finite, kNearest};
    if (spec.narrow && data == DType::float16) return {Arithmetic::minifloat_float16, kNearest};
    if (spec.narrow && data == DType::bfloat16) return {Arithmetic::minifloat_bfloat16, kNearest};
    if (spec.reciprocal && spec.shifted) return {Arithmetic::reciprocal_shifted, rounding};
    if (spec.reciprocal) return {Arithmetic::reciprocal, rounding};
    if (spec.shifted) return {Arithmetic::shifted, rounding};
  }
  if (!f.is_integer()) return {Arithmetic::minifloat, rounding};
  // A range of more than 16 bits is beyond the shortcut of `integer`.
  const bool is_wide = spec.quant_min < -0x1p22f || spec.quant_max > 0x1p22f;
  return {has_zero_point || spec.ieee || is_wide ? Arithmetic::affine : Arithmetic::integer, rounding};
}

/// What f.operator()<A, R>() gives for an order that order_of gives, else an empty result: the orders of the documented
/// functions don't go with stochastic rounding.
template <class Body, class F>
QUARK_INLINE auto with_order(Order order, const F& f) {
  constexpr Rounding kNearest = Rounding::half_even;
  using Result = decltype(f.template operator()<Arithmetic::minifloat, kNearest>());
  const auto rounded = [&]<Arithmetic A>() -> Result {
    if constexpr (!Body::kRounds) {
      return f.template operator()<A, kNearest>();
    } else {
      constexpr bool kMayBeRandom = A == Arithmetic::integer || A == Arithmetic::affine || A == Arithmetic::minifloat;
      switch (order.rounding) {
#define QUARK_ROUNDING(name) \
  case Rounding::name: return f.template operator()<A, Rounding::name>();
        QUARK_FIXED_ROUNDINGS(QUARK_ROUNDING)
#undef QUARK_ROUNDING
        case Rounding::stochastic:
          if constexpr (kMayBeRandom) return f.template operator()<A, Rounding::stochastic>();
      }
      return Result();
    }
  };
  if constexpr (Body::kOrders) {
    if constexpr (Body::kFinite)
      if (order.arithmetic == Arithmetic::finite) return f.template operator()<Arithmetic::finite, kNearest>();
    switch (order.arithmetic) {
      case Arithmetic::minifloat_float16: return f.template operator()<Arithmetic::minifloat_float16, kNearest>();
      case Arithmetic::minifloat_bfloat16: return f.template operator()<Arithmetic::minifloat_bfloat16, kNearest>();
      case Arithmetic::reciprocal_shifted: return rounded.template operator()<Arithmetic::reciprocal_shifted>();
      case Arithmetic::reciprocal: return rounded.template operator()<Arithmetic::reciprocal>();
      case Arithmetic::shifted: return rounded.template operator()<Arithmetic::shifted>();
      default: break;
    }
  }
  switch (order.arithmetic) {
    case Arithmetic::float16: return f.template operator()<Arithmetic::float16, kNearest>();
    case Arithmetic::bfloat16: return f.template operator()<Arithmetic::bfloat16, kNearest>();
    case Arithmetic::minifloat: return rounded.template operator()<Arithmetic::minifloat>();
    case Arithmetic::affine: return rounded.template operator()<Arithmetic::affine>();
    default: return rounded.template operator()<Arithmetic::integer>();
  }
}

/// The order of slope_of.
inline Order slope_order_of(const QuantSpec& spec) {
  return {spec.shifted ? Arithmetic::shifted : Arithmetic::affine, spec.rounding};
}

/// What f.operator()<A, R>() gives for it, else an empty result: what is rounded randomly doesn't learn.
template <class F>
QUARK_INLINE auto with_slope(Order order, const F& f) {
  using Result = decltype(f.template operator()<Arithmetic::affine, Rounding::half_even>());
  const bool is_shifted = order.arithmetic == Arithmetic::shifted;
  switch (order.rounding) {
#define QUARK_ROUNDING(name)                                                         \
  case Rounding::name:                                                               \
    return is_shifted ? f.template operator()<Arithmetic::shifted, Rounding::name>() \
                      : f.template operator()<Arithmetic::affine, Rounding::name>();
    QUARK_FIXED_ROUNDINGS(QUARK_ROUNDING)
#undef QUARK_ROUNDING
    case Rounding::stochastic: break;
  }
  return Result();
}

/// Where results of a dtype saturate: its largest finite value (float64 is computed in float32), or nowhere.
inline float limit_of(DType dtype, const QuantSpec& spec) {
  if (spec.ieee) return float_of(kInfinity);
  if (dtype == DType::float16) return 65504.0f;
  if (dtype == DType::bfloat16) return 0x1.fep127f;
  return float_of(kMaxFinite);
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
