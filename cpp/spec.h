// What an operator is told besides its tensors: a number format, who shares a scale, and how to round.
#pragma once
#include <span>
#include <string_view>

#include "status.h"
#include "tensor.h"

namespace quark {

/// Which codes of a format are no numbers.
enum class Specials : uint8_t { none, nan, ieee, fnuz };

/// How the quotient x / scale becomes a value of the grid.
#define QUARK_ROUNDINGS(X) X(half_even) X(half_up) X(half_away) X(floor) X(ceil) X(toward_zero)
enum class Rounding : uint8_t {
#define QUARK_ROUNDING(name) name,
  QUARK_ROUNDINGS(QUARK_ROUNDING)
#undef QUARK_ROUNDING
};
std::span<const char* const> rounding_names();

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
/// packed    codes are a little-endian bit stream along the last axis
/// length    logical length of the last axis, where codes are packed
/// dtype     dtype of data outputs (read by the Python schema; the core sees the tensor itself)
///
/// For pack and unpack the format is "codes" with `bits=` and, for signed codes, `signed`.
struct QuantSpec {
  Format format{};
  Rounding rounding = Rounding::half_even;
  bool symmetric = true;
  bool packed = false;
  float quant_min = 0, quant_max = 0;  ///< integer formats only
  int64_t length = -1;
  int rank = 0;
  int64_t block[kMaxRank] = {};
};

/// Parses the text form. Unknown words, names and values out of range are value errors.
Status parse_spec(std::string_view text, QuantSpec& spec);

/// The same, remembered: specs are few and calls are many.
Status cached_spec(std::string_view text, QuantSpec& spec);

/// Number of scales along an axis of length `size`.
inline int64_t scale_length(int64_t size, int64_t block) { return block == 0 ? 1 : size / block + (size % block != 0); }

}  // namespace quark
