// What parse_spec and run refuse, in which words, and what they accept; the float environment.
#include <cmath>
#include <limits>

#include "arrays.h"
#include "check.h"
#include "hostile.h"
#include "ops.h"

namespace {

using arrays::Array;
using arrays::Layout;
using arrays::Shape;
using check::Random;
using quark::DType;
using quark::ErrorKind;
using quark::Op;
using quark::QuantSpec;
using quark::Rounding;
using quark::ScaleFormat;
using quark::Status;
using quark::TensorView;

/// An error of that kind whose message has all of the given words.
void check_error(const Status& status, ErrorKind kind, std::initializer_list<const char*> words) {
  CHECK_EQ(status.kind(), kind);
  for (const char* word : words) {
    if (status.message().find(word) != std::string::npos) continue;
    check::fail(__FILE__, __LINE__, "\"" + status.message() + "\" doesn't say \"" + word + "\"");
  }
}

// ---- specs --------------------------------------------------------------------------------------------------------

QuantSpec good(std::string_view text) {
  const check::Note note([=] { return "spec \"" + std::string(text) + "\""; });
  QuantSpec spec;
  const Status status = quark::parse_spec(text, spec);
  CHECK(status.ok());
  CHECK_EQ(status.message(), std::string());
  return spec;
}

void bad(std::string_view text, std::initializer_list<const char*> words) {
  const check::Note note([=] { return "spec \"" + std::string(text) + "\""; });
  QuantSpec spec;
  check_error(quark::parse_spec(text, spec), ErrorKind::value, words);
  check_error(quark::cached_spec(text, spec), ErrorKind::value, words);
}

TEST(good_specs) {
  for (const quark::Format& f : quark::formats()) {
    const QuantSpec spec = good(f.name);
    CHECK_EQ(spec.format.name, std::string_view(f.name));
    CHECK(spec.rounding == Rounding::half_even);
    CHECK(spec.symmetric);
    CHECK(!spec.packed);
    CHECK_EQ(spec.rank, 0);
    CHECK_EQ(spec.length, -1);
    CHECK_EQ(spec.quant_min, f.is_integer() ? f.lo : 0.0f);
    CHECK_EQ(spec.quant_max, f.is_integer() ? f.hi : 0.0f);
  }
  CHECK(good("int8").scale_format == ScaleFormat::float32);
  CHECK(good("int8 scale=float32 asymmetric").scale_format == ScaleFormat::float32);
  CHECK(good("fp4 scale=e8m0 block=1,32").scale_format == ScaleFormat::e8m0);
  CHECK(good("int8 scale=exponent block=1,0").scale_format == ScaleFormat::exponent);
  CHECK(good("int8 scale=microexponents block=1,16,1").scale_format == ScaleFormat::microexponents);
  CHECK(good("int8 block=1,16 scale=exponent").shares_exponent());
  CHECK(!good("int8 block=1,16 scale=e8m0").shares_exponent());
  const QuantSpec plain = good("int8");
  CHECK(!plain.reciprocal && !plain.shifted && !plain.narrow && !plain.plus_zero && !plain.ieee);
  const QuantSpec floats = good("fp4 narrow plus_zero ieee");
  const QuantSpec wide = good("int4 shifted reciprocal ieee min=-8388608 max=8388608");
  CHECK(wide.shifted && wide.reciprocal && wide.ieee);
  CHECK(floats.narrow && floats.plus_zero && floats.ieee);
  CHECK_EQ(wide.quant_min, -0x1p23f);
  CHECK_EQ(wide.quant_max, 0x1p23f);
  CHECK_EQ(good("int8 ieee min=5 max=9").quant_min, 5.0f);
  const QuantSpec all =
      good("int4 block=1,128,0 rounding=half_up min=-7 max=6 asymmetric packed length=300 dtype=bfloat16");
  CHECK_EQ(all.rank, 3);
  CHECK_EQ(all.block[0], 1);
  CHECK_EQ(all.block[1], 128);
  CHECK_EQ(all.block[2], 0);
  CHECK(all.rounding == Rounding::half_up);
  CHECK_EQ(all.quant_min, -7.0f);
  CHECK_EQ(all.quant_max, 6.0f);
  CHECK(!all.symmetric);
  CHECK(all.packed);
  CHECK_EQ(all.length, 300);
  const QuantSpec again =
      good("int4 dtype=bfloat16 length=300 max=6 packed asymmetric min=-7 rounding=half_up block=1,128,0");
  CHECK_EQ(again.block[1], 128);
  CHECK_EQ(again.quant_min, -7.0f);
  CHECK_EQ(good("int8 block=1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2").rank, quark::kMaxRank);
  CHECK_EQ(good("fp4 packed length=0").length, 0);
  for (size_t r = 0; r < quark::rounding_names().size(); ++r)
    CHECK(good(std::string("fp4 rounding=") + quark::rounding_names()[r]).rounding == Rounding(r));
  for (int bits = 1; bits <= 8; ++bits) {
    const QuantSpec codes = good("codes bits=" + std::to_string(bits) + " packed");
    CHECK_EQ(codes.format.bits, bits);
    CHECK_EQ(codes.format.lo, 0.0f);
    CHECK_EQ(codes.format.hi, std::ldexp(1.0f, bits) - 1);
    CHECK(codes.format.storage == DType::uint8);
    const QuantSpec with_sign = good("codes signed bits=" + std::to_string(bits));
    CHECK_EQ(with_sign.format.lo, -std::ldexp(1.0f, bits - 1));
    CHECK_EQ(with_sign.format.hi, std::ldexp(1.0f, bits - 1) - 1);
    CHECK(with_sign.format.storage == DType::int8);
  }
}

TEST(bad_specs) {
  bad("", {"empty", "format"});
  bad("int6", {"unknown format 'int6'", "int4", "fp8_e4m3", "fp16"});
  bad("INT8", {"unknown format 'INT8'"});
  bad(" int8", {"unknown format ''"});
  bad("block=1", {"unknown format"});
  bad("int8 rounding=nearest", {"rounding=nearest"});
  bad("int8 rounding", {"'rounding'"});
  bad("int8 blocks=1", {"blocks=1"});
  bad("int8  packed", {"''"});
  bad("int8 packed=1", {"packed=1"});
  bad("int8 block=-1", {"block", "-1", ">= 0"});
  bad("int8 block=1.5", {"block", ">= 0"});
  bad("int8 block=1,,2", {"block"});
  bad("int8 block=99999999999999999999", {"block"});
  bad("int8 block=1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1", {"block", "16"});
  bad("int8 length=-1", {"length=-1"});
  bad("int8 length=x", {"length=x"});
  bad("int8 min=x", {"min=x"});
  bad("int8 max=", {"max="});
  bad("int8 min=-129", {"min", "int8"});
  bad("int8 max=128", {"max", "int8"});
  bad("int8 max=1.5", {"max", "int8"});
  bad("int8 max=nan", {"int8"});
  bad("int8 min=5 max=5", {"min < max"});
  bad("int8 min=-8 max=0", {"symmetric", "max > 0"});
  bad("uint8 min=-1", {"uint8"});
  bad("fp8_e4m3 max=240", {"integer formats", "fp8_e4m3"});
  bad("int8f6 min=-1", {"integer formats", "int8f6"});
  bad("fp4 asymmetric", {"asymmetric", "fp4"});
  bad("fp16 rounding=floor", {"fp16", "half_even"});
  bad("bf16 packed", {"bf16", "packed"});
  bad("int16 packed", {"int16", "packed"});
  bad("ieee int8", {"unknown format 'ieee'"});
  bad("int8 scale=e8m1", {"scale=e8m1"});
  bad("int8 scale", {"'scale'"});
  bad("int8 scale=", {"scale="});
  bad("int8 scale=e8m0 asymmetric", {"int8", "float32", "asymmetric"});
  bad("bf16 scale=e8m0", {"bf16", "float32", "cast"});
  bad("fp16 scale=exponent", {"fp16"});
  bad("fp4 scale=exponent", {"shared exponent", "integers", "fp4"});
  bad("int8f6 scale=microexponents block=16", {"shared exponent", "integers", "int8f6"});
  for (const char* name : {"int2", "uint8"}) bad(std::string(name) + " scale=exponent", {"shared exponent", name});
  bad("int8 ieee scale=exponent max=200", {"min and max"});
  bad("int4 ieee packed max=100", {"min and max"});
  bad("bf16 narrow", {"narrow", "bf16"});
  for (const char* word : {"scale=exponent", "scale=microexponents block=16"}) {
    const std::string text = std::string("int8 ") + word;
    bad(text + " reciprocal", {"shared exponent"});
    bad(text + " shifted", {"shared exponent"});
    bad(text + " rounding=half_up", {"half_even"});
    bad(text + " asymmetric", {"float32", "asymmetric"});
  }
  for (const char* block :
       {"", " block=7", " block=1,7", " block=0", " block=1,0", " block=1", " block=2,2", " block=16,0"})
    bad(std::string("int8 scale=microexponents") + block, {"microexponents", "even", "one axis"});
  for (const char* format : {"fp4", "fp8_e4m3", "int8f6", "bf16"}) {
    bad(std::string(format) + " reciprocal", {"reciprocal", "integer", format});
    bad(std::string(format) + " shifted", {"shifted", "integer", format});
  }
  bad("int8 narrow", {"narrow", "float", "int8"});
  bad("uint4 plus_zero", {"plus_zero", "float", "uint4"});
  bad("fp4 narrow rounding=floor", {"fp4", "half_even"});
  bad("int8 ieee=1", {"ieee=1"});
  bad("int8 shifted=", {"shifted="});
  bad("int8 ieee min=-8388609", {"min", "int8"});
  bad("int8 ieee max=8388610", {"max", "int8"});
  bad("int8 ieee max=0.5", {"int8"});
  bad("int8 ieee min=nan", {"int8"});
  bad("int8 ieee min=-inf max=inf", {"int8"});
  bad("int8 ieee min=9 max=9", {"min < max"});
  bad("int8 ieee min=200", {"min < max"});
  bad("fp4 ieee max=100", {"integer formats", "fp4"});
  bad("codes", {"bits", "1 to 8"});
  bad("codes bits=0", {"bits is 0", "1 to 8"});
  bad("codes bits=9", {"bits is 9", "1 to 8"});
  bad("codes bits=x", {"bits=x"});
}

TEST(cached_specs_are_parsed_specs) {
  for (int round = 0; round < 2; ++round) {
    for (int length = 0; length < 10'000; ++length) {  // more than it remembers
      QuantSpec spec;
      CHECK(quark::cached_spec("fp4 packed block=1,32 length=" + std::to_string(length), spec).ok());
      CHECK_EQ(spec.length, length);
      CHECK_EQ(spec.block[1], 32);
    }
  }
}

// ---- calls --------------------------------------------------------------------------------------------------------

/// A good call that a test then spoils.
struct Call {
  Op op;
  QuantSpec spec;
  std::vector<Array> arrays;
  std::vector<TensorView> in, out;

  Call(Op which, std::string_view text, std::vector<Array> inputs, std::vector<Array> outputs)
      : op(which), spec(good(text)), arrays(std::move(inputs)) {
    const size_t count = arrays.size();
    for (Array& a : outputs) arrays.push_back(std::move(a));
    for (size_t i = 0; i < arrays.size(); ++i) (i < count ? in : out).push_back(arrays[i].view());
  }
  // The views point into the arrays.
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Status run() {
    quark::SerialExecutor executor;
    return quark::run(op, in, out, spec, executor);
  }
  /// Refused, and nothing written.
  void refused(ErrorKind kind, std::initializer_list<const char*> words) {
    const check::Note note(quark::kOps[int(op)].name);
    const std::vector<Array> before = arrays;
    check_error(run(), kind, words);
    for (size_t i = 0; i < arrays.size(); ++i) CHECK(arrays[i].bytes() == before[i].bytes());
  }
};

Random& random_source() {
  static Random random(1);
  return random;
}
Array array(DType dtype, const Shape& shape) { return Array(random_source(), dtype, shape); }

/// int8 with a scale and a zero point per row.
Call quantize_call() {
  return Call(Op::quantize, "int8 block=1,0",
              {array(DType::float32, {4, 6}), array(DType::float32, {4, 1}), array(DType::int32, {4, 1})},
              {array(DType::int8, {4, 6})});
}
Call dynamic_call() {
  return Call(Op::quantize_dynamic, "int8 block=1,0 asymmetric", {array(DType::float32, {4, 6})},
              {array(DType::int8, {4, 6}), array(DType::float32, {4, 1}), array(DType::int32, {4, 1})});
}
Call packed_call() {
  return Call(Op::dequantize, "int4 block=1,0 packed length=7",
              {array(DType::uint8, {4, 4}), array(DType::float32, {4, 1})}, {array(DType::bfloat16, {4, 7})});
}

TEST(good_calls) {
  CHECK(quantize_call().run().ok());
  CHECK(dynamic_call().run().ok());
  CHECK(packed_call().run().ok());
}

TEST(wrong_counts) {
  for (const size_t n : {0u, 1u, 4u}) {
    Call c = quantize_call();
    c.in.resize(n, c.in[0]);
    c.refused(ErrorKind::value, {"quantize: ", std::to_string(n).c_str(), "inputs", "(xsz)", "(q)"});
  }
  {
    Call c = quantize_call();
    c.out.clear();
    c.refused(ErrorKind::value, {"quantize: ", "0 outputs"});
  }
  {
    Call c = quantize_call();
    c.out.push_back(c.out[0]);
    c.refused(ErrorKind::value, {"quantize: ", "2 outputs"});
  }
  {
    Call c = dynamic_call();
    c.out.pop_back();
    c.refused(ErrorKind::value, {"quantize_dynamic: ", "zero point", "asymmetric"});
  }
  {
    Call c = dynamic_call();
    c.spec.symmetric = true;
    c.refused(ErrorKind::value, {"quantize_dynamic: ", "zero point", "asymmetric"});
  }
}

TEST(wrong_dtypes) {
  const auto refuse = [](Call c, bool is_output, size_t at, DType dtype, std::initializer_list<const char*> words) {
    (is_output ? c.out : c.in)[at].dtype = dtype;
    c.refused(ErrorKind::type, words);
  };
  refuse(quantize_call(), false, 0, DType::int32,
         {"quantize: input 0", "int32", "float32, float16, bfloat16 or float64"});
  refuse(quantize_call(), false, 0, DType::float8_e5m2, {"quantize: input 0", "float8_e5m2", "allowed"});
  refuse(quantize_call(), false, 1, DType::int32, {"quantize: input 1", "int32", "float"});
  refuse(quantize_call(), false, 2, DType::float32, {"quantize: input 2", "float32", "integer"});
  refuse(quantize_call(), true, 0, DType::uint8, {"quantize: output 0", "uint8", "allowed: int8"});
  refuse(quantize_call(), true, 0, DType::float8_e4m3fn, {"quantize: output 0", "float8_e4m3fn", "allowed: int8"});
  refuse(dynamic_call(), true, 1, DType::int32, {"quantize_dynamic: output 1", "int32", "float32"});
  refuse(dynamic_call(), true, 2, DType::float32, {"quantize_dynamic: output 2", "float32", "int32"});
  refuse(packed_call(), false, 0, DType::int8, {"dequantize: input 0", "int8", "allowed: uint8"});
  refuse(packed_call(), true, 0, DType::int16, {"dequantize: output 0", "int16", "bfloat16"});
  refuse(Call(Op::pack, "codes bits=3 packed", {array(DType::uint8, {4})}, {array(DType::uint8, {2})}), false, 0,
         DType::float8_e5m2, {"pack: input 0", "int8 or uint8"});
}

TEST(zero_points_of_formats_without_them) {
  Call c(Op::quantize, "fp8_e4m3 block=0",
         {array(DType::float32, {4}), array(DType::float32, {1}), array(DType::int32, {1})},
         {array(DType::float8_e4m3fn, {4})});
  c.refused(ErrorKind::value, {"quantize: input 2", "fp8_e4m3", "zero point"});
}

TEST(fp8_codes_may_be_bytes) {
  Call c(Op::quantize, "fp8_e4m3 block=0", {array(DType::float32, {4}), array(DType::float32, {})},
         {array(DType::uint8, {4})});
  CHECK(c.run().ok());
}

// ---- learned scales, other orders -----------------------------------------------------------------------------------

Array number(float value, DType dtype = DType::float32, const Shape& shape = {}) {
  Array a = array(dtype, shape);
  for (int64_t i = 0; i < a.elements(); ++i) a.put_number(i, value);
  return a;
}
/// A scale for every three elements of a row.
Call lsq_call(const char* text = "int8 block=1,3") {
  return Call(Op::lsq_backward, text,
              {array(DType::float32, {4, 6}), array(DType::float16, {4, 6}), array(DType::float32, {4, 2}),
               number(0.5f), array(DType::int32, {4, 2})},
              {array(DType::float32, {4, 6}), array(DType::float32, {4, 2})});
}
Call tqt_call(Op op, float domain, const char* text = "int8 block=0,0") {
  std::vector<Array> in = {array(DType::float32, {4, 6}), number(1), number(domain), number(3, DType::int32)};
  std::vector<Array> out = {array(DType::float32, {4, 6})};
  if (op == Op::tqt_backward) {
    in.insert(in.begin(), array(DType::float32, {4, 6}));
    out.push_back(array(DType::float32, {}));
  }
  return Call(op, text, in, out);
}

TEST(learned_scales) {
  CHECK(lsq_call().run().ok());
  for (const char* text : {"int8 block=4,3", "int8 block=4,4", "uint4 block=1,5 ieee"}) {
    Call c = lsq_call(text);
    for (const size_t i : {2u, 4u}) c.in[i].shape[0] = c.spec.block[0] == 1 ? 4 : 1;
    c.out[1].shape[0] = c.in[2].shape[0];
    if (c.spec.block[1] == 3) {
      CHECK(c.run().ok());
    } else {
      c.refused(ErrorKind::value,
                {"lsq_backward: axis 1 has length 6", "multiple", std::to_string(c.spec.block[1]).c_str()});
    }
  }
  for (const char* text : {"fp4 block=1,3", "int8f6 block=1,3", "bf16 block=1,3", "int8 block=1,3 scale=exponent"}) {
    Call c = lsq_call(text);
    c.in.pop_back();
    c.refused(ErrorKind::value, {"lsq_backward: ", "format", c.spec.format.name, "integer"});
  }
  {
    Call c = lsq_call();
    Array two = array(DType::float32, {2}), none = array(DType::float32, {0}), wide = array(DType::float64, {});
    c.in[3] = two.view();
    c.refused(ErrorKind::value, {"lsq_backward: input 3", "(2,)", "one element"});
    c.in[3] = none.view();
    c.refused(ErrorKind::value, {"lsq_backward: input 3", "(0,)", "one element"});
    c.in[3] = wide.view();
    c.refused(ErrorKind::type, {"lsq_backward: input 3", "float64", "allowed: float32"});
    Array one = array(DType::float32, {1, 1, 1});
    c.in[3] = one.view();
    CHECK(c.run().ok());
    c.in[3].data = nullptr;
    c.refused(ErrorKind::value, {"lsq_backward: input 3", "no memory"});
  }
  {
    Call c = lsq_call();
    c.out[1].dtype = DType::float16;
    c.refused(ErrorKind::type, {"lsq_backward: output 1", "float16", "float32"});
    Call d = lsq_call();
    d.out[1] = d.in[2];
    d.refused(ErrorKind::value, {"output 1 overlaps input 2"});
    Call e = lsq_call();
    e.out[0] = e.in[0];  // the very same
    CHECK(e.run().ok());
    Call f = lsq_call();
    f.out[1] = f.out[0];
    f.out[1].shape[1] = f.out[1].strides[0] = 2;
    f.refused(ErrorKind::value, {"outputs 0 and 1 overlap"});
    Call g = lsq_call();
    g.in.resize(3);
    g.refused(ErrorKind::value, {"lsq_backward: got 3 inputs", "(xxsnz)"});
  }
  // Nothing to learn from: the sum is 0, or there is no scale.
  Call whole(Op::lsq_backward, "int8 block=0",
             {array(DType::float32, {0}), array(DType::float32, {0}), number(1), number(1)},
             {array(DType::float32, {0}), array(DType::float32, {})});
  CHECK(whole.run().ok());
  CHECK_EQ(*static_cast<const float*>(whole.out[1].data), 0.0f);
  Call none(Op::lsq_backward, "int8 block=4",
            {array(DType::float32, {0}), array(DType::float32, {0}), array(DType::float32, {0}), number(1)},
            {array(DType::float32, {0}), array(DType::float32, {0})});
  for (auto* tensors : {&none.in, &none.out})
    for (TensorView& t : *tensors)
      if (t.elements() == 0) t.data = nullptr;
  CHECK(none.run().ok());
}

TEST(thresholds) {
  for (const Op op : {Op::tqt_quantize, Op::tqt_backward}) {
    const std::string name = quark::kOps[int(op)].name;
    for (const float domain : {1.0f, 3.0f, 128.0f, 0x1p22f}) CHECK(tqt_call(op, domain).run().ok());
    for (const float domain : {0.0f, -0.0f, -1.0f, 0.5f, 127.5f, std::nextafter(1.0f, 2.0f), 0x1p22f + 1, 0x1p31f,
                               1e30f, INFINITY, -INFINITY, NAN})
      tqt_call(op, domain).refused(ErrorKind::value, {name.c_str(), "domain is", "1 to 2^22"});
    const size_t at = op == Op::tqt_backward ? 3 : 2;
    Array two = array(DType::float32, {1, 2}), code = array(DType::int32, {});
    Call c = tqt_call(op, 128);
    c.in[at] = two.view();
    c.refused(ErrorKind::value, {name.c_str(), "(1, 2)", "one element"});
    c.in[at] = code.view();
    c.refused(ErrorKind::type, {name.c_str(), "int32", "allowed: float32"});
    Call d = tqt_call(op, 128);
    d.in[at - 1] = two.view();
    d.refused(ErrorKind::value, {name.c_str(), "(1, 2)", "expected (1, 1)"});
  }
}

TEST(a_threshold_is_one_number) {
  for (const int64_t n : {0, 3}) {
    Call c(Op::tqt_quantize, "int8 block=1", {array(DType::float32, {n}), array(DType::float32, {n}), number(128)},
           {array(DType::float32, {n})});
    c.refused(ErrorKind::value, {"tqt_quantize: input 1", "one element"});
    Call d(Op::tqt_backward, "int8 block=1",
           {array(DType::float32, {n}), array(DType::float32, {n}), array(DType::float32, {n}), number(128)},
           {array(DType::float32, {n}), array(DType::float32, {n})});
    d.refused(ErrorKind::value, {"tqt_backward: input 2", "one element"});
  }
}

TEST(float_zero_points) {
  const auto with = [](Op op, const char* text, bool has_codes) {
    return Call(op, text,
                {op == Op::dequantize ? array(DType::int8, {8}) : array(DType::float32, {8}), number(1), number(0.5f)},
                {has_codes ? array(DType::int8, {8}) : array(DType::float32, {8})});
  };
  with(Op::quantize, "int8 block=0", true).refused(ErrorKind::type, {"quantize: input 2", "float32", "integer"});
  with(Op::quantize, "int8 block=0 reciprocal", true).refused(ErrorKind::type, {"quantize: input 2", "float32"});
  CHECK(with(Op::quantize, "int8 block=0 shifted", true).run().ok());
  CHECK(with(Op::fake_quantize, "int8 block=0", false).run().ok());
  CHECK(with(Op::dequantize, "int8 block=0", false).run().ok());
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float64}) {
    Call c = with(Op::fake_quantize, "int8 block=0 shifted", false);
    Array z = array(dtype, {});
    c.in[2] = z.view();
    c.refused(ErrorKind::type, {"fake_quantize: input 2", quark::name_of(dtype), "integer"});
  }
  with(Op::fake_quantize, "fp4 block=0", false).refused(ErrorKind::value, {"fp4 has no zero point"});
}

TEST(wide_codes) {
  const auto into = [](const char* text, DType dtype, const Shape& shape = {8}) {
    return Call(Op::quantize, text, {array(DType::float32, {8}), number(1)}, {array(dtype, shape)});
  };
  CHECK(into("int8 block=0 ieee", DType::int32).run().ok());
  CHECK(into("int8 block=0", DType::int8).run().ok());
  into("int8 block=0", DType::int32).refused(ErrorKind::type, {"quantize: output 0", "int32", "allowed: int8"});
  for (const DType dtype : {DType::int8, DType::uint8, DType::int64})
    into("int8 block=0 ieee", dtype).refused(ErrorKind::type, {"quantize: output 0", quark::name_of(dtype), "int32"});
  CHECK(into("int4 block=0 ieee packed", DType::uint8, {4}).run().ok());
  into("int4 block=0 ieee packed", DType::int32, {4}).refused(ErrorKind::type, {"int32", "allowed: uint8"});
  into("fp4 block=0 ieee", DType::int32).refused(ErrorKind::type, {"int32", "allowed: uint8"});
  const auto from = [](const char* text, DType dtype) {
    return Call(Op::dequantize, text, {array(dtype, {8}), number(1)}, {array(DType::float32, {8})});
  };
  for (const DType dtype : {DType::int8, DType::uint8, DType::int16, DType::uint16, DType::int32, DType::int64})
    CHECK(from("int8 block=0 ieee", dtype).run().ok());
  from("int8 block=0 ieee", DType::float32).refused(ErrorKind::type, {"float32", "an integer dtype"});
  from("int8 block=0", DType::int32).refused(ErrorKind::type, {"int32", "allowed: int8"});
  Call backward(Op::dequantize_backward, "int8 block=0", {array(DType::float32, {8}), array(DType::int32, {8})},
                {array(DType::float32, {})});
  backward.refused(ErrorKind::type, {"dequantize_backward: input 1", "int32", "allowed: int8"});
}

TEST(shared_exponents_have_no_codes) {
  for (const char* text :
       {"int8 block=8 scale=exponent", "int8 block=8 scale=microexponents", "int8 block=8 scale=exponent packed"}) {
    const DType dtype = good(text).packed ? DType::uint8 : DType::int8;
    Call quantize(Op::quantize, text, {array(DType::float32, {8}), number(1)}, {array(dtype, {8})});
    quantize.refused(ErrorKind::unsupported, {"quantize: output 0", "share an exponent"});
    Call dynamic(Op::quantize_dynamic, text, {array(DType::float32, {8})}, {array(dtype, {8}), number(1)});
    dynamic.refused(ErrorKind::unsupported, {"quantize_dynamic: output 0", "share an exponent"});
    Call dequantize(Op::dequantize, text, {array(dtype, {8}), number(1)}, {array(DType::float32, {8})});
    dequantize.refused(ErrorKind::unsupported, {"dequantize: input 0", "share an exponent"});
    Call backward(Op::dequantize_backward, text, {array(DType::float32, {8}), array(dtype, {8})}, {number(1)});
    backward.refused(ErrorKind::unsupported, {"dequantize_backward: input 1", "share an exponent"});
    Call values(Op::quantize_values, text, {array(DType::float32, {8}), number(1)}, {array(DType::float32, {8})});
    values.refused(ErrorKind::unsupported, {"quantize_values: ", "share an exponent"});
    Call fake(Op::fake_quantize_dynamic, text, {array(DType::float32, {8})}, {array(DType::float32, {8}), number(1)});
    CHECK(fake.run().ok());
  }
}

TEST(wrong_shapes) {
  const auto refuse = [](Call c, bool is_output, size_t at, const Shape& shape,
                         std::initializer_list<const char*> words) {
    Array other = array((is_output ? c.out : c.in)[at].dtype, shape);
    (is_output ? c.out : c.in)[at] = other.view();
    c.refused(ErrorKind::value, words);
  };
  refuse(quantize_call(), true, 0, {4, 5}, {"quantize: output 0", "(4, 5)", "expected (4, 6)"});
  refuse(quantize_call(), true, 0, {24}, {"quantize: output 0", "(24,)", "expected (4, 6)"});
  refuse(quantize_call(), false, 1, {4}, {"quantize: input 1", "(4,)", "expected (4, 1)"});
  refuse(quantize_call(), false, 1, {1, 1}, {"quantize: input 1", "(1, 1)", "expected (4, 1)"});
  refuse(quantize_call(), false, 2, {4, 6}, {"quantize: input 2", "(4, 6)", "expected (4, 1)"});
  refuse(quantize_call(), false, 0, {4, 6, 1}, {"quantize: ", "block has 2 axes", "(4, 6, 1)"});
  refuse(quantize_call(), false, 0, {}, {"quantize: ", "block has 2 axes", "()"});
  refuse(packed_call(), false, 0, {4, 7}, {"dequantize: input 0", "(4, 7)", "expected (4, 4)"});
  refuse(packed_call(), true, 0, {4, 8}, {"dequantize: ", "length is 7", "(4, 8)"});
  refuse(dynamic_call(), true, 1, {1, 4}, {"quantize_dynamic: output 1", "(1, 4)", "expected (4, 1)"});
}

TEST(no_memory) {
  Call c = quantize_call();
  c.in[0].data = nullptr;
  c.refused(ErrorKind::value, {"quantize: input 0", "no memory"});
  Call d = quantize_call();
  d.out[0].data = nullptr;
  d.refused(ErrorKind::value, {"quantize: output 0", "no memory"});
  // Nothing to read, nothing missing.
  Call e(Op::quantize, "int8 block=0,0", {array(DType::float32, {0, 3}), array(DType::float32, {})},
         {array(DType::int8, {0, 3})});
  e.in[0].data = e.out[0].data = nullptr;
  CHECK(e.run().ok());
}

TEST(misaligned) {
  for (const DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
    Call c(Op::quantize, "int8 block=0", {array(dtype, {4}), array(DType::float32, {})}, {array(DType::int8, {4})});
    c.in[0].data = static_cast<char*>(c.in[0].data) + 1;
    c.refused(ErrorKind::value, {"quantize: input 0", "aligned", quark::name_of(dtype)});
  }
  Call c = dynamic_call();
  c.out[1].data = static_cast<char*>(c.out[1].data) + 2;
  c.refused(ErrorKind::value, {"quantize_dynamic: output 1", "aligned", "float32"});
}

TEST(on_a_gpu) {
  for (const quark::Device device : {quark::Device::cuda, quark::Device::hip}) {
    Call c = quantize_call();
    c.in[1].device = device;
    c.refused(ErrorKind::unsupported, {"quantize: input 1", "GPU", "CPU"});
    Call d = quantize_call();
    d.out[0].device = device;
    d.refused(ErrorKind::unsupported, {"quantize: output 0", "GPU", "CPU"});
  }
}

/// Sets one axis of every data-shaped tensor, so that only the shape itself is wrong.
void refuse_length(Call c, int axis, int64_t length, std::initializer_list<const char*> words) {
  const int rank = c.in[0].rank;
  for (auto* tensors : {&c.in, &c.out})
    for (TensorView& t : *tensors)
      if (t.rank == rank && t.shape[0] == 4 && t.shape[1] != 1) t.shape[axis] = length;
  c.refused(ErrorKind::value, words);
}

TEST(impossible_shapes) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  refuse_length(quantize_call(), 1, -1, {"quantize: input 0", "impossible shape (4, -1)"});
  refuse_length(quantize_call(), 1, kHuge, {"quantize: input 0", "shape"});
  refuse_length(quantize_call(), 1, kHuge / 2, {"quantize: input 0", "shape"});
  refuse_length(quantize_call(), 1, kHuge / 64, {"quantize: input 0", "shape"});
  refuse_length(dynamic_call(), 1, kHuge / 4, {"quantize_dynamic: input 0", "shape"});
  // The logical shape of dequantize and unpack is that of an output: it isn't to be trusted either.
  refuse_length(packed_call(), 1, kHuge, {"dequantize: ", "shape"});
  {
    Call c(Op::dequantize, "int8 block=1,1", {array(DType::int8, {2, 3}), array(DType::float32, {2, 3})},
           {array(DType::float32, {2, 3})});
    c.out[0].shape[0] = c.out[0].shape[1] = int64_t(1) << 40;
    c.refused(ErrorKind::value, {"dequantize: ", "shape"});
  }
  {
    Call c(Op::unpack, "codes bits=3 packed", {array(DType::uint8, {3})}, {array(DType::uint8, {8})});
    c.out[0].shape[0] = kHuge;
    c.refused(ErrorKind::value, {"unpack: ", "shape"});
    c.out[0].shape[0] = -8;
    c.refused(ErrorKind::value, {"unpack: ", "shape"});
  }
  {
    Call c(Op::quantize, "int8 block=1,1", {array(DType::float32, {2, 3}), array(DType::float32, {2, 3})},
           {array(DType::int8, {2, 3})});
    c.in[1].shape[0] = -2;
    c.refused(ErrorKind::value, {"quantize: input 1", "impossible shape (-2, 3)"});
  }
}

TEST(huge_blocks_are_whole_axes) {
  Call c(Op::quantize, "int8 block=9223372036854775807", {array(DType::float32, {4}), array(DType::float32, {1})},
         {array(DType::int8, {4})});
  CHECK(c.run().ok());
}

TEST(outputs_that_overlap_themselves) {
  for (const int64_t stride : {0, 1, 5, -5}) {
    Call c = quantize_call();
    c.out[0].strides[0] = stride;
    c.refused(ErrorKind::value, {"quantize: output 0", "overlaps itself"});
  }
  Call c = quantize_call();
  c.out[0].strides[1] = 0;
  c.refused(ErrorKind::value, {"quantize: output 0", "overlaps itself"});
  Call d = dynamic_call();
  d.out[1].strides[0] = 2;
  d.refused(ErrorKind::value, {"quantize_dynamic: output 1", "contiguous"});
  // An axis of one element has no step, whatever its stride says.
  Call e(Op::quantize, "int8 block=0,0", {array(DType::float32, {1, 6}), array(DType::float32, {})},
         {array(DType::int8, {1, 6})});
  e.out[0].strides[0] = 0;
  CHECK(e.run().ok());
}

TEST(operands_that_overlap) {
  const auto fake = [] {
    return Call(Op::fake_quantize_backward, "int8 block=0",
                {array(DType::float32, {8}), array(DType::float32, {8}), array(DType::float32, {})},
                {array(DType::float32, {8})});
  };
  const auto moved = [](TensorView t, int64_t elements) {
    t.data = static_cast<char*>(t.data) + elements * quark::bytes_of(t.dtype);
    return t;
  };
  {
    Call c = fake();
    c.out[0] = c.in[1];  // the very same
    CHECK(c.run().ok());
  }
  Array longer = array(DType::float32, {9});
  TensorView view = longer.view();
  view.shape[0] = 8;
  for (const int64_t by : {1, -1}) {
    Call c = fake();
    c.in[1] = by > 0 ? view : moved(view, 1);
    c.out[0] = by > 0 ? moved(view, 1) : view;
    c.refused(ErrorKind::value, {"fake_quantize_backward: output 0 overlaps input 1", "very same"});
  }
  {
    Call c = fake();  // the same memory backwards
    c.out[0] = moved(c.in[0], 7);
    c.out[0].strides[0] = -1;
    c.refused(ErrorKind::value, {"output 0 overlaps input 0"});
  }
  {
    Array all = array(DType::float32, {16});
    Call c = fake();  // an input backwards from element 7, the output forwards from 4, then from 8
    c.in[0] = moved(all.view(), 7);
    c.in[0].shape[0] = 8;
    c.in[0].strides[0] = -1;
    c.out[0] = moved(all.view(), 4);
    c.out[0].shape[0] = 8;
    c.refused(ErrorKind::value, {"output 0 overlaps input 0"});
    c.out[0] = moved(c.out[0], 4);
    CHECK(c.run().ok());
  }
  {
    Call c = fake();  // the same bytes as another dtype
    c.out[0] = c.in[0];
    c.out[0].dtype = DType::float16;
    c.refused(ErrorKind::value, {"output 0 overlaps input 0"});
  }
  {
    Call c = fake();  // inside the scale
    c.in[2] = moved(c.out[0], 3);
    c.in[2].rank = 0;
    c.refused(ErrorKind::value, {"output 0 overlaps input 2"});
  }
  {
    Call c = fake();  // next to each other is fine
    Array both = array(DType::float32, {16});
    c.in[0] = both.view();
    c.in[0].shape[0] = 8;
    c.out[0] = moved(c.in[0], 8);
    CHECK(c.run().ok());
  }
  {
    Call c = dynamic_call();
    c.out[2].data = c.out[1].data;
    c.refused(ErrorKind::value, {"quantize_dynamic: outputs 1 and 2 overlap"});
  }
}

/// Scales are written before the last input is read, so they must not be an input, not even the very same tensor.
TEST(scales_in_the_memory_of_an_input) {
  for (const Op op : {Op::choose_qparams, Op::quantize_dynamic, Op::fake_quantize_dynamic, Op::dequantize_backward}) {
    std::vector<Array> in = {array(DType::float32, {5})}, out = {array(DType::float32, {5})};
    if (op == Op::quantize_dynamic) out.insert(out.begin(), array(DType::int8, {5}));
    if (op == Op::fake_quantize_dynamic) out.insert(out.begin(), array(DType::float32, {5}));
    if (op == Op::dequantize_backward) in.push_back(array(DType::int8, {5}));
    Call c(op, "int8 block=1", in, out);
    CHECK(c.run().ok());
    c.out.back() = c.in[0];
    c.refused(ErrorKind::value, {"overlaps input 0", "only data may be the very same tensor"});
  }
  Call c(Op::fake_quantize, "int8 block=1", {array(DType::float32, {5}), array(DType::float32, {5})},
         {array(DType::float32, {5})});
  c.out[0] = c.in[1];
  c.refused(ErrorKind::value, {"output 0 overlaps input 1"});
}

// ---- float environment --------------------------------------------------------------------------------------------

TEST(float_environment_is_plain_inside_and_restored_after) {
  const hostile::Environment environment;
  const uint64_t before = hostile::control();
  CHECK(!hostile::keeps_subnormals());
  CHECK(!hostile::rounds_to_nearest());
  {
    const quark::FloatEnvironment plain;
    CHECK(hostile::keeps_subnormals());
    CHECK(hostile::rounds_to_nearest());
    CHECK(hostile::control() != before);
  }
  CHECK_EQ(hostile::control(), before);
}

/// Values, scales and codes that a flushed or directed operation would change.
void fill(Random& random, Array& a, bool is_scale) {
  for (int64_t i = 0; i < a.elements(); ++i) {
    const auto exponent = int(random.between(-149, is_scale ? 3 : 10));
    const double m = 1 + double(random.between(0, 4095)) / 4096;
    const double specials[] = {0.0, -0.0, INFINITY, NAN};
    if (random.chance(3)) {
      a.put_number(i, specials[random.between(0, 3)]);
      continue;
    }
    a.put_number(i, std::ldexp(random.chance(50) && !is_scale ? -m : m, exponent));
  }
}

TEST(results_do_not_depend_on_the_host_s_float_environment) {
  Random random(2);
  for (const char* format :
       {"int8", "uint4 asymmetric", "int8f6", "fp8_e4m3", "fp8_e5m2", "fp4", "fp16", "bf16", "int8 shifted reciprocal",
        "int16 ieee reciprocal asymmetric", "fp8_e4m3 narrow plus_zero scale=e8m0", "int4 scale=e8m0",
        "int8 scale=exponent", "int5 scale=microexponents min=-15 max=15"}) {
    const bool has_pairs = std::string_view(format).find("micro") != std::string_view::npos;
    const std::string text = std::string(format) + (has_pairs ? " block=1,8" : " block=0,8");
    const QuantSpec spec = good(text);
    const bool is_integer = spec.format.is_integer();
    const DType storage = spec.ieee && is_integer ? DType::int32 : spec.format.storage;
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16, DType::float64}) {
      const Shape shape = {40, 64}, scales = {has_pairs ? 40 : 1, 8};
      Array x(random, dtype, shape), y(random, dtype, shape), s(random, DType::float32, scales),
          q(random, storage, shape);
      fill(random, x, false);
      fill(random, y, false);
      fill(random, s, true);
      std::vector<Array> z;
      if (!spec.symmetric) z.emplace_back(random, DType::int32, scales);
      const auto call = [&](Op op, std::vector<Array> in, std::vector<Array> out, bool zero_in, bool zero_out) {
        if (zero_in && !z.empty()) in.push_back(z[0]);
        if (zero_out && !z.empty()) out.push_back(z[0]);
        const check::Note note(
            [&] { return std::string(quark::kOps[int(op)].name) + " " + text + " " + quark::name_of(dtype); });
        std::vector<Array> plain = out, flushed = out;
        const QuantSpec own =
            good(op == Op::tqt_quantize || op == Op::tqt_backward ? std::string(format) + " block=0,0" : text);
        const auto run = [&](std::vector<Array>& results, quark::Executor& executor) {
          const auto inputs = arrays::views(in), outputs = arrays::views(results);
          const Status status = quark::run(op, inputs, outputs, own, executor);
          if (!status.ok()) check::fail(__FILE__, __LINE__, status.message());
        };
        quark::SerialExecutor serial;
        quark::OpenMPExecutor openmp(3);
        run(plain, serial);
        uint64_t before = 0, after = 0;
        {
          const hostile::Environment environment;
          before = hostile::control();
          run(flushed, random.chance(50) ? static_cast<quark::Executor&>(serial) : openmp);
          after = hostile::control();
        }
        CHECK_EQ(before, after);
        for (size_t i = 0; i < out.size(); ++i) CHECK(plain[i].bytes() == flushed[i].bytes());
      };
      call(Op::choose_qparams, {x}, {s}, false, true);
      call(Op::fake_quantize, {x, s}, {y}, true, false);
      call(Op::fake_quantize_dynamic, {x}, {y, s}, false, true);
      call(Op::fake_quantize_backward, {x, y, s}, {x}, true, false);
      if (spec.shares_exponent()) continue;
      call(Op::quantize, {x, s}, {q}, true, false);
      call(Op::quantize_values, {x, s}, {y}, false, false);
      call(Op::quantize_dynamic, {x}, {q, s}, false, true);
      call(Op::dequantize, {q, s}, {x}, true, false);
      call(Op::dequantize_backward, {x, q}, {s}, true, false);
      if (!is_integer) continue;
      // A factor and a scale that are subnormal.
      z.clear();
      Array large(random, dtype, shape);
      for (int64_t i = 0; i < large.elements(); ++i) large.put_number(i, double(random.between(1, 60'000)));
      call(Op::lsq_backward, {large, large, s, number(1e-40f)}, {y, s}, false, false);
      call(Op::tqt_quantize, {x, number(-126), number(128)}, {y}, false, false);
      call(Op::tqt_backward, {large, large, number(-126), number(128)}, {y, number(0)}, false, false);
    }
  }
}

TEST(domains_are_checked_in_any_float_environment) {
  for (const float domain : {NAN, 0.5f, 1e30f}) {
    Call c = tqt_call(Op::tqt_quantize, domain);
    quark::SerialExecutor executor;
    Status status;
    {
      const hostile::Environment environment;
      status = quark::run(c.op, c.in, c.out, c.spec, executor);
    }
    check_error(status, ErrorKind::value, {"domain"});
  }
}

TEST(parsing_does_not_depend_on_the_float_environment) {
  const hostile::Environment environment;
  QuantSpec spec;
  CHECK(quark::parse_spec("int8 min=-127 max=127", spec).ok());
  CHECK_EQ(spec.quant_min, -127.0f);
  CHECK(!quark::parse_spec("int8 max=126.5", spec).ok());
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
