// From the elements of a group to its scale.
//
// Compiled once per CPU level and for every GPU platform, like numerics.h.
#pragma once
#include "numerics.h"

namespace quark::QUARK_LEVEL {
namespace {

/// What a reduction keeps per scale: two numbers that an unsigned maximum orders.
struct Extremes {
  uint32_t low = 0, high = 0;
};

QUARK_INLINE uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
QUARK_INLINE Extremes max(const Extremes& a, const Extremes& b) { return {max(a.low, b.low), max(a.high, b.high)}; }

// What one element is to the scale of its group, by the scale's format.

/// Bits of max(-x, 0) and of max(x, 0).
struct BoundsKey {
  static QUARK_INLINE Extremes of(float x, const Grid&) { return {below_zero(x), above_zero(x)}; }
};
struct MagnitudeKey {
  static QUARK_INLINE Extremes of(float x, const Grid&) { return {0, magnitude_key(x)}; }
};
struct FiniteKey {
  static QUARK_INLINE Extremes of(float x, const Grid&) { return {0, finite_key(x)}; }
};
struct ExponentKey {
  static QUARK_INLINE Extremes of(float x, const Grid& g) { return {0, exponent_key(x, g)}; }
};

/// One of these.
enum class KeyKind : uint8_t { bounds, magnitude, finite, exponent };

inline KeyKind key_of(const QuantSpec& spec) {
  switch (spec.scale_format) {
    case ScaleFormat::float32: return spec.symmetric ? KeyKind::magnitude : KeyKind::bounds;
    case ScaleFormat::exponent: return spec.scale_rule == ScaleRule::fit ? KeyKind::exponent : KeyKind::magnitude;
    case ScaleFormat::microexponents: return spec.ieee ? KeyKind::finite : KeyKind::magnitude;
    default: return KeyKind::magnitude;
  }
}

/// What f.operator()<Key>() gives.
template <class F>
QUARK_INLINE auto with_key(KeyKind kind, const F& f) {
  switch (kind) {
    case KeyKind::bounds: return f.template operator()<BoundsKey>();
    case KeyKind::finite: return f.template operator()<FiniteKey>();
    case KeyKind::exponent: return f.template operator()<ExponentKey>();
    default: return f.template operator()<MagnitudeKey>();
  }
}

/// The byte of pair bits of `n` elements: bits 2 j and 2 j + 1 of `below`, of elements, to bit j. A last element
/// without a neighbour goes by itself.
QUARK_INLINE uint8_t pair_bits_of(uint32_t below, int64_t n) {
  below |= ~0u << uint32_t(n);
  uint32_t both = below & below >> 1 & 0x5555u;  // the even bits move together
  both = (both | both >> 1) & 0x3333u;
  both = (both | both >> 2) & 0x0f0fu;
  both |= both >> 4;
  return uint8_t(both & ((1u << uint32_t((n + 1) / 2)) - 1u));
}

/// What the letter e (ops.inc) has of a group.
struct Ends {
  uint32_t high, low;
};
QUARK_INLINE Ends ends_of(const Extremes& e) {
  const bool has_nan = max(e.low, e.high) > kInfinity;
  return {has_nan ? kNaN : e.high, (has_nan ? kNaN : e.low) | kSign};
}

// How a scale follows from its group's extremes.

/// One of these: no scale, a number, a power of two, an E4M3 number, the exponent of a group or that which its largest
/// key asks for.
enum class ScaleKind : uint8_t { one, symmetric, asymmetric, e8m0, e4m3, exponent, exponent_key };

inline ScaleKind scale_kind_of(const QuantSpec& spec) {
  switch (spec.scale_format) {
    case ScaleFormat::e8m0: return ScaleKind::e8m0;
    case ScaleFormat::e4m3: return ScaleKind::e4m3;
    case ScaleFormat::exponent:
      return spec.scale_rule == ScaleRule::fit ? ScaleKind::exponent_key : ScaleKind::exponent;
    case ScaleFormat::microexponents: return ScaleKind::exponent;
    case ScaleFormat::global: return ScaleKind::symmetric;
    case ScaleFormat::float32: break;
  }
  if (spec.format.is_cast()) return ScaleKind::one;
  return spec.symmetric ? ScaleKind::symmetric : ScaleKind::asymmetric;
}

template <ScaleKind kind>
QUARK_INLINE ScaleAndZero scale_of(const Extremes& e, float tensor_scale, const Grid& g, const Grid& e4m3) {
  if constexpr (kind == ScaleKind::e8m0) return e8m0_scale(e.high, g);
  if constexpr (kind == ScaleKind::e4m3) return e4m3_scale(e.high, tensor_scale, g, e4m3);
  if constexpr (kind == ScaleKind::exponent) return exponent_scale(exponent_field(e.high), e.high >= kInfinity, g);
  if constexpr (kind == ScaleKind::exponent_key) return exponent_scale(int32_t(e.high) - 150, false, g);
  if constexpr (kind == ScaleKind::symmetric) return scale_from_bounds(e.low, e.high, true, g);
  if constexpr (kind == ScaleKind::asymmetric) return scale_from_bounds(e.low, e.high, false, g);
  return {1.0f, 0, 0};
}

/// What f.operator()<kind>() gives.
template <class F>
QUARK_INLINE auto with_scale_kind(ScaleKind kind, const F& f) {
  switch (kind) {
    case ScaleKind::one: return f.template operator()<ScaleKind::one>();
    case ScaleKind::symmetric: return f.template operator()<ScaleKind::symmetric>();
    case ScaleKind::asymmetric: return f.template operator()<ScaleKind::asymmetric>();
    case ScaleKind::e8m0: return f.template operator()<ScaleKind::e8m0>();
    case ScaleKind::e4m3: return f.template operator()<ScaleKind::e4m3>();
    case ScaleKind::exponent_key: return f.template operator()<ScaleKind::exponent_key>();
    default: return f.template operator()<ScaleKind::exponent>();
  }
}

// Scales that are searched for.

/// Nearest rank, from 1: the least of n values that this part of them doesn't exceed.
QUARK_INLINE int64_t percentile_rank(double part, int64_t n) {
  const double exact = part * double(n);
  auto rank = int64_t(exact);
  if (double(rank) < exact) ++rank;
  return rank < 1 ? 1 : rank < n ? rank : n;
}

/// The shares of the extremes whose squared errors are compared: 1, 0.99, ... 0.21.
inline constexpr int kShares = 80;
inline float share_of(int i) { return float(100 - i) / 100.0f; }
QUARK_INLINE Extremes operator*(const Extremes& e, float share) {
  return {bits_of(float_of(e.low) * share), bits_of(float_of(e.high) * share)};
}

/// Whether a group's extremes leave something to search.
QUARK_INLINE bool is_searched(const Extremes& e) {
  const uint32_t most = max(e.low, e.high);
  return most > 0 && most < kInfinity;
}

// ---- sums ---------------------------------------------------------------------------------------------------------

/// The one order of a sum of float64 terms, whatever the machine: chunks of 1024 terms; in a chunk, lane j (0..63) adds
/// terms j, j + 64, ... and the lanes fold in halves; the sums of chunks are summed by the same rule.
inline constexpr int kLanes = 64, kChunk = 1024;

}  // namespace
}  // namespace quark::QUARK_LEVEL
