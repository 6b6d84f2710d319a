#include "spec.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <string>
#include <unordered_map>

#include "parallel.h"

namespace quark {
namespace {

constexpr Format kFormats[] = {
#define QUARK_FORMAT(name, bits, exponent_bits, mantissa_bits, min_exp, lo, hi, specials, storage) \
  {#name, bits, exponent_bits, mantissa_bits, min_exp, lo, hi, Specials::specials, DType::storage},
#include "formats.inc"
#undef QUARK_FORMAT
};

constexpr const char* kRoundingNames[] = {
#define QUARK_ROUNDING(name) #name,
    QUARK_ROUNDINGS(QUARK_ROUNDING)
#undef QUARK_ROUNDING
};

constexpr const char* kScaleFormatNames[] = {
#define QUARK_SCALE_FORMAT(name) #name,
    QUARK_SCALE_FORMATS(QUARK_SCALE_FORMAT)
#undef QUARK_SCALE_FORMAT
};

constexpr const char* kScaleRuleNames[] = {
#define QUARK_SCALE_RULE(name) #name,
    QUARK_SCALE_RULES(QUARK_SCALE_RULE)
#undef QUARK_SCALE_RULE
};

/// Where `name` stands in a list of names, or -1.
template <size_t N>
int index_of(std::string_view name, const char* const (&names)[N]) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return int(i);
  return -1;
}

std::string quoted(std::string_view text) { return std::string("'").append(text).append("'"); }

/// What strtod and streams read depends on the locale and on the rounding mode.
template <class T>
bool parse_number(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

/// Reads a length for every axis.
Status parse_lengths(const std::string& name, std::string_view text, int64_t* lengths, int& rank) {
  if (rank > 0) return value_error("spec: " + name + " is given twice");
  if (text.ends_with(',')) return value_error("spec: " + name + " is " + quoted(text) + "; it ends in a comma");
  while (!text.empty()) {
    if (rank == kMaxRank) return value_error("spec: " + name + " has more than " + std::to_string(kMaxRank) + " axes");
    const size_t comma = text.find(',');
    int64_t n = 0;
    if (!parse_number(text.substr(0, comma), n) || n < 0)
      return value_error("spec: " + name + " is " + quoted(text) + "; lengths must be integers >= 0");
    lengths[rank++] = n;
    text = comma == std::string_view::npos ? std::string_view() : text.substr(comma + 1);
  }
  return {};
}

bool parse_method(std::string_view text, QuantSpec& spec) {
  constexpr std::string_view kPercentile = "percentile:";
  if (text == "mse") {
    spec.method = Method::mse;
    return true;
  }
  spec.method = Method::percentile;
  return text.starts_with(kPercentile) && parse_number(text.substr(kPercentile.size()), spec.percentile) &&
         spec.percentile > 0.0 && spec.percentile <= 100.0;
}

Status parse_format(std::string_view name, QuantSpec& spec) {
  for (const Format& row : kFormats) {
    if (row.name != name) continue;
    spec.format = row;
    return {};
  }
  std::string known;
  for (const Format& row : kFormats) known += std::string(known.empty() ? "" : ", ") + row.name;
  return value_error("spec: unknown format " + quoted(name) + "; known: " + known);
}

/// The format behind "codes bits=B [signed]": integers of that width.
Status codes_format(int bits, bool is_signed, QuantSpec& spec) {
  if (bits < 1 || bits > 8) return value_error("spec: bits is " + std::to_string(bits) + "; packing takes 1 to 8");
  const auto mantissa = uint8_t(is_signed ? bits - 1 : bits);
  const auto steps = float(1 << mantissa);
  spec.format = {"codes",      uint8_t(bits),  0,
                 mantissa,     mantissa,       is_signed ? -steps : 0.0f,
                 steps - 1.0f, Specials::none, is_signed ? DType::int8 : DType::uint8};
  spec.quant_min = spec.format.lo;
  spec.quant_max = spec.format.hi;
  return {};
}

/// Checks the scale format against the rest.
Status complete_scale(const QuantSpec& spec) {
  const Format& f = spec.format;
  if (spec.scale_format != ScaleFormat::float32 && (f.is_cast() || !spec.symmetric))
    return value_error(std::string("spec: scales of ") + f.name + " are float32 here: it is a cast or asymmetric");
  if (spec.shares_exponent() && (!f.is_integer() || f.lo == 0 || f.bits < 3 || spec.reciprocal || spec.shifted))
    return value_error(std::string("spec: a shared exponent goes with signed integers of 3 bits or more, plainly "
                                   "rounded, not with ") +
                       f.name);
  const bool is_power = spec.scale_format == ScaleFormat::e8m0;
  if (spec.scale_rule != ScaleRule::floor &&
      !(spec.scale_rule == ScaleRule::fit ? spec.scale_format == ScaleFormat::exponent : is_power))
    return value_error(std::string("spec: rule=") + kScaleRuleNames[int(spec.scale_rule)] +
                       " doesn't go with scale=" + kScaleFormatNames[int(spec.scale_format)]);
  if (spec.scale_rule == ScaleRule::fit && !spec.ieee)
    return value_error("spec: rule=fit is of the finite elements alone, so it needs ieee");
  if (spec.scale_format == ScaleFormat::exponent && spec.ieee && spec.scale_rule != ScaleRule::fit)
    return value_error("spec: exponents of the finite elements alone, which ieee means, need rule=fit");
  if (spec.method == Method::mse && spec.rounding == Rounding::stochastic)
    return value_error("spec: method=mse needs a rounding that isn't stochastic");
  if (spec.method != Method::extremes && spec.scale_format != ScaleFormat::float32 && !is_power)
    return value_error(std::string("spec: a method chooses float32 and e8m0 scales, not ") +
                       kScaleFormatNames[int(spec.scale_format)]);
  if (spec.has_pairs()) {
    const int axis = spec.block_axis();
    if (axis < 0 || spec.block[axis] == 0 || spec.block[axis] % 2 != 0)
      return value_error("spec: microexponents need a block of even length along one axis");
  }
  if (spec.packed && f.bits > 8)
    return value_error(std::string("spec: ") + f.name + " has no packed form; it is wider than a byte");
  return {};
}

/// Checks the shape of the array that the data is a shard of.
Status complete_whole(QuantSpec& spec, int rank) {
  if (rank == 0) return {};
  if (spec.rounding != Rounding::stochastic)
    return value_error("spec: whole is for random numbers, so it needs rounding=stochastic");
  if (rank != spec.rank)
    return value_error("spec: whole has " + std::to_string(rank) + " axes, block " + std::to_string(spec.rank));
  int64_t n = 1;  // strides are counted even where the array is empty
  for (int d = 0; d < rank; ++d)
    if (__builtin_mul_overflow(n, std::max<int64_t>(spec.whole[d], 1), &n))
      return value_error("spec: whole has too many elements");
  spec.is_shard = true;
  return {};
}

/// Checks what only makes sense together, and fills in the format's own range.
Status complete(QuantSpec& spec, bool has_min, bool has_max) {
  const Format& f = spec.format;
  const bool is_integer = f.is_integer();
  if (!is_integer && (has_min || has_max))
    return value_error(std::string("spec: min and max are for integer formats, not ") + f.name);
  if (!is_integer && !spec.symmetric)
    return value_error(std::string("spec: asymmetric is for integer formats, not ") + f.name);
  if (is_integer) {
    if (!has_min) spec.quant_min = f.lo;
    if (!has_max) spec.quant_max = f.hi;
    const bool is_free = spec.ieee && !spec.packed && !spec.shares_exponent();
    const float lo = is_free ? -0x1p23f : f.lo, hi = is_free ? 0x1p23f : f.hi;
    const auto is_code = [&](float v) { return v >= lo && v <= hi && std::nearbyint(v) == v; };
    if (!is_code(spec.quant_min) || !is_code(spec.quant_max) || spec.quant_min >= spec.quant_max)
      return value_error(std::string("spec: min and max must be codes of ") + f.name + " with min < max");
    const bool is_given = spec.ieee && spec.scale_format == ScaleFormat::float32;  // never chosen by the range
    if (spec.symmetric && !is_given && spec.quant_max <= 0) return value_error("spec: a symmetric range needs max > 0");
  }
  if (!is_integer && (spec.reciprocal || spec.shifted))
    return value_error(std::string("spec: reciprocal and shifted are for integer formats, not ") + f.name);
  if ((is_integer || f.is_cast()) && (spec.narrow || spec.plus_zero))
    return value_error(std::string("spec: narrow and plus_zero are for minifloat formats, not ") + f.name);
  const bool is_nearest = f.is_cast() || spec.narrow || (spec.shares_exponent() && spec.ieee);
  if (spec.rounding == Rounding::stochastic && (spec.reciprocal || spec.shifted || spec.ieee))
    return value_error("spec: stochastic rounding is for the plain order of computing");
  if (spec.rounding != Rounding::half_even && is_nearest)
    return value_error(std::string("spec: ") + f.name + (f.is_cast() ? " is a cast and" : " so computed") +
                       " rounds half_even only");
  return complete_scale(spec);
}

}  // namespace

std::span<const Format> formats() { return kFormats; }
std::span<const char* const> rounding_names() { return kRoundingNames; }
const Format& e4m3_format() {
  enum Row : uint8_t {
#define QUARK_FORMAT(name, ...) name,
#include "formats.inc"
#undef QUARK_FORMAT
  };
  return kFormats[fp8_e4m3];
}

Status parse_spec(std::string_view text, QuantSpec& spec) {
  const FloatEnvironment environment;  // reading numbers rounds, and comparing NaN traps where the host wants that
  spec = {};
  bool has_min = false, has_max = false, is_signed = false, is_codes = false;
  int bits = 0, whole_rank = 0;
  bool first = true;
  while (!text.empty()) {
    const size_t space = text.find(' ');
    const std::string_view word = text.substr(0, space);
    text = space == std::string_view::npos ? std::string_view() : text.substr(space + 1);
    const size_t equals = word.find('=');
    const std::string_view key = word.substr(0, equals);
    const std::string_view value = equals == std::string_view::npos ? std::string_view() : word.substr(equals + 1);
    bool good = true;
    if (first) {
      is_codes = word == "codes";
      if (!is_codes)
        if (Status status = parse_format(word, spec); !status.ok()) return status;
      first = false;
    } else if (key == "block") {
      if (Status status = parse_lengths("block", value, spec.block, spec.rank); !status.ok()) return status;
    } else if (key == "whole") {
      if (Status status = parse_lengths("whole", value, spec.whole, whole_rank); !status.ok()) return status;
    } else if (key == "batch") {
      good = parse_number(value, spec.batch) && spec.batch >= 0 && spec.batch <= kMaxRank;
    } else if (key == "rounding") {
      const int found = index_of(value, kRoundingNames);
      good = found >= 0;
      if (good) spec.rounding = Rounding(found);
    } else if (key == "scale") {
      const int found = index_of(value, kScaleFormatNames);
      good = found >= 0;
      if (good) spec.scale_format = ScaleFormat(found);
    } else if (key == "rule") {
      const int found = index_of(value, kScaleRuleNames);
      good = found >= 0;
      if (good) spec.scale_rule = ScaleRule(found);
    } else if (key == "method") {
      good = parse_method(value, spec);
    } else if (key == "min") {
      good = has_min = parse_number(value, spec.quant_min);
    } else if (key == "max") {
      good = has_max = parse_number(value, spec.quant_max);
    } else if (key == "length") {
      good = parse_number(value, spec.length) && spec.length >= 0;
    } else if (key == "bits") {
      good = is_codes && parse_number(value, bits);
    } else if (word == "asymmetric") {
      spec.symmetric = false;
    } else if (word == "packed") {
      spec.packed = true;
    } else if (word == "reciprocal") {
      spec.reciprocal = true;
    } else if (word == "shifted") {
      spec.shifted = true;
    } else if (word == "narrow") {
      spec.narrow = true;
    } else if (word == "plus_zero") {
      spec.plus_zero = true;
    } else if (word == "ieee") {
      spec.ieee = true;
    } else if (word == "signed") {
      good = is_signed = is_codes;
    } else {
      good = key == "dtype" || key == "scales";  // the Python schema's
    }
    if (!good) return value_error("spec: can't read " + quoted(word));
  }
  if (first) return value_error("spec: empty; it must start with a format's name");
  if (Status status = complete_whole(spec, whole_rank); !status.ok()) return status;
  if (is_codes) return codes_format(bits, is_signed, spec);
  return complete(spec, has_min, has_max);
}

Status cached_spec(std::string_view text, QuantSpec& spec) {
  struct Hash : std::hash<std::string_view> {
    using is_transparent = void;
  };
  // Of this thread: no lock to wait for, or to be left locked in a forked child.
  static thread_local std::unordered_map<std::string, QuantSpec, Hash, std::equal_to<>> cache;
  constexpr size_t kMost = 1024;  // dynamic shapes make ever new lengths
  if (const auto found = cache.find(text); found != cache.end()) {
    spec = found->second;
    return {};
  }
  if (Status status = parse_spec(text, spec); !status.ok()) return status;
  if (cache.size() >= kMost) cache.clear();
  cache.emplace(text, spec);
  return {};
}

}  // namespace quark
