// What an operator is told besides its tensors: a number format, who shares a scale, and how to round.
#pragma once
#include <span>
#include <string_view>

#include "status.h"
#include "tensor.h"

namespace quark {

/// Which codes of a format are no numbers.
enum class Specials : uint8_t { none, nan, ieee, fnuz };

/// How the quotient x / scale becomes a value of the grid. Stochastic: up with the probability of its distance from the
/// value below.
#define QUARK_FIXED_ROUNDINGS(X) X(half_even) X(half_up) X(half_away) X(floor) X(ceil) X(toward_zero)
#define QUARK_ROUNDINGS(X) QUARK_FIXED_ROUNDINGS(X) X(stochastic)
enum class Rounding : uint8_t {
#define QUARK_ROUNDING(name) name,
  QUARK_ROUNDINGS(QUARK_ROUNDING)
#undef QUARK_ROUNDING
};
std::span<const char* const> rounding_names();

/// What TQT's domain can be. CPU levels must not share its code.
[[gnu::always_inline]] constexpr bool is_domain(float n) { return n >= 1.0f && n <= 0x1p22f && float(int32_t(n)) == n; }

/// How a dynamic scale follows from its group, and what it can be.
///   float32         the extreme value lands on the end of the range
///   e8m0            a power of two from 2^-127 to 2^127 (OCP MX 1.0, 6.3)
///   e4m3            an fp8_e4m3 number times a scale of the whole tensor (NVFP4)
///   global          that scale of the whole tensor: the extreme value lands on 448 times the end of the range
///   exponent        the group's exponent, 2^(E - bits + 2) a code: block floating point
///   microexponents  the same, halved for a pair of neighbours that both lie below 2^E (MX6, MX9: arXiv 2302.08007)
#define QUARK_SCALE_FORMATS(X) X(float32) X(e8m0) X(e4m3) X(global) X(exponent) X(microexponents)
enum class ScaleFormat : uint8_t {
#define QUARK_SCALE_FORMAT(name) name,
  QUARK_SCALE_FORMATS(QUARK_SCALE_FORMAT)
#undef QUARK_SCALE_FORMAT
};

/// How a power of two follows from amax = m * 2^E, 1 <= m < 2, and the end of the range, m' * 2^emax. 2^(E - emax), and
/// once more where
///   floor  never (OCP MX 1.0)
///   ceil   m > 1
///   even   amax would round to a next power of two on the element's grid
///   rceil  m > m': the smallest power of two that lets nothing saturate
///   fit    shared exponents: a code would round past the last one
#define QUARK_SCALE_RULES(X) X(floor) X(ceil) X(even) X(rceil) X(fit)
enum class ScaleRule : uint8_t {
#define QUARK_SCALE_RULE(name) name,
  QUARK_SCALE_RULES(QUARK_SCALE_RULE)
#undef QUARK_SCALE_RULE
};

/// What choose_qparams takes for a group's extremes: they themselves, nearest-rank percentiles, or that part of them
/// which gives the least squared error.
enum class Method : uint8_t { extremes, percentile, mse };

/// One row of formats.inc as numbers.
struct Format {
  const char* name;
  uint8_t bits;
  uint8_t exponent_bits;
  uint8_t mantissa_bits;
  int16_t min_exp;
  float lo, hi;
  Specials specials;
  DType storage;

  /// Codes are two's complement (or unsigned) numbers of equal steps: the integers, and int8f6 with steps of 1/64.
  bool is_fixed_point() const { return exponent_bits == 0; }
  /// Fixed point with steps of 1: codes and values are the same numbers.
  bool is_integer() const { return is_fixed_point() && min_exp == mantissa_bits; }
  /// A dtype of the frameworks that is quantized to by a cast, without a scale.
  bool is_cast() const { return bits == 16 && exponent_bits > 0; }
  bool is_fp8() const { return bits == 8 && exponent_bits > 0; }
};

std::span<const Format> formats();

/// A parsed spec. Its text form is one format name and `key=value` words, in any order:
///
///   "int4 block=1,128 rounding=half_up min=-7 max=7 asymmetric packed length=300 dtype=bfloat16"
///
/// block     for every axis how many neighbours share a scale, 0 = the whole axis (default: no axes, a 0-d tensor)
/// min, max  the integer range, where it isn't the format's own
/// scale     the ScaleFormat (default: float32)
/// rule      the ScaleRule of power-of-two scales (default: floor)
/// method    "mse", or "percentile:" and a number above 0, up to 100: for choose_qparams only
/// packed    codes are a little-endian bit stream along the last axis
/// length    logical length of the last axis, where codes are packed
/// batch     so many leading axes of every tensor are batches (default: 0): each example is a call of its own, and the
///           rest of the spec is about one. An input that the examples share has length 1 there
/// whole     the shape of the array that the data is a shard of, where the rounding is stochastic: random words go by
///           the index in that array. After the key's two words then come the indices of the shard's first element
/// dtype     dtype of data outputs, and
/// scales    of scale outputs (read by the Python schema; the core sees the tensors themselves)
///
/// In which order to compute, where it isn't that of the everyday functions:
///
/// reciprocal  integers: x is multiplied by the reciprocal of s (divided by s where that is infinite)
/// shifted     integers: z is added before rounding, not after; only then it may be a float
/// narrow      minifloats: the quotient x / s is rounded to x's dtype
/// plus_zero   minifloats: a zero of the grid is +0
/// ieee        NaN and infinity as IEEE has them: a NaN quotient gives NaN, a result too large for its dtype infinity.
///             The integer range is free within +-2^23, and codes may be int32. Shared exponents are those of the
///             finite elements; microexponents let the others pass, exponents make them 0
///
/// For pack and unpack the format is "codes" with `bits=` and, for signed codes, `signed`.
struct QuantSpec {
  Format format{};
  Rounding rounding = Rounding::half_even;
  bool symmetric = true;
  bool packed = false;
  ScaleFormat scale_format = ScaleFormat::float32;
  ScaleRule scale_rule = ScaleRule::floor;
  Method method = Method::extremes;
  double percentile = 100.0;
  bool reciprocal = false, shifted = false, narrow = false, plus_zero = false, ieee = false;
  float quant_min = 0, quant_max = 0;  ///< integer formats only
  int64_t length = -1;
  int rank = 0;
  int64_t block[kMaxRank] = {};
  int batch = 0;
  bool is_shard = false;
  int64_t whole[kMaxRank] = {};  ///< of `rank` axes, where the data is a shard

  /// The one axis along which more than one element shares a scale, or -1.
  int block_axis() const {
    int found = -1;
    for (int d = 0; d < rank; ++d)
      if (block[d] != 1) {
        if (found >= 0) return -1;
        found = d;
      }
    return found;
  }
  /// Blocks of integers that share an exponent.
  bool shares_exponent() const {
    return scale_format == ScaleFormat::exponent || scale_format == ScaleFormat::microexponents;
  }
  bool has_pairs() const { return scale_format == ScaleFormat::microexponents; }

  /// Whether calls with this spec have a tensor of this letter (ops.inc), where the operator's row does. A zero point
  /// input may be absent all the same.
  bool takes(char letter) const {
    if (letter == 'g') return scale_format == ScaleFormat::e4m3;
    if (letter == 'p') return has_pairs();
    if (letter == 'k') return rounding == Rounding::stochastic;
    return true;
  }
};

/// Elements along an axis that share a byte of pair bits.
inline constexpr int64_t kPairByte = 16;

/// The row of the format that e4m3 scales have.
const Format& e4m3_format();

/// Parses the text form. Unknown words, names and values out of range are value errors.
Status parse_spec(std::string_view text, QuantSpec& spec);

/// The same, remembered: specs are few and calls are many.
Status cached_spec(std::string_view text, QuantSpec& spec);

/// Number of scales along an axis of length `size`.
inline int64_t scale_length(int64_t size, int64_t block) { return block == 0 ? 1 : size / block + (size % block != 0); }

/// Bytes that so many codes of at most 8 bits fill. CPU levels must not share its code.
[[gnu::always_inline]] constexpr int64_t packed_length(int64_t codes, int64_t bits) {
  return codes / 8 * bits + (codes % 8 * bits + 7) / 8;
}

}  // namespace quark
