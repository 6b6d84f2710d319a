// The scalar numerics: what one element becomes. Host and device, CPU levels and GPUs share these functions.
//
// They are branch-free (selects only), so the loops around them vectorize, and every operation is an IEEE basic
// operation or an integer one, so results are the same everywhere. The float environment must be the default one:
// round to nearest even, subnormals honoured (parallel.h, FloatEnvironment).
//
// This header is compiled once per CPU level: QUARK_LEVEL is the namespace, and everything has internal linkage, so
// the linker can't give one level another level's code.
#pragma once
#include "spec.h"

#ifndef QUARK_LEVEL
#define QUARK_LEVEL host
#endif
#if defined(__CUDACC__) || defined(__HIP__)
#define QUARK_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define QUARK_INLINE inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
#define QUARK_ON_GPU
#define QUARK_ONE_NAN
#endif
// A fused multiply-add is one instruction. Some quotients and products take fewer steps with it; their bits are the
// same without, as compiling with QUARK_NO_FMA does.
#if (defined(__FMA__) || defined(QUARK_ON_GPU)) && !defined(QUARK_NO_FMA)
#define QUARK_FMA
#endif

namespace quark::QUARK_LEVEL {
namespace {

// ---- bits ---------------------------------------------------------------------------------------------------------

QUARK_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
QUARK_INLINE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

inline constexpr uint32_t kSign = 0x80000000u;
inline constexpr uint32_t kInfinity = 0x7f800000u;
inline constexpr uint32_t kNaN = 0x7fc00000u;
inline constexpr uint32_t kMaxFinite = 0x7f7fffffu;
inline constexpr uint32_t kMinNormal = 0x00800000u;

#if defined(QUARK_FMA)
#if defined(__CUDA_ARCH__)
QUARK_INLINE float fused(float a, float b, float c) { return fmaf(a, b, c); }
QUARK_INLINE double fused(double a, double b, double c) { return fma(a, b, c); }
#else
QUARK_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
QUARK_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif
#endif

QUARK_INLINE uint32_t sign_of(float x) { return bits_of(x) & kSign; }
QUARK_INLINE float magnitude(float x) { return float_of(bits_of(x) & ~kSign); }
QUARK_INLINE bool is_nan(float x) { return x != x; }
QUARK_INLINE bool is_finite(float x) { return (bits_of(x) & ~kSign) < kInfinity; }
/// The one NaN that is ever written, with the sign of x.
QUARK_INLINE float nan_like(float x) { return float_of(kNaN | sign_of(x)); }
/// A result that may be NaN. CPUs hand on the NaN of an operand; NVIDIA's GPUs compute one of their own, so there
/// `nan`, what the operand's is, takes its place.
QUARK_INLINE float with_nan(float y, [[maybe_unused]] float nan) {
#if defined(QUARK_ONE_NAN)
  return is_nan(y) ? nan : y;
#else
  return y;
#endif
}
/// NaN passes through; never fminf/fmaxf, which drop it.
QUARK_INLINE float clamp(float x, float lo, float hi) {
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

/// 2^e for e from -149 to 127.
QUARK_INLINE float power_of_two(int32_t e) { return float_of(e >= -126 ? uint32_t(e + 127) << 23 : 1u << (e + 149)); }
/// The exponent of a normal number, by its bits; of zero and subnormals -127.
QUARK_INLINE int32_t exponent_field(uint32_t magnitude) { return int32_t(magnitude >> 23) - 127; }

// ---- 16-bit floats ------------------------------------------------------------------------------------------------

QUARK_INLINE float from_bfloat16(uint16_t h) { return float_of(uint32_t(h) << 16); }

QUARK_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t(is_nan(x) ? 0x7fc0u | (u >> 16 & 0x8000u) : rounded);
}

QUARK_INLINE float from_float16(uint16_t h) {
  const uint32_t m = h & 0x7fffu;
  const uint32_t normal = (m << 13) + (112u << 23);
  const uint32_t subnormal = bits_of(float(int32_t(m)) * 0x1p-24f);
  const uint32_t special = kInfinity | (m << 13) | (m > 0x7c00u ? 0x00400000u : 0u);  // NaN is quiet, as by F16C
  const uint32_t u = m >= 0x7c00u ? special : m < 0x0400u ? subnormal : normal;
  return float_of(u | uint32_t(h & 0x8000u) << 16);
}

QUARK_INLINE uint16_t to_float16(float x) {
  const uint32_t m = bits_of(x) & ~kSign;
  // Below 2^-14 the last place is 2^-24: that of 0.5, so one addition rounds.
  const uint32_t subnormal = bits_of(float_of(m) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t finite = m < (113u << 23) ? subnormal : normal;
  const uint32_t h = m > kInfinity ? 0x7e00u : m >= 0x477ff000u ? 0x7c00u : finite;
  return uint16_t(h | (bits_of(x) >> 16 & 0x8000u));
}

// ---- grids --------------------------------------------------------------------------------------------------------

/// A format and its range as loop constants.
struct Grid {
  float lo, hi;            ///< integers: the range of codes; others: of values
  uint32_t min_exp;        ///< 2^min_exp as float bits
  uint32_t mantissa;       ///< mantissa bits
  uint32_t bits;           ///< of a code
  float plus_zero;         ///< added to a result: +0 turns -0 into +0, where the format has no -0; -0 changes nothing
  uint32_t nan, nan_sign;  ///< quantized NaN: these bits, with the input's sign where nan_sign is kSign
  uint32_t nan_code;       ///< the code written for NaN, but for the sign
  uint32_t kept_nan;       ///< mask of a NaN's bits: nothing where the format has none, which makes it 0
  uint32_t nan_from, inf_at;  ///< read: magnitude codes that are NaN (from here up), and infinity
  // Scales:
  float top;               ///< where the largest magnitude of a group lands
  uint32_t up_above;       ///< powers of two: amax with a greater fraction than this one takes the next exponent
  int32_t code_exponent;   ///< shared exponents: a code of a block with exponent E is worth 2^(E + code_exponent)
  int32_t least_exponent;  ///< E of a block of zeros and (of x's dtype) subnormals
  uint32_t non_finite;     ///< mask of what stays of infinities and NaN that don't count
};

/// The largest magnitude in the range.
QUARK_INLINE float largest_of(const Grid& g) {
  return magnitude(g.lo) > magnitude(g.hi) ? magnitude(g.lo) : magnitude(g.hi);
}

/// The ScaleRule as Grid::up_above.
inline uint32_t up_above(ScaleRule rule, uint32_t mantissa, float top) {
  constexpr uint32_t kOne = 1u << 23;
  if (rule == ScaleRule::ceil) return 0;
  if (rule == ScaleRule::even) return kOne - (kOne >> (mantissa + 1)) - 1;
  if (rule == ScaleRule::rceil) return bits_of(top) & (kOne - 1);
  return kOne;
}

/// `data` is the dtype that x has.
inline Grid make_grid(const QuantSpec& spec, DType data = DType::float32) {
  constexpr uint32_t kNever = 0xffffffffu;
  const Format& f = spec.format;
  const bool has_nan = f.specials != Specials::none;
  const bool has_minus_zero = f.exponent_bits > 0 && f.specials != Specials::fnuz;
  const uint32_t top = (1u << (f.bits - 1)) - 1u;  // the largest magnitude code
  Grid g{};
  g.lo = f.is_integer() ? spec.quant_min : f.lo;
  g.hi = f.is_integer() ? spec.quant_max : f.hi;
  g.min_exp = uint32_t(f.min_exp + 127) << 23;
  g.mantissa = f.mantissa_bits;
  g.bits = f.bits;
  g.plus_zero = has_minus_zero && !spec.plus_zero ? -0.0f : 0.0f;
  g.nan = has_nan || spec.ieee ? kNaN : 0;
  g.nan_sign = has_nan && f.specials != Specials::fnuz ? kSign : 0;
  g.nan_code = f.specials == Specials::fnuz ? top + 1 : top;
  g.kept_nan = g.nan ? ~0u : 0u;
  g.nan_from = g.inf_at = kNever;
  if (f.specials == Specials::nan) g.nan_from = top;
  if (f.specials == Specials::ieee) g.inf_at = top - ((1u << f.mantissa_bits) - 1u), g.nan_from = g.inf_at + 1;
  g.top = spec.scale_format == ScaleFormat::global ? g.hi * e4m3_format().hi : g.hi;
  g.up_above = up_above(spec.scale_rule, f.is_integer() ? uint32_t(exponent_field(bits_of(g.hi))) : g.mantissa, g.top);
  g.code_exponent = 2 - f.bits;
  g.least_exponent = spec.scale_rule == ScaleRule::fit ? -149 - g.code_exponent
                     : !spec.has_pairs()               ? -126
                     : data == DType::float16          ? -15
                                                       : -127;
  g.non_finite = spec.has_pairs() ? ~0u : 0u;
  return g;
}

/// floor(t), t from 0 to 2^22.
QUARK_INLINE float floor_of_small(float t) {
  const float nearest = (t + 0x1p23f) - 0x1p23f;
  return nearest - (nearest > t ? 1.0f : 0.0f);
}

/// floor(f * 2^32), f in [0, 1): in halves, and without a conversion, which is undefined for the NaN that may come.
QUARK_INLINE uint32_t fraction_bits(float f) {
  const float scaled = f * 0x1p16f;
  const float high = floor_of_small(scaled);
  const float low = floor_of_small((scaled - high) * 0x1p16f);
  return bits_of(high + 0x1p23f) << 16 | (bits_of(low + 0x1p23f) & 0xffffu);
}

/// The grid of E4M3 scales.
inline Grid e4m3_grid() {
  QuantSpec spec;
  spec.format = e4m3_format();
  return make_grid(spec);
}

/// Rounds |t| to an integer: the magnitude of R(t), t = ±m. Exact for every finite m (from 2^23 up it is one already).
/// `random` decides where R is stochastic.
template <Rounding R>
QUARK_INLINE float round_magnitude(float m, bool negative, uint32_t random) {
  const float nearest = m < 0x1p23f ? (m + 0x1p23f) - 0x1p23f : m;
  if constexpr (R == Rounding::half_even) return nearest;
  const float down = nearest - (nearest > m ? 1.0f : 0.0f);
  const float up = down + (down < m ? 1.0f : 0.0f);
  if constexpr (R == Rounding::toward_zero) return down;
  if constexpr (R == Rounding::floor) return negative ? up : down;
  if constexpr (R == Rounding::ceil) return negative ? down : up;
  if constexpr (R == Rounding::stochastic) return down + (random < fraction_bits(m - down) ? 1.0f : 0.0f);
  // Never add 0.5: 0.49999997 + 0.5 is 1.
  const float away = m - down >= 0.5f ? up : down;
  if constexpr (R == Rounding::half_away) return away;
  const float toward_plus = up - m >= 0.5f ? down : up;  // of a negative t: -0.5 goes to -0
  return negative ? toward_plus : away;
}

/// R(t) for an integer grid. -0 may result.
template <Rounding R>
QUARK_INLINE float round_to_integer(float t, uint32_t random = 0) {
  return float_of(bits_of(round_magnitude<R>(magnitude(t), sign_of(t) != 0, random)) | sign_of(t));
}

/// The same for |t| < 2^22: one anchor serves both signs.
template <Rounding R>
QUARK_INLINE float round_small_to_integer(float t, uint32_t random) {
  if constexpr (R == Rounding::half_even) return (t + 0x1.8p23f) - 0x1.8p23f;
  return round_to_integer<R>(t, random);
}

/// R(v) on a float grid, for |v| at most 4 * g.hi. The sign of zero is that of v. NaN: unspecified bits.
template <Rounding R>
QUARK_INLINE float round_to_grid(float v, uint32_t random, const Grid& g) {
  const float m = magnitude(v);
  const uint32_t exponent = bits_of(v) & kInfinity;
  const uint32_t e = exponent > g.min_exp ? exponent : g.min_exp;
  float r;
  if constexpr (R == Rounding::half_even) {
    // The anchor's last place is the grid's spacing at m, so the addition rounds and the subtraction is exact.
    const float anchor = float_of(e + ((23u - g.mantissa) << 23));
    r = (m + anchor) - anchor;
  } else {
    const float spacing = float_of(e - (g.mantissa << 23));
    const float inverse = float_of((254u << 23) - (e - (g.mantissa << 23)));
    r = round_magnitude<R>(m * inverse, sign_of(v) != 0, random) * spacing;
  }
  return float_of(bits_of(r) | sign_of(v)) + g.plus_zero;
}

// ---- quantize -----------------------------------------------------------------------------------------------------

/// How one element is computed, v being the quotient.
enum class Arithmetic : uint8_t {
  integer,             ///< R(v)
  affine,              ///< R(v) + z
  shifted,             ///< R(v + z)
  reciprocal,          ///< affine, with v = x * (1 / s)
  reciprocal_shifted,  ///< shifted, with v = x * (1 / s)
  finite,              ///< R(v), infinities and NaN apart: shared exponents that they don't count in
  minifloat,           ///< R(v) on a float grid
  minifloat_float16,   ///< the same, with v rounded to float16
  minifloat_bfloat16,  ///< the same, with v rounded to bfloat16
  float16,             ///< the cast
  bfloat16,
};

/// z enters, before or after rounding.
QUARK_INLINE constexpr bool has_zero(Arithmetic a) {
  return a >= Arithmetic::affine && a <= Arithmetic::reciprocal_shifted;
}
QUARK_INLINE constexpr bool adds_before(Arithmetic a) {
  return a == Arithmetic::shifted || a == Arithmetic::reciprocal_shifted;
}
QUARK_INLINE constexpr bool is_minifloat(Arithmetic a) {
  return a >= Arithmetic::minifloat && a <= Arithmetic::minifloat_bfloat16;
}

/// v = x / s.
template <Arithmetic A>
QUARK_INLINE float quotient(float x, float s) {
  const float v = x / s;
  if constexpr (A == Arithmetic::reciprocal || A == Arithmetic::reciprocal_shifted) {
    const float inverse = 1.0f / s;  // infinite from 2^-128 down
    return magnitude(inverse) == float_of(kInfinity) ? v : x * inverse;
  }
  if constexpr (A == Arithmetic::minifloat_float16) return from_float16(to_float16(v));
  if constexpr (A == Arithmetic::minifloat_bfloat16) return from_bfloat16(to_bfloat16(v));
  return v;
}

/// The code of x as a float: integers the code itself, other formats the value that the code stands for.
/// Integers: clamp(R(v) + z, lo, hi) or clamp(R(v + z), lo, hi), others: R(clamp(v, lo, hi)). NaN: NaN where the
/// format has one, else the code of zero.
template <Arithmetic A, Rounding R>
QUARK_INLINE float quantize_value(float x, float s, float z, uint32_t random, const Grid& g) {
  const float v = quotient<A>(x, s);
  if constexpr (A == Arithmetic::integer) {
    const float t = is_nan(v) ? float_of(g.nan) : v;
    const float y = round_small_to_integer<R>(clamp(t, g.lo, g.hi), random) + 0.0f;  // -0 becomes +0
    return with_nan(y, float_of(kNaN));
  }
  if constexpr (adds_before(A)) {
    const float t = (is_nan(v) ? float_of(g.nan) : v) + z;
    return with_nan(round_to_integer<R>(clamp(is_nan(t) ? float_of(g.nan) : t, g.lo, g.hi)) + 0.0f, float_of(kNaN));
  }
  if constexpr (has_zero(A)) {
    const float t = is_nan(v) ? float_of(g.nan) : v;
    const float y = clamp(round_to_integer<R>(t, random) + z, g.lo, g.hi) + 0.0f;  // as z may be -0
    return is_nan(y) ? float_of(kNaN) : y;  // where t and z both are, compilers choose which NaN the sum is
  }
  float y = v;
  if constexpr (is_minifloat(A)) y = round_to_grid<R>(clamp(v, g.lo, g.hi), random, g);
  if constexpr (A == Arithmetic::float16) y = from_float16(to_float16(v));
  if constexpr (A == Arithmetic::bfloat16) y = from_bfloat16(to_bfloat16(v));
  return is_nan(v) ? float_of(g.nan | (sign_of(x) & g.nan_sign)) : y;
}

/// Whether the clipped gradient passes: R(v) (integers: R(v) + z), on the grid continued past its ends, is inside
/// [lo, hi]. NaN isn't.
template <Arithmetic A, Rounding R>
QUARK_INLINE bool is_inside(float x, float s, float z, uint32_t random, const Grid& g) {
  const float v = quotient<A>(x, s);
  if constexpr (A == Arithmetic::integer || A == Arithmetic::affine) {
    const float q = round_to_integer<R>(v, random) + z;
    return q >= g.lo && q <= g.hi;
  }
  float y = v;
  if constexpr (is_minifloat(A)) y = round_to_grid<R>(clamp(v, 4.0f * g.lo, 4.0f * g.hi), random, g);
  if constexpr (A == Arithmetic::float16) y = from_float16(to_float16(v));
  if constexpr (A == Arithmetic::bfloat16) y = from_bfloat16(to_bfloat16(v));
  return !is_nan(v) && y >= g.lo && y <= g.hi;
}

// ---- dequantize ---------------------------------------------------------------------------------------------------

/// (y - z) * s in float32, saturating at ±limit (the output dtype's largest finite value), unless the code itself is
/// infinite. A NaN result has y's sign.
template <Arithmetic A>
QUARK_INLINE float dequantize_value(float y, float s, float z, float limit) {
  float product = y * s;
  if constexpr (has_zero(A)) product = (y - z) * s;
  float bound = limit;
  if constexpr (A != Arithmetic::integer && !has_zero(A))
    bound = magnitude(y) == float_of(kInfinity) ? float_of(kInfinity) : limit;
  return is_nan(product) ? nan_like(y) : clamp(product, -bound, bound);
}

/// dequantize(quantize(x)), but NaN stays NaN in every format.
template <Arithmetic A, Rounding R>
QUARK_INLINE float fake_quantize_value(float x, float s, float z, float limit, uint32_t random, const Grid& g) {
  const float y = dequantize_value<A>(quantize_value<A, R>(x, s, z, random, g), s, z, limit);
  return is_nan(x) ? nan_like(x) : y;
}

/// The same in a block whose scale is that of its finite elements alone: the others pass through, or become 0.
template <Rounding R>
QUARK_INLINE float fake_quantize_finite(float x, float s, float limit, const Grid& g) {
  const float y = (round_small_to_integer<R>(clamp(x / s, g.lo, g.hi), 0) + 0.0f) * s;
  const float kept = float_of((is_nan(x) ? bits_of(nan_like(x)) : bits_of(x)) & g.non_finite);
  const float finite = is_nan(y) ? nan_like(x) : clamp(y, -limit, limit);
  return is_finite(x) ? finite : kept;
}

// ---- learned scales -----------------------------------------------------------------------------------------------

/// What one element contributes to the gradients of x and of the scale: dx = grad inside the range, else 0, and the
/// product weight * slope, exact in float64, whose sum over a group is d/ds.
struct Slope {
  float dx, weight, slope;
};

/// sum + a * b; the product is exact.
QUARK_INLINE double plus_product(double sum, float a, float b) {
#if defined(QUARK_FMA)
  return fused(double(a), double(b), sum);
#else
  return sum + double(a) * double(b);
#endif
}

/// slope = R(v) - v inside (shifted: of v + z), lo - z below, hi - z above. NaN isn't inside, below or above.
/// LSQ: arXiv 1902.08153. TQT: arXiv 1903.08066.
template <Arithmetic A, Rounding R>
QUARK_INLINE Slope slope_of(float x, float grad, float s, float z, const Grid& g) {
  const float v = adds_before(A) ? quotient<A>(x, s) + z : quotient<A>(x, s);
  const float rounded = round_to_integer<R>(v);
  const float r = adds_before(A) ? rounded : rounded + z;
  const bool is_below = r < g.lo;
  const bool is_above = r > g.hi;
  const float slope = is_below ? g.lo - z : is_above ? g.hi - z : rounded - v;
  return {r >= g.lo && r <= g.hi ? grad : 0.0f, is_nan(r) ? 0.0f : grad, is_nan(r) ? 0.0f : slope};
}

/// What a learned scale's numbers amount to: the factor of its gradient; of a threshold also the scale and the range.
struct Learned {
  double factor;
  float scale, lo, hi;
};

/// TQT: the scale is 2^ceil(t) / domain, ceil(t) from -126 to 127, the range [-domain, domain - 1], and the gradient of
/// t has the factor scale * ln 2. A wrong domain makes NaN.
QUARK_INLINE Learned learned_of_threshold(float t, float domain) {
  constexpr double kLn2 = 0.69314718055994530942;
  const float e = clamp(round_to_integer<Rounding::ceil>(t), -126.0f, 127.0f);
  const bool is_number = !is_nan(t) && is_domain(domain);
  const float scale = is_number ? power_of_two(int32_t(is_nan(t) ? 0.0f : e)) / domain : float_of(kNaN);
  return {double(scale) * kLn2, scale, -domain, domain - 1.0f};
}

// ---- minifloat codes ----------------------------------------------------------------------------------------------

/// The bits of max(v's exponent, min_exp).
QUARK_INLINE uint32_t exponent_on_grid(float v, const Grid& g) {
  const uint32_t exponent = bits_of(v) & kInfinity;
  return exponent > g.min_exp ? exponent : g.min_exp;
}

/// The code of a value of the grid. With e = max(exponent, min_exp), |y| is an integer q of spacings 2^(e - mantissa);
/// an anchor addition shows q, and each step of e past min_exp is worth 2^mantissa codes.
QUARK_INLINE uint32_t encode(float y, const Grid& g) {
  const uint32_t e = exponent_on_grid(y, g);
  const uint32_t anchor = e + ((23u - g.mantissa) << 23);
  const uint32_t q = bits_of(magnitude(y) + float_of(anchor)) - anchor;
  const uint32_t code = is_nan(y) ? g.nan_code : q + (((e - g.min_exp) >> 23) << g.mantissa);
  return code | (bits_of(y) >> 31) << (g.bits - 1);
}

/// The same for formats without NaN, too, whose code it is then 0.
QUARK_INLINE uint32_t encode_or_zero(float y, const Grid& g) {
  return encode(is_nan(y) ? float_of(bits_of(y) & g.kept_nan) : y, g);
}

/// The value of a code.
QUARK_INLINE float decode(uint32_t code, const Grid& g) {
  const uint32_t top = 1u << (g.bits - 1);
  const uint32_t m = code & (top - 1u);
  const uint32_t sign = (code & top) << (32 - g.bits);
  const uint32_t fields = m << (23 - g.mantissa);  // exponent and mantissa in their places
  const float normal = float_of(fields + g.min_exp - kMinNormal);
  const float subnormal = float_of(fields + g.min_exp) - float_of(g.min_exp);  // less the leading 1 that it hasn't
  // fnuz's NaN is the code of -0; it has no sign of its own.
  const uint32_t fnuz_nan = g.nan_code;
  uint32_t u = bits_of(m >> g.mantissa ? normal : subnormal) | sign;
  u = m == g.inf_at ? kInfinity | sign : u;
  u = m >= g.nan_from ? kNaN | sign : u;
  return float_of(code == fnuz_nan && fnuz_nan == top ? kNaN : u);
}

// ---- ordinary scales ----------------------------------------------------------------------------------------------

// Nearly every scale is one with which nothing overflows or loses bits, and then fewer steps give the same numbers,
// rounded to nearest even or stochastically. Only a NaN x is a special case.

/// A scale and zero point with what follows from them once for many elements.
struct OrdinaryScale {
  float s, z, inverse;
  float lo, hi;  ///< x is clamped to these first: the ends of the range, less z, times s
};

/// Where rounding is random x isn't clamped to the ends but beyond them, as the quotient of an end may lie below it.
template <Rounding R>
QUARK_INLINE OrdinaryScale ordinary_scale(float s, float z, const Grid& g) {
  const float lo = (g.lo - z) * s, hi = (g.hi - z) * s;
  if constexpr (R == Rounding::stochastic) return {s, z, 1.0f / s, lo - magnitude(lo), hi + magnitude(hi)};
  return {s, z, 1.0f / s, lo, hi};
}

/// Whether s and z are ordinary, for codes up to `largest` in magnitude and results up to `limit`. With s from 2^-48 up
/// quotient_of's remainder is exact for |x| >= 2^-100; the quotient of a lesser x is so far below every grid that it is
/// rounded to 0.
QUARK_INLINE bool is_ordinary(float s, float z, float largest, float limit) {
  const float reach = largest + magnitude(z);
  return s >= 0x1p-48f && s <= 0x1p60f && reach <= 0x1p20f && reach * s <= limit && (z + 0x1.8p23f) - 0x1.8p23f == z;
}

/// x / s. With a fused multiply-add the remainder corrects x * (1 / s) to the nearest float (Brisebarre, Muller, Raina:
/// Accelerating correctly rounded floating-point division when the divisor is known in advance, 2004).
QUARK_INLINE float quotient_of(float x, const OrdinaryScale& k) {
#if defined(QUARK_FMA)
  const float v = x * k.inverse;
  return fused(fused(-v, k.s, x), k.inverse, v);
#else
  return x / k.s;
#endif
}

/// A magnitude below 2^22 to an integer, up where `random` is below the fraction's 32 bits.
QUARK_INLINE float round_randomly(float m, uint32_t random) {
  const auto down = float(int32_t(m));
#if defined(__AVX512F__) || defined(QUARK_ON_GPU)  // which convert to unsigned numbers
  return down + (random < uint32_t((m - down) * 0x1p32f) ? 1.0f : 0.0f);
#else
  const float scaled = (m - down) * 0x1p16f;
  const auto high = int32_t(scaled);
  const auto low = int32_t((scaled - float(high)) * 0x1p16f);
  return down + (random < (uint32_t(high) << 16 | uint32_t(low)) ? 1.0f : 0.0f);
#endif
}

/// x / s inside the range, less z.
template <Rounding R>
QUARK_INLINE float bounded_quotient(float x, const OrdinaryScale& k, const Grid& g) {
  const float v = quotient_of(clamp(x, k.lo, k.hi), k);
  if constexpr (R == Rounding::stochastic) return clamp(v, g.lo - k.z, g.hi - k.z);
  return v;
}

/// 1.5 * 2^23 spacings of numbers of exponent `e` as bits: v plus this ends in the number of spacings that v rounds to,
/// to nearest even and of either sign. Fixed point has those of min_exp everywhere.
QUARK_INLINE uint32_t anchor_of(uint32_t e, const Grid& g) { return e + ((23u - g.mantissa) << 23) + (1u << 22); }

/// R(x / s) inside the range, less z. NaN is NaN where R is nearest, else x mustn't be one.
template <bool kIsFixed, Rounding R>
QUARK_INLINE float round_ordinary(float x, uint32_t random, const OrdinaryScale& k, const Grid& g) {
  constexpr bool kIsRandom = R == Rounding::stochastic;
  const float v = bounded_quotient<R>(x, k, g);
  if constexpr (kIsFixed) {
    if constexpr (kIsRandom) return float_of(bits_of(round_randomly(magnitude(v), random)) | sign_of(v)) + 0.0f;
    const float anchor = float_of(anchor_of(g.min_exp, g));
    return (v + anchor) - anchor;
  }
  const uint32_t e = exponent_on_grid(v, g);
  if constexpr (kIsRandom) {
    const uint32_t spacing = e - (g.mantissa << 23);
    const float m = round_randomly(magnitude(v) * float_of((254u << 23) - spacing), random) * float_of(spacing);
    return float_of(bits_of(m) | sign_of(x)) + g.plus_zero;
  }
  // As in round_to_grid, but the anchor is 1.5 times a power of two, so that it serves both signs. It loses that of 0,
  // and that of a NaN is the processor's.
  const float anchor = float_of(anchor_of(e, g));
  const uint32_t keeps = bits_of(g.plus_zero);  // the sign
  return float_of((bits_of(x) & keeps) | (bits_of((v + anchor) - anchor) & ~keeps));
}

struct FakeQuantizeOrdinary {
  template <bool kIsFixed, Rounding R>
  static QUARK_INLINE float apply(float x, uint32_t random, const OrdinaryScale& k, const Grid& g) {
    const float number = R == Rounding::stochastic && is_nan(x) ? 0.0f : x;
    const float y = round_ordinary<kIsFixed, R>(number, random, k, g) * k.s;
    return is_nan(x) ? nan_like(x) : y;
  }
};

/// R(x / s) + z: of fixed point the code, of which the lowest byte counts, as one of fewer bits may have the sign's
/// above; of minifloats the number, NaN where x is.
struct QuantizeOrdinary {
  template <bool kIsFixed, Rounding R>
  static QUARK_INLINE auto apply(float x, uint32_t random, const OrdinaryScale& k, const Grid& g) {
    constexpr bool kIsRandom = R == Rounding::stochastic;
    if constexpr (!kIsFixed) {
      if constexpr (!kIsRandom) return with_nan(round_ordinary<false, R>(x, random, k, g), nan_like(x));
      const float y = round_ordinary<false, R>(is_nan(x) ? 0.0f : x, random, k, g);
      return is_nan(x) ? nan_like(x) : y;
    } else {
      const float number = is_nan(x) ? 0.0f : x;
      if constexpr (kIsRandom) return int32_t(round_ordinary<true, R>(number, random, k, g) + k.z);
      const uint32_t anchor = anchor_of(g.min_exp, g);
      return int32_t(bits_of(bounded_quotient<R>(number, k, g) + float_of(anchor)) - anchor) + int32_t(k.z);
    }
  }
};

struct DequantizeOrdinary {
  template <bool kIsFixed, Rounding R>
  static QUARK_INLINE float apply(float y, uint32_t, const OrdinaryScale& k, const Grid&) {
    if constexpr (kIsFixed) return (y - k.z) * k.s;
    return with_nan(y * k.s, nan_like(y));
  }
};

/// slope_of<affine, half_even> where the range and z are integers of up to 20 bits. The quotient is a division here: of
/// a tiny x, too, every bit counts.
QUARK_INLINE Slope small_slope_of(float x, float grad, float s, float z, const Grid& g) {
  const float v = x / s, rounded = (v + 0x1.8p23f) - 0x1.8p23f, lo = g.lo - z, hi = g.hi - z;
  const float slope = rounded < lo ? lo : rounded > hi ? hi : rounded - v;
  return {rounded >= lo && rounded <= hi ? grad : 0.0f, is_nan(v) ? 0.0f : grad, is_nan(v) ? 0.0f : slope};
}

// ---- dynamic scales -----------------------------------------------------------------------------------------------

/// Bits that order like the magnitude of x if its sign is -, else 0. Unsigned maximum: NaN > inf > finite.
QUARK_INLINE uint32_t below_zero(float x) { return bits_of(x) & ~kSign & uint32_t(int32_t(bits_of(x)) >> 31); }
/// The same for the sign +.
QUARK_INLINE uint32_t above_zero(float x) { return bits_of(x) & ~kSign & ~uint32_t(int32_t(bits_of(x)) >> 31); }

struct ScaleAndZero {
  float scale;         ///< the number that x is divided by
  int32_t zero_point;  ///< 0 where symmetric
  uint32_t code;       ///< the scale's code, where its format is not float32
};

QUARK_INLINE float at_least_normal(float s) { return s < float_of(kMinNormal) ? float_of(kMinNormal) : s; }

/// The scale of a group from its extremes: `low` and `high` are bits of max(-x, 0) and max(x, 0).
/// Symmetric: s = amax / top. Asymmetric: s = (high + low) / (hi - lo), z = clamp(lo - RNE(-low / s)).
/// All zero: 1. NaN or inf in the group: NaN. Never 0, subnormal or inf.
QUARK_INLINE ScaleAndZero scale_from_bounds(uint32_t low, uint32_t high, bool symmetric, const Grid& g) {
  const uint32_t amax = low > high ? low : high;
  const float lo = float_of(low), hi = float_of(high);
  float s;
  if (symmetric) {
    s = float_of(amax) / g.top;
  } else {
    const float steps = g.hi - g.lo, width = hi + lo;
    s = bits_of(width) == kInfinity ? hi / steps + lo / steps : width / steps;
    s = bits_of(s) == kInfinity ? float_of(kMaxFinite) : s;  // two codes for the whole range of float32
  }
  s = amax >= kInfinity ? float_of(kNaN) : amax == 0 ? 1.0f : at_least_normal(s);
  const float below = amax >= kInfinity ? 0.0f : round_to_integer<Rounding::half_even>(lo / s);
  return {s, int32_t(symmetric ? 0.0f : clamp(g.lo + below, g.lo, g.hi)), 0};
}

// ---- power-of-two scales ------------------------------------------------------------------------------------------

/// Bits of |x|, for unsigned maxima: NaN > inf > finite.
QUARK_INLINE uint32_t magnitude_key(float x) { return bits_of(x) & ~kSign; }
/// The same, but infinities and NaN count as 0.
QUARK_INLINE uint32_t finite_key(float x) { return is_finite(x) ? magnitude_key(x) : 0u; }

/// A magnitude with its exponent counted from -150, so that subnormals are normalized. Zero stays 0.
QUARK_INLINE uint32_t normalized(uint32_t m) {
  const uint32_t subnormal = m == 0 ? 0u : bits_of(float(int32_t(m))) - (126u << 23);
  return m >= kMinNormal ? m + (23u << 23) : subnormal;
}

/// The exponent that x asks of its block, plus 150; 0 for zero. A positive x whose code would be rounded up past the
/// last one, 2^(bits - 1) - 1, asks for the next exponent. Infinities and NaN count as 0.
QUARK_INLINE uint32_t exponent_key(float x, const Grid& g) {
  const uint32_t wide = normalized(finite_key(x));
  const auto dropped = uint32_t(23 + g.code_exponent);  // bits - 1 significant bits stay
  const uint32_t rounded = wide + (1u << (dropped - 1)) - 1u + (((wide | kMinNormal) >> dropped) & 1u);
  return (sign_of(x) || wide == 0 ? wide : rounded) >> 23;
}

/// Power-of-two scales are E8M0 codes: exponent + 127, and 255 for NaN. A block's own exponent is one too.
inline constexpr uint32_t kNaNScale = 255;

/// The value of an E8M0 code, times 2^shift.
QUARK_INLINE float decode_e8m0(uint32_t code, int32_t shift) {
  return code == kNaNScale ? float_of(kNaN) : power_of_two(int32_t(code) - 127 + shift);
}

/// 2^clamp(E - emax, -127, 127) with amax = 2^E * m, top = 2^emax * m', and E one more where the rule says so. Zero:
/// 2^-127. NaN or inf in the group: NaN.
QUARK_INLINE ScaleAndZero e8m0_scale(uint32_t amax, const Grid& g) {
  const uint32_t wide = normalized(amax);
  const int32_t up = (wide & (kMinNormal - 1u)) > g.up_above ? 1 : 0;
  const int32_t e = int32_t(wide >> 23) - 150 - exponent_field(bits_of(g.top)) + up;
  const uint32_t code = amax >= kInfinity ? kNaNScale : uint32_t((e < -127 ? -127 : e > 127 ? 127 : e) + 127);
  return {decode_e8m0(code, 0), 0, code};
}

/// The value of code 1 in a block with exponent E, or NaN.
QUARK_INLINE ScaleAndZero exponent_scale(int32_t e, bool is_nan, const Grid& g) {
  const int32_t least = e < g.least_exponent ? g.least_exponent : e;
  return {is_nan ? float_of(kNaN) : power_of_two(least + g.code_exponent), 0,
          is_nan ? kNaNScale : uint32_t(least + 127)};
}

/// Whether x lies below 2^E in a block of scale s = 2^(E + code_exponent). In a block of subnormals nothing does: their
/// exponent fields are all the same. Infinities and NaN count as 0.
QUARK_INLINE bool is_below_exponent(float x, float s, const Grid& g) {
  const bool has_less = s > power_of_two(g.least_exponent + g.code_exponent);
  return has_less && float_of(finite_key(x)) < s * power_of_two(-g.code_exponent);
}

// ---- E4M3 scales --------------------------------------------------------------------------------------------------

/// The scale of a block, (amax / hi) / tensor_scale as an E4M3 number that is never 0, times tensor_scale.
QUARK_INLINE ScaleAndZero e4m3_scale(uint32_t amax, float tensor_scale, const Grid& g, const Grid& e4m3) {
  const float v = (float_of(amax) / g.top) / tensor_scale;
  const float bounded = clamp(amax >= kInfinity ? float_of(kNaN) : v, 0x1p-9f, e4m3.hi);
  const float rounded = round_to_grid<Rounding::half_even>(bounded, 0, e4m3);
  const float block = is_nan(bounded) ? float_of(kNaN) : rounded;
  return {is_nan(block) ? block : block * tensor_scale, 0, encode(block, e4m3)};
}

// ---- random numbers -----------------------------------------------------------------------------------------------

/// Four random words: Philox4x32-10 (Salmon et al., SC'11) with the counter (low, high, 0, 0).
struct RandomWords {
  uint32_t word[4];
};

/// Two words.
struct WordPair {
  uint32_t word[2];
  QUARK_INLINE constexpr uint32_t operator[](int i) const { return word[i]; }
};
inline constexpr WordPair kPhilox{{0xD2511F53u, 0xCD9E8D57u}}, kPhiloxWeyl{{0x9E3779B9u, 0xBB67AE85u}};
inline constexpr int kPhiloxRounds = 10;

QUARK_INLINE RandomWords philox(uint64_t counter, uint64_t key) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  auto k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = uint64_t(kPhilox[0]) * c0, b = uint64_t(kPhilox[1]) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += kPhiloxWeyl[0];
    k1 += kPhiloxWeyl[1];
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
