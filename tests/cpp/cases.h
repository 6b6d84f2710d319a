// Random calls of every operator, and what it takes to run them.
#pragma once
#include <cfloat>
#include <cmath>
#include <limits>
#include <optional>

#include "arrays.h"
#include "check.h"
#include "cpu/levels.h"
#include "numerics.h"
#include "ops.h"
#include "random_specs.h"
#include "reference.h"

namespace cases {

using arrays::Array;
using arrays::Layout;
using arrays::Shape;
using check::Random;
using quark::Status;
using namespace specs;
using namespace quark::QUARK_LEVEL;

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

// ---- codes ----------------------------------------------------------------------------------------------------------

inline float value_of_step(const Format& f) { return std::ldexp(1.0f, f.min_exp - f.mantissa_bits); }

inline uint32_t code_of(float y, const QuantSpec& spec) {
  const Format& f = spec.format;
  if (f.storage == DType::float16) return to_float16(y);
  if (f.storage == DType::bfloat16) return to_bfloat16(y);
  if (!f.is_fixed_point()) return encode(y, make_grid(spec));
  return uint32_t(int32_t(y / value_of_step(f))) & ((1u << f.bits) - 1u);
}

inline float value_of(uint32_t code, const QuantSpec& spec) {
  const Format& f = spec.format;
  if (f.storage == DType::float16) return from_float16(uint16_t(code));
  if (f.storage == DType::bfloat16) return from_bfloat16(uint16_t(code));
  if (!f.is_fixed_point()) return decode(code, make_grid(spec));
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

// ---- random cases -------------------------------------------------------------------------------------------------

enum class Size { small, tiles, large, empty };

inline Shape random_shape(Random& random, Size size) {
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

/// Mostly numbers around `range`, ties among them; where `wild`, also anything else.
inline double random_value(Random& random, double range, bool wild) {
  if (wild && random.chance(40)) {
    const double special[] = {0.0, -0.0, 1e-45, -1e-40, 0x1p-126, 1e300, -FLT_MAX, INFINITY, -INFINITY, NAN, -NAN};
    return special[random.between(0, 10)];
  }
  if (wild && random.chance(40)) return float_of(uint32_t(random.bits()));
  if (random.chance(30)) return double(random.between(-64, 64)) / 4;
  return range * double(random.between(-1'500'000, 1'500'000)) / 1e6;
}

/// One element in how many is wild: none, a few of an array (so that most groups are numbers) or many.
inline int64_t random_rarity(Random& random, const Array& a) {
  return random.pick<int64_t>({0, 0, 3, std::max<int64_t>(3, a.elements() / 4)});
}
inline bool one_in(Random& random, int64_t rarity) { return rarity > 0 && random.between(1, rarity) == 1; }

inline void fill_values(Random& random, Array& a, double range) {
  const int64_t rarity = random_rarity(random, a);
  for (int64_t i = 0; i < a.elements(); ++i) a.put_number(i, random_value(random, range, one_in(random, rarity)));
}

/// Numbers near one power of two, some of which would round up to the next one.
inline void fill_block_values(Random& random, Array& a) {
  const int64_t rarity = random_rarity(random, a);
  const bool half = a.dtype() == DType::float16;
  const auto base =
      int(random.chance(40) ? random.between(-10, 10) : random.between(half ? -26 : -151, half ? 15 : 127));
  for (int64_t i = 0; i < a.elements(); ++i) {
    const auto exponent = base - int(random.between(0, random.chance(50) ? 1 : 12));
    const double m =
        random.chance(50) ? 2 - double(random.between(0, 40)) / 4096 : 1 + double(random.between(0, 4095)) / 4096;
    const double x = std::ldexp(random.chance(20) ? std::floor(m * 16) / 16 : m, exponent);
    a.put_number(i, one_in(random, rarity) ? random_value(random, x, true) : random.chance(60) ? x : -x);
  }
}

/// Zeros in a row, so that some groups have nothing else.
inline void clear_some(Random& random, Array& a) {
  const int64_t end = random.between(0, a.elements());
  for (int64_t i = random.between(0, end); i < end; ++i) a.put_number(i, random.chance(50) ? 0.0 : -0.0);
}

/// Powers of two.
inline void fill_block_scales(Random& random, Array& a) {
  const bool any = a.dtype() == DType::float32 || a.dtype() == DType::float64;
  for (int64_t i = 0; i < a.elements(); ++i)
    a.put_number(i,
                 std::ldexp(1.0, int(any && random.chance(20) ? random.between(-149, 127) : random.between(-14, 8))));
}

/// Codes of powers of two, mostly near 1.
inline void fill_exponents(Random& random, Array& a) {
  const int one = a.dtype() == DType::int8 ? 0 : 127;
  for (int64_t i = 0; i < a.elements(); ++i)
    if (random.chance(80)) a.put(i, uint8_t(one + random.between(-20, 20)));
}

inline void fill_scales(Random& random, Array& a) {
  const bool wild = random.chance(30);
  for (int64_t i = 0; i < a.elements(); ++i) {
    double s =
        std::ldexp(1.0 + (random.chance(50) ? 0 : double(random.between(0, 999)) / 1000), int(random.between(-6, 3)));
    if (wild && random.chance(20)) s = random_value(random, 1e-3, true);
    a.put_number(i, s);
  }
}

inline void fill_zero_points(Random& random, Array& a, bool shifted) {
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
inline void fill_codes(Random& random, const QuantSpec& spec, Array& a) {
  CodeArray codes{spec, a, 1};
  if (spec.packed || (codes.is_wide() && random.chance(50))) return;
  for (int64_t i = 0; i < a.elements(); ++i) codes.put(i, uint32_t(random.bits()) & ((1u << spec.format.bits) - 1u));
}

/// `aligned`: all arrays are in one piece, from a boundary on, and the data's are of this dtype.
inline Case make_case(Random& random, Op op, const Shape& shape, const std::string& text,
                      std::optional<DType> aligned = std::nullopt) {
  Case c{op, text, {}, {}, {}};
  const Status status = quark::parse_spec(c.text, c.spec);
  if (!status.ok()) check::fail(__FILE__, __LINE__, "\"" + c.text + "\": " + status.message());
  const Format& f = c.spec.format;
  const Needs needs(op);

  Shape scale_shape = shape, pair_shape = shape;
  for (size_t d = 0; d < shape.size(); ++d) scale_shape[d] = quark::scale_length(shape[d], c.spec.block[d]);
  for (size_t d = 0; d < shape.size(); ++d)
    if (c.spec.block[d] != 1) pair_shape[d] = (shape[d] + 15) / 16;
  const bool one_scale = arrays::product(scale_shape) == 1;
  Shape code_shape = shape;
  if (c.spec.packed) {
    if (code_shape.empty()) code_shape = {1};
    code_shape.back() = (code_shape.back() * f.bits + 7) / 8;
  }
  const auto [name, ins, outs] = quark::kOps[int(op)];
  const auto make = [&](char kind, bool is_output) {
    const Layout layout = aligned             ? Layout::aligned
                          : random.chance(40) ? Layout::contiguous
                          : is_output         ? Layout::strided
                                              : Layout::broadcast;
    Shape small = scale_shape;
    if (one_scale && random.chance(30)) small = random.chance(50) ? Shape{} : Shape{1, 1};
    switch (kind) {
      case 'x': {
        const DType dtype = aligned ? *aligned : random.chance(40) ? DType::float32 : random.pick(kFloats);
        Array a(random, dtype, shape, layout);
        if (c.spec.scale_format != ScaleFormat::float32 && random.chance(70)) {
          fill_block_values(random, a);
        } else {
          fill_values(random, a, f.is_cast() ? 1e5 : f.is_integer() ? std::fabs(c.spec.quant_max) : f.hi);
        }
        if (random.chance(20)) clear_some(random, a);
        return a;
      }
      case 'c': return Array(random, random.chance(50) ? DType::int8 : DType::uint8, shape, layout);
      case 'q': {
        DType dtype = c.spec.packed || (f.is_fp8() && random.chance(30)) ? DType::uint8 : f.storage;
        if (c.spec.ieee && f.is_integer() && !c.spec.packed) dtype = is_output ? DType::int32 : random.pick(kIntegers);
        Array a(random, dtype, code_shape, layout);
        fill_codes(random, c.spec, a);
        return a;
      }
      case 's': {
        const DType dtype = random.pick(scale_dtypes(c.spec, is_output));
        Array a(random, dtype, small, is_output ? Layout::contiguous : layout);
        if (is_output || dtype == DType::float8_e4m3fn) return a;
        if (quark::bytes_of(dtype) == 1) {
          fill_exponents(random, a);
        } else if (needs.one_scale) {
          for (int64_t i = 0; i < a.elements(); ++i) a.put_number(i, random_value(random, 8, true));
        } else if (c.spec.shares_exponent()) {
          fill_block_scales(random, a);
        } else {
          fill_scales(random, a);
        }
        return a;
      }
      case 'g': {
        Array a(random, DType::float32, random.chance(50) ? Shape{} : Shape{1, 1}, layout);
        fill_scales(random, a);
        return a;
      }
      case 'p': return Array(random, DType::uint8, pair_shape, is_output ? Layout::contiguous : layout);
      case 'k': {
        if (!c.spec.is_shard) return Array(random, DType::int32, {2}, layout);
        const auto rank = int64_t(shape.size());
        Array a(random, DType::int32, {2 + rank}, random.chance(50) ? Layout::contiguous : Layout::strided);
        for (size_t d = 0; d < shape.size(); ++d) {
          const int64_t room = std::min<int64_t>(c.spec.whole[d] - shape[d], INT32_MAX);
          a.put(int64_t(2 + d), int32_t(random.chance(30) ? room : random.between(0, room)));
        }
        return a;
      }
      case 'e': {
        Shape ends = scale_shape;
        ends.push_back(2);
        return Array(random, DType::int32, ends);
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
    if (kind == 'z' ? f.is_integer() && !c.spec.shares_exponent() && random.chance(60) : c.spec.takes(kind))
      c.in.push_back(make(kind, false));
  for (const char kind : std::string_view(outs))
    if (kind == 'z' ? !c.spec.symmetric : c.spec.takes(kind)) c.out.push_back(make(kind, true));
  return c;
}

inline Case random_case(Random& random, Op op, Size size) {
  const Shape shape = random_shape(random, size);
  return make_case(random, op, shape, random_spec(random, op, shape));
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

inline void check_same(const Array& got, const Array& want, const std::string& name) {
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

/// The levels to test: QUARK_TEST_LEVEL, or all that this machine supports.
inline std::vector<quark::CpuLevel> levels() {
  const char* only = std::getenv("QUARK_TEST_LEVEL");
  std::vector<quark::CpuLevel> found;
  for (const quark::CpuLevel& level : quark::cpu_levels())
    if (level.is_supported() && (!only || std::string_view(only) == level.name)) found.push_back(level);
  return found;
}

}  // namespace cases
