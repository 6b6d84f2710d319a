// Every operator from end to end, on every CPU level, against one element at a time. What becomes of an element is
// computed here in double, from its definition; only codes and 16-bit floats are the core's (test_numerics.cpp).
#include <array>
#include <cfloat>
#include <cmath>

#include "cases.h"
#include "reference.h"

namespace {

using namespace cases;
using quark::Method;
using quark::Specials;

// ---- the reference ------------------------------------------------------------------------------------------------

/// A call's arrays by the letters of its row. Inputs, or outputs where no input has the letter; null where there is
/// none.
class Operands {
 public:
  Operands(Case& c, std::vector<Array>& out) {
    take(quark::kOps[int(c.op)].ins, c.in, c.spec);
    take(quark::kOps[int(c.op)].outs, out, c.spec);
  }
  Array*& operator[](char letter) { return found_[letter - 'a']; }
  Array* operator[](char letter) const { return found_[letter - 'a']; }

 private:
  void take(std::string_view letters, std::vector<Array>& arrays, const QuantSpec& spec) {
    size_t at = 0;
    for (const char letter : letters) {
      if (!spec.takes(letter) || at == arrays.size()) continue;
      if (!(*this)[letter]) (*this)[letter] = &arrays[at];
      ++at;
    }
  }

  std::array<Array*, 'z' - 'a' + 1> found_ = {};
};

// What becomes of one element. `data` is the dtype that x has.

/// What an element is computed with.
struct Terms {
  float s, z;
  uint32_t random;
};

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
double on_grid(const QuantSpec& spec, double v, uint32_t random) {
  const Format& f = spec.format;
  const double spacing = std::ldexp(1.0, std::max(std::ilogb(v), int(f.min_exp)) - f.mantissa_bits);
  return std::copysign(reference::rounded(spec.rounding, v / spacing, random) * spacing, v);
}

/// The code of x as a float: integers the code itself, other formats the value that the code stands for.
float quantized(const QuantSpec& spec, DType data, float x, const Terms& t) {
  const Format& f = spec.format;
  const float v = divided(spec, data, x, t.s);
  if (f.is_integer()) return reference::integer_code(spec, v, t.z, t.random);
  const bool has_nan = f.specials != Specials::none, is_signed = has_nan && f.specials != Specials::fnuz;
  if (std::isnan(v)) return has_nan || spec.ieee ? std::copysign(NAN, is_signed ? x : 1.0f) : 0.0f;
  if (f.is_cast()) return cast(f, v);
  const auto y = float(on_grid(spec, std::clamp(v, f.lo, f.hi), t.random));
  const bool has_minus_zero = f.exponent_bits > 0 && f.specials != Specials::fnuz && !spec.plus_zero;
  return y == 0 && !has_minus_zero ? 0.0f : y;
}

float dequantized(float y, const Terms& t, float limit) {
  const float product = (y - t.z) * t.s;
  if (std::isnan(product)) return std::copysign(NAN, y);
  return std::isinf(y) ? product : std::clamp(product, -limit, limit);
}

float fake_quantized(const QuantSpec& spec, DType data, float x, const Terms& t, float limit) {
  if (spec.shares_exponent() && spec.ieee) return reference::finite_value(spec, x, t.s, limit);
  return std::isnan(x) ? std::copysign(NAN, x) : dequantized(quantized(spec, data, x, t), t, limit);
}

bool inside(const QuantSpec& spec, float x, const Terms& t) {
  const Format& f = spec.format;
  const float v = x / t.s;
  if (!std::isfinite(v)) return false;
  if (f.is_cast()) return std::isfinite(cast(f, v));
  if (!f.is_integer()) return std::fabs(on_grid(spec, v, t.random)) <= f.hi;
  const auto r = float(reference::rounded(spec.rounding, v, t.random) + t.z);
  return r >= spec.quant_min && r <= spec.quant_max;
}

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

/// Scales as they are stored: numbers, or codes of one byte.
float scale_number(const QuantSpec& spec, const Array& scale, int64_t index, const Array* tensor_scale) {
  const int of_code_1 = spec.shares_exponent() ? 2 - spec.format.bits : 0;
  const auto power = [&](int e, bool is_nan) { return is_nan ? NAN : std::ldexp(1.0f, e + of_code_1); };
  switch (scale.dtype()) {
    case DType::int8: return power(scale.get<int8_t>(index), scale.get<int8_t>(index) == -128);
    case DType::float8_e8m0fnu: return power(scale.get<uint8_t>(index) - 127, scale.get<uint8_t>(index) == 255);
    case DType::float8_e4m3fn: return float(reference::e4m3_value(scale.get<uint8_t>(index))) * tensor_scale->number(0);
    default: return scale.number(index);
  }
}
void put_scale(Array& scale, int64_t index, const reference::Scale& r) {
  if (scale.dtype() == DType::float32) return scale.put(index, r.number);
  scale.put(index, uint8_t(scale.dtype() == DType::int8 ? r.code - 127 : r.code));
}

/// Where the bit of an element's pair lies, and the pair's other element, -1 where there is none.
struct Pair {
  int64_t byte, bit, other;

  Pair(int64_t flat, const Shape& shape, const QuantSpec& spec) {
    size_t axis = 0;
    while (spec.block[axis] == 1) ++axis;
    int64_t inner = 1;
    for (size_t d = axis + 1; d < shape.size(); ++d) inner *= shape[d];
    const int64_t n = shape[axis], at = flat / inner % n, outer = flat / inner / n;
    byte = (outer * ((n + 15) / 16) + at / 16) * inner + flat % inner;
    bit = at / 2 % 8;
    other = (at ^ 1) < n ? flat + ((at ^ 1) - at) * inner : -1;
  }
};

/// What elements are computed with, by their number.
class TermsOf {
 public:
  TermsOf(const QuantSpec& spec, const Shape& shape, const Operands& at) : spec_(spec), shape_(shape), at_(at) {
    if (at['k'])
      for (int i = 0; i < 2; ++i) key_[size_t(i)] = at['k']->get<uint32_t>(i);
  }

  /// The index of an element, of a shard that in the whole array.
  uint64_t index_of(int64_t flat) const {
    if (!spec_.is_shard) return uint64_t(flat);
    uint64_t index = 0, step = 1;
    for (size_t d = shape_.size(); d-- > 0; flat /= shape_[d], step *= uint64_t(spec_.whole[d]))
      index += uint64_t(at_['k']->get<int32_t>(int64_t(2 + d)) + flat % shape_[d]) * step;
    return index;
  }

  Terms operator()(int64_t flat) const {
    const int64_t index = scale_index(flat, shape_, spec_);
    Terms t{scale_number(spec_, *at_['s'], index, at_['g']), 0, 0};
    if (at_['z']) t.z = at_['z']->number(index);
    if (at_['k']) t.random = reference::random_word(index_of(flat), key_);
    if (!at_['p']) return t;
    const Pair pair(flat, shape_, spec_);
    if (at_['p']->get<uint8_t>(pair.byte) >> pair.bit & 1) t.s = float(double(t.s) / 2);
    return t;
  }

 private:
  const QuantSpec& spec_;
  const Shape& shape_;
  const Operands& at_;
  std::array<uint32_t, 2> key_ = {};
};

/// The scale, of 80 shares of the extremes, that leaves the least squared error.
reference::Scale least_error(const QuantSpec& spec, DType dtype, const std::vector<float>& group) {
  const reference::Bounds all = reference::bounds_of(group);
  reference::Scale best;
  double least = INFINITY;
  for (int i = 0; i < 80; ++i) {
    const float share = float(100 - i) / 100.0f;
    const reference::Scale r = reference::scale_of(spec, dtype, {all.low * share, all.high * share}, 1);
    std::vector<double> errors;
    for (const float x : group) {
      const float y = fake_quantized(spec, dtype, x, {r.number, float(r.zero_point), 0}, FLT_MAX);
      errors.push_back((double(y) - double(x)) * (double(y) - double(x)));
    }
    const double error = tree_sum(errors);
    if (error < least) best = r, least = error;
  }
  return best;
}

reference::Scale chosen_scale(const QuantSpec& spec, DType dtype, const std::vector<float>& group, float tensor_scale) {
  const reference::Bounds all = reference::bounds_of(group);
  const bool is_plain = !all.are_finite() || (all.low == 0 && all.high == 0) || spec.format.is_cast();
  if (spec.method == Method::extremes || is_plain) return reference::scale_of_group(spec, dtype, group, tensor_scale);
  if (spec.method == Method::mse) return least_error(spec, dtype, group);
  return reference::scale_of(spec, dtype, reference::percentiles_of(spec, group), 1);
}

/// Writes scales, zero points and pair bits.
void naive_choose(const QuantSpec& spec, const Operands& at) {
  const Array& x = *at['x'];
  std::vector<std::vector<float>> groups(size_t(at['s']->elements()));
  for (int64_t i = 0; i < x.elements(); ++i) groups[size_t(scale_index(i, x.shape(), spec))].push_back(x.number(i));
  std::vector<float> numbers;
  for (size_t k = 0; k < groups.size(); ++k) {
    const reference::Scale r = chosen_scale(spec, x.dtype(), groups[k], at['g'] ? at['g']->number(0) : 1);
    put_scale(*at['s'], int64_t(k), r);
    if (at['z']) at['z']->put(int64_t(k), int32_t(r.zero_point));
    numbers.push_back(r.number);
  }
  if (!at['p']) return;
  for (int64_t i = 0; i < at['p']->elements(); ++i) at['p']->put(i, uint8_t(0));
  for (int64_t i = 0; i < x.elements(); ++i) {
    const Pair pair(i, x.shape(), spec);
    const float s = numbers[size_t(scale_index(i, x.shape(), spec))];
    const auto is_below = [&](float v) { return reference::is_below(spec, x.dtype(), v, s); };
    if (is_below(x.number(i)) && is_below(pair.other < 0 ? 0 : x.number(pair.other)))
      at['p']->put(pair.byte, uint8_t(at['p']->get<uint8_t>(pair.byte) | 1 << pair.bit));
  }
}

/// The same, and the scale of the whole tensor where the others are relative to one.
void naive_choose_all(const QuantSpec& spec, const Operands& at) {
  if (at['g']) {
    QuantSpec whole = spec;
    whole.scale_format = ScaleFormat::global;
    std::vector<float> all;
    for (int64_t i = 0; i < at['x']->elements(); ++i) all.push_back(at['x']->number(i));
    at['g']->put(0, reference::scale_of_group(whole, at['x']->dtype(), all).number);
  }
  naive_choose(spec, at);
}

/// out = f(i) for every element.
/// Writes max(x, +0) and min(x, -0) of every group, NaN where it has one.
void naive_extremes(const QuantSpec& spec, const Operands& at) {
  const Array& x = *at['x'];
  std::vector<float> most(size_t(at['e']->elements() / 2), 0.0f), least(most.size(), -0.0f);
  for (int64_t i = 0; i < x.elements(); ++i) {
    const auto group = size_t(scale_index(i, x.shape(), spec));
    const float v = x.number(i);
    if (std::isnan(v) || std::isnan(most[group])) {
      most[group] = float_of(0x7fc00000u), least[group] = float_of(0xffc00000u);
    } else {
      if (v > most[group]) most[group] = v;
      if (v < least[group]) least[group] = v;
    }
  }
  for (size_t group = 0; group < most.size(); ++group) {
    at['e']->put(int64_t(2 * group), most[group]);
    at['e']->put(int64_t(2 * group + 1), least[group]);
  }
}

template <class F>
void naive_elementwise(Array& out, const F& f) {
  for (int64_t i = 0; i < out.elements(); ++i) out.put_number(i, f(i));
}

int64_t last_length(const Array& a) { return a.shape().empty() ? 1 : a.shape().back(); }

void naive_quantize(const QuantSpec& spec, const Operands& at) {
  const Array& x = *at['x'];
  CodeArray codes{spec, *at['q'], last_length(x)};
  codes.clear();
  QuantSpec numbers = spec;
  numbers.ieee = false;  // no format without NaN has a code for it
  const TermsOf terms(spec, x.shape(), at);
  for (int64_t i = 0; i < x.elements(); ++i) codes.put_value(i, quantized(numbers, x.dtype(), x.number(i), terms(i)));
}

void naive_fake_quantize(const QuantSpec& spec, const Operands& at, Array& out) {
  const Array& x = *at['x'];
  const TermsOf terms(spec, x.shape(), at);
  naive_elementwise(out, [&](int64_t i) {
    return fake_quantized(spec, x.dtype(), x.number(i), terms(i), limit_of(out.dtype(), spec));
  });
}

/// factor * the sum of each scale's terms.
void put_sums(const std::vector<std::vector<double>>& terms, double factor, Array& out) {
  for (size_t i = 0; i < terms.size(); ++i) {
    const auto sum = float(tree_sum(terms[i]) * factor);
    out.put(int64_t(i), std::isnan(sum) ? NAN : sum);
  }
}

void naive_learn(const QuantSpec& spec, const Operands& at, const Array& grad, double factor, std::vector<Array>& out) {
  const Array& x = *at['x'];
  const TermsOf terms(spec, x.shape(), at);
  std::vector<std::vector<double>> sums(size_t(out[1].elements()));
  for (int64_t i = 0; i < x.elements(); ++i) {
    const Terms t = terms(i);
    const auto [to_x, term] = reference::learned(spec, x.number(i), grad.number(i), t.s, t.z);
    out[0].put_number(i, to_x);
    sums[size_t(scale_index(i, x.shape(), spec))].push_back(term);
  }
  put_sums(sums, factor, out[1]);
}

/// TQT's scale, and its range in the spec.
float use_threshold(const Operands& at, QuantSpec& spec) {
  const float t = at['s']->number(0), n = at['n']->number(0);
  spec.quant_min = -n;
  spec.quant_max = n - 1;
  return std::isnan(t) ? NAN : std::ldexp(1.0f, int(std::clamp(std::ceil(t), -126.0f, 127.0f))) / n;
}

/// Writes what the operator should write.
void naive(Case& c, std::vector<Array>& out) {
  QuantSpec spec = c.spec;
  Operands at(c, out);
  switch (c.op) {
    case Op::choose_qparams: return naive_choose(spec, at);
    case Op::extremes: return naive_extremes(spec, at);
    case Op::quantize: return naive_quantize(spec, at);
    case Op::quantize_dynamic: naive_choose_all(spec, at); return naive_quantize(spec, at);
    case Op::quantize_values: {
      const Array& x = *at['x'];
      const TermsOf terms(spec, x.shape(), at);
      return naive_elementwise(out[0], [&](int64_t i) { return quantized(spec, x.dtype(), x.number(i), terms(i)); });
    }
    case Op::fake_quantize: return naive_fake_quantize(spec, at, out[0]);
    case Op::fake_quantize_dynamic: naive_choose_all(spec, at); return naive_fake_quantize(spec, at, out[0]);
    case Op::dequantize: {
      const CodeArray codes{spec, *at['q'], last_length(out[0])};
      const TermsOf terms(spec, out[0].shape(), at);
      return naive_elementwise(
          out[0], [&](int64_t i) { return dequantized(codes.value(i), terms(i), limit_of(out[0].dtype(), spec)); });
    }
    case Op::fake_quantize_backward: {
      const Array& x = *at['x'];
      const TermsOf terms(spec, x.shape(), at);
      return naive_elementwise(
          out[0], [&](int64_t i) { return inside(spec, x.number(i), terms(i)) ? c.in[1].number(i) : 0.0f; });
    }
    case Op::dequantize_backward: {
      const Array& grad = *at['x'];
      const CodeArray codes{spec, *at['q'], last_length(grad)};
      std::vector<std::vector<double>> terms(size_t(out[0].elements()));
      for (int64_t i = 0; i < grad.elements(); ++i) {
        const int64_t index = scale_index(i, grad.shape(), spec);
        const double q = codes.value(i), z = at['z'] ? at['z']->number(index) : 0.0f;
        terms[size_t(index)].push_back(double(grad.number(i)) * (q - z));
      }
      return put_sums(terms, 1.0, out[0]);
    }
    case Op::lsq_backward: return naive_learn(spec, at, c.in[1], at['n']->number(0), out);
    case Op::tqt_quantize:
    case Op::tqt_backward: {
      const float s = use_threshold(at, spec);
      Random random(0);
      Array scale(random, DType::float32, {});
      scale.put(0, s);
      at['s'] = &scale;
      if (c.op == Op::tqt_quantize) return naive_fake_quantize(spec, at, out[0]);
      return naive_learn(spec, at, c.in[1], double(s) * std::log(2.0), out);
    }
    case Op::convert: return naive_elementwise(out[0], [&](int64_t i) { return c.in[0].number(i); });
    case Op::pack: {
      CodeArray codes{spec, out[0], last_length(c.in[0])};
      codes.clear();
      for (int64_t i = 0; i < c.in[0].elements(); ++i) codes.put(i, c.in[0].get<uint8_t>(i));
      return;
    }
    case Op::unpack: {
      const CodeArray codes{spec, c.in[0], last_length(out[0])};
      return naive_elementwise(out[0], [&](int64_t i) { return value_of(codes.get(i), spec); });
    }
  }
}

// ---- running ------------------------------------------------------------------------------------------------------

/// The call as users make it, and each level's kernel by itself.
void check_case(Case& c, quark::Executor& executor, const char* name) {
  std::vector<Array> want = c.out;
  naive(c, want);
  check_run(c, want, name,
            [&](quark::Tensors in, quark::Tensors out) { return quark::run(c.op, in, out, c.spec, executor); });
  for (const quark::CpuLevel& level : levels()) {
    const check::Note note(level.name);
    check_run(c, want, name, [&](quark::Tensors in, quark::Tensors out) {
      return level.kernels[int(c.op)](in, out, c.spec, executor);
    });
  }
}

/// So many random calls of each operator: QUARK_TEST_CALLS, or 5000.
int calls() {
  const char* wanted = std::getenv("QUARK_TEST_CALLS");
  return wanted ? std::atoi(wanted) : 5000;
}

void check_op(Op op) {
  Random random(100 + uint64_t(op));
  quark::SerialExecutor serial;
  for (int i = 0; i < calls(); ++i) {
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
  CHECK(!levels().empty());
  for (const quark::CpuLevel& level : quark::cpu_levels())
    std::printf("     %s: %s\n", level.name,
                level.is_supported() ? "tested" : "not supported by this machine, skipped");
}

#define QUARK_OP(name, ins, outs) \
  TEST(name) { check_op(Op::name); }
#include "ops.inc"
#undef QUARK_OP

// ---- groups of one row --------------------------------------------------------------------------------------------

/// Groups that follow one another, whose scales are chosen and applied in one pass: shorter than a tile and longer,
/// ending within bytes, whole or ragged at the ends of rows.
TEST(groups_of_one_row) {
  Random random(400);
  quark::SerialExecutor serial;
  const char* texts[] = {"int8",
                         "int2 packed",
                         "int3 packed asymmetric",
                         "int4 packed asymmetric",
                         "int5 packed rounding=stochastic",
                         "int16 asymmetric",
                         "fp8_e4m3 rounding=stochastic",
                         "fp6_e2m3 packed scale=e8m0 rule=rceil",
                         "fp4 packed scale=e4m3",
                         "int8 packed scale=exponent",
                         "int3 packed scale=exponent",
                         "int5 packed scale=microexponents min=-15",
                         "bf16"};
  for (const char* text : texts) {
    const bool has_pairs = std::string_view(text).find("micro") != std::string_view::npos;
    for (const int64_t group :
         {1, 2, 3, 5, 8, 12, 16, 24, 32, 33, 100, 512, 1000, 1023, 1024, 1025, 1032, 2048, 3000}) {
      if (has_pairs && group % 2 != 0) continue;
      for (const Op op : {Op::choose_qparams, Op::quantize_dynamic, Op::fake_quantize_dynamic, Op::quantize_dynamic}) {
        const int64_t groups = random.between(1, 2 + 1500 / group);
        const int64_t n = group * groups + (random.chance(50) ? random.between(0, group - 1) : 0);
        const bool is_flat = random.chance(30);
        const Shape shape = is_flat ? Shape{n} : Shape{random.between(1, 3), 1, n};
        const std::string blocks = (is_flat ? "" : has_pairs ? "1,1," : "1,0,") + std::to_string(group);
        Case c = make_case(random, op, shape, std::string(text) + " block=" + blocks + " length=" + std::to_string(n));
        ShuffledExecutor shuffled(random.bits());
        check_case(c, serial, "serial");
        check_case(c, shuffled, "shuffled");
      }
    }
  }
}

/// What is taken in vectors of eight neighbours: arrays in one piece, with scales that they share and others, some of
/// them no ordinary ones; groups of a few vectors, rows of many, and arrays that don't end with a vector.
TEST(vectors) {
  Random random(402);
  quark::SerialExecutor serial;
  struct Blocks {
    Shape shape;
    const char* block;
  };
  const Blocks all[] = {{{4, 64}, "0,0"},  {{4, 64}, "1,0"},   {{4, 64}, "0,1"},    {{6, 9}, "0,1"},
                        {{4, 64}, "1,16"}, {{3, 96}, "1,32"},  {{2, 512}, "1,256"}, {{3, 8}, "1,8"},
                        {{5, 24}, "1,24"}, {{3, 512}, "1,0"},  {{2, 1000}, "1,0"},  {{2, 2056}, "1,0"},
                        {{3, 20}, "0,0"},  {{7, 11}, "1,0"},   {{8, 12}, "1,4"},    {{9, 8}, "3,0"},
                        {{6, 32}, "2,16"}, {{4, 4104}, "1,0"}, {{16, 8}, "0,0"},    {{5, 128}, "1,64"}};
  const char* texts[] = {"int8",
                         "int8 rounding=stochastic",
                         "int8 rounding=half_up",
                         "uint8 asymmetric",
                         "int4 packed",
                         "int4 packed rounding=stochastic",
                         "uint4 packed asymmetric",
                         "int3 packed",
                         "fp8_e4m3",
                         "fp8_e5m2 rounding=stochastic",
                         "fp8_e5m2fnuz",
                         "fp4",
                         "fp4 packed",
                         "fp4 packed rounding=stochastic",
                         "int8f6 scale=e8m0",
                         "int8f6 scale=e8m0 rounding=stochastic",
                         "fp8_e4m3 scale=e8m0",
                         "fp4 packed scale=e8m0 rule=even",
                         "fp4 packed scale=e4m3",
                         "int8 packed scale=exponent"};
  for (const char* format : texts) {
    for (const auto& [shape, block] : all) {
      std::string text = std::string(format) + " block=" + block + " length=" + std::to_string(shape[1]);
      const bool is_random = text.find("stochastic") != std::string::npos;
      for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        for (const Op op : {Op::quantize, Op::dequantize, Op::fake_quantize, Op::quantize_dynamic,
                            Op::fake_quantize_dynamic, Op::fake_quantize}) {
          Case c = make_case(random, op, shape, text, dtype);
          check_case(c, serial, "serial");
        }
        if (!is_random) continue;
        const std::string whole = " whole=" + std::to_string(shape[0] + 3) + "," + std::to_string(shape[1] + 5);
        Case c = make_case(random, Op::fake_quantize, shape, text + whole, dtype);
        check_case(c, serial, "serial");
      }
    }
  }
  for (const char* format : {"int8", "uint4", "int4 rounding=half_up", "int8 shifted"}) {
    for (const auto& [shape, block] : all) {
      for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        Case c = make_case(random, Op::lsq_backward, shape, std::string(format) + " block=" + block, dtype);
        check_case(c, serial, "serial");
      }
    }
  }
}

/// Around the length from which threads share a group.
TEST(long_groups) {
  Random random(401);
  constexpr int64_t kLongest = 1 << 18;
  const std::pair<const char*, Shape> calls[] = {
      {"int8 block=0", {kLongest}},
      {"int8 block=1,0 asymmetric", {2, kLongest + 1}},
      {"int3 block=1,0 packed", {2, kLongest - 1}},
      {"int3 block=1,262150 packed", {2, kLongest + 8}},
      {"fp4 block=300000 scale=e4m3 packed", {300'017}},
      {"fp8_e4m3 block=1,262144 scale=e8m0 rule=ceil rounding=stochastic", {2, kLongest + 3}},
      {"int8 block=0 scale=exponent", {kLongest + 2}},
      {"int5 block=1,270000 scale=microexponents packed", {2, 270'001}},
      {"int8 block=1,0 method=percentile:99.99", {2, kLongest + 1}}};
  for (const auto& [text, shape] : calls) {
    const bool searches = std::string_view(text).find("method") != std::string_view::npos;
    for (const Op op : {Op::choose_qparams, Op::quantize_dynamic, Op::fake_quantize_dynamic}) {
      if (searches && op != Op::choose_qparams) continue;
      Case c = make_case(random, op, shape, text + (" length=" + std::to_string(shape.back())));
      quark::OpenMPExecutor openmp(3);
      check_case(c, openmp, "OpenMP with 3 threads");
    }
  }
}

// ---- known answers ------------------------------------------------------------------------------------------------

std::vector<float> numbers_of(const Array& a) {
  std::vector<float> all;
  for (int64_t i = 0; i < a.elements(); ++i) all.push_back(a.number(i));
  return all;
}

/// What choosing from a few elements and quantizing them gives, worked out by hand: all outputs one after the other.
/// int8 exponents are their numbers, other scales of a byte their codes.
TEST(known_answers) {
  struct Known {
    Op op;
    const char* text;
    std::vector<float> x;
    std::vector<DType> dtypes;
    std::vector<std::vector<float>> want;
  };
  const auto f32 = DType::float32, i8 = DType::int8, u8 = DType::uint8, e8m0 = DType::float8_e8m0fnu,
             e4m3 = DType::float8_e4m3fn, i32 = DType::int32;
  const Known all[] = {
      {Op::choose_qparams, "int8 block=0 method=percentile:75", {-254, 127, 1, 2}, {f32}, {{1}}},
      {Op::choose_qparams, "int8 block=0 method=percentile:75.1", {-254, 127, 1, 2}, {f32}, {{2}}},
      {Op::choose_qparams, "int8 block=0 method=percentile:0.01", {-254, 127, 1, 2}, {f32}, {{1.0f / 127}}},
      {Op::choose_qparams, "int8 block=0 method=percentile:50", {0, 0, 0, 9}, {f32}, {{1}}},
      {Op::choose_qparams, "int8 block=2 method=percentile:50", {127, 254, NAN, 0}, {f32}, {{1, NAN}}},
      {Op::choose_qparams, "fp4 block=0 scale=e8m0 method=percentile:50", {4, 4096}, {e8m0}, {{127}}},
      // Of max(-x, 0), 0 0 51 99, the third; of max(x, 0), 0 0 204 255, the third.
      {Op::choose_qparams,
       "uint8 asymmetric block=0 method=percentile:75",
       {-99, -51, 204, 255},
       {f32, i32},
       {{1}, {51}}},
      {Op::choose_qparams, "int4 block=0 method=mse", {7, 1, -3, 2}, {f32}, {{1}}},
      // 8 (s - 1)^2 + (1.5 - s)^2 is least at 1.056, between the shares 0.71 and 0.7.
      {Op::choose_qparams, "int2 block=0 method=mse", {1, 1, 1, 1, 1, 1, 1, 1, 1.5f}, {f32}, {{1.5f * 0.7f}}},
      {Op::choose_qparams, "fp4 block=0 scale=global", {-2688}, {f32}, {{1}}},
      {Op::choose_qparams, "fp4 block=0 scale=global", {0}, {f32}, {{1}}},
      {Op::choose_qparams, "fp4 block=0 scale=global", {1, -INFINITY}, {f32}, {{NAN}}},
      {Op::quantize_dynamic,
       "fp4 block=2 scale=e4m3",
       {2688, -448, 6, 0.5f, 0, 0},
       {u8, e4m3, f32},
       {{7, 10, 7, 1, 0, 0}, {0x7e, 0x38, 0x01}, {1}}},
      {Op::quantize_dynamic,
       "fp4 block=2 scale=e4m3",
       {1, 2, NAN, 0},
       {u8, e4m3, f32},
       {{0, 0, 0, 0}, {0x7f, 0x7f}, {NAN}}},
      {Op::quantize_dynamic, "fp4 block=2 scale=e8m0", {3, -5, INFINITY, 1}, {u8, e8m0}, {{5, 14, 0, 0}, {127, 255}}},
      {Op::quantize_dynamic,
       "int8f6 block=2 scale=e8m0",
       {-1.5f, 1.99f, 0, 0},
       {i8, e8m0},
       {{-96, 127, 0, 0}, {127, 0}}},
      {Op::quantize_dynamic,
       "int8 block=2 scale=exponent",
       {1, -1.999f, NAN, 5},
       {i8, i8},
       {{64, -128, 0, 0}, {0, -128}}},
      {Op::quantize_dynamic,
       "int5 block=4 scale=microexponents min=-15",
       {1, 0.5f, -0.5f, 0.25f, 0, 0, 4, -INFINITY},
       {i8, i8, u8},
       {{8, 4, -8, 4, 0, 0, 0, 0}, {0, -128}, {0x2}}},
      {Op::fake_quantize_dynamic,
       "int5 block=16 scale=microexponents min=-15",
       {1, 0.3f, 0.95f, 0.3f, 7},
       {f32, i8, u8},
       {{1, 0.25f, 1, 0.25f, 7}, {2}, {0x3}}},
  };
  for (const Known& k : all) {
    const check::Note note([&] { return std::string(quark::kOps[int(k.op)].name) + " " + k.text; });
    Random random(402);
    Case c{k.op, k.text, {}, {}, {}};
    CHECK(quark::parse_spec(k.text, c.spec).ok());
    c.in.emplace_back(random, f32, Shape{int64_t(k.x.size())});
    for (size_t i = 0; i < k.x.size(); ++i) c.in[0].put(int64_t(i), k.x[i]);
    for (size_t i = 0; i < k.want.size(); ++i)
      c.out.emplace_back(random, k.dtypes[i], Shape{int64_t(k.want[i].size())});
    const auto inputs = arrays::views(c.in), outputs = arrays::views(c.out);
    quark::SerialExecutor serial;
    const Status status = quark::run(c.op, inputs, outputs, c.spec, serial);
    if (!status.ok()) check::fail(__FILE__, __LINE__, status.message());
    for (size_t i = 0; i < k.want.size(); ++i)
      for (size_t j = 0; j < k.want[i].size(); ++j) {
        const check::Note place([&] { return "output " + std::to_string(i) + ", element " + std::to_string(j); });
        CHECK_EQ(numbers_of(c.out[i])[j], k.want[i][j]);
      }
  }
}

// ---- rounding's boundaries ----------------------------------------------------------------------------------------

/// x at and next to the numbers where a quotient by s changes its code or meets an end, and every special float.
std::vector<float> hard_values(Random& random, const Grid& g, bool is_integer, float s, float z) {
  std::vector<float> all = {0.0f,
                            -0.0f,
                            FLT_MIN,
                            -FLT_MIN,
                            0x1p-149f,
                            -0x1p-149f,
                            0x1p-100f,
                            -0x1p-101f,
                            FLT_MAX,
                            -FLT_MAX,
                            INFINITY,
                            -INFINITY,
                            NAN,
                            -NAN,
                            0x1p-60f,
                            0x1.8p-110f,
                            0x1p-126f,
                            float_of(0x7f800001u),
                            float_of(0xffc12345u)};
  const auto put_near = [&](double v) {
    auto x = float(v * double(s));
    for (int i = 0; i < 2; ++i) x = std::nextafter(x, -INFINITY);
    for (int i = 0; i < 5; ++i, x = std::nextafter(x, INFINITY)) all.push_back(x);
  };
  put_near(double(g.lo) - double(z));
  put_near(double(g.hi) - double(z));
  for (int i = 0; i < 200; ++i) {
    const double share = double(random.bits() >> 40) / double(1 << 24);
    double v = double(g.lo) + share * (double(g.hi) - double(g.lo)) - double(z);
    double spacing = 1.0;
    if (!is_integer) {
      v = std::ldexp(v, -int(random.between(0, 20)));
      const int exponent = std::max(std::ilogb(v == 0.0 ? 1.0 : v), exponent_field(g.min_exp));
      spacing = std::ldexp(1.0, exponent - int(g.mantissa));
    }
    put_near((std::floor(v / spacing) + 0.5) * spacing);
  }
  all.resize((all.size() + 15) / 16 * 16, 1.0f);
  return all;
}

/// Scales from one end of what is ordinary to the other, and past both: the shortcuts that they allow change no bit.
TEST(boundaries) {
  Random random(640);
  quark::SerialExecutor serial;
  for (const char* format : {"int8", "int2", "uint4", "uint8", "int16", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz",
                             "fp8_e5m2fnuz", "fp6_e2m3", "fp4", "int8f6"}) {
    for (const char* rounding : {"half_even", "stochastic"}) {
      for (const int exponent : {-127, -100, -61, -49, -48, -47, -20, -7, 0, 9, 59, 60, 61, 100}) {
        for (const int64_t shared : {0, 16, 1}) {  // elements of a scale; 0: all
          for (const Op op : {Op::fake_quantize, Op::quantize}) {
            Case c{op, std::string(format) + " block=" + std::to_string(shared) + " rounding=" + rounding, {}, {}, {}};
            CHECK(quark::parse_spec(c.text, c.spec).ok());
            const Format& f = c.spec.format;
            // Mantissas near 2 make the poorest reciprocals.
            const auto mantissa = uint32_t(random.chance(50) ? random.bits() : 0x7fffff - random.between(0, 200));
            const float s = std::ldexp(float_of(0x3f800000u | (mantissa & 0x7fffffu)), exponent);
            const float z = f.is_integer() && random.chance(50) ? float(random.between(-20, 20)) : 0.0f;
            const std::vector<float> x = hard_values(random, make_grid(c.spec), f.is_integer(), s, z);
            const auto n = int64_t(x.size());
            const DType dtypes[] = {DType::float32, DType::bfloat16, DType::float16};
            const DType dtype = dtypes[random.between(0, 2)];
            c.in.emplace_back(random, dtype, Shape{n});
            for (int64_t i = 0; i < n; ++i) c.in[0].put_number(i, double(x[size_t(i)]));
            const int64_t scales = shared == 0 ? 1 : n / shared;
            c.in.emplace_back(random, DType::float32, Shape{scales});
            for (int64_t i = 0; i < scales; ++i) c.in[1].put(i, s);
            if (c.spec.rounding == Rounding::stochastic) c.in.emplace_back(random, DType::int32, Shape{2});
            if (z != 0.0f) {
              c.in.emplace_back(random, DType::int32, Shape{scales});
              for (int64_t i = 0; i < scales; ++i) c.in.back().put(i, int32_t(z));
            }
            c.out.emplace_back(random, op == Op::quantize ? f.storage : dtype, Shape{n});
            check_case(c, serial, "serial");
          }
        }
      }
    }
  }
}

// ---- spoiled calls ------------------------------------------------------------------------------------------------

/// Good calls about which something has been changed: they are refused and nothing is written, or they are good all the
/// same. Under a sanitizer: nothing outside the tensors is read either way.
TEST(spoiled_calls_do_no_harm) {
  Random random(500);
  quark::SerialExecutor serial;
  const std::vector<DType> all_dtypes = {
#define QUARK_DTYPE(name, bytes, dlpack, xla) DType::name,
      QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
  };
  int refused = 0;
  constexpr int kCalls = 40'000;
  for (int i = 0; i < kCalls; ++i) {
    const auto op = Op(i % quark::kOpCount);
    const Shape shape = random_shape(random, random.chance(10) ? Size::empty : Size::small);
    Case c = make_case(random, op, shape, random_spec(random, op, shape));
    std::vector<Array> in = c.in, out = c.out;
    auto inputs = arrays::views(in), outputs = arrays::views(out);
    auto& side = random.chance(60) ? inputs : outputs;
    const size_t at = size_t(random.between(0, int64_t(side.size()) - 1));
    quark::TensorView& t = side[at];
    const int64_t axis = t.rank > 0 ? random.between(0, t.rank - 1) : 0;
    const DType dtype = random.pick(all_dtypes);
    switch (random.between(0, 9)) {
      case 0: side.erase(side.begin() + int64_t(at)); break;
      case 1: side.insert(side.begin() + int64_t(at), quark::TensorView(t)); break;
      case 2: std::swap(t, random.chance(50) ? inputs.front() : outputs.back()); break;
      case 3:
        if (quark::bytes_of(dtype) <= quark::bytes_of(t.dtype)) t.dtype = dtype;
        break;
      case 4:
        if (t.shape[axis] > 0) t.shape[axis] -= random.between(1, t.shape[axis]);
        break;
      case 5: t.rank = std::max(t.rank - 1, 0); break;
      case 6:
        t.shape[t.rank] = 1;
        ++t.rank;
        break;
      case 7: t.data = outputs.back().elements() == 0 || random.chance(50) ? nullptr : outputs.back().data; break;
      case 8: t.strides[axis] = 0; break;
      default:
        CHECK(quark::parse_spec(random_spec(random, Op(random.between(0, quark::kOpCount - 1)), shape), c.spec).ok());
    }
    const check::Note note([&] { return c.description(); });
    const Status status = quark::run(op, inputs, outputs, c.spec, serial);
    if (status.ok()) continue;
    ++refused;
    CHECK(!status.message().empty());
    for (size_t k = 0; k < in.size(); ++k) check_same(in[k], c.in[k], "input " + std::to_string(k));
    for (size_t k = 0; k < out.size(); ++k) check_same(out[k], c.out[k], "output " + std::to_string(k));
  }
  CHECK(refused > kCalls / 3);
}

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

/// Scales whose squared errors are equal, so that only the order of their sums decides: e8m0 scales of 1 and 1/2. The
/// numbers 4.5 - a - b - c, 1.5 + a, 1.5 + b and 1.5 + c leave the same in all with both, and what is below 1/4 leaves
/// itself.
TEST(squared_errors_add_in_the_tree) {
  Random random(161);
  quark::SerialExecutor serial;
  for (int i = 0; i < 20; ++i) {
    Case c = make_case(random, Op::choose_qparams, {4000}, "int4 block=0 scale=e8m0 method=mse");
    c.in[0] = Array(random, DType::float32, {4000});
    for (int64_t at = 0; at < 4000; at += 5) {
      double rest = 4.5;
      for (int64_t k = 1; k < 4; ++k) {
        const double part = double(random.between(1, 1 << 17)) * 0x1p-21;
        c.in[0].put_number(at + k, 1.5 + part);
        rest -= part;
      }
      c.in[0].put_number(at, rest);
      c.in[0].put_number(at + 4, double(random.between(1, 1 << 24)) * 0x1p-26);
    }
    check_case(c, serial, "serial");
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

TEST(results_past_the_caches) {
  Random random(151);
  quark::SerialExecutor serial;
  quark::OpenMPExecutor openmp(2);
  const int64_t cache = std::exchange(quark::last_cache_bytes(), 0);
  for (int i = 0; i < 60 * quark::kOpCount; ++i) {
    Case c = random_case(random, Op(i % quark::kOpCount), i % 4 == 0 ? Size::tiles : Size::small);
    check_case(c, i % 5 == 0 ? static_cast<quark::Executor&>(openmp) : serial, "past the caches");
  }
  quark::last_cache_bytes() = cache;
}

/// Gradients of scales from numbers so tiny that a quotient's remainder isn't exact. Each case has numbers of one size,
/// as a sum would hide the lesser ones.
TEST(slopes_of_tiny_numbers) {
  Random random(152);
  quark::SerialExecutor serial;
  for (int i = 0; i < 20000; ++i) {
    const Shape shape = {random.between(1, 3), random.between(1, 40)};
    Case c = make_case(random, Op::lsq_backward, shape, random_spec(random, Op::lsq_backward, shape));
    const auto fill = [&](Array& a, int64_t exponent) {
      for (int64_t k = 0; k < a.elements(); ++k)
        a.put_number(k, std::ldexp(double(random.between(1 << 23, 1 << 24)), int(exponent) - 23));
    };
    const bool is_large = random.chance(50);
    fill(c.in[0], is_large ? random.between(-100, -90) : random.between(-140, -115));
    fill(c.in[1], 0);
    fill(c.in[2], is_large ? random.between(40, 50) : random.between(-5, 0));
    check_case(c, serial, "tiny numbers");
  }
}

/// Of 16-bit gradients a NaN becomes the one NaN with its sign, whatever its payload and wherever it stands.
TEST(gradients_that_are_nan) {
  Random random(153);
  quark::SerialExecutor serial;
  int words = 0;
  for (int i = 0; i < 20000; ++i) {
    const Shape shape = {random.between(1, 3), random.between(17, 70)};
    const DType half = random.chance(50) ? DType::float16 : DType::bfloat16;
    Case c = i % 8 ? make_case(random, Op::lsq_backward, shape, random_spec(random, Op::lsq_backward, shape))
                   : make_case(random, Op::lsq_backward, {2, 4 * shape[1]}, "int8 block=1,0", half);
    Array& grad = c.in[1];
    const DType dtype = grad.dtype();
    if (dtype != DType::float16 && dtype != DType::bfloat16) continue;
    ++words;
    const int quiet = dtype == DType::float16 ? 0x7e00 : 0x7fc0;
    for (int64_t k = 0; k < grad.elements(); ++k)
      grad.put(k, uint16_t((quiet + random.between(1, 0x7fff - quiet)) | (random.chance(50) ? 0x8000 : 0)));
    for (int64_t k = 0; k < c.in[0].elements(); ++k) c.in[0].put_number(k, 0.0);
    check_case(c, serial, "NaN gradients");
  }
  CHECK(words > 2000);
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
        for (const quark::CpuLevel& level : levels()) {
          const check::Note note(level.name);
          check_run(c, want, how.c_str(),
                    [&](quark::Tensors in, quark::Tensors out) { return level.kernels[op](in, out, c.spec, openmp); });
        }
      }
    }
  }
}

// ---- batches ------------------------------------------------------------------------------------------------------

void copy_element(const Array& from, int64_t at, Array& to, int64_t index) {
  switch (quark::bytes_of(from.dtype())) {
    case 1: return to.put(index, from.get<uint8_t>(at));
    case 2: return to.put(index, from.get<uint16_t>(at));
    case 4: return to.put(index, from.get<uint32_t>(at));
    default: return to.put(index, from.get<uint64_t>(at));
  }
}

/// A batch of calls and, by itself, each of them.
struct Batch {
  Case whole;
  std::vector<Case> examples;
  Shape lengths;

  /// Examples like this one: its elements, moved round from one to the next. Each batch axis of an input may be shared.
  Batch(Random& random, const Case& model, const Shape& of_batch)
      : whole{model.op, model.text + " batch=" + std::to_string(of_batch.size()), {}, {}, {}}, lengths(of_batch) {
    CHECK(quark::parse_spec(whole.text, whole.spec).ok());
    examples.assign(size_t(arrays::product(lengths)), model);
    for (size_t i = 0; i < model.in.size(); ++i) {
      Shape shape = lengths;
      // The first one isn't shared, so that there are so many examples.
      for (int64_t& n : shape) n = i > 0 && random.chance(40) ? 1 : n;
      const char letter = letter_of(model, quark::kOps[int(model.op)].ins, i);
      Array all = batched(random, model.in[i], shape, letter == 'k' ? Layout::strided : Layout::broadcast);
      const auto count = int64_t(examples.size());
      for (int64_t e = 0; e < count; ++e) fill(random, letter, model.in[i], all, e);
      for (int64_t e = 0; e < count; ++e) {
        Array one(random, all.dtype(), model.in[i].shape());
        move_example(one, all, e, false);
        examples[size_t(e)].in[i] = one;
      }
      whole.in.push_back(std::move(all));
    }
    for (size_t i = 0; i < model.out.size(); ++i) {
      const char letter = letter_of(model, quark::kOps[int(model.op)].outs, i);
      const bool may_have_steps = std::strchr("xqc", letter) != nullptr;
      whole.out.push_back(
          batched(random, model.out[i], lengths, may_have_steps ? Layout::strided : Layout::contiguous));
    }
  }

  /// The batch's outputs, from the examples' own.
  std::vector<Array> expected() {
    std::vector<Array> want = whole.out;
    for (size_t e = 0; e < examples.size(); ++e) {
      std::vector<Array> out = examples[e].out;
      naive(examples[e], out);
      for (size_t i = 0; i < out.size(); ++i) move_example(out[i], want[i], int64_t(e), true);
    }
    return want;
  }

 private:
  static Array batched(Random& random, const Array& a, Shape shape, Layout layout) {
    shape.insert(shape.end(), a.shape().begin(), a.shape().end());
    return Array(random, a.dtype(), shape, random.chance(40) ? Layout::contiguous : layout);
  }
  /// The number of an example's first element.
  int64_t first(const Array& all, int64_t example, int64_t elements) const {
    int64_t at = 0, step = 1;
    for (size_t d = lengths.size(); d-- > 0; example /= lengths[d]) {
      if (all.shape()[d] != 1) at += example % lengths[d] * step;
      step *= all.shape()[d];
    }
    return at * elements;
  }
  void move_example(Array& one, Array& all, int64_t example, bool into_all) const {
    const int64_t n = one.elements(), from = first(all, example, n);
    for (int64_t j = 0; j < n; ++j)
      into_all ? copy_element(one, j, all, from + j) : copy_element(all, from + j, one, j);
  }
  static char letter_of(const Case& c, std::string_view row, size_t at) {
    for (const char letter : row)
      if (c.spec.takes(letter) && at-- == 0) return letter;
    return '?';
  }
  void fill(Random& random, char letter, const Array& a, Array& all, int64_t example) const {
    const int64_t n = a.elements(), to = first(all, example, n);
    for (int64_t j = 0; j < n; ++j) {
      if (letter != 'k') {
        copy_element(a, (j + 3 * example) % n, all, to + j);
      } else if (j < 2) {
        all.put(to + j, uint32_t(random.bits()));
      } else {  // where a shard begins: there or at 0
        all.put(to + j, random.chance(50) ? a.get<int32_t>(j) : 0);
      }
    }
  }
};

void check_batch(Batch& batch, quark::Executor& executor, const char* how) {
  const std::vector<Array> want = batch.expected();
  Case& c = batch.whole;
  check_run(c, want, how,
            [&](quark::Tensors in, quark::Tensors out) { return quark::run(c.op, in, out, c.spec, executor); });
}

TEST(batches) {
  Random random(210);
  quark::SerialExecutor serial;
  for (int i = 0; i < 250 * quark::kOpCount; ++i) {
    const auto op = Op(i % quark::kOpCount);
    const Case model = random_case(random, op, i % 10 == 0 ? Size::tiles : i % 11 == 0 ? Size::empty : Size::small);
    Shape lengths(size_t(random.between(1, 3)));
    for (int64_t& n : lengths) n = random.chance(5) ? 0 : random.between(1, 4);
    Batch batch(random, model, lengths);
    ShuffledExecutor shuffled(random.bits());
    check_batch(batch, random.chance(50) ? static_cast<quark::Executor&>(serial) : shuffled, "a batch");
  }
}

/// Examples that share the threads, and examples among which they are shared.
TEST(batches_on_threads) {
  Random random(211);
  for (int op = 0; op < quark::kOpCount; ++op) {
    for (const int64_t length : {20'000, (1 << 18) + 3}) {
      const Shape shape = {2, length / 2};
      const Case model = make_case(random, Op(op), shape, random_spec(random, Op(op), shape));
      Batch batch(random, model, length > 1 << 18 ? Shape{2} : Shape{3, 2});
      quark::OpenMPExecutor openmp(3);
      check_batch(batch, openmp, "OpenMP with 3 threads");
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
    if (!status.ok()) check::fail(__FILE__, __LINE__, status.message());
    for (size_t k = 0; k < in.size(); ++k)
      check_same(in[k], k == shared ? want[0] : c.in[k], "input " + std::to_string(k));
    for (size_t k = 1; k < out.size(); ++k) check_same(out[k], want[k], "output " + std::to_string(k));
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
