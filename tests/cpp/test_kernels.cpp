// Every operator from end to end, on every CPU level, against one element at a time. What becomes of an element is
// computed here in double, from its definition; only codes and 16-bit floats are the core's (test_numerics.cpp).
#include <cfloat>
#include <cmath>
#include <limits>

#include "arrays.h"
#include "check.h"
#include "numerics.h"
#include "ops.h"
#include "reference.h"

namespace {

using arrays::Array;
using arrays::Layout;
using arrays::Shape;
using check::Random;
using quark::DType;
using quark::Format;
using quark::Op;
using quark::QuantSpec;
using quark::Rounding;
using quark::ScaleFormat;
using quark::Specials;
using quark::Status;
using namespace quark::QUARK_LEVEL;

const std::vector<DType> kFloats = {DType::float32, DType::float16, DType::bfloat16, DType::float64};
const std::vector<DType> kIntegers = {DType::int8,   DType::uint8, DType::int16,
                                      DType::uint16, DType::int32, DType::int64};

// ---- the reference ------------------------------------------------------------------------------------------------

/// One call: the operator, its spec and its operands, outputs still full of random bytes.
struct Case {
  Op op;
  std::string text;
  QuantSpec spec;
  std::vector<Array> in, out;

  std::string description() const {
    std::string all = std::string(quark::kOps[int(op)].name) + " \"" + text + "\"";
    for (const Array& a : in) all += "\n        in  " + a.text();
    for (const Array& a : out) all += "\n        out " + a.text();
    return all;
  }
};

// What becomes of one element. `data` is the dtype that x has.

/// The quotient in the order that the spec asks for.
float divided(const QuantSpec& spec, DType data, float x, float s) {
  const float inverse = 1 / s, v = x / s;
  if (spec.reciprocal && !std::isinf(inverse)) return x * inverse;
  if (spec.narrow && data == DType::float16) return from_float16(to_float16(v));
  if (spec.narrow && data == DType::bfloat16) return from_bfloat16(to_bfloat16(v));
  return v;
}

float cast(const Format& f, float v) {
  return f.storage == DType::float16 ? from_float16(to_float16(v)) : from_bfloat16(to_bfloat16(v));
}

/// R(v) on a float grid without an end.
double on_grid(const Format& f, Rounding r, double v) {
  const double spacing = std::ldexp(1.0, std::max(std::ilogb(v), int(f.min_exp)) - f.mantissa_bits);
  return std::copysign(reference::rounded(r, v / spacing) * spacing, v);
}

/// The code of x as a float: integers the code itself, other formats the value that the code stands for.
float quantized(const QuantSpec& spec, DType data, float x, float s, float z) {
  const Format& f = spec.format;
  const float v = divided(spec, data, x, s);
  if (f.is_integer()) return reference::integer_code(spec, v, z);
  const bool has_nan = f.specials != Specials::none, is_signed = has_nan && f.specials != Specials::fnuz;
  if (std::isnan(v)) return has_nan || spec.ieee ? std::copysign(NAN, is_signed ? x : 1.0f) : 0.0f;
  if (f.is_cast()) return cast(f, v);
  const auto y = float(on_grid(f, spec.rounding, std::clamp(v, f.lo, f.hi)));
  const bool has_minus_zero = f.exponent_bits > 0 && f.specials != Specials::fnuz && !spec.plus_zero;
  return y == 0 && !has_minus_zero ? 0.0f : y;
}

float dequantized(float y, float s, float z, float limit) {
  const float product = (y - z) * s;
  if (std::isnan(product)) return std::copysign(NAN, y);
  return std::isinf(y) ? product : std::clamp(product, -limit, limit);
}

float fake_quantized(const QuantSpec& spec, DType data, float x, float s, float z, float limit) {
  return std::isnan(x) ? std::copysign(NAN, x) : dequantized(quantized(spec, data, x, s, z), s, z, limit);
}

bool inside(const QuantSpec& spec, float x, float s, float z) {
  const Format& f = spec.format;
  const float v = x / s;
  if (!std::isfinite(v)) return false;
  if (f.is_cast()) return std::isfinite(cast(f, v));
  if (!f.is_integer()) return std::fabs(on_grid(f, spec.rounding, v)) <= f.hi;
  const auto r = float(reference::rounded(spec.rounding, v) + z);
  return r >= spec.quant_min && r <= spec.quant_max;
}

// Codes.

float value_of_step(const Format& f) { return std::ldexp(1.0f, f.min_exp - f.mantissa_bits); }

uint32_t code_of(float y, const QuantSpec& spec) {
  const Format& f = spec.format;
  if (f.storage == DType::float16) return to_float16(y);
  if (f.storage == DType::bfloat16) return to_bfloat16(y);
  if (!f.is_fixed_point()) return encode(y, make_grid(spec), f.bits);
  return uint32_t(int32_t(y / value_of_step(f))) & ((1u << f.bits) - 1u);
}

float value_of(uint32_t code, const QuantSpec& spec) {
  const Format& f = spec.format;
  if (f.storage == DType::float16) return from_float16(uint16_t(code));
  if (f.storage == DType::bfloat16) return from_bfloat16(uint16_t(code));
  if (!f.is_fixed_point()) return decode(code, make_grid(spec), f.bits);
  auto q = int32_t(code);
  if (f.lo < 0 && code >> (f.bits - 1) != 0) q -= 1 << f.bits;
  return float(q) * value_of_step(f);
}

/// The codes of a logical array, stored one apiece or packed.
struct CodeArray {
  const QuantSpec& spec;
  Array& array;
  int64_t row;  // of the logical array

  int64_t byte_of(int64_t flat, int64_t bit) const {
    return flat / row * ((row * spec.format.bits + 7) / 8) + (flat % row * spec.format.bits + bit) / 8;
  }
  /// Numbers of any integer dtype.
  bool is_wide() const { return spec.ieee && spec.format.is_integer() && !spec.packed; }
  int bit_of(int64_t flat, int64_t bit) const { return int((flat % row * spec.format.bits + bit) % 8); }

  void put(int64_t flat, uint32_t code) {
    if (!spec.packed) {
      // Two's complement codes fill their storage with the sign.
      if (spec.format.is_fixed_point())
        return array.put_number(flat, value_of(code, spec) / value_of_step(spec.format));
      return quark::bytes_of(array.dtype()) == 2 ? array.put(flat, uint16_t(code)) : array.put(flat, uint8_t(code));
    }
    for (int64_t b = 0; b < spec.format.bits; ++b) {
      const int64_t at = byte_of(flat, b);
      const int bit = bit_of(flat, b);
      const auto byte = array.get<uint8_t>(at);
      array.put(at, uint8_t((byte & ~(1u << bit)) | (code >> b & 1u) << bit));
    }
  }
  uint32_t get(int64_t flat) const {
    if (!spec.packed) {
      const uint32_t all = quark::bytes_of(array.dtype()) == 2 ? array.get<uint16_t>(flat) : array.get<uint8_t>(flat);
      return all & ((1u << spec.format.bits) - 1u);
    }
    uint32_t code = 0;
    for (int64_t b = 0; b < spec.format.bits; ++b) {
      const int bit = bit_of(flat, b);
      code |= (array.get<uint8_t>(byte_of(flat, b)) >> bit & 1u) << b;
    }
    return code;
  }
  void put_value(int64_t flat, float y) { is_wide() ? array.put_number(flat, y) : put(flat, code_of(y, spec)); }
  float value(int64_t flat) const { return is_wide() ? array.number(flat) : value_of(get(flat), spec); }
  /// A row's last bits are zero.
  void clear() {
    for (int64_t i = 0; spec.packed && i < array.elements(); ++i) array.put(i, uint8_t(0));
  }
};

/// The number of the scale that element `flat` belongs to.
int64_t scale_index(int64_t flat, const Shape& shape, const QuantSpec& spec) {
  int64_t index = 0, inner = arrays::product(shape);
  for (size_t d = 0; d < shape.size(); ++d) {
    inner /= shape[d];
    const int64_t at = flat / inner % shape[d], b = spec.block[d];
    index = index * quark::scale_length(shape[d], b) + (b == 0 ? 0 : at / b);
  }
  return index;
}

/// The tree sum, one level of chunks after the other.
double tree_sum(std::vector<double> terms) {
  do {
    std::vector<double> sums;
    for (size_t begin = 0; begin == 0 || begin < terms.size(); begin += 1024) {
      std::vector<double> lanes(64, 0.0);
      for (size_t i = begin; i < std::min(terms.size(), begin + 1024); ++i) lanes[(i - begin) % 64] += terms[i];
      while (lanes.size() > 1) {
        const size_t half = lanes.size() / 2;
        for (size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
        lanes.resize(half);
      }
      sums.push_back(lanes[0]);
    }
    terms = sums;
  } while (terms.size() > 1);
  return terms[0];
}

float limit_of(DType dtype, const QuantSpec& spec) {
  if (spec.ieee) return INFINITY;
  return dtype == DType::float16 ? 65504.0f : dtype == DType::bfloat16 ? 0x1.fep127f : FLT_MAX;
}

void naive_choose(const QuantSpec& spec, const Array& x, Array& scale, Array* zero) {
  std::vector<std::vector<float>> groups(size_t(scale.elements()));
  for (int64_t i = 0; i < x.elements(); ++i) groups[size_t(scale_index(i, x.shape(), spec))].push_back(x.number(i));
  for (size_t k = 0; k < groups.size(); ++k) {
    ScaleAndZero r = {1.0f, 0};
    if (spec.scale_format != ScaleFormat::float32) {
      r.scale = float(reference::block_scale(spec, x.dtype(), groups[k]));
    } else if (!spec.format.is_cast()) {
      uint32_t extreme[2] = {};  // of each sign
      for (const float v : groups[k]) {
        uint32_t& to = extreme[bits_of(v) >> 31];
        to = std::max(to, bits_of(v) & 0x7fffffffu);
      }
      r = scale_from_bounds(extreme[1], extreme[0], spec.symmetric, make_grid(spec));
    }
    scale.put(int64_t(k), r.scale);
    if (zero) zero->put(int64_t(k), r.zero_point);
  }
}

/// Scales or zero points by their number.
using Numbers = std::function<float(int64_t)>;
Numbers numbers_of(const Array* a) {
  return [a](int64_t i) { return a ? a->number(i) : 0.0f; };
}

/// f(i, s, z) for every element.
template <class F>
void naive_elementwise(const QuantSpec& spec, const Shape& shape, const Numbers& scale, const Numbers& zero,
                       const F& f) {
  for (int64_t i = 0; i < arrays::product(shape); ++i) {
    const int64_t index = scale_index(i, shape, spec);
    f(i, scale(index), zero(index));
  }
}

int64_t last_length(const Array& a) { return a.shape().empty() ? 1 : a.shape().back(); }

void naive_quantize(QuantSpec spec, const Array& x, const Array& scale, const Array* zero, Array& q) {
  CodeArray codes{spec, q, last_length(x)};
  codes.clear();
  QuantSpec numbers = spec;
  numbers.ieee = false;  // no format without NaN has a code for it
  naive_elementwise(spec, x.shape(), numbers_of(&scale), numbers_of(zero), [&](int64_t i, float s, float z) {
    codes.put_value(i, quantized(numbers, x.dtype(), x.number(i), s, z));
  });
}

/// The other element of x's pair, 0 where there is none.
float partner_of(const QuantSpec& spec, const Array& x, int64_t flat) {
  int64_t inner = 1;
  for (auto d = int(x.shape().size()) - 1; d >= 0; --d) {
    const int64_t n = x.shape()[size_t(d)], at = flat / inner % n, other = at ^ 1;
    if (spec.block[d] != 1) return other < n ? x.number(flat + (other - at) * inner) : 0.0f;
    inner *= n;
  }
  return 0.0f;
}

void naive_fake_quantize(const QuantSpec& spec, const Array& x, const Numbers& scale, const Numbers& zero, Array& out) {
  const float limit = limit_of(out.dtype(), spec);
  naive_elementwise(spec, x.shape(), scale, zero, [&](int64_t i, float s, float z) {
    const float y = spec.shares_exponent() ? reference::shared_exponent_value(spec, x.dtype(), x.number(i),
                                                                              partner_of(spec, x, i), s, limit)
                                           : fake_quantized(spec, x.dtype(), x.number(i), s, z, limit);
    out.put_number(i, y);
  });
}

/// factor * the sum of each scale's terms.
void put_sums(const std::vector<std::vector<double>>& terms, double factor, Array& out) {
  for (size_t i = 0; i < terms.size(); ++i) {
    const auto sum = float(tree_sum(terms[i]) * factor);
    out.put(int64_t(i), std::isnan(sum) ? NAN : sum);
  }
}

void naive_learn(const QuantSpec& spec, const Array& x, const Array& grad, const Numbers& scale, const Numbers& zero,
                 double factor, Array& dx, Array& ds) {
  std::vector<std::vector<double>> terms(size_t(ds.elements()));
  naive_elementwise(spec, x.shape(), scale, zero, [&](int64_t i, float s, float z) {
    const auto [to_x, term] = reference::learned(spec, x.number(i), grad.number(i), s, z);
    dx.put_number(i, to_x);
    terms[size_t(scale_index(i, x.shape(), spec))].push_back(term);
  });
  put_sums(terms, factor, ds);
}

/// TQT's scale, and its range in the spec.
float use_threshold(const Array& threshold, const Array& domain, QuantSpec& spec) {
  const float t = threshold.number(0), n = domain.number(0);
  spec.quant_min = -n;
  spec.quant_max = n - 1;
  return std::isnan(t) ? NAN : std::ldexp(1.0f, int(std::clamp(std::ceil(t), -126.0f, 127.0f))) / n;
}

/// Writes what the operator should write.
void naive(Case& c, std::vector<Array>& out) {
  const QuantSpec& spec = c.spec;
  auto& in = c.in;
  const auto optional = [](std::vector<Array>& all, size_t at) { return all.size() > at ? &all[at] : nullptr; };
  switch (c.op) {
    case Op::choose_qparams: return naive_choose(spec, in[0], out[0], optional(out, 1));
    case Op::quantize: return naive_quantize(spec, in[0], in[1], optional(in, 2), out[0]);
    case Op::quantize_dynamic:
      naive_choose(spec, in[0], out[1], optional(out, 2));
      return naive_quantize(spec, in[0], out[1], optional(out, 2), out[0]);
    case Op::quantize_values:
      return naive_elementwise(spec, in[0].shape(), numbers_of(&in[1]), numbers_of(nullptr),
                               [&](int64_t i, float s, float z) {
                                 out[0].put_number(i, quantized(spec, in[0].dtype(), in[0].number(i), s, z));
                               });
    case Op::fake_quantize:
      return naive_fake_quantize(spec, in[0], numbers_of(&in[1]), numbers_of(optional(in, 2)), out[0]);
    case Op::fake_quantize_dynamic:
      naive_choose(spec, in[0], out[1], optional(out, 2));
      return naive_fake_quantize(spec, in[0], numbers_of(&out[1]), numbers_of(optional(out, 2)), out[0]);
    case Op::dequantize: {
      const CodeArray codes{spec, in[0], last_length(out[0])};
      const float limit = limit_of(out[0].dtype(), spec);
      return naive_elementwise(
          spec, out[0].shape(), numbers_of(&in[1]), numbers_of(optional(in, 2)),
          [&](int64_t i, float s, float z) { out[0].put_number(i, dequantized(codes.value(i), s, z, limit)); });
    }
    case Op::fake_quantize_backward:
      return naive_elementwise(spec, in[0].shape(), numbers_of(&in[2]), numbers_of(optional(in, 3)),
                               [&](int64_t i, float s, float z) {
                                 const bool passes = inside(spec, in[0].number(i), s, z);
                                 out[0].put_number(i, passes ? in[1].number(i) : 0.0f);
                               });
    case Op::dequantize_backward: {
      const CodeArray codes{spec, in[1], last_length(in[0])};
      std::vector<std::vector<double>> terms(size_t(out[0].elements()));
      for (int64_t i = 0; i < in[0].elements(); ++i) {
        const int64_t index = scale_index(i, in[0].shape(), spec);
        const double q = codes.value(i), z = numbers_of(optional(in, 2))(index);
        terms[size_t(index)].push_back(double(in[0].number(i)) * (q - z));
      }
      return put_sums(terms, 1.0, out[0]);
    }
    case Op::lsq_backward:
      return naive_learn(spec, in[0], in[1], numbers_of(&in[2]), numbers_of(optional(in, 4)), in[3].number(0), out[0],
                         out[1]);
    case Op::tqt_quantize: {
      QuantSpec own = spec;
      const float s = use_threshold(in[1], in[2], own);
      return naive_fake_quantize(own, in[0], [s](int64_t) { return s; }, numbers_of(optional(in, 3)), out[0]);
    }
    case Op::tqt_backward: {
      QuantSpec own = spec;
      const float s = use_threshold(in[2], in[3], own);
      return naive_learn(
          own, in[0], in[1], [s](int64_t) { return s; }, numbers_of(optional(in, 4)), double(s) * std::log(2.0), out[0],
          out[1]);
    }
    case Op::convert:
      for (int64_t i = 0; i < in[0].elements(); ++i) out[0].put_number(i, in[0].number(i));
      return;
    case Op::pack: {
      CodeArray codes{spec, out[0], last_length(in[0])};
      codes.clear();
      for (int64_t i = 0; i < in[0].elements(); ++i) codes.put(i, in[0].get<uint8_t>(i));
      return;
    }
    case Op::unpack: {
      const CodeArray codes{spec, in[0], last_length(out[0])};
      for (int64_t i = 0; i < out[0].elements(); ++i) out[0].put_number(i, value_of(codes.get(i), spec));
      return;
    }
  }
}

// ---- random cases -------------------------------------------------------------------------------------------------

enum class Size { small, tiles, large, empty };

Shape random_shape(Random& random, Size size) {
  if (size == Size::large) {
    if (random.chance(30)) return {random.between(200'000, 300'000)};
    return {random.between(2, 5), random.between(20, 60), random.between(1000, 2000)};
  }
  if (size == Size::tiles) {
    if (random.chance(40)) return {random.between(900, 5000)};
    if (random.chance(50)) return {random.between(1, 4), random.between(900, 2100)};
    return {random.between(1, 40), random.between(1, 9), random.between(1, 30)};
  }
  Shape shape(size_t(random.between(0, 5)));
  if (size == Size::empty && shape.empty()) shape = {0};
  for (int64_t& n : shape) n = random.chance(15) ? 1 : random.between(2, shape.size() > 3 ? 5 : 13);
  if (size == Size::empty)
    for (size_t i = 0; i < 2; ++i) shape[size_t(random.between(0, int64_t(shape.size()) - 1))] = 0;
  return shape;
}

/// What an operator asks of its spec.
struct Needs {
  bool codes, scales_of_x, learned, one_scale;

  explicit Needs(Op op) {
    const auto [name, ins, outs] = quark::kOps[int(op)];
    const auto has = [](const char* kinds, char kind) { return std::strchr(kinds, kind) != nullptr; };
    codes = has(ins, 'q') || has(outs, 'q');
    scales_of_x = has(outs, 's') && !has(ins, 's') && !has(ins, 'q');
    learned = has(ins, 'n');
    one_scale = std::string_view(name).starts_with("tqt");
  }
};

/// Groups of any lengths, or (learned scales) of one length, or pairs along one axis.
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

/// The format's own range, or one that is a little narrower, or (`wide`) any.
std::string random_range(Random& random, const Format& f, const Needs& needs, bool wide) {
  int64_t low = int64_t(f.lo) + random.chance(20), high = int64_t(f.hi) - (random.chance(20) && f.bits > 2);
  if (wide && random.chance(60)) {
    const int64_t bound = int64_t(1) << random.between(1, 23);
    high = random.chance(40) ? bound : random.between(1, bound);
    low = random.chance(40) ? -bound : -random.between(0, bound);
    const int64_t off = random.between(-bound, bound);
    if (!needs.scales_of_x && random.chance(20))
      low = std::min(low / 2 + off / 2, high / 2 + off / 2 - 1), high = high / 2 + off / 2;
  }
  std::string text;
  if (low != int64_t(f.lo)) text += " min=" + std::to_string(low);
  if (high != int64_t(f.hi)) text += " max=" + std::to_string(high);
  return text;
}

const Format& random_format(Random& random, bool is_integer, bool shares) {
  for (;;) {
    const Format& f = quark::formats()[size_t(random.between(0, int64_t(quark::formats().size()) - 1))];
    if (shares ? f.is_integer() && f.lo < 0 && f.bits >= 3 : f.is_integer() || !is_integer) return f;
  }
}

std::string random_spec(Random& random, Op op, const Shape& shape) {
  if (op == Op::pack || op == Op::unpack) {
    const int64_t bits = random.between(1, 8);
    return "codes bits=" + std::to_string(bits) + (bits > 1 && random.chance(50) ? " signed" : "") + " packed";
  }
  if (op == Op::convert) return "codes bits=8";
  const Needs needs(op);
  const bool shares = !needs.codes && !needs.learned && op != Op::quantize_values && random.chance(25);
  const bool pairs = shares && !shape.empty() && random.chance(60);
  const Format& f = random_format(random, needs.learned, shares);
  std::string text = f.name + random_blocks(random, shape, needs, pairs);
  const auto add = [&](const char* word, bool allowed) {
    if (!allowed || !random.chance(25)) return false;
    text += word;
    return true;
  };
  const bool e8m0 = !shares && add(" scale=e8m0", !f.is_cast());
  if (shares) text += pairs ? " scale=microexponents" : " scale=exponent";
  const bool narrow = add(" narrow", !f.is_integer() && !f.is_cast());
  add(" plus_zero", !f.is_integer() && !f.is_cast());
  const bool ieee = add(" ieee", true);
  if (!f.is_cast() && !shares && !narrow)
    text += std::string(" rounding=") + quark::rounding_names()[size_t(random.between(0, 5))];
  if (f.is_integer()) {
    const bool packed = f.bits <= 8 && random.chance(50);
    text += random_range(random, f, needs, ieee && !shares && !packed);
    if (packed) text += " packed length=" + std::to_string(shape.empty() ? 1 : shape.back());
    add(" reciprocal", !shares);
    add(" shifted", !shares);
    if (!shares && !e8m0 && random.chance(50)) text += " asymmetric";
  }
  if (!f.is_integer() && f.bits <= 8 && random.chance(50))
    text += " packed length=" + std::to_string(shape.empty() ? 1 : shape.back());
  return text;
}

/// Mostly numbers around `range`, ties among them; where `wild`, also anything else.
double random_value(Random& random, double range, bool wild) {
  if (wild && random.chance(15)) {
    const double special[] = {0.0, -0.0, 1e-45, -1e-40, 0x1p-126, 1e300, -FLT_MAX, INFINITY, -INFINITY, NAN, -NAN};
    return special[random.between(0, 10)];
  }
  if (wild && random.chance(15)) return float_of(uint32_t(random.bits()));
  if (random.chance(30)) return double(random.between(-64, 64)) / 4;
  return range * double(random.between(-1'500'000, 1'500'000)) / 1e6;
}

void fill_values(Random& random, Array& a, double range) {
  const bool wild = random.chance(50);
  for (int64_t i = 0; i < a.elements(); ++i) a.put_number(i, random_value(random, range, wild));
}

/// Numbers near one power of two, some of which would round up to the next one.
void fill_block_values(Random& random, Array& a) {
  const bool wild = random.chance(50);
  const bool half = a.dtype() == DType::float16;
  const auto base =
      int(random.chance(40) ? random.between(-10, 10) : random.between(half ? -26 : -151, half ? 15 : 127));
  for (int64_t i = 0; i < a.elements(); ++i) {
    const auto exponent = base - int(random.between(0, random.chance(50) ? 1 : 12));
    const double m =
        random.chance(50) ? 2 - double(random.between(0, 40)) / 4096 : 1 + double(random.between(0, 4095)) / 4096;
    const double x = std::ldexp(random.chance(20) ? std::floor(m * 16) / 16 : m, exponent);
    a.put_number(i, wild && random.chance(10) ? random_value(random, x, true) : random.chance(60) ? x : -x);
  }
}

/// Powers of two.
void fill_block_scales(Random& random, Array& a) {
  const bool any = a.dtype() == DType::float32 || a.dtype() == DType::float64;
  for (int64_t i = 0; i < a.elements(); ++i)
    a.put_number(i,
                 std::ldexp(1.0, int(any && random.chance(20) ? random.between(-149, 127) : random.between(-14, 8))));
}

void fill_scales(Random& random, Array& a) {
  const bool wild = random.chance(30);
  for (int64_t i = 0; i < a.elements(); ++i) {
    double s =
        std::ldexp(1.0 + (random.chance(50) ? 0 : double(random.between(0, 999)) / 1000), int(random.between(-6, 3)));
    if (wild && random.chance(20)) s = random_value(random, 1e-3, true);
    a.put_number(i, s);
  }
}

void fill_zero_points(Random& random, Array& a, bool shifted) {
  const int64_t bytes = quark::bytes_of(a.dtype());
  for (int64_t i = 0; i < a.elements(); ++i) {
    if (a.dtype() == DType::float32) {
      const double z = random_value(random, 300, random.chance(20));
      a.put_number(i, std::isfinite(float(z)) || shifted ? z : 0.5);  // else NaN would have any sign
      continue;
    }
    int64_t z = random.between(-300, 300);
    if (bytes == 1) z = a.dtype() == DType::int8 ? random.between(-128, 127) : random.between(0, 255);
    if (a.dtype() == DType::uint16) z = random.between(0, 65535);
    if (bytes >= 4 && random.chance(20)) z = random.between(-1 << 23, 1 << 23);
    a.put_number(i, double(z));
  }
}

/// Codes of the format: the storage of int4 is bytes, but they hold -8 to 7. Packed bytes are left random, and so are
/// some of the wide codes.
void fill_codes(Random& random, const QuantSpec& spec, Array& a) {
  CodeArray codes{spec, a, 1};
  if (spec.packed || (codes.is_wide() && random.chance(50))) return;
  for (int64_t i = 0; i < a.elements(); ++i) codes.put(i, uint32_t(random.bits()) & ((1u << spec.format.bits) - 1u));
}

Case random_case(Random& random, Op op, Size size) {
  Case c{op, "", {}, {}, {}};
  const Shape shape = random_shape(random, size);
  c.text = random_spec(random, op, shape);
  const Status status = quark::parse_spec(c.text, c.spec);
  if (!status.ok()) check::fail(__FILE__, __LINE__, "\"" + c.text + "\": " + status.message());
  const Format& f = c.spec.format;
  const Needs needs(op);

  Shape scale_shape = shape;
  for (size_t d = 0; d < shape.size(); ++d) scale_shape[d] = quark::scale_length(shape[d], c.spec.block[d]);
  const bool one_scale = arrays::product(scale_shape) == 1;
  Shape code_shape = shape;
  if (c.spec.packed) {
    if (code_shape.empty()) code_shape = {1};
    code_shape.back() = (code_shape.back() * f.bits + 7) / 8;
  }
  const auto [name, ins, outs] = quark::kOps[int(op)];
  const auto make = [&](char kind, bool is_output) {
    const Layout layout = random.chance(40) ? Layout::contiguous : is_output ? Layout::strided : Layout::broadcast;
    Shape small = scale_shape;
    if (one_scale && random.chance(30)) small = random.chance(50) ? Shape{} : Shape{1, 1};
    switch (kind) {
      case 'x': {
        Array a(random, random.chance(40) ? DType::float32 : random.pick(kFloats), shape, layout);
        if (c.spec.scale_format != ScaleFormat::float32 && random.chance(70)) {
          fill_block_values(random, a);
        } else {
          fill_values(random, a, f.is_cast() ? 1e5 : f.is_integer() ? std::fabs(c.spec.quant_max) : f.hi);
        }
        return a;
      }
      case 'c': {
        return Array(random, random.chance(50) ? DType::int8 : DType::uint8, shape, layout);
      }
      case 'q': {
        DType dtype = c.spec.packed || (f.is_fp8() && random.chance(30)) ? DType::uint8 : f.storage;
        if (c.spec.ieee && f.is_integer() && !c.spec.packed) dtype = is_output ? DType::int32 : random.pick(kIntegers);
        Array a(random, dtype, code_shape, layout);
        fill_codes(random, c.spec, a);
        return a;
      }
      case 's': {
        if (is_output) return Array(random, DType::float32, small);
        Array a(random, random.chance(60) ? DType::float32 : random.pick(kFloats), small, layout);
        if (needs.one_scale) {
          for (int64_t i = 0; i < a.elements(); ++i) a.put_number(i, random_value(random, 8, true));
        } else if (c.spec.shares_exponent()) {
          fill_block_scales(random, a);
        } else {
          fill_scales(random, a);
        }
        return a;
      }
      case 'n': {
        Array a(random, DType::float32, random.chance(50) ? Shape{} : Shape{1, 1}, layout);
        const int64_t domain = random.chance(60) ? int64_t(1) << random.between(0, 22) : random.between(1, 1 << 22);
        a.put_number(0, needs.one_scale ? double(domain) : random_value(random, 1e-3, random.chance(10)));
        return a;
      }
      default: {
        if (is_output) return Array(random, DType::int32, small);
        const bool may_be_float = c.spec.shifted || !std::strchr(outs, 'q');
        Array a(random, may_be_float && random.chance(40) ? DType::float32 : random.pick(kIntegers), small, layout);
        fill_zero_points(random, a, c.spec.shifted);
        return a;
      }
    }
  };
  for (const char kind : std::string_view(ins))
    if (kind != 'z' || (f.is_integer() && !c.spec.shares_exponent() && random.chance(60)))
      c.in.push_back(make(kind, false));
  for (const char kind : std::string_view(outs))
    if (kind != 'z' || !c.spec.symmetric) c.out.push_back(make(kind, true));
  return c;
}

// ---- running ------------------------------------------------------------------------------------------------------

/// Chunks of random lengths in random order: what threads may do at worst.
class ShuffledExecutor final : public quark::Executor {
 public:
  explicit ShuffledExecutor(uint64_t seed) : random_(seed) {}

  void run(int64_t items, int64_t, Chunk chunk, void* context) override {
    std::vector<std::pair<int64_t, int64_t>> chunks;
    for (int64_t begin = 0; begin < items;) {
      const int64_t end = std::min(items, begin + random_.between(1, 5));
      chunks.emplace_back(begin, end);
      begin = end;
    }
    for (size_t i = chunks.size(); i > 1; --i)
      std::swap(chunks[i - 1], chunks[size_t(random_.between(0, int64_t(i) - 1))]);
    const quark::FloatEnvironment environment;
    for (const auto& [begin, end] : chunks) chunk(context, begin, end);
  }

 private:
  Random random_;
};

void check_same(const Array& got, const Array& want, const std::string& name) {
  if (got.bytes() == want.bytes()) return;
  for (int64_t i = 0; i < got.elements(); ++i) {
    const size_t at = got.offset(i);
    const auto n = size_t(quark::bytes_of(got.dtype()));
    if (std::memcmp(got.bytes().data() + at, want.bytes().data() + at, n) == 0) continue;
    return check::fail(__FILE__, __LINE__,
                       name + " element " + std::to_string(i) + ": " + check::text_of(got.number(i)) +
                           " != " + check::text_of(want.number(i)));
  }
  check::fail(__FILE__, __LINE__, name + ": a byte outside its elements has changed");
}

template <class Run>
void check_run(Case& c, const std::vector<Array>& want, const char* how, const Run& run) {
  const check::Note note([&] { return std::string(how) + " " + c.description(); });
  std::vector<Array> in = c.in, out = c.out;
  const auto inputs = arrays::views(in), outputs = arrays::views(out);
  const Status status = run(inputs, outputs);
  if (!status.ok()) return check::fail(__FILE__, __LINE__, status.message());
  for (size_t i = 0; i < in.size(); ++i) check_same(in[i], c.in[i], "input " + std::to_string(i));
  for (size_t i = 0; i < out.size(); ++i) check_same(out[i], want[i], "output " + std::to_string(i));
}

/// The call as users make it, and each level's kernel by itself.
void check_case(Case& c, quark::Executor& executor, const char* name) {
  std::vector<Array> want = c.out;
  naive(c, want);
  check_run(c, want, name,
            [&](quark::Tensors in, quark::Tensors out) { return quark::run(c.op, in, out, c.spec, executor); });
  for (const quark::CpuLevel& level : quark::cpu_levels()) {
    if (!level.is_supported()) continue;
    const check::Note note(level.name);
    check_run(c, want, name, [&](quark::Tensors in, quark::Tensors out) {
      return level.kernels[int(c.op)](in, out, c.spec, executor);
    });
  }
}

void check_op(Op op) {
  Random random(100 + uint64_t(op));
  quark::SerialExecutor serial;
  for (int i = 0; i < 3000; ++i) {
    Case c = random_case(random, op, i % 4 == 0 ? Size::tiles : Size::small);
    ShuffledExecutor shuffled(random.bits());
    if (i % 2) {
      check_case(c, serial, "serial");
    } else {
      check_case(c, shuffled, "shuffled");
    }
  }
}

TEST(levels) {
  for (const quark::CpuLevel& level : quark::cpu_levels())
    std::printf("     %s: %s\n", level.name,
                level.is_supported() ? "tested" : "not supported by this machine, skipped");
}

#define QUARK_OP(name, ins, outs) \
  TEST(name) { check_op(Op::name); }
#include "ops.inc"
#undef QUARK_OP

TEST(sums_at_the_tree_s_edges) {
  Random random(160);
  quark::SerialExecutor serial;
  for (const int64_t n : {1, 2, 63, 64, 65, 1023, 1024, 1025, 65536, 1 << 20, (1 << 20) + 1, (1 << 20) + 1025}) {
    Case c{Op::dequantize_backward, "int8 block=0", {}, {}, {}};
    CHECK(quark::parse_spec(c.text, c.spec).ok());
    c.in.emplace_back(random, DType::float32, Shape{n});
    c.in.emplace_back(random, DType::int8, Shape{n});
    c.out.emplace_back(random, DType::float32, Shape{});
    // Terms that swallow each other until they cancel: another order of additions gives another sum.
    std::vector<float> terms(size_t(n), 1.0f);
    for (size_t i = 1; i < terms.size(); i += 2) {
      terms[i] = std::ldexp(float(random.between(1, (1 << 24) - 1)), int(random.between(-60, 60)));
      terms[i - 1] = -terms[i];
    }
    for (size_t i = terms.size(); i > 1; --i) std::swap(terms[i - 1], terms[size_t(random.between(0, int64_t(i) - 1))]);
    for (int64_t i = 0; i < n; ++i) {
      c.in[0].put(i, terms[size_t(i)]);
      c.in[1].put(i, int8_t(1));
    }
    check_case(c, serial, "serial");

    // The same terms as gradients of values below the range, whose slope is -1, in two groups.
    Case d{Op::lsq_backward, "int8 block=1,0 min=-1", {}, {}, {}};
    CHECK(quark::parse_spec(d.text, d.spec).ok());
    for (int k = 0; k < 2; ++k) d.in.emplace_back(random, DType::float32, Shape{2, n});
    d.in.emplace_back(random, DType::float32, Shape{2, 1});
    d.in.emplace_back(random, DType::float32, Shape{});
    d.out.emplace_back(random, DType::float32, Shape{2, n});
    d.out.emplace_back(random, DType::float32, Shape{2, 1});
    for (int64_t i = 0; i < 2 * n; ++i) {
      d.in[0].put(i, -5.0f);
      d.in[1].put(i, terms[size_t(i < n ? i : 2 * n - 1 - i)]);
    }
    for (int k = 0; k < 2; ++k) d.in[2].put(k, 1.0f);
    d.in[3].put(0, 0.1f);
    check_case(d, serial, "serial");
  }
}

TEST(empty_arrays) {
  Random random(150);
  quark::SerialExecutor serial;
  for (int i = 0; i < 1000; ++i) {
    Case c = random_case(random, Op(i % quark::kOpCount), Size::empty);
    check_case(c, serial, "serial");
  }
}

TEST(any_number_of_threads_gives_the_same_bits) {
  Random random(200);
  for (int op = 0; op < quark::kOpCount; ++op) {
    for (int i = 0; i < 6; ++i) {
      Case c = random_case(random, Op(op), Size::large);
      std::vector<Array> want = c.out;
      naive(c, want);
      quark::SerialExecutor serial;
      check_run(c, want, "serial",
                [&](quark::Tensors in, quark::Tensors out) { return quark::run(c.op, in, out, c.spec, serial); });
      for (const int threads : {1, 2, 3, 8}) {
        quark::OpenMPExecutor openmp(threads);
        const std::string how = "OpenMP with " + std::to_string(threads) + " threads";
        for (const quark::CpuLevel& level : quark::cpu_levels()) {
          if (!level.is_supported()) continue;
          const check::Note note(level.name);
          check_run(c, want, how.c_str(),
                    [&](quark::Tensors in, quark::Tensors out) { return level.kernels[op](in, out, c.spec, openmp); });
        }
      }
    }
  }
}

TEST(an_output_may_be_the_very_same_tensor_as_an_input) {
  Random random(300);
  quark::SerialExecutor serial;
  for (int i = 0; i < 1500 * quark::kOpCount; ++i) {
    const int op = i % quark::kOpCount;
    const std::string_view ins = quark::kOps[op].ins;
    if (ins[0] != 'x' || quark::kOps[op].outs[0] != 'x') continue;
    Case c = random_case(random, Op(op), random.chance(25) ? Size::tiles : Size::small);
    const size_t shared = ins[1] == 'x' && random.chance(50) ? 1 : 0;
    Array both(random, random.pick(kFloats), c.in[shared].shape(), Layout::strided);
    fill_values(random, both, 10);
    c.in[shared] = both;
    c.out[0] = both;
    std::vector<Array> want = c.out;
    naive(c, want);
    std::vector<Array> in = c.in, out = c.out;
    const auto inputs = arrays::views(in);
    auto outputs = arrays::views(out);
    outputs[0] = inputs[shared];
    const check::Note note([&] { return "input " + std::to_string(shared) + " in place, " + c.description(); });
    const Status status = quark::run(c.op, inputs, outputs, c.spec, serial);
    if (c.spec.scale_format == ScaleFormat::microexponents && both.elements() > 0) {
      CHECK(!status.ok());  // an element's partner may have been written already
      continue;
    }
    if (!status.ok()) check::fail(__FILE__, __LINE__, status.message());
    for (size_t k = 0; k < in.size(); ++k)
      check_same(in[k], k == shared ? want[0] : c.in[k], "input " + std::to_string(k));
    for (size_t k = 1; k < out.size(); ++k) check_same(out[k], want[k], "output " + std::to_string(k));
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
