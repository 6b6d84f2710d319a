// The scalar numerics against tables of each format's values and exact double arithmetic.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "check.h"
#include "numerics.h"
#include "reference.h"

namespace {

using check::Random;
using quark::DType;
using quark::Format;
using quark::QuantSpec;
using quark::Rounding;
using quark::ScaleFormat;
using quark::ScaleRule;
using quark::Specials;
using reference::rounded;
using namespace quark::QUARK_LEVEL;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLargest = FLT_MAX, kTiny = 0x1p-149f;

// ---- the reference ------------------------------------------------------------------------------------------------

QuantSpec spec_of(const std::string& text) {
  QuantSpec spec;
  const quark::Status status = quark::parse_spec(text, spec);
  if (!status.ok()) check::fail(__FILE__, __LINE__, status.message());
  return spec;
}

/// A format's magnitudes in order, continued past its end. For float formats the place in it is the code.
class Table {
 public:
  explicit Table(const Format& f) : format_(f) {
    const double end = 8.0 * f.hi;
    for (double m = 0; m <= end;) {
      magnitudes_.push_back(m);
      const int exponent = m > 0 ? std::max(std::ilogb(m), int(f.min_exp)) : f.min_exp;
      m += std::ldexp(1.0, exponent - f.mantissa_bits);
    }
  }

  struct Place {
    size_t index;  // of the last magnitude that isn't larger
    double part;   // of the way to the next one
  };
  Place find(double magnitude) const {
    const auto above = std::upper_bound(magnitudes_.begin(), magnitudes_.end(), magnitude);
    const auto k = size_t(above - magnitudes_.begin()) - 1;
    return {k, (magnitude - magnitudes_[k]) / (magnitudes_[k + 1] - magnitudes_[k])};
  }
  static size_t round(Rounding r, Place p, bool negative, uint32_t random = 0) {
    bool up = false;
    switch (r) {
      case Rounding::half_even: up = p.part > 0.5 || (p.part == 0.5 && p.index % 2 == 1); break;
      case Rounding::half_up: up = negative ? p.part > 0.5 : p.part >= 0.5; break;
      case Rounding::half_away: up = p.part >= 0.5; break;
      case Rounding::floor: up = negative && p.part > 0; break;
      case Rounding::ceil: up = !negative && p.part > 0; break;
      case Rounding::toward_zero: break;
      case Rounding::stochastic: up = random < std::floor(p.part * 0x1p32); break;
    }
    return p.index + size_t(up);
  }

  double operator[](size_t k) const { return magnitudes_[k]; }
  size_t size() const { return magnitudes_.size(); }
  const Format& format() const { return format_; }
  bool has_minus_zero() const { return format_.exponent_bits > 0 && format_.specials != Specials::fnuz; }
  /// The signed value as a float of the format.
  float value(double magnitude, bool negative) const {
    if (magnitude == 0 && !has_minus_zero()) return 0.0f;
    return float(negative ? -magnitude : magnitude);
  }

 private:
  const Format& format_;
  std::vector<double> magnitudes_;
};

bool is_negative(float x) { return std::signbit(x); }
float nan_of(bool negative) { return float_of(kNaN | (negative ? kSign : 0)); }

/// Without the one that is random.
template <class F>
void for_each_fixed_rounding(const F& f) {
#define QUARK_ROUNDING(name) f.template operator()<Rounding::name>();
  QUARK_FIXED_ROUNDINGS(QUARK_ROUNDING)
#undef QUARK_ROUNDING
}

template <class F>
void for_each_rounding(const F& f) {
  for_each_fixed_rounding(f);
  f.template operator()<Rounding::stochastic>();
}

// ---- inputs -------------------------------------------------------------------------------------------------------

std::vector<float> specials() {
  std::vector<float> all = {0.0f,
                            kTiny,
                            2 * kTiny,
                            3 * kTiny,
                            float_of(kMinNormal - 1),
                            float_of(kMinNormal),
                            1e-40f,
                            0.1f,
                            1.0f,
                            1e10f,
                            0x1p126f,
                            0x1p127f,
                            kLargest,
                            std::nextafter(kLargest, 0.0f),
                            kInf,
                            float_of(0x7fc00000),
                            float_of(0x7f800001),
                            float_of(0x7fffffff),
                            float_of(0x7fa12345)};
  const size_t n = all.size();
  for (size_t i = 0; i < n; ++i) all.push_back(float_of(bits_of(all[i]) | kSign));
  return all;
}

/// x, its neighbours up to two steps away, and the same with the other sign.
void push_near(std::vector<float>& all, float x) {
  const float below = std::nextafter(x, -kInf), above = std::nextafter(x, kInf);
  for (const float y : {x, below, above, std::nextafter(below, -kInf), std::nextafter(above, kInf)}) {
    all.push_back(y);
    all.push_back(-y);
  }
}

/// Every value of the grid, every midpoint, and what is next to them.
std::vector<float> edges(const Table& table) {
  std::vector<float> all = specials();
  for (size_t k = 0; k + 1 < table.size(); ++k) {
    push_near(all, float(table[k]));
    push_near(all, float((table[k] + table[k + 1]) / 2));
  }
  return all;
}

/// A random word at or next to the one where a number rounds up that far past the one below.
uint32_t random_word(Random& random, double part) {
  const auto edge = int64_t(std::isfinite(part) ? part * 0x1p32 : 0);
  switch (random.between(0, 5)) {
    case 0: return 0;
    case 1: return 0xffffffffu;
    case 2: return uint32_t(random.bits());
    default: return uint32_t(std::clamp<int64_t>(edge - random.between(-1, 1), 0, 0xffffffff));
  }
}
/// Of t on the unit grid.
uint32_t random_word_for(Random& random, float t) {
  return random_word(random, std::fabs(t) - std::trunc(std::fabs(t)));
}

/// Any bits, or bits with an exponent that matters to the format and often few bits set: near ties.
float random_float(Random& random, const Format& f) {
  const uint64_t bits = random.bits();
  auto u = uint32_t(bits);
  if (bits >> 32 & 1) {
    const int low = f.min_exp - f.mantissa_bits - 2, high = std::ilogb(f.hi) + 2;
    const int exponent = std::clamp(int(random.between(low, high)) + 127, 0, 255);
    u = (u & 0x807fffffu) | uint32_t(exponent) << 23;
    if (bits >> 33 & 1) u &= ~uint32_t((uint64_t(1) << (bits >> 34) % 23) - 1);
    if (bits >> 40 & 1) u ^= 1;
  }
  return float_of(u);
}

template <class F>
void for_each_input(const Table& table, int randoms, const F& f) {
  for (const float x : edges(table)) f(x);
  Random random(1);
  for (int i = 0; i < randoms; ++i) f(random_float(random, table.format()));
}

// ---- grids --------------------------------------------------------------------------------------------------------

TEST(rows_have_their_documented_largest_values) {
  struct Known {
    const char* name;
    uint32_t code;
    float value;
  };
  const Known known[] = {{"fp8_e4m3", 0x7e, 448},
                         {"fp8_e4m3", 0x08, 0x1p-6f},
                         {"fp8_e4m3", 0x01, 0x1p-9f},
                         {"fp8_e5m2", 0x7b, 57344},
                         {"fp8_e5m2", 0x7c, kInf},
                         {"fp8_e5m2", 0x01, 0x1p-16f},
                         {"fp8_e4m3fnuz", 0x7f, 240},
                         {"fp8_e4m3fnuz", 0x01, 0x1p-10f},
                         {"fp8_e5m2fnuz", 0x7f, 57344},
                         {"fp8_e5m2fnuz", 0x01, 0x1p-17f},
                         {"fp6_e3m2", 0x1f, 28},
                         {"fp6_e3m2", 0x21, -0.0625f},
                         {"fp6_e2m3", 0x1f, 7.5f},
                         {"fp6_e2m3", 0x3f, -7.5f},
                         {"fp4", 0x1, 0.5f},
                         {"fp4", 0x2, 1},
                         {"fp4", 0x3, 1.5f},
                         {"fp4", 0x5, 3},
                         {"fp4", 0x7, 6},
                         {"fp4", 0xf, -6},
                         {"fp8_e4m3", 0xc0, -2},
                         {"fp8_e5m2", 0x3c, 1}};
  for (const Known& k : known) {
    const QuantSpec spec = spec_of(k.name);
    CHECK_EQ(decode(k.code, make_grid(spec)), k.value);
  }
  for (const Format& f : quark::formats()) {
    const check::Note note(f.name);
    if (f.is_integer()) {
      CHECK_EQ(double(f.hi) - double(f.lo) + 1, std::ldexp(1.0, f.bits));
    } else {
      CHECK_EQ(f.lo, -f.hi);
    }
  }
}

TEST(round_to_grid) {
  for (const Format& f : quark::formats()) {
    if (f.is_cast() && f.exponent_bits == 8) continue;  // bf16: the anchor would overflow; it has a function of its own
    const check::Note note(f.name);
    const Table table(f);
    const Grid grid = make_grid(spec_of(f.name));
    Random random(14);
    for_each_input(table, 500'000, [&](float v) {
      if (!(std::fabs(v) <= 4 * f.hi)) return;
      const bool negative = is_negative(v);
      const Table::Place place = table.find(std::fabs(v));
      const uint32_t word = random_word(random, place.part);
      for_each_rounding([&]<Rounding R>() {
        const float want = table.value(table[Table::round(R, place, negative, word)], negative);
        const float got = quark::QUARK_LEVEL::round_to_grid<R>(v, word, grid);
        const check::Note input([&] {
          return quark::rounding_names()[int(R)] + (" of " + check::text_of(v)) + ", word " + check::text_of(word);
        });
        CHECK_EQ(got, want);
      });
    });
  }
}

TEST(minifloats_quantize_saturate_and_encode) {
  for (const Format& f : quark::formats()) {
    if (f.is_integer() || f.is_cast()) continue;
    const check::Note note(f.name);
    const Table table(f);
    const Grid grid = make_grid(spec_of(f.name));
    const auto top = size_t(table.find(f.hi).index);
    Random random(2);
    for_each_input(table, 300'000, [&](float x) {
      const float s = random.chance(50) ? 1.0f : float_of(uint32_t(random.bits()) & ~kSign);
      const float v = x / s;
      const bool negative = is_negative(v);
      const bool far = !(std::fabs(v) < 4 * f.hi);
      const Table::Place place = far ? Table::Place{top, 0} : table.find(std::fabs(v));
      const uint32_t word = random_word(random, place.part);
      for_each_rounding([&]<Rounding R>() {
        const check::Note input([&] {
          return quark::rounding_names()[int(R)] + (" of " + check::text_of(x)) + " / " + check::text_of(s) +
                 ", word " + check::text_of(word);
        });
        const size_t index = Table::round(R, place, negative, word);
        float want = table.value(table[std::min(index, top)], negative);
        if (std::isnan(v)) {
          const bool has_nan = f.specials != Specials::none;
          want = has_nan ? nan_of(is_negative(x) && f.specials != Specials::fnuz) : 0.0f;
        }
        const float got = quantize_value<Arithmetic::minifloat, R>(x, s, 0.0f, word, grid);
        CHECK_EQ(got, want);
        CHECK_EQ((is_inside<Arithmetic::minifloat, R>(x, s, 0.0f, word, grid)), !std::isnan(v) && !far && index <= top);
        if (f.exponent_bits == 0 || std::isnan(v)) return;
        const uint32_t sign = is_negative(want) ? 1u << (f.bits - 1) : 0;
        CHECK_EQ(encode(got, grid), uint32_t(std::min(index, top)) | sign);
      });
    });
  }
}

TEST(codes_up_to_eight_bits_decode_and_encode) {
  for (const Format& f : quark::formats()) {
    if (f.bits > 8 || f.exponent_bits == 0) continue;
    const Table table(f);
    const Grid grid = make_grid(spec_of(f.name));
    const uint32_t half = 1u << (f.bits - 1);
    for (uint32_t code = 0; code < 2 * half; ++code) {
      const check::Note note([&] { return std::string(f.name) + " code " + std::to_string(code); });
      const uint32_t m = code & (half - 1);
      const bool negative = code >= half;
      float want = float(negative ? -table[m] : table[m]);
      uint32_t back = code;
      if (f.specials == Specials::nan && m == half - 1) want = nan_of(negative);
      if (f.specials == Specials::ieee && m == 0x7c) want = negative ? -kInf : kInf;
      if (f.specials == Specials::ieee && m > 0x7c) want = nan_of(negative), back = code | 0x7f;
      if (f.specials == Specials::fnuz && code == half) want = nan_of(false);
      const float value = decode(code, grid);
      CHECK_EQ(value, want);
      if (std::isinf(value)) continue;  // read, never written
      CHECK_EQ(encode(value, grid), back);
    }
  }
}

// ---- 16-bit floats ------------------------------------------------------------------------------------------------

template <class Widen, class Narrow>
void test_16_bit_float(const char* name, uint32_t infinity, uint32_t nan, Widen widen, Narrow narrow) {
  const Format f = spec_of(name).format;
  const Table table(f);
  CHECK_EQ(table[infinity - 1], double(f.hi));
  for (uint32_t h = 0; h <= 0xffff; ++h) {
    const check::Note note([&] { return name + (" " + check::text_of(h)); });
    const uint32_t m = h & 0x7fff;
    const float x = widen(uint16_t(h));
    CHECK_EQ(is_negative(x), h > 0x7fff);
    if (m > infinity) {
      CHECK(std::isnan(x));
      CHECK_EQ(narrow(x), nan | (h & 0x8000));
    } else {
      CHECK_EQ(magnitude(x), m == infinity ? kInf : float(table[m]));
      CHECK_EQ(narrow(x), h);
    }
  }
  for_each_input(table, 2'000'000, [&](float x) {
    const uint32_t sign = is_negative(x) ? 0x8000 : 0;
    uint32_t want = nan;
    if (std::fabs(x) >= 2 * f.hi) {
      want = infinity;
    } else if (!std::isnan(x)) {
      want = uint32_t(Table::round(Rounding::half_even, table.find(std::fabs(x)), false));
      want = std::min(want, infinity);
    }
    const check::Note note([&] { return name + (" of " + check::text_of(x)); });
    CHECK_EQ(narrow(x), want | sign);
  });
}

TEST(float16) { test_16_bit_float("fp16", 0x7c00, 0x7e00, from_float16, to_float16); }
TEST(bfloat16) { test_16_bit_float("bf16", 0x7f80, 0x7fc0, from_bfloat16, to_bfloat16); }

template <Arithmetic A, class Widen, class Narrow>
void test_cast(const char* name, Widen widen, Narrow narrow) {
  const Format f = spec_of(name).format;
  const Grid grid = make_grid(spec_of(name));
  for_each_input(Table(f), 300'000, [&](float x) {
    const check::Note note([&] { return name + (" of " + check::text_of(x)); });
    const float want = std::isnan(x) ? nan_of(is_negative(x)) : widen(narrow(x));
    CHECK_EQ((quantize_value<A, Rounding::half_even>(x, 1.0f, 0.0f, 0, grid)), want);
    CHECK_EQ((fake_quantize_value<A, Rounding::half_even>(x, 1.0f, 0.0f, kLargest, 0, grid)), want);
    CHECK_EQ((is_inside<A, Rounding::half_even>(x, 1.0f, 0.0f, 0, grid)), std::isfinite(want));
  });
}

TEST(casts_overflow_to_infinity) {
  test_cast<Arithmetic::float16>("fp16", from_float16, to_float16);
  test_cast<Arithmetic::bfloat16>("bf16", from_bfloat16, to_bfloat16);
}

// ---- integers -----------------------------------------------------------------------------------------------------

TEST(integers_round_exactly_at_every_size) {
  std::vector<float> all = specials();
  for (int k = 0; k < 300; ++k) push_near(all, float(k) / 2);
  for (int e = -149; e < 128; ++e) push_near(all, std::ldexp(1.0f, e));
  for (int e = 20; e < 26; ++e)
    for (int k = -8; k <= 8; ++k) push_near(all, std::ldexp(1.0f, e) + float(k) / 2);
  Random random(3);
  for (int i = 0; i < 1'000'000; ++i) all.push_back(random_float(random, spec_of("uint16").format));
  for (const float t : all) {
    if (!std::isfinite(t)) continue;
    const uint32_t word = random_word_for(random, t);
    for_each_rounding([&]<Rounding R>() {
      const check::Note note([&] {
        return quark::rounding_names()[int(R)] + (" of " + check::text_of(t)) + ", word " + check::text_of(word);
      });
      const auto want = float(std::fabs(t) < 0x1p40f ? std::copysign(rounded(R, t, word), double(t)) : double(t));
      CHECK_EQ(round_to_integer<R>(t, word), want);
      if (std::fabs(t) >= 0x1p22f) return;
      CHECK_EQ(round_small_to_integer<R>(t, word) + 0.0f, want + 0.0f);
    });
  }
}

void test_integer(Random& random, const QuantSpec& spec, float z, float x, float s) {
  const Grid grid = make_grid(spec);
  const float v = x / s;
  const uint32_t word = random_word_for(random, v);
  for_each_rounding([&]<Rounding R>() {
    const check::Note note([&] {
      return std::string(spec.format.name) + " " + quark::rounding_names()[int(R)] + " of " + check::text_of(x) +
             " / " + check::text_of(s) + ", zero point " + check::text_of(z) + ", word " + check::text_of(word);
    });
    const double r = std::fabs(v) < 0x1p40f ? rounded(R, v, word) : double(v);
    const double code = std::isnan(v) ? z : r + z;
    const auto want = float(std::clamp(code, double(spec.quant_min), double(spec.quant_max)) + 0.0);
    const bool inside = !std::isnan(v) && code >= spec.quant_min && code <= spec.quant_max;
    CHECK_EQ((quantize_value<Arithmetic::affine, R>(x, s, z, word, grid)), want);
    CHECK_EQ((is_inside<Arithmetic::affine, R>(x, s, z, word, grid)), inside);
    if (z != 0) return;
    CHECK_EQ((quantize_value<Arithmetic::integer, R>(x, s, z, word, grid)), want);
    CHECK_EQ((is_inside<Arithmetic::integer, R>(x, s, z, word, grid)), inside);
  });
}

TEST(integers_with_and_without_zero_points) {
  std::vector<std::string> specs = {"int8 min=-7 max=100", "int16 min=0 max=1", "uint8 min=3 max=250",
                                    "int4 min=-8 max=-1 asymmetric", "uint16 min=1000 max=65535 asymmetric"};
  for (const Format& f : quark::formats())
    if (f.is_integer()) specs.emplace_back(f.name);
  Random random(4);
  for (const std::string& text : specs) {
    const QuantSpec spec = spec_of(text);
    std::vector<float> zeros = {0,     1,       -1,       2,           7,           -128,    255,
                                65535, 0x1p22f, -0x1p22f, 0x1p23f - 1, 1 - 0x1p23f, 0x1p23f, -0x1p23f};
    for (int i = 0; i < 6; ++i) zeros.push_back(float(random.between(-1 << 23, 1 << 23)));
    for (const float z : zeros) {
      std::vector<float> all = specials();
      for (const float end : {spec.quant_min - z, spec.quant_max - z, 0.0f})
        for (int k = -20; k <= 20; ++k) push_near(all, end + float(k) / 4);
      for (int i = 0; i < 2000; ++i) {
        all.push_back(float_of(uint32_t(random.bits())));
        all.push_back(
            float(random.between(int64_t(4 * (spec.quant_min - z)) - 9, int64_t(4 * (spec.quant_max - z)) + 9)) / 4);
      }
      for (const float x : all) {
        test_integer(random, spec, z, x, 1.0f);
        test_integer(random, spec, z, x, float_of(uint32_t(random.bits())));
      }
    }
  }
}

// ---- other orders -------------------------------------------------------------------------------------------------

TEST(quotients) {
  constexpr auto kReciprocal = Arithmetic::reciprocal, kShifted = Arithmetic::reciprocal_shifted;
  Random random(12);
  std::vector<float> scales = specials();
  push_near(scales, 0x1p-128f);
  push_near(scales, 0x1p-126f);
  for (int i = 0; i < 3000; ++i) scales.push_back(float_of(uint32_t(random.bits())));
  int64_t differ = 0;
  for (const float s : scales) {
    for (int i = 0; i < 200; ++i) {
      const float x = i < 20 ? random.pick(specials()) : float_of(uint32_t(random.bits())), v = x / s;
      const check::Note note([&] { return check::text_of(x) + " / " + check::text_of(s); });
      const float want = std::fabs(s) <= 0x1p-128f ? v : x * (1 / s);
      const auto same = [](float a, float b) { return std::isnan(a) ? std::isnan(b) : check::same(a, b); };
      CHECK(same(quotient<kReciprocal>(x, s), want));
      CHECK(same(quotient<kShifted>(x, s), want));
      for (const float y : {quotient<Arithmetic::affine>(x, s), quotient<Arithmetic::minifloat>(x, s)})
        CHECK(same(y, v));
      CHECK(same(quotient<Arithmetic::minifloat_float16>(x, s), from_float16(to_float16(v))));
      CHECK(same(quotient<Arithmetic::minifloat_bfloat16>(x, s), from_bfloat16(to_bfloat16(v))));
      differ += !same(want, v);
    }
  }
  CHECK(differ > 10'000);
  CHECK_EQ(quotient<kReciprocal>(0x1p-140f, 0x1p-128f), 0x1p-12f);
  CHECK_EQ(quotient<kReciprocal>(0x1p-140f, std::nextafter(0x1p-128f, 1.0f)), 0x1.fffffp-13f);
  CHECK_EQ(quotient<kReciprocal>(0, 0x1p-128f), 0.0f);
  CHECK_EQ(quotient<kReciprocal>(5, 0), kInf);
  CHECK_EQ(quotient<kReciprocal>(-5, -kInf), 0.0f);
  CHECK_EQ(quotient<kReciprocal>(3, kLargest), 3 * (1 / kLargest));
  CHECK_EQ(quotient<Arithmetic::minifloat_float16>(1 + 0x1p-11f, 1), 1.0f);
  CHECK_EQ(quotient<Arithmetic::minifloat_float16>(-65520, 1), -kInf);
  CHECK_EQ(quotient<Arithmetic::minifloat_float16>(1, 0x1p25f), 0.0f);
  CHECK_EQ(quotient<Arithmetic::minifloat_bfloat16>(257, 1), 256.0f);
  CHECK_EQ(quotient<Arithmetic::minifloat_bfloat16>(kLargest, 1), kInf);
}

template <Arithmetic A, Rounding R>
void test_order(QuantSpec spec, float x, float s, float z) {
  spec.shifted = adds_before(A);
  spec.rounding = R;
  const check::Note note([&] {
    return std::string(spec.format.name) + " arithmetic " + std::to_string(int(A)) + " " +
           quark::rounding_names()[int(R)] + " of " + check::text_of(x) + " / " + check::text_of(s) + ", zero point " +
           check::text_of(z);
  });
  CHECK_EQ((quantize_value<A, R>(x, s, z, 0, make_grid(spec))),
           reference::integer_code(spec, quark::QUARK_LEVEL::quotient<A>(x, s), z));
}

TEST(integers_in_every_order) {
  Random random(13);
  for (const char* text : {"int8", "int8 ieee", "uint4 min=1 max=14", "int16 ieee min=-8388608 max=8388608",
                           "int4 ieee min=100 max=200"}) {
    const QuantSpec spec = spec_of(text);
    for (const float z : {0.0f, 5.0f, -300.0f, 0.5f, -0.3f, 1e-20f, 0x1p23f, 3e9f, -1e30f}) {
      std::vector<float> all = specials();
      for (const float end : {spec.quant_min - z, spec.quant_max - z, 0.0f})
        for (int k = -8; k <= 8; ++k) push_near(all, end + float(k) / 4);
      for (int i = 0; i < 1000; ++i) all.push_back(float_of(uint32_t(random.bits())));
      for (const float x : all) {
        for (const float s : {1.0f, 0.7f, float_of(uint32_t(random.bits()))}) {
          for_each_fixed_rounding([&]<Rounding R>() {
            test_order<Arithmetic::affine, R>(spec, x, s, z);
            test_order<Arithmetic::shifted, R>(spec, x, s, z);
            test_order<Arithmetic::reciprocal, R>(spec, x, s, z);
            test_order<Arithmetic::reciprocal_shifted, R>(spec, x, s, z);
          });
        }
      }
    }
  }
  // A zero point that is no number: the code of zero, or NaN.
  const Grid int8 = make_grid(spec_of("int8")), ieee = make_grid(spec_of("int8 ieee"));
  const auto shifted = quantize_value<Arithmetic::shifted, Rounding::half_even>;
  for (const float z : {nan_of(true), -kInf}) {
    CHECK_EQ(shifted(kInf, 1, z, 0, int8), 0.0f);
    CHECK_EQ(shifted(kInf, 1, z, 0, ieee), nan_of(false));
  }
  const auto affine = quantize_value<Arithmetic::affine, Rounding::half_even>;
  for (const float x : {1.0f, nan_of(false), nan_of(true)})
    for (const float z : {nan_of(false), nan_of(true)}) CHECK_EQ(affine(x, 1, z, 0, ieee), nan_of(false));
}

TEST(zeros_and_nan_of_float_formats) {
  constexpr auto kEven = Rounding::half_even;
  const auto quantized = quantize_value<Arithmetic::minifloat, kEven>;
  for (const Format& f : quark::formats()) {
    if (f.is_integer() || f.is_cast()) continue;
    const check::Note note(f.name);
    const Grid plain = make_grid(spec_of(f.name)), plus = make_grid(spec_of(f.name + std::string(" plus_zero"))),
               ieee = make_grid(spec_of(f.name + std::string(" ieee")));
    const bool has_minus_zero = f.exponent_bits > 0 && f.specials != Specials::fnuz;
    for (const float x : {-0.0f, -kTiny}) {
      CHECK_EQ(quantized(x, 1, 0, 0, plain), has_minus_zero ? -0.0f : 0.0f);
      CHECK_EQ(quantized(x, 1, 0, 0, plus), 0.0f);
    }
    CHECK_EQ(quantized(-1, 1, 0, 0, plus), -1.0f);
    const bool is_signed = f.specials == Specials::nan || f.specials == Specials::ieee;
    CHECK_EQ(quantized(-0.0f, 0, 0, 0, ieee), nan_of(is_signed));
    CHECK_EQ(quantized(kInf, 1, 0, 0, ieee), f.hi);
    CHECK_EQ((fake_quantize_value<Arithmetic::minifloat, kEven>(kInf, kLargest, 0, kInf, 0, ieee)),
             f.hi > 1 ? kInf : kLargest);
  }
}

// ---- dequantize ---------------------------------------------------------------------------------------------------

template <Arithmetic A>
void test_dequantize(float y, float s, float z, float limit) {
  const check::Note note([&] {
    return check::text_of(y) + " - " + check::text_of(z) + " times " + check::text_of(s) + ", limit " +
           check::text_of(limit);
  });
  const double difference = A == Arithmetic::affine ? double(y) - double(z) : double(y);
  float want = float(difference * double(s));  // the product is exact: at most 24 + 24 bits
  const bool keeps_infinity = std::isinf(y) && A != Arithmetic::integer && A != Arithmetic::affine;
  if (std::isnan(want)) {
    want = nan_of(is_negative(y));
  } else if (!keeps_infinity) {
    want = std::clamp(want, -limit, limit);
  }
  CHECK_EQ(dequantize_value<A>(y, s, z, limit), want);
}

TEST(dequantize_saturates) {
  const float limits[] = {65504.0f, 0x1.fep127f, kLargest};
  // Known answers: the scale's NaN and the code's infinity are kept, everything else is brought to the limit.
  CHECK_EQ(dequantize_value<Arithmetic::integer>(100, 1000, 0, 65504), 65504.0f);
  CHECK_EQ(dequantize_value<Arithmetic::integer>(-100, 1000, 0, 65504), -65504.0f);
  CHECK_EQ(dequantize_value<Arithmetic::integer>(100, kInf, 0, kLargest), kLargest);
  CHECK_EQ(dequantize_value<Arithmetic::affine>(5, kInf, 5, kLargest), nan_of(false));
  CHECK_EQ(dequantize_value<Arithmetic::affine>(0, kLargest, 2, 65504), -65504.0f);
  CHECK_EQ(dequantize_value<Arithmetic::minifloat>(kInf, 1, 0, 65504), kInf);
  CHECK_EQ(dequantize_value<Arithmetic::minifloat>(-kInf, 2, 0, 65504), -kInf);
  CHECK_EQ(dequantize_value<Arithmetic::minifloat>(kInf, 0, 0, 65504), nan_of(false));
  CHECK_EQ(dequantize_value<Arithmetic::minifloat>(-448, kLargest, 0, kLargest), -kLargest);
  CHECK_EQ(dequantize_value<Arithmetic::minifloat>(-0.0f, 1, 0, kLargest), -0.0f);
  CHECK_EQ(dequantize_value<Arithmetic::minifloat>(-1, nan_of(false), 0, kLargest), nan_of(true));
  CHECK_EQ(dequantize_value<Arithmetic::bfloat16>(0x1.fep127f, 1, 0, kLargest), 0x1.fep127f);

  Random random(5);
  std::vector<float> scales = specials();
  for (int i = 0; i < 3000; ++i) scales.push_back(float_of(uint32_t(random.bits())));
  for (const float limit : limits) {
    for (const float s : scales) {
      for (int i = 0; i < 40; ++i) {
        const auto code = float(random.between(-32768, 65535));
        test_dequantize<Arithmetic::integer>(code, s, 0, limit);
        test_dequantize<Arithmetic::affine>(code, s, 0, limit);
        test_dequantize<Arithmetic::affine>(code, s, float(random.between(-1 << 23, 1 << 23)), limit);
      }
      for (const float z : {-0x1p23f, 0x1p23f}) test_dequantize<Arithmetic::affine>(65535, s, z, limit);
      for (const char* name : {"fp8_e4m3", "fp8_e5m2", "fp8_e5m2fnuz", "fp4"}) {
        const QuantSpec spec = spec_of(name);
        const auto code = uint32_t(random.between(0, (1 << spec.format.bits) - 1));
        test_dequantize<Arithmetic::minifloat>(decode(code, make_grid(spec)), s, 0, limit);
      }
      test_dequantize<Arithmetic::minifloat>(kInf, s, 0, limit);
      test_dequantize<Arithmetic::minifloat>(-kInf, s, 0, limit);
      test_dequantize<Arithmetic::minifloat>(-0.0f, s, 0, limit);
      test_dequantize<Arithmetic::minifloat>(nan_of(true), s, 0, limit);
      test_dequantize<Arithmetic::float16>(from_float16(uint16_t(random.bits())), s, 0, limit);
      test_dequantize<Arithmetic::bfloat16>(from_bfloat16(uint16_t(random.bits())), s, 0, limit);
    }
  }
}

TEST(fake_quantize_is_dequantize_of_quantize_but_for_nan) {
  Random random(6);
  const Grid e4m3 = make_grid(spec_of("fp8_e4m3")), fp4 = make_grid(spec_of("fp4")), int8 = make_grid(spec_of("int8"));
  std::vector<float> all = specials();
  for (int i = 0; i < 300'000; ++i) all.push_back(random_float(random, spec_of("int8").format));
  for (const float x : all) {
    const float s = random.chance(50) ? 0.3f : float_of(uint32_t(random.bits()));
    const auto z = float(random.between(-300, 300));
    const auto word = uint32_t(random.bits());
    const check::Note note([&] { return check::text_of(x) + " / " + check::text_of(s); });
    for_each_rounding([&]<Rounding R>() {
      const float nan = nan_of(is_negative(x));
      const auto fake = [&]<Arithmetic A>(float zero, const Grid& grid) {
        const float y = dequantize_value<A>(quantize_value<A, R>(x, s, zero, word, grid), s, zero, 65504.0f);
        CHECK_EQ((fake_quantize_value<A, R>(x, s, zero, 65504.0f, word, grid)), std::isnan(x) ? nan : y);
      };
      fake.template operator()<Arithmetic::integer>(0, int8);
      fake.template operator()<Arithmetic::affine>(z, int8);
      fake.template operator()<Arithmetic::minifloat>(0, e4m3);
      fake.template operator()<Arithmetic::minifloat>(0, fp4);
    });
  }
}

TEST(is_inside_at_the_edges) {
  const Grid e4m3 = make_grid(spec_of("fp8_e4m3")), fp4 = make_grid(spec_of("fp4")), int4 = make_grid(spec_of("int4"));
  const auto e4m3_inside = [&](float x) {
    return is_inside<Arithmetic::minifloat, Rounding::half_even>(x, 1, 0, 0, e4m3);
  };
  CHECK(e4m3_inside(448));
  CHECK(e4m3_inside(464));  // the tie goes to 448, which is even; 480 is not
  CHECK(!e4m3_inside(std::nextafter(464.0f, kInf)));
  CHECK(e4m3_inside(-464));
  CHECK(!e4m3_inside(-kLargest));
  CHECK(!e4m3_inside(kInf));
  CHECK(!e4m3_inside(nan_of(false)));
  const auto fp4_inside = [&](float x) {
    return is_inside<Arithmetic::minifloat, Rounding::half_even>(x, 1, 0, 0, fp4);
  };
  CHECK(fp4_inside(std::nextafter(7.0f, 0.0f)));
  CHECK(!fp4_inside(7));  // to 8
  CHECK((is_inside<Arithmetic::minifloat, Rounding::toward_zero>(7.9999995f, 1, 0, 0, fp4)));
  CHECK((!is_inside<Arithmetic::minifloat, Rounding::toward_zero>(8, 1, 0, 0, fp4)));
  CHECK((is_inside<Arithmetic::minifloat, Rounding::floor>(7.9999995f, 1, 0, 0, fp4)));
  CHECK((!is_inside<Arithmetic::minifloat, Rounding::floor>(-6.0000005f, 1, 0, 0, fp4)));
  CHECK((!is_inside<Arithmetic::minifloat, Rounding::ceil>(6.0000005f, 1, 0, 0, fp4)));
  CHECK((is_inside<Arithmetic::integer, Rounding::half_even>(std::nextafter(7.5f, 0.0f), 1, 0, 0, int4)));
  CHECK((!is_inside<Arithmetic::integer, Rounding::half_even>(7.5f, 1, 0, 0, int4)));
  CHECK((is_inside<Arithmetic::integer, Rounding::half_even>(-8.5f, 1, 0, 0, int4)));
  CHECK((!is_inside<Arithmetic::integer, Rounding::half_away>(-8.5f, 1, 0, 0, int4)));
  CHECK((is_inside<Arithmetic::affine, Rounding::half_even>(2.5f, 1, 5, 0, int4)));
  CHECK((!is_inside<Arithmetic::affine, Rounding::half_even>(3.0f, 1, 5, 0, int4)));
  CHECK((!is_inside<Arithmetic::affine, Rounding::half_even>(nan_of(true), 1, 5, 0, int4)));
}

// ---- dynamic scales -----------------------------------------------------------------------------------------------

void test_bounds(const QuantSpec& spec, float low, float high) {
  const check::Note note([&] {
    return std::string(spec.format.name) + (spec.symmetric ? " symmetric" : " asymmetric") + " bounds " +
           check::text_of(low) + ", " + check::text_of(high);
  });
  const reference::Scale want = reference::scale_of(spec, DType::float32, {low, high}, 1);
  const ScaleAndZero got = scale_from_bounds(bits_of(low), bits_of(high), spec.symmetric, make_grid(spec));
  CHECK_EQ(got.scale, want.number);
  CHECK_EQ(got.zero_point, int32_t(want.zero_point));
}

TEST(scale_from_bounds) {
  std::vector<float> bounds = {
      0,   kTiny, 2 * kTiny, 100 * kTiny, 1e-40f,   1e-36f, 0x1p-126f,     0x1p-120f,           0.1f, 1, 127,
      255, 1e30f, 0x1p127f,  0x1.fp127f,  kLargest, kInf,   nan_of(false), float_of(0x7f800001)};
  Random random(7);
  for (int i = 0; i < 300; ++i) bounds.push_back(float_of(uint32_t(random.bits()) & ~kSign));
  for (const Format& f : quark::formats()) {
    if (f.is_cast()) continue;
    std::vector<std::string> texts = {f.name, f.name + std::string(" scale=global")};
    if (f.is_integer()) texts.push_back(f.name + std::string(" asymmetric"));
    if (f.is_integer()) texts.push_back(f.name + std::string(" asymmetric min=0 max=1"));
    if (f.is_integer()) texts.push_back(f.name + std::string(" min=0"));
    for (const std::string& text : texts)
      for (const float low : bounds)
        for (const float high : bounds) test_bounds(spec_of(text), low, high);
  }
  // Known answers.
  const auto int8 = make_grid(spec_of("int8")), uint8 = make_grid(spec_of("uint8"));
  const auto known = [](ScaleAndZero r, float scale, int32_t zero) {
    CHECK_EQ(r.scale, scale);
    CHECK_EQ(r.zero_point, zero);
  };
  known(quark::QUARK_LEVEL::scale_from_bounds(0, 0, true, int8), 1, 0);
  known(quark::QUARK_LEVEL::scale_from_bounds(0, 0, false, int8), 1, -128);
  known(quark::QUARK_LEVEL::scale_from_bounds(bits_of(63.5f), bits_of(127), true, int8), 1, 0);
  known(quark::QUARK_LEVEL::scale_from_bounds(bits_of(51), bits_of(204), false, uint8), 1, 51);
  known(quark::QUARK_LEVEL::scale_from_bounds(0, 1, true, int8), 0x1p-126f, 0);
  known(quark::QUARK_LEVEL::scale_from_bounds(bits_of(1), bits_of(kInf), false, int8), nan_of(false), -128);
}

// ---- power-of-two scales ------------------------------------------------------------------------------------------

TEST(power_of_two) {
  for (int e = -149; e <= 127; ++e) CHECK_EQ(quark::QUARK_LEVEL::power_of_two(e), std::ldexp(1.0f, e));
}

/// The keys that a reduction takes to the scale of a block.
struct BlockKeys {
  uint32_t magnitude = 0, finite = 0, exponent = 0;

  BlockKeys(const std::vector<float>& block, const Grid& grid) {
    for (const float x : block) {
      magnitude = std::max(magnitude, magnitude_key(x));
      finite = std::max(finite, finite_key(x));
      exponent = std::max(exponent, exponent_key(x, grid));
    }
  }
};

ScaleAndZero scale_of_block(const QuantSpec& spec, DType dtype, const std::vector<float>& block) {
  const Grid grid = make_grid(spec, dtype);
  const BlockKeys keys(block, grid);
  if (spec.scale_format == ScaleFormat::e8m0) return e8m0_scale(keys.magnitude, grid);
  if (spec.scale_rule == ScaleRule::fit) return exponent_scale(int32_t(keys.exponent) - 150, false, grid);
  const uint32_t key = spec.ieee ? keys.finite : keys.magnitude;
  return exponent_scale(exponent_field(key), key >= kInfinity, grid);
}

std::vector<std::string> specs_with_scales_of_powers_of_two() {
  std::vector<std::string> all = {"int8 scale=e8m0 min=-7 max=100", "int16 ieee scale=e8m0 max=8388608 rule=even",
                                  "int16 ieee scale=e8m0 max=8388607 rule=rceil",
                                  "int5 scale=microexponents block=16 min=-15 max=15",
                                  "int8 scale=microexponents block=16 min=-127 max=127 ieee"};
  for (const Format& f : quark::formats()) {
    if (f.is_cast()) continue;
    for (const char* rule : {"floor", "ceil", "even", "rceil"})
      all.push_back(f.name + std::string(" scale=e8m0 rule=") + rule);
    if (!f.is_integer() || f.lo == 0 || f.bits < 3) continue;
    for (const char* words : {" scale=exponent", " scale=exponent rule=fit ieee", " scale=microexponents block=2"})
      all.push_back(f.name + std::string(words));
  }
  return all;
}

/// Numbers just below, at and above powers of two and the ties on the way to the next one.
float random_near_power(Random& random, int exponent) {
  const auto bits = int(random.between(0, 23));
  const float m = random.chance(60) ? 2 - std::ldexp(1.0f, -bits) : 1 + std::ldexp(1.0f, -bits);
  const float x = std::ldexp(random.chance(30) ? std::nextafter(m, kInf) : m, exponent);
  return random.chance(50) ? -x : x;
}

TEST(scales_of_blocks) {
  Random random(9);
  std::vector<float> all = specials();
  for (int e = -149; e < 128; ++e) {
    push_near(all, std::ldexp(1.0f, e));
    for (int bits = 1; bits < 24; ++bits) push_near(all, std::ldexp(2 - std::ldexp(1.0f, -bits), e));
  }
  for (const std::string& text : specs_with_scales_of_powers_of_two()) {
    const QuantSpec spec = spec_of(text);
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
      const auto test = [&](std::vector<float> block) {
        for (float& x : block) {
          if (dtype == DType::float16) x = from_float16(to_float16(x));
          if (dtype == DType::bfloat16) x = from_bfloat16(to_bfloat16(x));
        }
        const check::Note note([&] {
          std::string values = text + ", " + quark::name_of(dtype) + " of";
          for (const float x : block) values.append(" ").append(check::text_of(x));
          return values;
        });
        const ScaleAndZero got = scale_of_block(spec, dtype, block);
        const reference::Scale want = reference::scale_of_group(spec, dtype, block);
        CHECK_EQ(got.scale, want.number);
        if (spec.scale_rule != ScaleRule::fit) CHECK_EQ(got.code, want.code);
      };
      for (const float x : all) test({x});
      for (int i = 0; i < 2000; ++i) {
        std::vector<float> block(size_t(random.between(1, 8)));
        const auto exponent = int(random.between(dtype == DType::float16 ? -26 : -151, 127));
        for (float& x : block) {
          x = random_near_power(random, exponent - int(random.between(0, 2)));
          if (random.chance(5)) x = random.pick(all);
        }
        test(block);
      }
    }
  }
  // Known answers: one ordinary block each, and the ends.
  const auto known = [](const char* text, const std::vector<float>& block, float want, DType dtype = DType::float32) {
    const check::Note note(text);
    CHECK_EQ(scale_of_block(spec_of(text), dtype, block).scale, want);
  };
  known("fp4 scale=e8m0", {3, -5.9f}, 1);
  known("fp4 scale=e8m0", {0, -0.0f}, 0x1p-127f);
  known("fp4 scale=e8m0", {kLargest}, 0x1p125f);
  known("fp4 scale=e8m0 rule=ceil", {4}, 1);
  known("fp4 scale=e8m0 rule=ceil", {-5}, 2);
  known("fp4 scale=e8m0 rule=rceil", {6}, 1);
  known("fp4 scale=e8m0 rule=rceil", {6.0000005f}, 2);
  known("fp4 scale=e8m0 rule=even", {6.9999995f}, 1);
  known("fp4 scale=e8m0 rule=even", {7}, 2);  // the tie between 6 and 8 goes to 8
  known("fp4 scale=e8m0 rule=rceil", {kLargest}, 0x1p126f);
  known("int8f6 scale=e8m0 rule=ceil", {kLargest}, 0x1p127f);  // not 2^128
  known("fp8_e5m2 scale=e8m0 rule=ceil", {0x1.8p-113f}, 0x1p-127f);
  known("fp8_e5m2 scale=e8m0 rule=ceil", {0x1.8p-112f}, 0x1p-126f);
  known("fp8_e5m2 scale=e8m0", {0x1p-112f}, 0x1p-127f);
  known("int8f6 scale=e8m0", {kLargest}, 0x1p127f);
  known("int8f6 scale=e8m0", {kTiny}, 0x1p-127f);
  known("int8f6 scale=e8m0", {1, kInf}, nan_of(false));
  known("int8f6 scale=e8m0", {1, nan_of(true)}, nan_of(false));
  known("int8f6 scale=e8m0 rule=even", {127.49f}, 64);
  known("int8f6 scale=e8m0 rule=even", {127.5f}, 128);
  known("int8 scale=e8m0 rule=even", {127.5f}, 2);
  known("int8 scale=exponent", {1, 0.3f}, 0x1p-6f);
  known("int8 scale=exponent", {-127.9f}, 1);  // no doubling
  known("int8 scale=exponent", {0}, 0x1p-132f);
  known("int8 scale=exponent", {kTiny}, 0x1p-132f);
  known("int8 scale=exponent", {0x1p-126f}, 0x1p-132f);
  known("int8 scale=exponent", {kLargest}, 0x1p121f);
  known("int8 scale=exponent", {1, -kInf}, nan_of(false));
  const char* fit = "int8 scale=exponent rule=fit ieee";
  known(fit, {1, 0.3f}, 0x1p-6f);
  known(fit, {127.49f}, 1);
  known(fit, {127.5f}, 2);  // the tie goes to 128
  known(fit, {-127.5f}, 1);
  known(fit, {kInf, nan_of(false), 2}, 0x1p-5f);
  known(fit, {0}, kTiny);
  known(fit, {kTiny}, kTiny);
  known(fit, {kLargest}, 0x1p122f);
  known(fit, {-kLargest}, 0x1p121f);
  const char* micro = "int8 scale=microexponents block=16";
  known(micro, {1, 0.3f}, 0x1p-6f);
  known(micro, {127.5f, kInf}, nan_of(false));
  known("int8 scale=microexponents block=16 ieee", {127.5f, kInf}, 1);
  known(micro, {0}, 0x1p-133f);
  known(micro, {kTiny}, 0x1p-133f);
  known(micro, {0}, 0x1p-21f, DType::float16);
  known("int5 scale=microexponents block=16", {0x1p-20f}, 0x1p-18f, DType::float16);
}

/// Integers only: amax = m * 2^e with 24 bits of m, and the ends of E8M0's range.
uint32_t e8m0_code(uint32_t amax, const QuantSpec& spec) {
  const auto parts = [](uint32_t bits) {
    struct {
      uint64_t m;
      int e;
    } p{bits & 0x7fffffu, int(bits >> 23)};
    if (p.e > 0) p.m |= 1u << 23;
    for (p.e = std::max(p.e, 1); p.m < 1u << 23; p.m *= 2) --p.e;
    return p;
  };
  if (amax > 0x7f7fffff) return 255;
  if (amax == 0) return 0;
  const auto x = parts(amax), top = parts(bits_of(float(reference::top_of(spec))));
  const int mantissa = spec.format.is_integer() ? top.e - 127 : spec.format.mantissa_bits;
  // 2 - 2^-(mantissa + 1), as m: in 2^-24ths, as it may need 25 bits.
  const uint64_t tie = (uint64_t(2) << 24) - (uint64_t(1) << (24 - mantissa - 1));
  bool up = false;
  switch (spec.scale_rule) {
    case ScaleRule::floor:
    case ScaleRule::fit: break;
    case ScaleRule::ceil: up = x.m > 1u << 23; break;
    case ScaleRule::even: up = 2 * x.m >= tie; break;
    case ScaleRule::rceil: up = x.m > top.m; break;
  }
  return uint32_t(std::clamp(x.e - top.e + up, -127, 127) + 127);
}

TEST(e8m0_scales_of_every_bfloat16_and_every_exponent) {
  std::vector<uint32_t> fractions = {0, 0x7fffff};
  for (int bit = 0; bit < 23; ++bit)
    for (const uint32_t edge : {1u << bit, 0x800000u - (1u << bit), 0x400000u | 1u << bit, 0x600000u, 0x7e0000u})
      for (const uint32_t f : {edge - 1, edge, edge + 1}) fractions.push_back(f & 0x7fffffu);
  for (const std::string& text : specs_with_scales_of_powers_of_two()) {
    const QuantSpec spec = spec_of(text);
    if (spec.scale_format != ScaleFormat::e8m0) continue;
    const Grid grid = make_grid(spec);
    const auto test = [&](uint32_t amax) {
      const check::Note note([&] { return text + " of " + check::text_of(float_of(amax)); });
      const uint32_t code = e8m0_code(amax, spec);
      const ScaleAndZero got = e8m0_scale(amax, grid);
      CHECK_EQ(got.code, code);
      CHECK_EQ(got.scale, code == 255 ? nan_of(false) : std::ldexp(1.0f, int(code) - 127));
      CHECK_EQ(decode_e8m0(code, 0), got.scale);
    };
    for (uint32_t high = 0; high <= 0x7fff; ++high) test(high << 16);  // a negative one has the same magnitude
    for (uint32_t exponent = 0; exponent <= 0xff; ++exponent)
      for (const uint32_t fraction : fractions) test(exponent << 23 | fraction);
    const uint32_t top = bits_of(float(reference::top_of(spec))) & 0x7fffff;
    for (uint32_t exponent = 0; exponent <= 0xff; ++exponent)
      for (const uint32_t fraction : {top - 1, top, top + 1}) test(exponent << 23 | (fraction & 0x7fffffu));
    for (int bit = 0; bit < 23; ++bit)
      for (uint32_t m : {1u << bit, (1u << bit) + 1, (2u << bit) - 1}) test(m);  // subnormal
  }
}

TEST(exponents_of_every_bfloat16) {
  for (const char* text : {"int8 scale=exponent", "int3 scale=exponent", "int16 scale=exponent",
                           "int5 scale=microexponents block=16", "int16 scale=microexponents block=2"}) {
    const QuantSpec spec = spec_of(text);
    const Grid grid = make_grid(spec);
    for (uint32_t high = 0; high <= 0x7fff; ++high) {
      const check::Note note([&] { return text + (" of " + check::text_of(float_of(high << 16))); });
      const auto field = int(high >> 7) - 127, least = spec.has_pairs() ? -127 : -126;
      const bool is_nan = field == 128;
      const int e = std::max(field, least);
      const ScaleAndZero got = exponent_scale(field, is_nan, grid);
      CHECK_EQ(got.code, is_nan ? 255u : uint32_t(e + 127));
      CHECK_EQ(got.scale, is_nan ? nan_of(false) : std::ldexp(1.0f, e + 2 - spec.format.bits));
      // What is stored is read as the same scale: an E8M0 code, or as int8 its exponent, where -128 is NaN.
      const int of_code_1 = 2 - spec.format.bits;
      CHECK_EQ(decode_e8m0(got.code, of_code_1), got.scale);
      CHECK_EQ(decode_e8m0(uint8_t(int8_t(uint8_t(got.code - 127)) + 127), of_code_1), got.scale);
    }
  }
}

TEST(is_below_exponent) {
  Random random(10);
  for (const char* text : {"int5 scale=microexponents block=16", "int8 scale=microexponents block=16",
                           "int16 scale=microexponents block=16"}) {
    const QuantSpec spec = spec_of(text);
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
      const Grid grid = make_grid(spec, dtype);
      const int least = dtype == DType::float16 ? -15 : -127, most = dtype == DType::float16 ? 15 : 127;
      std::vector<float> all = specials();
      for (int e = least - 10; e <= most; ++e) push_near(all, std::ldexp(1.0f, e));
      for (float& x : all) {
        if (dtype == DType::float16) x = from_float16(to_float16(x));
        if (dtype == DType::bfloat16) x = from_bfloat16(to_bfloat16(x));
      }
      for (int e = least; e <= most; ++e) {
        const float s = exponent_scale(e, false, grid).scale;
        for (const float x : all) {
          const check::Note note([&] {
            return std::string(text) + ", " + quark::name_of(dtype) + " " + check::text_of(x) + " below 2^" +
                   std::to_string(e);
          });
          CHECK_EQ(quark::QUARK_LEVEL::is_below_exponent(x, s, grid), reference::exponent_field(x, dtype) < e);
        }
      }
      for (const float x : all) CHECK(!quark::QUARK_LEVEL::is_below_exponent(x, nan_of(false), grid));
    }
  }
}

TEST(fake_quantize_finite) {
  Random random(15);
  for (const std::string& text : specs_with_scales_of_powers_of_two()) {
    const QuantSpec spec = spec_of(text);
    if (!spec.shares_exponent() || !spec.ieee) continue;
    const Grid grid = make_grid(spec);
    for (int i = 0; i < 50'000; ++i) {
      const auto exponent = int(random.between(-149, 127));
      const float near = random_near_power(random, std::min(exponent + int(random.between(0, 9)), 127));
      const float x = random.chance(10) ? random.pick(specials()) : near, s = std::ldexp(1.0f, exponent);
      const float limit = random.pick<float>({65504.0f, kLargest, kInf});
      const check::Note note([&] { return text + " of " + check::text_of(x) + " with " + check::text_of(s); });
      CHECK_EQ(quark::QUARK_LEVEL::fake_quantize_finite<Rounding::half_even>(x, s, limit, grid),
               reference::finite_value(spec, x, s, limit));
    }
  }
  const auto value = [](const char* text, float x, float s) {
    const Grid grid = make_grid(spec_of(text));
    return quark::QUARK_LEVEL::fake_quantize_finite<Rounding::half_even>(x, s, kLargest, grid);
  };
  const char *mx6 = "int5 scale=microexponents block=16 min=-15 max=15 ieee",
             *bfp = "int8 scale=exponent rule=fit ieee";
  CHECK_EQ(value(mx6, 0.95f, 0.0625f), 0.9375f);
  CHECK_EQ(value(mx6, 0.95f, 0.125f), 1.0f);
  CHECK_EQ(value(mx6, 1.99f, 0.125f), 1.875f);
  CHECK_EQ(value(mx6, -0.01f, 0.125f), 0.0f);
  CHECK_EQ(value(mx6, -kInf, 0.125f), -kInf);
  CHECK_EQ(value(mx6, float_of(0xff800001), 0.125f), nan_of(true));
  CHECK_EQ(value(bfp, -kInf, 0.125f), 0.0f);
  CHECK_EQ(value(bfp, nan_of(true), 0.125f), 0.0f);
  CHECK_EQ(value(bfp, -0.05f, 0.125f), 0.0f);
  CHECK_EQ(value(bfp, -kLargest, 0x1p121f), -kLargest);
}

// ---- E4M3 scales --------------------------------------------------------------------------------------------------

TEST(e4m3_scale) {
  const Grid e4m3 = make_grid(spec_of("fp8_e4m3"));
  Random random(16);
  std::vector<float> tensor_scales = specials();
  for (const float g : {0.3f, 1e-3f, 0x1p-126f, 1 / 2688.0f, 0x1p60f}) tensor_scales.push_back(g);
  for (int i = 0; i < 20; ++i) tensor_scales.push_back(float_of(uint32_t(random.bits())));
  for (const char* text : {"fp4 scale=e4m3", "fp6_e2m3 scale=e4m3", "int4 scale=e4m3 min=-7", "int8f6 scale=e4m3"}) {
    const QuantSpec spec = spec_of(text);
    const Grid grid = make_grid(spec);
    for (const float g : tensor_scales) {
      std::vector<float> all = specials();
      for (uint32_t code = 1; code < 0x7f; ++code)  // the scales, and their midpoints
        for (const double scale :
             {reference::e4m3_value(code), (reference::e4m3_value(code) + reference::e4m3_value(code - 1)) / 2})
          push_near(all, float(scale * double(g) * reference::top_of(spec)));
      for (uint32_t high = 0; high <= 0x7fff; high += 3) all.push_back(float_of(high << 16));
      for (int i = 0; i < 2000; ++i) all.push_back(float_of(uint32_t(random.bits())));
      for (const float x : all) {
        const float amax = std::fabs(x);
        const check::Note note([&] { return text + (" of " + check::text_of(amax)) + " with " + check::text_of(g); });
        const ScaleAndZero got = quark::QUARK_LEVEL::e4m3_scale(bits_of(amax), g, grid, e4m3);
        const reference::Scale want = reference::e4m3_scale(spec, {0, amax}, g);
        CHECK_EQ(got.code, want.code);
        CHECK_EQ(got.scale, std::isnan(want.number) ? nan_of(false) : want.number);
        if (got.code != 0x7f) CHECK(got.code >= 1 && got.code <= 0x7e);  // never 0 or negative
      }
    }
  }
  for (uint32_t code = 0; code < 256; ++code) {
    const float value = decode(code, e4m3);
    CHECK_EQ(value, std::isnan(value) ? nan_of(code > 0x7f) : float(reference::e4m3_value(code)));
    CHECK_EQ(std::isnan(value), (code & 0x7f) == 0x7f);
  }
  // Known answers: NVFP4's block scales.
  const Grid fp4 = make_grid(spec_of("fp4 scale=e4m3"));
  const auto code = [&](float amax, float g) {
    return quark::QUARK_LEVEL::e4m3_scale(bits_of(amax), g, fp4, e4m3).code;
  };
  CHECK_EQ(code(6, 1), 0x38u);  // 1
  CHECK_EQ(code(0, 1), 0x01u);
  CHECK_EQ(code(2688, 1), 0x7eu);
  CHECK_EQ(code(kLargest, 1), 0x7eu);
  CHECK_EQ(code(kInf, 1), 0x7fu);
  CHECK_EQ(code(1, nan_of(true)), 0x7fu);
  CHECK_EQ(code(0, 0), 0x7fu);  // 0 / 0
}

// ---- random numbers -----------------------------------------------------------------------------------------------

TEST(philox) {
  // Random123's known answers. The core's counters have two words, so the second one is only the reference's.
  constexpr uint32_t kOnes = 0xffffffffu;
  CHECK(
      (reference::philox({0, 0, 0, 0}, {0, 0}) == reference::Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((reference::philox({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
         reference::Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  Random random(17);
  for (int i = 0; i < 20'000; ++i) {
    const auto pick = [&] { return random.pick<uint64_t>({0, 1, kOnes, uint64_t(kOnes) + 1, ~0ull, random.bits()}); };
    const uint64_t counter = pick(), key = pick();
    const RandomWords got = quark::QUARK_LEVEL::philox(counter, key);
    const auto want =
        reference::philox({uint32_t(counter), uint32_t(counter >> 32), 0, 0}, {uint32_t(key), uint32_t(key >> 32)});
    for (size_t j = 0; j < 4; ++j) CHECK_EQ(got.word[j], want[j]);
  }
}

TEST(fraction_bits) {
  const auto test = [](float f) {
    const check::Note note([&] { return check::text_of(f); });
    // f = m * 2^-shift
    const uint32_t bits = bits_of(f), field = bits >> 23;
    const uint64_t m = field > 0 ? (bits & 0x7fffff) | 0x800000 : bits;
    const int shift = 150 - int(std::max(field, 1u));
    const uint64_t want = shift >= 32 ? (shift - 32 > 63 ? 0 : m >> (shift - 32)) : m << (32 - shift);
    CHECK_EQ(quark::QUARK_LEVEL::fraction_bits(f), want);
  };
  for (uint32_t m = 0; m < 1u << 23; ++m) test(float_of(0x3f000000 | m));  // [0.5, 1)
  for (uint32_t exponent = 0; exponent < 127; ++exponent)
    for (uint32_t m = 0; m < 1u << 23; m += 4097) test(float_of(exponent << 23 | m));
  for (uint32_t m = 0; m < 1u << 23; m += 5) test(float_of(m));
  for (int e = 1; e <= 149; ++e) test(std::ldexp(1.0f, -e));
  test(std::nextafter(1.0f, 0.0f));
}

/// Up with the probability of the distance, to 2^-32, whatever the format; the same towards both signs.
TEST(stochastic_rounding_has_the_right_probability) {
  Random random(18);
  for (const Format& f : quark::formats()) {
    if (f.is_cast()) continue;
    const Table table(f);
    const QuantSpec spec = spec_of(f.name);
    const Grid grid = make_grid(spec);
    const auto value = [&](float x, uint32_t word) {
      return f.is_integer() ? quantize_value<Arithmetic::integer, Rounding::stochastic>(x, 1, 0, word, grid)
                            : quantize_value<Arithmetic::minifloat, Rounding::stochastic>(x, 1, 0, word, grid);
    };
    for (int i = 0; i < 2000; ++i) {
      const auto k = size_t(random.between(0, int64_t(table.find(f.hi).index) - 1));
      const auto x = float(table[k] + (table[k + 1] - table[k]) * double(random.between(1, 255)) / 256);
      const Table::Place place = table.find(x);
      const auto edge = uint32_t(place.part * 0x1p32);
      for (const float sign : {1.0f, f.lo < 0 ? -1.0f : 1.0f}) {
        const check::Note note([&] { return std::string(f.name) + " of " + check::text_of(sign * x); });
        const float up = value(sign * x, edge - 1), down = value(sign * x, edge);
        CHECK_EQ(up, table.value(table[place.index + 1], sign < 0));
        CHECK_EQ(down, table.value(table[place.index], sign < 0));
        CHECK_EQ(value(sign * x, 0), up);
        CHECK_EQ(value(sign * x, 0xffffffffu), down);
      }
    }
    for (const uint32_t word : {0u, 0x80000000u, 0xffffffffu}) {
      const check::Note note(f.name);
      const float lo = f.is_integer() ? spec.quant_min : f.lo;
      CHECK_EQ(value(kInf, word), f.hi);
      CHECK_EQ(value(-kInf, word), lo + 0.0f);
      CHECK_EQ(value(kLargest, word), f.hi);
      CHECK_EQ(value(f.hi, word), f.hi);
      CHECK_EQ(std::isnan(value(nan_of(false), word)), f.specials != Specials::none);
    }
  }
}

// ---- learned scales -----------------------------------------------------------------------------------------------

template <Arithmetic A, Rounding R>
void test_slope(QuantSpec spec, float x, float grad, float s, float z) {
  spec.shifted = A == Arithmetic::shifted;
  spec.rounding = R;
  const check::Note note([&] {
    return std::string(spec.shifted ? "shifted " : "") + quark::rounding_names()[int(R)] + " of " + check::text_of(x) +
           " / " + check::text_of(s) + ", zero point " + check::text_of(z);
  });
  const Slope got = slope_of<A, R>(x, grad, s, z, make_grid(spec));
  const reference::Learned want = reference::learned(spec, x, grad, s, z);
  CHECK_EQ(got.dx, want.dx);
  CHECK_EQ(double(got.weight) * double(got.slope) + 0.0, want.term + 0.0);
}

TEST(slope_of) {
  Random random(11);
  for (const char* text : {"int8", "uint4 min=1 max=14", "int16 ieee min=-8388608 max=8388608"}) {
    const QuantSpec spec = spec_of(text);
    for (const float z : {0.0f, 3.0f, -130.0f, 0.25f, -1.3f, 0x1p23f, -0x1p23f, 1e30f, kInf, -kInf, nan_of(false)}) {
      std::vector<float> all = specials();
      for (const float end : {spec.quant_min - z, spec.quant_max - z, spec.quant_min, spec.quant_max, 0.0f})
        for (int k = -8; k <= 8; ++k) push_near(all, end + float(k) / 4);
      for (int i = 0; i < 2000; ++i) all.push_back(float_of(uint32_t(random.bits())));
      for (const float x : all) {
        for (const float s : {1.0f, 0.3f, float_of(uint32_t(random.bits()))}) {
          const float grad = random.pick(std::vector<float>{1.0f, -0.7f, 0.0f, kTiny, kLargest});
          for_each_fixed_rounding([&]<Rounding R>() {
            test_slope<Arithmetic::affine, R>(spec, x, grad, s, z);
            test_slope<Arithmetic::shifted, R>(spec, x, grad, s, z);
          });
        }
      }
    }
  }
  const Grid int4 = make_grid(spec_of("int4"));
  const auto known = [](const Slope& r, float dx, float weight, float slope) {
    CHECK_EQ(r.dx, dx);
    CHECK_EQ(r.weight, weight);
    CHECK_EQ(r.slope, slope);
  };
  constexpr auto kEven = Rounding::half_even;
  const float nan = nan_of(false);
  const auto affine = quark::QUARK_LEVEL::slope_of<Arithmetic::affine, kEven>;
  const auto shifted = quark::QUARK_LEVEL::slope_of<Arithmetic::shifted, kEven>;
  known(affine(2.25f, 5, 1, 0, int4), 5, 5, -0.25f);
  known(affine(7.25f, 5, 1, 0, int4), 5, 5, -0.25f);  // rounds to the end
  known(affine(7.5f, 5, 1, 0, int4), 0, 5, 7);
  known(affine(-8.5f, 5, 1, 0, int4), 5, 5, 0.5f);
  known(affine(-8.75f, 5, 1, 0, int4), 0, 5, -8);
  known(affine(4.75f, 5, 1, 3, int4), 0, 5, 4);  // 5 + 3 is above 7
  known(affine(kInf, 5, 1, 3, int4), 0, 5, 4);
  known(affine(-kInf, 5, 1, 3, int4), 0, 5, -11);
  known(affine(nan, 5, 1, 3, int4), 0, 0, 0);
  known(affine(0, 5, 0, 3, int4), 0, 0, 0);
  known(affine(1, 5, nan, 3, int4), 0, 0, 0);
  known(affine(2.25f, nan, 1, 0, int4), nan, nan, -0.25f);
  known(shifted(2.25f, 5, 1, 0.5f, int4), 5, 5, 0.25f);  // 2.75 rounds to 3
  known(shifted(7.25f, 5, 1, 0.5f, int4), 0, 5, 6.5f);
  known(shifted(kInf, 5, 1, -kInf, int4), 0, 0, 0);
}

TEST(learned_of_threshold) {
  const auto scale = [](float t, float domain) { return quark::QUARK_LEVEL::learned_of_threshold(t, domain).scale; };
  std::vector<float> all = specials();
  for (int t = -160; t <= 140; ++t) push_near(all, float(t));
  for (const float domain : {1.0f, 2.0f, 3.0f, 127.0f, 128.0f, 32768.0f, 0x1p22f - 1, 0x1p22f}) {
    for (const float t : all) {
      const check::Note note([&] { return check::text_of(t) + ", domain " + check::text_of(domain); });
      const double power = std::ldexp(1.0, int(std::clamp(std::ceil(std::isnan(t) ? 0 : t), -126.0f, 127.0f)));
      CHECK_EQ(scale(t, domain), std::isnan(t) ? nan_of(false) : float(power / double(domain)));
    }
  }
  CHECK_EQ(scale(0, 128), 0x1p-7f);
  CHECK_EQ(scale(0.001f, 128), 0x1p-6f);
  CHECK_EQ(scale(-0.999f, 128), 0x1p-7f);
  CHECK_EQ(scale(kInf, 1), 0x1p127f);
  CHECK_EQ(scale(-kInf, 0x1p22f), 0x1p-148f);
  for (const float domain : {0.0f, -1.0f, 0.5f, 2.5f, 0x1p22f + 1, kInf, nan_of(false)})
    CHECK(std::isnan(scale(0, domain)));
  const quark::QUARK_LEVEL::Learned learned = quark::QUARK_LEVEL::learned_of_threshold(1.5f, 128);
  CHECK_EQ(learned.factor, 0x1p-5 * std::log(2.0));
  CHECK_EQ(learned.lo, -128.0f);
  CHECK_EQ(learned.hi, 127.0f);
}

TEST(bounds_keep_the_largest_bits_of_each_sign) {
  Random random(8);
  std::vector<float> all = specials();
  for (int i = 0; i < 100'000; ++i) all.push_back(float_of(uint32_t(random.bits())));
  for (const float x : all) {
    const check::Note note([&] { return check::text_of(x); });
    CHECK_EQ(below_zero(x), is_negative(x) ? bits_of(x) & ~kSign : 0u);
    CHECK_EQ(above_zero(x), is_negative(x) ? 0u : bits_of(x));
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
