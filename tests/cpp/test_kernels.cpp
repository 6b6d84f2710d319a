// Every operator from end to end, on every CPU level, against one element at a time with the scalar numerics.
#include <cfloat>
#include <cmath>
#include <limits>

#include "arrays.h"
#include "check.h"
#include "numerics.h"
#include "ops.h"

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

/// f<A, R>() for the arithmetic and rounding of a spec.
template <class F>
auto with_numerics(const QuantSpec& spec, bool has_zero_point, const F& f) {
  const auto with_rounding = [&]<Arithmetic A>() {
    switch (spec.rounding) {
#define QUARK_ROUNDING(name) \
  case Rounding::name: return f.template operator()<A, Rounding::name>();
      QUARK_ROUNDINGS(QUARK_ROUNDING)
#undef QUARK_ROUNDING
    }
    __builtin_unreachable();
  };
  if (spec.format.storage == DType::float16) return with_rounding.template operator()<Arithmetic::float16>();
  if (spec.format.storage == DType::bfloat16) return with_rounding.template operator()<Arithmetic::bfloat16>();
  if (!spec.format.is_integer()) return with_rounding.template operator()<Arithmetic::minifloat>();
  if (has_zero_point) return with_rounding.template operator()<Arithmetic::affine>();
  return with_rounding.template operator()<Arithmetic::integer>();
}

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

float limit_of(DType dtype) {
  return dtype == DType::float16 ? 65504.0f : dtype == DType::bfloat16 ? 0x1.fep127f : FLT_MAX;
}

void naive_choose(const QuantSpec& spec, const Array& x, Array& scale, Array* zero) {
  const auto scales = size_t(scale.elements());
  std::vector<uint32_t> low(scales), high(scales);
  for (int64_t i = 0; i < x.elements(); ++i) {
    const uint32_t u = bits_of(x.number(i));
    uint32_t& to = (u >> 31 ? low : high)[size_t(scale_index(i, x.shape(), spec))];
    to = std::max(to, u & 0x7fffffffu);
  }
  for (size_t i = 0; i < scales; ++i) {
    ScaleAndZero r = scale_from_bounds(low[i], high[i], spec.symmetric, make_grid(spec));
    if (spec.format.is_cast()) r = {1.0f, 0};
    scale.put(int64_t(i), r.scale);
    if (zero) zero->put(int64_t(i), r.zero_point);
  }
}

/// f(i, s, z) for every element.
template <class F>
void naive_elementwise(const QuantSpec& spec, const Shape& shape, const Array& scale, const Array* zero, const F& f) {
  for (int64_t i = 0; i < arrays::product(shape); ++i) {
    const int64_t index = scale_index(i, shape, spec);
    f(i, scale.number(index), zero ? zero->number(index) : 0.0f);
  }
}

void naive_quantize(const QuantSpec& spec, const Array& x, const Array& scale, const Array* zero, Array& q) {
  CodeArray codes{spec, q, x.shape().empty() ? 1 : x.shape().back()};
  codes.clear();
  const Grid grid = make_grid(spec);
  naive_elementwise(spec, x.shape(), scale, zero, [&](int64_t i, float s, float z) {
    const float y = with_numerics(
        spec, zero, [&]<Arithmetic A, Rounding R>() { return quantize_value<A, R>(x.number(i), s, z, grid); });
    codes.put(i, code_of(y, spec));
  });
}

void naive_fake_quantize(const QuantSpec& spec, const Array& x, const Array& scale, const Array* zero, Array& out) {
  const Grid grid = make_grid(spec);
  naive_elementwise(spec, x.shape(), scale, zero, [&](int64_t i, float s, float z) {
    const float y = with_numerics(spec, zero, [&]<Arithmetic A, Rounding R>() {
      return fake_quantize_value<A, R>(x.number(i), s, z, limit_of(out.dtype()), grid);
    });
    out.put_number(i, y);
  });
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
    case Op::fake_quantize: return naive_fake_quantize(spec, in[0], in[1], optional(in, 2), out[0]);
    case Op::fake_quantize_dynamic:
      naive_choose(spec, in[0], out[1], optional(out, 2));
      return naive_fake_quantize(spec, in[0], out[1], optional(out, 2), out[0]);
    case Op::dequantize: {
      const Array* zero = optional(in, 2);
      const Shape& shape = out[0].shape();
      const CodeArray codes{spec, in[0], shape.empty() ? 1 : shape.back()};
      return naive_elementwise(spec, shape, in[1], zero, [&](int64_t i, float s, float z) {
        const float y = with_numerics(spec, zero, [&]<Arithmetic A, Rounding>() {
          return dequantize_value<A>(value_of(codes.get(i), spec), s, z, limit_of(out[0].dtype()));
        });
        out[0].put_number(i, y);
      });
    }
    case Op::fake_quantize_backward: {
      const Array* zero = optional(in, 3);
      const Grid grid = make_grid(spec);
      return naive_elementwise(spec, in[0].shape(), in[2], zero, [&](int64_t i, float s, float z) {
        const bool inside = with_numerics(
            spec, zero, [&]<Arithmetic A, Rounding R>() { return is_inside<A, R>(in[0].number(i), s, z, grid); });
        out[0].put_number(i, inside ? in[1].number(i) : 0.0f);
      });
    }
    case Op::dequantize_backward: {
      const Array* zero = optional(in, 2);
      const Shape& shape = in[0].shape();
      const CodeArray codes{spec, in[1], shape.empty() ? 1 : shape.back()};
      std::vector<std::vector<double>> terms(size_t(out[0].elements()));
      for (int64_t i = 0; i < in[0].elements(); ++i) {
        const int64_t index = scale_index(i, shape, spec);
        const double q = value_of(codes.get(i), spec), z = zero ? double(zero->number(index)) : 0.0;
        terms[size_t(index)].push_back(double(in[0].number(i)) * (q - z));
      }
      for (size_t i = 0; i < terms.size(); ++i) {
        const auto sum = float(tree_sum(terms[i]));
        out[0].put(int64_t(i), std::isnan(sum) ? float_of(kNaN) : sum);
      }
      return;
    }
    case Op::pack: {
      const Shape& shape = in[0].shape();
      CodeArray codes{spec, out[0], shape.empty() ? 1 : shape.back()};
      codes.clear();
      for (int64_t i = 0; i < in[0].elements(); ++i) codes.put(i, in[0].get<uint8_t>(i));
      return;
    }
    case Op::unpack: {
      const Shape& shape = out[0].shape();
      const CodeArray codes{spec, in[0], shape.empty() ? 1 : shape.back()};
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

std::string random_blocks(Random& random, const Shape& shape) {
  std::string text;
  for (const int64_t n : shape) {
    int64_t b = random.chance(35) ? 0 : random.chance(40) ? 1 : random.between(2, std::max<int64_t>(2, n + 2));
    if (b > 1 && random.chance(40)) b = int64_t(1) << random.between(1, 7);  // 2 to 128
    text += (text.empty() ? " block=" : ",") + std::to_string(b);
  }
  return text;
}

std::string random_spec(Random& random, Op op, const Shape& shape) {
  if (op == Op::pack || op == Op::unpack) {
    const int64_t bits = random.between(1, 8);
    return "codes bits=" + std::to_string(bits) + (bits > 1 && random.chance(50) ? " signed" : "") + " packed";
  }
  const Format& f = quark::formats()[size_t(random.between(0, int64_t(quark::formats().size()) - 1))];
  std::string text = f.name + random_blocks(random, shape);
  if (!f.is_cast()) text += std::string(" rounding=") + quark::rounding_names()[size_t(random.between(0, 5))];
  if (f.is_integer()) {
    if (random.chance(20)) text += " min=" + std::to_string(int64_t(f.lo + 1));
    if (random.chance(20)) text += " max=" + std::to_string(int64_t(f.bits > 2 ? f.hi - 1 : f.hi));
    if (random.chance(50)) text += " asymmetric";
  }
  if (f.bits <= 8 && random.chance(50)) text += " packed length=" + std::to_string(shape.empty() ? 1 : shape.back());
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

void fill_scales(Random& random, Array& a) {
  const bool wild = random.chance(30);
  for (int64_t i = 0; i < a.elements(); ++i) {
    double s =
        std::ldexp(1.0 + (random.chance(50) ? 0 : double(random.between(0, 999)) / 1000), int(random.between(-6, 3)));
    if (wild && random.chance(20)) s = random_value(random, 1e-3, true);
    a.put_number(i, s);
  }
}

void fill_zero_points(Random& random, Array& a) {
  const int64_t bytes = quark::bytes_of(a.dtype());
  for (int64_t i = 0; i < a.elements(); ++i) {
    int64_t z = random.between(-300, 300);
    if (bytes == 1) z = a.dtype() == DType::int8 ? random.between(-128, 127) : random.between(0, 255);
    if (a.dtype() == DType::uint16) z = random.between(0, 65535);
    if (bytes >= 4 && random.chance(20)) z = random.between(-1 << 23, 1 << 23);
    a.put_number(i, double(z));
  }
}

/// Codes of the format: the storage of int4 is bytes, but they hold -8 to 7. Packed bytes are left random.
void fill_codes(Random& random, const QuantSpec& spec, Array& a) {
  if (spec.packed) return;
  CodeArray codes{spec, a, 1};
  for (int64_t i = 0; i < a.elements(); ++i) codes.put(i, uint32_t(random.bits()) & ((1u << spec.format.bits) - 1u));
}

Case random_case(Random& random, Op op, Size size) {
  Case c{op, "", {}, {}, {}};
  const Shape shape = random_shape(random, size);
  c.text = random_spec(random, op, shape);
  const Status status = quark::parse_spec(c.text, c.spec);
  if (!status.ok()) check::fail(__FILE__, __LINE__, "\"" + c.text + "\": " + status.message());
  const Format& f = c.spec.format;

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
        fill_values(random, a, f.is_cast() ? 1e5 : f.hi);
        return a;
      }
      case 'c': {
        return Array(random, random.chance(50) ? DType::int8 : DType::uint8, shape, layout);
      }
      case 'q': {
        const DType dtype = c.spec.packed || (f.is_fp8() && random.chance(30)) ? DType::uint8 : f.storage;
        Array a(random, dtype, code_shape, layout);
        fill_codes(random, c.spec, a);
        return a;
      }
      case 's': {
        if (is_output) return Array(random, DType::float32, small);
        Array a(random, random.chance(60) ? DType::float32 : random.pick(kFloats), small, layout);
        fill_scales(random, a);
        return a;
      }
      default: {
        if (is_output) return Array(random, DType::int32, small);
        Array a(random, random.pick(kIntegers), small, layout);
        fill_zero_points(random, a);
        return a;
      }
    }
  };
  for (const char kind : std::string_view(ins))
    if (kind != 'z' || (f.is_integer() && random.chance(60))) c.in.push_back(make(kind, false));
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
  for (int i = 0; i < 3000; ++i) {
    const bool is_backward = i % 2;
    Case c = random_case(random, is_backward ? Op::fake_quantize_backward : Op::fake_quantize,
                         i % 8 < 2 ? Size::tiles : Size::small);
    const size_t shared = is_backward && random.chance(50) ? 1 : 0;
    Array both(random, random.pick(kFloats), c.in[shared].shape(), Layout::strided);
    fill_values(random, both, 10);
    c.in[shared] = both;
    c.out[0] = both;
    std::vector<Array> want = c.out;
    naive(c, want);
    std::vector<Array> in = c.in;
    const auto inputs = arrays::views(in);
    const check::Note note([&] { return "input " + std::to_string(shared) + " in place, " + c.description(); });
    const Status status = quark::run(c.op, inputs, {&inputs[shared], 1}, c.spec, serial);
    if (!status.ok()) check::fail(__FILE__, __LINE__, status.message());
    for (size_t k = 0; k < in.size(); ++k)
      check_same(in[k], k == shared ? want[0] : c.in[k], "input " + std::to_string(k));
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
