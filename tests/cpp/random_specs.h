// Random specs that an operator takes, from any source of choices: check::Random, or the bytes of tests/cpp/fuzz.
#pragma once
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "ops.h"

namespace specs {

using quark::DType;
using quark::Format;
using quark::Op;
using quark::QuantSpec;
using quark::Rounding;
using quark::ScaleFormat;
using Shape = std::vector<int64_t>;

inline const std::vector<DType> kFloats = {DType::float32, DType::float16, DType::bfloat16, DType::float64};
inline const std::vector<DType> kIntegers = {DType::int8,   DType::uint8, DType::int16,
                                             DType::uint16, DType::int32, DType::int64};

inline constexpr const char* kScaleFormats[] = {
#define QUARK_SCALE_FORMAT(name) #name,
    QUARK_SCALE_FORMATS(QUARK_SCALE_FORMAT)
#undef QUARK_SCALE_FORMAT
};

/// What an operator asks of its spec.
struct Needs {
  bool codes, scales_of_x, learned, one_scale, chooses, is_random;
  std::vector<ScaleFormat> scales = {ScaleFormat::float32};

  explicit Needs(Op op) {
    const auto [name, ins, outs] = quark::kOps[int(op)];
    const auto has = [](const char* kinds, char kind) { return std::strchr(kinds, kind) != nullptr; };
    codes = has(ins, 'q') || has(outs, 'q');
    scales_of_x = has(outs, 's') && !has(ins, 's') && !has(ins, 'q');
    learned = has(ins, 'n');
    one_scale = std::string_view(name).starts_with("tqt");
    chooses = op == Op::choose_qparams;
    is_random = has(ins, 'k') || chooses || op == Op::extremes || op == Op::dequantize;  // or doesn't mind
    using enum ScaleFormat;
    if (op == Op::quantize_values) scales = {float32, e8m0};
    if (has(ins, 'p') || has(outs, 'p') || has(outs, 'e')) scales = {float32, e8m0, e4m3, exponent, microexponents};
    if (chooses || has(outs, 'e')) scales.push_back(global);
  }
};

/// Groups of any lengths, or (learned scales) of one length, or pairs along one axis.
template <class Random>
std::string random_blocks(Random& random, const Shape& shape, const Needs& needs, bool pairs) {
  std::string text;
  const int64_t paired = pairs ? random.between(0, int64_t(shape.size()) - 1) : -1;
  for (size_t d = 0; d < shape.size(); ++d) {
    const int64_t n = shape[d];
    int64_t b = random.chance(35) ? 0 : random.chance(40) ? 1 : random.between(2, std::max<int64_t>(2, n + 2));
    if (b > 1 && random.chance(40)) b = int64_t(1) << random.between(1, 7);  // 2 to 128
    if (pairs) b = int64_t(d) == paired ? 2 * random.between(1, random.chance(50) ? 4 : 16) : 1;
    if (needs.one_scale) b = 0;
    while (needs.learned && b > 0 && b < n && n % b != 0) --b;
    text += (text.empty() ? " block=" : ",") + std::to_string(b);
  }
  return text;
}

/// The format's own range, or one that is a little narrower, or (`wide`) any, or (`off_center`) without 0.
template <class Random>
std::string random_range(Random& random, const Format& f, bool wide, bool off_center) {
  int64_t low = int64_t(f.lo) + random.chance(20), high = int64_t(f.hi) - (random.chance(20) && f.bits > 2);
  if (wide && random.chance(60)) {
    const int64_t bound = int64_t(1) << random.between(1, 23);
    high = random.chance(40) ? bound : random.between(1, bound);
    low = random.chance(40) ? -bound : -random.between(0, bound);
    const int64_t off = random.between(-bound, bound);
    if (off_center && random.chance(20))
      low = std::min(low / 2 + off / 2, high / 2 + off / 2 - 1), high = high / 2 + off / 2;
  }
  std::string text;
  if (low != int64_t(f.lo)) text += " min=" + std::to_string(low);
  if (high != int64_t(f.hi)) text += " max=" + std::to_string(high);
  return text;
}

/// Of those that go with the scale.
template <class Random>
const Format& random_format(Random& random, const Needs& needs, ScaleFormat scale) {
  const bool shares = scale == ScaleFormat::exponent || scale == ScaleFormat::microexponents;
  std::vector<const Format*> allowed;
  for (const Format& f : quark::formats()) {
    if (shares && !(f.is_integer() && f.lo < 0 && f.bits >= 3)) continue;
    if ((needs.learned && !f.is_integer()) || (scale != ScaleFormat::float32 && f.is_cast())) continue;
    allowed.push_back(&f);
  }
  return *random.pick(allowed);
}

/// The shape of an array that has shards of this one, now and then of more elements than 32 bits count.
template <class Random>
std::string random_whole(Random& random, const Shape& shape) {
  std::string text;
  int64_t room = 1;
  for (const int64_t n : shape) room *= n;
  for (const int64_t n : shape) {
    int64_t more = random.chance(40) ? 0 : random.between(0, 9);
    if (room > 0 && room < 1 << 20 && random.chance(10)) more = random.between(0, int64_t(1) << 33), room = 0;
    text += (text.empty() ? " whole=" : ",") + std::to_string(n + more);
  }
  return text;
}

template <class Random>
std::string random_spec(Random& random, Op op, const Shape& shape) {
  if (op == Op::pack || op == Op::unpack) {
    const int64_t bits = random.between(1, 8);
    return "codes bits=" + std::to_string(bits) + (bits > 1 && random.chance(50) ? " signed" : "") + " packed";
  }
  if (op == Op::convert) return "codes bits=8";
  const Needs needs(op);
  ScaleFormat scale = random.chance(30) ? ScaleFormat::float32 : random.pick(needs.scales);
  if (scale == ScaleFormat::microexponents && shape.empty()) scale = ScaleFormat::exponent;
  const bool pairs = scale == ScaleFormat::microexponents, shares = pairs || scale == ScaleFormat::exponent;
  const bool is_number = scale == ScaleFormat::float32, is_power = scale == ScaleFormat::e8m0;
  const Format& f = random_format(random, needs, scale);
  const bool is_float = !f.is_integer() && !f.is_cast();
  std::string text = f.name + random_blocks(random, shape, needs, pairs);
  const auto add = [&](const std::string& word, bool allowed, int percent = 25) {
    if (!allowed || !random.chance(percent)) return false;
    text += " " + word;
    return true;
  };
  add(std::string("scale=") + kScaleFormats[int(scale)], true, is_number ? 10 : 100);
  const bool narrow = add("narrow", is_float);
  add("plus_zero", is_float);
  const bool ieee = add("ieee", !shares || !needs.codes);
  add("rule=fit", ieee && scale == ScaleFormat::exponent, 100);
  add(std::string("rule=") + random.pick(std::vector<const char*>{"floor", "ceil", "even", "rceil"}), is_power, 80);
  const bool searches = needs.chooses && (is_number || is_power) && !ieee;
  const bool mse = add("method=mse", searches, 20);
  const char* percent = random.pick(std::vector<const char*>{"100", "99.99", "90", "66.6", "50", "12.5", "0.001"});
  add(std::string("method=percentile:") + percent, searches && !mse);
  const bool is_nearest = f.is_cast() || narrow || (shares && ieee);
  const bool stochastic = add("rounding=stochastic", needs.is_random && !is_nearest && !ieee && !mse, 30);
  if (stochastic && random.chance(50)) text += random_whole(random, shape);
  const char* rounding = quark::rounding_names()[size_t(random.between(0, int64_t(Rounding::stochastic) - 1))];
  add(std::string("rounding=") + rounding, !is_nearest && !stochastic, 100);
  const bool packed = add("packed length=" + std::to_string(shape.empty() ? 1 : shape.back()), f.bits <= 8, 50);
  if (!f.is_integer()) return text;
  text += random_range(random, f, ieee && !shares && !packed, is_number && !needs.scales_of_x);
  add("reciprocal", !shares && !stochastic);
  add("shifted", !shares && !stochastic);
  add("asymmetric", is_number, 50);
  return text;
}

/// Where scales of a spec may be stored.
inline std::vector<DType> scale_dtypes(const QuantSpec& spec, bool is_output) {
  if (spec.scale_format == ScaleFormat::e4m3) return {DType::float8_e4m3fn};
  std::vector<DType> all = is_output ? std::vector<DType>{DType::float32} : kFloats;
  const bool has_codes = !(spec.shares_exponent() && spec.ieee);
  if (spec.scale_format == ScaleFormat::e8m0) all = {DType::float8_e8m0fnu, all[0], all.back()};
  if (spec.shares_exponent() && has_codes) all = {DType::float8_e8m0fnu, DType::int8, DType::int8, all[0], all.back()};
  return all;
}

}  // namespace specs
