// What parse_spec and run refuse, in which words, and what they accept; the float environment.
#include <cmath>
#include <limits>
#include <locale>

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
using quark::Method;
using quark::Op;
using quark::QuantSpec;
using quark::Rounding;
using quark::ScaleFormat;
using quark::ScaleRule;
using quark::Status;
using quark::TensorView;

/// An error of that kind whose message has all of the given words.
using Words = std::vector<const char*>;
void check_error(const Status& status, ErrorKind kind, const Words& words) {
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

void bad(std::string_view text, const Words& words) {
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
  CHECK(good("fp4 scale=e4m3 block=1,16").scale_format == ScaleFormat::e4m3);
  CHECK(good("fp4 scale=global block=0,0").scale_format == ScaleFormat::global);
  CHECK(good("int8 block=1,16 scale=exponent").shares_exponent());
  CHECK(!good("int8 block=1,16 scale=e8m0").shares_exponent());
  const std::pair<const char*, ScaleRule> rules[] = {
      {"floor", ScaleRule::floor}, {"ceil", ScaleRule::ceil}, {"even", ScaleRule::even}, {"rceil", ScaleRule::rceil}};
  for (const auto& [name, rule] : rules) CHECK(good(std::string("fp4 scale=e8m0 rule=") + name).scale_rule == rule);
  CHECK(good("int8 scale=exponent rule=fit ieee").scale_rule == ScaleRule::fit);
  CHECK(good("int8 rule=floor").scale_rule == ScaleRule::floor);
  CHECK(good("int8").method == Method::extremes);
  CHECK(good("fp4 scale=e8m0 method=mse").method == Method::mse);
  for (const double percent : {100.0, 99.99, 50.0, 0.001, 5e-324}) {
    char text[64];
    std::snprintf(text, sizeof text, "int8 asymmetric method=percentile:%.17g", percent);
    CHECK(good(text).method == Method::percentile);
    CHECK_EQ(good(text).percentile, percent);
  }
  CHECK(good("int8 method=percentile:99 rounding=stochastic").rounding == Rounding::stochastic);
  struct Commas : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale(), new Commas));
  CHECK_EQ(good("int8 method=percentile:99.5").percentile, 99.5);
  std::locale::global(before);
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

TEST(optional_letters) {
  const std::pair<const char*, std::string_view> calls[] = {{"int8", ""},
                                                            {"int8 asymmetric", ""},
                                                            {"fp4 scale=e8m0 rounding=stochastic", "k"},
                                                            {"fp4 scale=e4m3", "g"},
                                                            {"fp4 scale=global", ""},
                                                            {"int8 scale=exponent", ""},
                                                            {"int8 scale=microexponents block=2", "p"},
                                                            {"fp4 scale=e4m3 rounding=stochastic", "gk"}};
  for (const auto& [text, optional] : calls) {
    const check::Note note(text);
    for (const char letter : std::string_view("gkp"))
      CHECK_EQ(good(text).takes(letter), optional.find(letter) != std::string_view::npos);
    for (const char letter : std::string_view("xqcsnze")) CHECK(good(text).takes(letter));
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
  for (const char* number : {"1x", "0x1", "1e999", "1,5", "--1", "+1"})
    bad(std::string("int8 max=") + number, {"max="});
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
    bad(text + " ieee rounding=half_up", {"half_even"});
    bad(text + " asymmetric", {"float32", "asymmetric"});
  }
  for (const char* block :
       {"", " block=7", " block=1,7", " block=0", " block=1,0", " block=1", " block=2,2", " block=16,0"})
    bad(std::string("int8 scale=microexponents") + block, {"microexponents", "even", "one axis"});
  for (const char* name : {"e8m0", "e4m3", "global", "exponent", "microexponents block=2"}) {
    const std::string scale = std::string(" scale=") + name;
    bad("int8 asymmetric" + scale, {"int8", "float32", "asymmetric"});
    for (const char* format : {"bf16", "fp16"}) bad(format + scale, {format, "float32", "cast"});
  }
  bad("fp4 scale=e8m0 rule=up", {"rule=up"});
  bad("fp4 scale=e8m0 rule=", {"rule="});
  bad("fp4 scale=e8m0 rule", {"'rule'"});
  for (const char* scale : {"float32", "e4m3", "global", "exponent", "microexponents"})
    for (const char* rule : {"ceil", "even", "rceil"})
      bad(std::string("int8 block=16 scale=") + scale + " rule=" + rule, {"rule=", rule, "scale=", scale});
  for (const char* scale : {"float32", "e8m0", "e4m3", "global", "microexponents"})
    bad(std::string("int8 ieee block=16 scale=") + scale + " rule=fit", {"rule=fit", "scale=", scale});
  bad("int8 scale=exponent rule=fit", {"rule=fit", "ieee"});
  bad("int8 scale=exponent ieee", {"ieee", "rule=fit"});
  for (const char* scale : {"e8m0 rule=even", "e4m3", "global"})
    bad(std::string("int8 ieee min=-8 max=0 scale=") + scale, {"symmetric", "max > 0"});
  for (const char* method :
       {"", "minmax", "MSE", "mse:1", "percentile", "percentile:", "percentile:x", "percentile:50x", "percentile: 50",
        "percentile:0", "percentile:-0", "percentile:-1", "percentile:100.00001", "percentile:1e9", "percentile:inf",
        "percentile:-inf", "percentile:nan", "percentile:1e-400", "percentile:50:50"}) {
    const std::string word = std::string("method=") + method;
    if (word.find(' ') == std::string::npos) bad("int8 " + word, {"can't read", word.c_str()});
    bad(word, {"unknown format"});
  }
  for (const char* method : {"mse", "percentile:99"})
    for (const char* scale : {"e4m3", "global", "exponent", "microexponents"})
      bad(std::string("int8 block=16 scale=") + scale + " method=" + method, {"method", "float32 and e8m0", scale});
  bad("int8 method=mse rounding=stochastic", {"mse", "stochastic"});
  for (const char* text :
       {"int8 reciprocal", "int8 shifted", "int8 ieee", "fp4 ieee", "fp8_e4m3 ieee", "int8 scale=exponent ieee"})
    bad(std::string(text) + " rounding=stochastic", {"stochastic", "plain"});
  for (const char* text : {"fp4 narrow", "fp16", "bf16"})
    bad(std::string(text) + " rounding=stochastic", {"half_even"});
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
  for (const char* batch : {"", "x", "-1", "17", "1.5", "99999999999999999999"})
    bad(std::string("int8 batch=") + batch, {"can't read", "batch="});
  bad("int8 batch", {"'batch'"});
  for (const char* text : {"int8 block=0 whole=8", "codes bits=4 whole=8", "int8 whole=8"})
    bad(text, {"whole", "rounding=stochastic"});
  bad("int8 rounding=stochastic block=0 whole=8,8", {"whole has 2 axes", "block 1"});
  bad("codes bits=4 rounding=stochastic whole=8", {"whole has 1 axes", "block 0"});
  bad("int8 rounding=stochastic block=0 whole=-8", {"whole", "-8", ">= 0"});
  bad("int8 rounding=stochastic block=0 whole=8,", {"whole", "comma"});
  bad("int8 rounding=stochastic block=0 whole=8 whole=8", {"whole is given twice"});
  for (const char* whole : {"4294967296,4294967296", "0,9223372036854775807,2", "9223372036854775807,2,0"})
    bad("int8 rounding=stochastic block=" + std::string(std::string_view(whole).size() < 22 ? "0,0" : "0,0,0") +
            " whole=" + whole,
        {"whole has too many elements"});
}

TEST(batches_and_shards) {
  CHECK_EQ(good("int8").batch, 0);
  CHECK(!good("int8 rounding=stochastic block=0").is_shard);
  CHECK_EQ(good("codes bits=4 packed batch=2").batch, 2);
  CHECK_EQ(good("int8 batch=16 block=1,0").batch, 16);
  const QuantSpec spec = good("fp4 whole=9223372036854775807,0 block=1,32 rounding=stochastic batch=1");
  CHECK(spec.is_shard);
  CHECK_EQ(spec.whole[0], std::numeric_limits<int64_t>::max());
  CHECK_EQ(spec.whole[1], 0);
  CHECK_EQ(spec.rank, 2);
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
  void refused(ErrorKind kind, const Words& words) {
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
  const auto refuse = [](Call c, bool is_output, size_t at, DType dtype, const Words& words) {
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
  for (const char* text : {"fp4 block=1,3", "int8f6 block=1,3", "bf16 block=1,3"}) {
    Call c = lsq_call(text);
    c.in.pop_back();
    c.refused(ErrorKind::value, {"lsq_backward: ", "format", c.spec.format.name, "integer"});
  }
  for (const char* words : {"scale=e8m0", "scale=exponent"})
    lsq_call((std::string("int8 block=1,3 ") + words).c_str())
        .refused(ErrorKind::value, {"lsq_backward: ", "gradient", "float32"});
  lsq_call("int8 block=1,3 rounding=stochastic").refused(ErrorKind::value, {"lsq_backward: ", "stochastic", "key"});
  for (const Op op : {Op::tqt_quantize, Op::tqt_backward}) {
    tqt_call(op, 8, "int8 block=0,0 scale=e8m0").refused(ErrorKind::value, {"gradient", "float32"});
    tqt_call(op, 8, "int8 block=0,0 rounding=stochastic").refused(ErrorKind::value, {"stochastic", "key"});
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

// ---- scale formats and optional tensors ---------------------------------------------------------------------------

DType scale_dtype(const QuantSpec& spec) {
  if (spec.scale_format == ScaleFormat::e4m3) return DType::float8_e4m3fn;
  if (spec.scale_format == ScaleFormat::e8m0) return DType::float8_e8m0fnu;
  return spec.shares_exponent() && !spec.ieee ? DType::int8 : DType::float32;
}

/// The letters of a call's tensors, without zero points.
std::string letters_of(const char* row, const QuantSpec& spec) {
  std::string letters;
  for (const char letter : std::string_view(row))
    if (letter != 'z' && spec.takes(letter)) letters += letter;
  return letters;
}

/// A call on data of shape (4, 33), symmetric and unpacked, with the tensors that its row and spec say. Blocks are of
/// 16 along the last axis.
Call call_of(Op op, const std::string& text) {
  const QuantSpec spec = good(text + " block=1,16");
  const auto make = [&](char letter) {
    switch (letter) {
      case 'q': return array(spec.ieee && spec.format.is_integer() ? DType::int32 : spec.format.storage, {4, 33});
      case 's': return array(scale_dtype(spec), {4, 3});
      case 'g': return number(1);
      case 'p': return array(DType::uint8, {4, 3});
      case 'k': return array(DType::int32, {2});
      default: return array(DType::float32, {4, 33});
    }
  };
  std::vector<Array> in, out;
  for (const char letter : letters_of(quark::kOps[int(op)].ins, spec)) in.push_back(make(letter));
  for (const char letter : letters_of(quark::kOps[int(op)].outs, spec)) out.push_back(make(letter));
  return Call(op, text + " block=1,16", std::move(in), std::move(out));
}

/// Every operator with optional tensors, and specs that have all of them.
const std::vector<Op> kBlockOps = {Op::choose_qparams,        Op::quantize,
                                   Op::quantize_dynamic,      Op::dequantize,
                                   Op::fake_quantize,         Op::fake_quantize_dynamic,
                                   Op::fake_quantize_backward};
const std::vector<std::string> kBlockTexts = {"int8",
                                              "fp8_e4m3 rounding=stochastic",
                                              "fp4 scale=e8m0 rule=even",
                                              "fp4 scale=e4m3",
                                              "fp4 scale=e4m3 rounding=stochastic",
                                              "int8 scale=exponent",
                                              "int5 scale=microexponents",
                                              "int5 scale=microexponents rounding=stochastic"};

template <class F>
void for_each_block_call(const F& f) {
  for (const Op op : kBlockOps)
    for (const std::string& text : kBlockTexts) {
      const check::Note note([&] { return quark::kOps[int(op)].name + (" \"" + text) + "\""; });
      f(op, text);
    }
}

TEST(every_optional_tensor_has_to_be_there) {
  for_each_block_call([](Op op, const std::string& text) {
    CHECK(call_of(op, text).run().ok());
    const QuantSpec spec = good(text + " block=1,16");
    for (const bool is_output : {false, true}) {
      const char* row = is_output ? quark::kOps[int(op)].outs : quark::kOps[int(op)].ins;
      const size_t n = letters_of(row, spec).size();
      for (size_t i = 0; i < n; ++i) {
        Call c = call_of(op, text);
        auto& side = is_output ? c.out : c.in;
        side.erase(side.begin() + int64_t(i));
        const Status status = c.run();  // another one may have taken its place
        CHECK(!status.ok());
        check_error(status, status.kind(), {quark::kOps[int(op)].name});
      }
      Call more = call_of(op, text);  // one could be a zero point
      auto& side = is_output ? more.out : more.in;
      side.insert(side.end(), 2, TensorView(side.back()));
      more.refused(ErrorKind::value, {"got", "with this spec its row is"});
      if (n < 2) continue;
      Call c = call_of(op, text);
      (is_output ? c.out : c.in).resize(0);
      c.refused(ErrorKind::value, {"got", "with this spec its row is"});
    }
  });
  Call c = call_of(Op::quantize, "fp4 scale=e4m3 rounding=stochastic");
  c.in.resize(2);
  c.refused(ErrorKind::value, {"quantize: got 2 inputs", "(xsgkz)", "(q)"});
  Call d = call_of(Op::fake_quantize_dynamic, "int5 scale=microexponents");
  d.out.resize(1);
  d.refused(ErrorKind::value, {"fake_quantize_dynamic: got 1 inputs and 1 outputs", "(xspz)"});
}

constexpr DType kAllDTypes[] = {
#define QUARK_DTYPE(name, bytes, dlpack, xla) DType::name,
    QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
};

/// Which dtypes a tensor of a letter may have.
bool is_allowed(char letter, DType t, const QuantSpec& spec, bool is_output) {
  const bool is_float = t <= DType::float64;
  switch (letter) {
    case 'x': return is_float;
    case 'g': return t == DType::float32;
    case 'p': return t == DType::uint8;
    case 'k': return t == DType::int32;
    case 'q': return t == spec.format.storage || (spec.format.is_fp8() && t == DType::uint8);
    default: break;
  }
  const bool is_number = is_output ? t == DType::float32 : is_float;
  if (spec.scale_format == ScaleFormat::e4m3) return t == DType::float8_e4m3fn;
  if (t == DType::float8_e8m0fnu) return spec.scale_format == ScaleFormat::e8m0 || spec.shares_exponent();
  return is_number || (spec.shares_exponent() && t == DType::int8);
}

TEST(dtypes_of_every_letter) {
  for_each_block_call([](Op op, const std::string& text) {
    const QuantSpec spec = good(text + " block=1,16");
    for (const bool is_output : {false, true}) {
      const std::string letters = letters_of(is_output ? quark::kOps[int(op)].outs : quark::kOps[int(op)].ins, spec);
      for (size_t i = 0; i < letters.size(); ++i) {
        for (const DType dtype : kAllDTypes) {
          Call c = call_of(op, text);
          TensorView& t = (is_output ? c.out : c.in)[i];
          Array other = array(dtype, Shape(t.shape, t.shape + t.rank));
          t = other.view();
          const std::string name = (is_output ? "output " : "input ") + std::to_string(i);
          const check::Note note([&] { return name + " of " + quark::name_of(dtype); });
          if (is_allowed(letters[i], dtype, spec, is_output)) {
            CHECK(c.run().ok());
          } else {
            c.refused(ErrorKind::type, {name.c_str(), quark::name_of(dtype), "allowed: "});
          }
        }
      }
    }
  });
}

TEST(shapes_of_optional_tensors) {
  const std::pair<char, std::vector<Shape>> wrong[] = {
      {'s', {{4}, {3, 4}, {4, 1}, {4, 2}, {4, 4}, {4, 33}, {}, {12}, {4, 3, 1}}},
      {'g', {{0}, {2}, {1, 2}, {4, 3}}},
      {'p', {{4}, {3, 4}, {4, 1}, {4, 2}, {4, 4}, {4, 33}, {}, {12}, {4, 3, 1}, {1, 1}}},
      {'k', {{}, {1}, {3}, {2, 1}, {1, 2}, {0}}}};
  for_each_block_call([&](Op op, const std::string& text) {
    const QuantSpec spec = good(text + " block=1,16");
    for (const bool is_output : {false, true}) {
      const std::string letters = letters_of(is_output ? quark::kOps[int(op)].outs : quark::kOps[int(op)].ins, spec);
      for (const auto& [letter, shapes] : wrong) {
        const size_t at = letters.find(letter);
        if (at == std::string::npos) continue;
        for (const Shape& shape : shapes) {
          Call c = call_of(op, text);
          TensorView& t = (is_output ? c.out : c.in)[at];
          Array other = array(t.dtype, shape);
          t = other.view();
          c.refused(ErrorKind::value,
                    {((is_output ? "output " : "input ") + std::to_string(at)).c_str(), "shape", "expected"});
        }
      }
    }
  });
  // Any shape of one element is a tensor's scale.
  for (const Shape& shape : {Shape{}, Shape{1}, Shape{1, 1, 1}}) {
    Call c = call_of(Op::fake_quantize_dynamic, "fp4 scale=e4m3");
    Array g = array(DType::float32, shape);
    c.out[2] = g.view();
    CHECK(c.run().ok());
  }
}

TEST(layouts_of_optional_tensors) {
  Array wide = array(DType::uint8, {4, 6});
  Call c = call_of(Op::choose_qparams, "int5 scale=microexponents");
  TensorView t = wide.view();
  t.shape[1] = 3;
  c.out[1] = t;
  c.refused(ErrorKind::value, {"choose_qparams: output 1", "contiguous"});
  t.strides[0] = 0;
  c.out[1] = t;
  c.refused(ErrorKind::value, {"choose_qparams: output 1", "overlaps itself"});
  Call d = call_of(Op::fake_quantize, "int5 scale=microexponents");
  d.in[2] = t;  // inputs may be anything
  CHECK(d.run().ok());
  Call e = call_of(Op::fake_quantize, "int8 rounding=stochastic");
  for (const int64_t stride : {1, 0, -1}) {
    e.in[2].strides[0] = stride;
    if (stride < 0) e.in[2].data = static_cast<char*>(e.in[2].data) + 4;
    CHECK(e.run().ok());
  }
  Call f = call_of(Op::fake_quantize_dynamic, "int5 scale=microexponents");
  f.out[2].data = f.out[1].data;
  f.refused(ErrorKind::value, {"outputs 1 and 2 overlap"});
  Call g = call_of(Op::fake_quantize_dynamic, "fp4 scale=e4m3");
  g.out[2].data = g.out[0].data;
  g.refused(ErrorKind::value, {"outputs 0 and 2 overlap"});
  Call k = call_of(Op::fake_quantize, "int8 rounding=stochastic");
  k.in[2].data = k.out[0].data;
  k.refused(ErrorKind::value, {"output 0 overlaps input 2"});
}

TEST(what_goes_with_which_operator) {
  for (const char* text : {"fp8_e4m3", "int8", "fp4 packed", "bf16"}) {
    const DType codes = good(text).packed ? DType::uint8 : good(text).format.storage;
    Call pack(Op::pack, text, {array(DType::uint8, {4})}, {array(codes, {good(text).packed ? 2 : 4})});
    pack.refused(ErrorKind::value, {"pack: the format is", "expected codes"});
    Call unpack(Op::unpack, text, {array(codes, {good(text).packed ? 2 : 4})}, {array(DType::uint8, {4})});
    unpack.refused(ErrorKind::value, {"unpack: the format is", "expected codes"});
  }
  struct Refused {
    Op op;
    const char* text;
    ErrorKind kind;
    Words words;
  };
  std::vector<Refused> all;
  for (const Op op : kBlockOps) {
    if (op == Op::choose_qparams) continue;
    for (const char* text : {"int8 method=mse", "fp4 scale=e8m0 method=percentile:99"})
      all.push_back({op, text, ErrorKind::value, {"method", "choose_qparams"}});
    all.push_back({op, "fp4 scale=global", ErrorKind::value, {"scale=global", "choose_qparams"}});
  }
  for (const char* text : {"fp4 scale=e4m3", "int8 scale=exponent", "int5 scale=microexponents"}) {
    all.push_back({Op::quantize_values, text, ErrorKind::unsupported, {"float32 and e8m0"}});
    all.push_back({Op::dequantize_backward, text, ErrorKind::value, {"gradient", "float32"}});
  }
  all.push_back({Op::dequantize_backward, "fp4 scale=e8m0", ErrorKind::value, {"gradient", "float32"}});
  for (const char* text : {"int8", "fp4", "fp4 scale=e8m0"}) {
    all.push_back({Op::quantize_values, text, ErrorKind::none, {}});
    all.push_back({Op::choose_qparams, text, ErrorKind::none, {}});
  }
  for (const char* text : {"int8 rounding=stochastic", "fp4 scale=e8m0 rounding=stochastic"})
    all.push_back({Op::quantize_values, text, ErrorKind::value, {"stochastic", "key"}});
  for (const char* text : {"int8 scale=exponent rule=fit ieee", "int5 scale=microexponents ieee"}) {
    for (const Op op : {Op::quantize, Op::quantize_dynamic, Op::dequantize, Op::dequantize_backward})
      all.push_back({op, text, ErrorKind::unsupported, {"no codes", "finite elements"}});
    for (const Op op : {Op::fake_quantize, Op::fake_quantize_dynamic, Op::fake_quantize_backward, Op::choose_qparams})
      all.push_back({op, text, ErrorKind::none, {}});
    all.push_back({Op::quantize_values, text, ErrorKind::unsupported, {"float32 and e8m0"}});
  }
  for (const char* text : {"fp4 scale=global", "int8 method=mse", "fp4 scale=e8m0 method=percentile:1"})
    all.push_back({Op::choose_qparams, text, ErrorKind::none, {}});
  for (const Refused& r : all) {
    const check::Note note(r.text);
    Call c = call_of(r.op, r.text);
    if (r.kind == ErrorKind::none) {
      CHECK(c.run().ok());
    } else {
      c.refused(r.kind, r.words);
    }
  }
}

/// Scales of exponents that codes can't have are numbers.
TEST(exponents_of_the_finite_elements_are_numbers) {
  for (const char* text : {"int8 scale=exponent rule=fit ieee", "int5 scale=microexponents ieee"}) {
    for (const DType dtype : {DType::int8, DType::float8_e8m0fnu}) {
      Array s = array(dtype, {4, 3});
      Call given = call_of(Op::fake_quantize, text), chosen = call_of(Op::choose_qparams, text);
      given.in[1] = s.view();
      given.refused(ErrorKind::type, {"fake_quantize: input 1", quark::name_of(dtype), "allowed: a float dtype"});
      chosen.out[0] = s.view();
      chosen.refused(ErrorKind::type, {"choose_qparams: output 0", quark::name_of(dtype), "allowed: float32"});
    }
  }
}

TEST(wrong_shapes) {
  const auto refuse = [](Call c, bool is_output, size_t at, const Shape& shape, const Words& words) {
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

TEST(on_several_devices) {
  for (const quark::Device device : {quark::Device::cuda, quark::Device::hip}) {
    const char* name = device == quark::Device::cuda ? "cuda:1" : "hip:1";
    Call c = quantize_call();
    c.in[1].device = device;
    c.in[1].device_number = 1;
    c.refused(ErrorKind::value, {"quantize: input 1 is on", name, "the call is on the CPU"});
    Call d = quantize_call();
    d.out[0].device = device;
    d.out[0].device_number = 1;
    d.refused(ErrorKind::value, {"quantize: output 0 is on", name, "the call is on the CPU"});
  }
  Call c = quantize_call();
  c.in[0].device_number = 3;
  c.refused(ErrorKind::value, {"quantize: input 0 is on the CPU with device number 3; the call is on the CPU:"});
}

/// Sets one axis of every data-shaped tensor, so that only the shape itself is wrong.
void refuse_length(Call c, int axis, int64_t length, const Words& words) {
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

TEST(impossible_ranks) {
  for (const int rank : {-1, quark::kMaxRank + 1, std::numeric_limits<int>::max()}) {
    Call c = quantize_call();
    c.in[0].rank = rank;
    c.refused(ErrorKind::value, {"quantize: input 0", std::to_string(rank).c_str(), "allowed: 0 to 16"});
    Call d = quantize_call();
    d.out[0].rank = rank;
    d.refused(ErrorKind::value, {"quantize: output 0", "allowed: 0 to 16"});
  }
}

TEST(impossible_strides) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  for (const int64_t stride : {kHuge, -kHuge - 1, kHuge / 2, -kHuge / 4, int64_t(1) << 62, -(int64_t(1) << 60)})
    for (const int axis : {0, 1}) {
      Call c = quantize_call();
      c.in[0].strides[axis] = stride;
      c.refused(ErrorKind::value, {"quantize: input 0", "too large: shape (4, 6), strides"});
      Call d = quantize_call();
      d.out[0].strides[axis] = stride;
      d.refused(ErrorKind::value, {"quantize: output 0", "too large: shape (4, 6), strides"});
      // No step is taken along an axis of one element, or of an empty array.
      Call e(Op::quantize, "int8 block=0,0", {array(DType::float32, {1, 1}), array(DType::float32, {})},
             {array(DType::int8, {1, 1})});
      e.in[0].strides[axis] = e.out[0].strides[axis] = stride;
      CHECK(e.run().ok());
      Call f(Op::quantize, "int8 block=0,0", {array(DType::float32, {0, 3}), array(DType::float32, {})},
             {array(DType::int8, {0, 3})});
      f.in[0].strides[axis] = f.out[0].strides[axis] = stride;
      CHECK(f.run().ok());
    }
}

TEST(huge_lengths_of_empty_arrays) {
  constexpr int64_t kHuge = int64_t(1) << 62;
  Call c(Op::quantize, "int4 packed block=0,0", {array(DType::float32, {0, 3}), array(DType::float32, {})},
         {array(DType::uint8, {0, 2})});
  c.in[0].shape[1] = kHuge;
  c.refused(ErrorKind::value, {"quantize: output 0 has shape (0, 2); expected (0, 2305843009213693952)"});
  c.out[0].shape[1] = kHuge / 2;
  CHECK(c.run().ok());
  Call d(Op::quantize, "int16 block=0,0", {array(DType::float32, {0, 3}), array(DType::float32, {})},
         {array(DType::int16, {0, 3})});
  d.in[0].shape[1] = d.out[0].shape[1] = kHuge;
  CHECK(d.run().ok());
  for (TensorView* t : {&d.in[0], &d.out[0]}) t->rank = 3, t->shape[2] = 4, t->strides[2] = 1;
  d.refused(ErrorKind::value, {"quantize: input 0", "impossible shape (0, 4611686018427387904, 4)"});
}

/// Groups along an axis and a step of as good as everything.
TEST(huge_strides_of_empty_arrays) {
  constexpr int64_t kHuge = -(int64_t(1) << 62) + 1;  // four of them overflow
  Call c(Op::lsq_backward, "int3 block=2,0,0",
         {array(DType::float32, {4, 4, 0}), array(DType::float32, {4, 4, 0}), array(DType::float32, {2, 1, 1}),
          array(DType::float32, {})},
         {array(DType::float32, {4, 4, 0}), array(DType::float32, {2, 1, 1})});
  for (TensorView* t : {&c.in[0], &c.in[1], &c.out[0]}) t->strides[1] = kHuge;
  CHECK(c.run().ok());
  // Of each example, too.
  Call d(Op::lsq_backward, "int3 block=2,0,0 batch=1",
         {array(DType::float32, {2, 4, 4, 0}), array(DType::float32, {2, 4, 4, 0}), array(DType::float32, {2, 2, 1, 1}),
          array(DType::float32, {2})},
         {array(DType::float32, {2, 4, 4, 0}), array(DType::float32, {2, 2, 1, 1})});
  for (TensorView* t : {&d.in[0], &d.in[1], &d.out[0]}) t->strides[2] = kHuge;
  CHECK(d.run().ok());
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

// ---- batches and shards -------------------------------------------------------------------------------------------

TensorView moved(TensorView t, int64_t elements) {
  t.data = static_cast<char*>(t.data) + elements * quark::bytes_of(t.dtype);
  return t;
}

/// Three examples with a scale per row, which are their own.
Call batch_call() {
  return Call(Op::fake_quantize, "int8 block=1,0 batch=1",
              {array(DType::float32, {3, 4, 6}), array(DType::float32, {3, 4, 1})}, {array(DType::float32, {3, 4, 6})});
}

TEST(lengths_of_batches) {
  CHECK(batch_call().run().ok());
  {
    Call c = batch_call();  // shared scales
    c.in[1].shape[0] = 1;
    CHECK(c.run().ok());
    c.in[0].shape[0] = 1;  // one example
    c.refused(ErrorKind::value, {"fake_quantize: output 0", "(3, 4, 6)", "batch axis 0", "1 examples"});
    c.out[0].shape[0] = 1;
    CHECK(c.run().ok());
  }
  {
    Call c = batch_call();
    c.in[1].shape[0] = 2;
    c.refused(ErrorKind::value, {"fake_quantize: input 1", "(2, 4, 1)", "batch axis 0", "3 examples"});
    c.in[1].shape[0] = 0;
    c.refused(ErrorKind::value, {"fake_quantize: input 1", "(0, 4, 1)", "3 examples"});
  }
  for (const int64_t n : {0, 1, 2}) {
    Call c = batch_call();
    c.out[0].shape[0] = n;
    c.refused(ErrorKind::value, {"fake_quantize: output 0", "3 examples"});
  }
  {
    Call c = batch_call();  // what one example gets is wrong
    c.in[1].rank = 2;
    c.refused(ErrorKind::value, {"fake_quantize: input 1 has shape (4,)", "(4, 1)", "of one example"});
    c.in[1].rank = 0;
    c.refused(ErrorKind::value, {"fake_quantize: input 1", "()", "1 batch axes"});
  }
  {
    Call c = batch_call();
    c.spec.batch = 3;
    c.refused(ErrorKind::value, {"fake_quantize: ", "block has 2 axes", "()", "of one example"});
    c.spec.batch = 4;
    c.refused(ErrorKind::value, {"fake_quantize: input 0", "4 batch axes"});
  }
  {
    Call c = batch_call();
    c.in.pop_back();
    c.refused(ErrorKind::value, {"fake_quantize: got 1 inputs"});
  }
  {
    Call c = batch_call();
    c.in[1].dtype = DType::int32;
    c.refused(ErrorKind::type, {"fake_quantize: input 1", "int32", "of one example"});
  }
}

/// Without examples there is nothing to do, but the shapes must be right; there may be no memory.
TEST(no_examples) {
  Call c = batch_call();
  for (TensorView* t : {&c.in[0], &c.in[1], &c.out[0]}) t->shape[0] = 0, t->data = nullptr;
  CHECK(c.run().ok());
  c.in[1].shape[0] = 1;
  c.refused(ErrorKind::value, {"input 1", "no memory"});
  c.in[1].data = c.arrays[1].view().data;
  CHECK(c.run().ok());
  c.in[1].shape[2] = 2;
  c.refused(ErrorKind::value, {"input 1 has shape (4, 2)", "of one example"});
  Call empty = batch_call();  // 2^60 of nothing
  for (TensorView* t : {&empty.in[0], &empty.in[1], &empty.out[0]}) {
    t->shape[0] = int64_t(1) << 60;
    t->shape[1] = 0;
  }
  CHECK(empty.run().ok());
  empty.in[0].shape[0] = int64_t(1) << 59;
  empty.refused(ErrorKind::value, {"input 1", "examples"});
}

/// Examples mustn't write where another one reads or writes.
TEST(overlaps_in_batches) {
  {
    Call c = batch_call();  // in place
    c.out[0] = c.in[0];
    CHECK(c.run().ok());
  }
  {
    Call c = batch_call();  // every example writes the same elements
    c.out[0].strides[0] = 0;
    c.refused(ErrorKind::value, {"output 0", "overlaps itself"});
    c.out[0] = c.in[0];
    c.in[0].strides[0] = c.out[0].strides[0] = 0;
    c.refused(ErrorKind::value, {"output 0", "overlaps itself"});
  }
  {
    Call c = batch_call();  // one row further in memory: an example's end in the next one
    c.out[0].strides[0] = 20;
    c.refused(ErrorKind::value, {"output 0", "overlaps itself"});
  }
  {
    Call c = batch_call();  // in place for the first example, all others read it too
    c.out[0] = c.in[0];
    c.in[0].strides[0] = 0;
    c.refused(ErrorKind::value, {"output 0 overlaps input 0"});
  }
  {
    Array longer = array(DType::float32, {4, 4, 6});
    Call c = batch_call();  // the next example's input
    c.in[0] = moved(longer.view(), 24);
    c.out[0] = longer.view();
    c.in[0].shape[0] = c.out[0].shape[0] = 3;
    c.refused(ErrorKind::value, {"output 0 overlaps input 0"});
  }
  {
    Array all = array(DType::float32, {3, 2, 24});
    Call c(Op::fake_quantize_dynamic, "int8 block=0 batch=1", {array(DType::float32, {3, 24})},
           {array(DType::float32, {3, 24}), array(DType::float32, {3, 1})});
    c.out[0].data = all.view().data;
    c.out[0].strides[0] = 48;
    CHECK(c.run().ok());
    c.out[1].data = moved(all.view(), 60).data;  // the scale of one in the data of another
    c.refused(ErrorKind::value, {"outputs 0 and 1 overlap"});
    c.out[1].data = c.in[0].data;
    c.refused(ErrorKind::value, {"output 1 overlaps input 0"});
  }
}

/// All examples are checked before one is run.
TEST(numbers_of_examples) {
  for (const Op op : {Op::tqt_quantize, Op::tqt_backward}) {
    Call one = tqt_call(op, 8, "int8 block=0,0 batch=1");
    std::vector<Array> in, out;
    for (const bool is_output : {false, true})
      for (const TensorView& t : is_output ? one.out : one.in) {
        Shape shape = {2};
        shape.insert(shape.end(), t.shape, t.shape + t.rank);
        (is_output ? out : in).push_back(number(8, t.dtype, shape));
      }
    Call c(op, "int8 block=0,0 batch=1", in, out);
    CHECK(c.run().ok());
    const size_t at = op == Op::tqt_quantize ? 2 : 3;
    static_cast<float*>(c.in[at].data)[1] = 2.5f;
    c.refused(ErrorKind::value, {"domain is 2.5", "integer from 1"});
    c.in[at].strides[0] = 0;
    CHECK(c.run().ok());
  }
}

Call shard_call(const char* words) {
  Array keys = array(DType::int32, {2, 4});
  for (const int at : {2, 6}) keys.put(at, 4), keys.put(at + 1, 3);
  return Call(Op::fake_quantize, std::string("int8 block=0,0 rounding=stochastic whole=8,9") + words,
              {array(DType::float32, {2, 4, 6}), number(2, DType::float32, {2}), keys},
              {array(DType::float32, {2, 4, 6})});
}

TEST(places_of_shards) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max(), kLeast = std::numeric_limits<int32_t>::min();
  const auto key_of = [](Call& c) { return static_cast<int32_t*>(c.in[2].data); };
  for (const int example : {0, 1}) {
    for (const int32_t begin : {5, 6, 7, 8, 9, -1, kMost, kLeast}) {
      Call c = shard_call(" batch=1");
      CHECK(c.run().ok());
      key_of(c)[4 * example + 2] = begin;
      c.refused(ErrorKind::value,
                {"fake_quantize: input 2", "axis 0", std::to_string(begin).c_str(), "(4, 6)", "(8, 9)"});
      key_of(c)[4 * example + 2] = 0;
      CHECK(c.run().ok());
      key_of(c)[4 * example + 3] = begin;
      c.refused(ErrorKind::value, {"fake_quantize: input 2", "axis 1", std::to_string(begin).c_str()});
    }
  }
  {
    Call c = shard_call(" batch=1");  // words as usual, those of the place missing
    c.in[2].shape[1] = 2;
    c.refused(ErrorKind::value, {"fake_quantize: input 2", "(2,)", "(4,)"});
    c.in[2].shape[1] = 3;
    c.refused(ErrorKind::value, {"fake_quantize: input 2", "(3,)", "(4,)"});
    c.spec.is_shard = false;
    c.refused(ErrorKind::value, {"fake_quantize: input 2", "(3,)", "(2,)"});
  }
  {
    Call c = shard_call(" batch=1");  // nothing at the very end
    c.in[0].shape[1] = c.out[0].shape[1] = 0;
    key_of(c)[2] = key_of(c)[6] = 8;
    CHECK(c.run().ok());
  }
  {
    Call c = shard_call(" batch=1");  // larger than the whole
    c.spec.whole[1] = 5;
    key_of(c)[3] = key_of(c)[7] = 0;
    c.refused(ErrorKind::value, {"input 2", "axis 1", "(4, 6)", "(8, 5)"});
  }
}

TEST(extremes_of_many_axes) {
  std::string block = "0";
  Shape shape = {2};
  for (int rank = 1; rank <= quark::kMaxRank; ++rank, block += ",0", shape.push_back(1)) {
    Shape ends(size_t(std::min(rank, quark::kMaxRank - 1)), 1);
    ends.push_back(2);
    Call c(Op::extremes, "int8 block=" + block, {array(DType::float32, shape)}, {array(DType::int32, ends)});
    if (rank < quark::kMaxRank) {
      CHECK(c.run().ok());
    } else {
      c.refused(ErrorKind::value, {"extremes: ", "16 dimensions", "at most 15"});
    }
  }
}

TEST(shapes_of_extremes) {
  const auto ends = [](const Shape& shape, DType dtype = DType::int32) {
    return Call(Op::extremes, "fp4 block=1,4 scale=e8m0", {array(DType::bfloat16, {3, 8})}, {array(dtype, shape)});
  };
  CHECK(ends({3, 2, 2}).run().ok());
  for (const Shape& shape : {Shape{3, 2}, Shape{3, 2, 1}, Shape{2, 3, 2}, Shape{3, 4}, Shape{12}, Shape{3, 2, 2, 1}})
    ends(shape).refused(ErrorKind::value, {"extremes: output 0", "(3, 2, 2)"});
  ends({3, 2, 2}, DType::float32).refused(ErrorKind::type, {"extremes: output 0", "float32", "int32"});
  Call c = ends({3, 2, 2});
  std::swap(c.out[0].strides[1], c.out[0].strides[2]);
  c.refused(ErrorKind::value, {"extremes: output 0", "contiguous"});
  Call d(Op::extremes, "int8 block=0 method=mse", {array(DType::float32, {3})}, {array(DType::int32, {1, 2})});
  d.refused(ErrorKind::value, {"extremes: ", "method", "choose_qparams"});
  d.spec = good("fp4 block=0 scale=global");
  CHECK(d.run().ok());
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

/// Whether an operator can be called with a spec.
bool goes_with(Op op, const QuantSpec& spec) {
  if (op == Op::choose_qparams) return true;
  if (spec.method != Method::extremes) return false;
  const bool is_number = spec.scale_format == ScaleFormat::float32, is_random = spec.rounding == Rounding::stochastic;
  switch (op) {
    case Op::convert:
    case Op::pack:
    case Op::unpack: return false;
    case Op::quantize_values: return !is_random && (is_number || spec.scale_format == ScaleFormat::e8m0);
    case Op::quantize:
    case Op::quantize_dynamic:
    case Op::dequantize: return !(spec.shares_exponent() && spec.ieee);
    case Op::dequantize_backward: return is_number;
    case Op::lsq_backward:
    case Op::tqt_quantize:
    case Op::tqt_backward: return is_number && !is_random && spec.format.is_integer();
    default: return true;
  }
}

TEST(results_do_not_depend_on_the_host_s_float_environment) {
  Random random(2);
  for (const char* words : {"int8",
                            "uint4 asymmetric",
                            "int8f6",
                            "fp8_e4m3",
                            "fp8_e5m2",
                            "fp4",
                            "fp16",
                            "bf16",
                            "int8 shifted reciprocal",
                            "int16 ieee reciprocal asymmetric",
                            "fp8_e4m3 narrow plus_zero scale=e8m0",
                            "int4 scale=e8m0 rule=even",
                            "fp4 scale=e8m0 rule=rceil",
                            "fp4 scale=e4m3",
                            "int8 scale=exponent",
                            "int8 scale=exponent rule=fit ieee",
                            "int5 scale=microexponents min=-15 max=15",
                            "int8 scale=microexponents ieee",
                            "fp8_e5m2 rounding=stochastic",
                            "int4 asymmetric rounding=stochastic",
                            "fp4 scale=e8m0 method=mse",
                            "int4 asymmetric method=mse",
                            "int8 method=percentile:90"}) {
    const bool has_pairs = std::string_view(words).find("micro") != std::string_view::npos;
    const std::string text = std::string(words) + (has_pairs ? " block=1,8" : " block=0,8");
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16, DType::float64}) {
      for (int op = 0; op < quark::kOpCount; ++op) {
        const bool is_tqt = Op(op) == Op::tqt_quantize || Op(op) == Op::tqt_backward;
        if (!goes_with(Op(op), good(text))) continue;
        const QuantSpec spec = good(is_tqt ? std::string(words) + " block=0,0" : text);
        const bool is_learned = is_tqt || Op(op) == Op::lsq_backward;
        const auto make = [&](char letter) {
          const Shape shape = {40, 64}, scales = is_tqt ? Shape{1, 1} : Shape{has_pairs ? 40 : 1, 8};
          const bool is_wide = spec.ieee && spec.format.is_integer();
          switch (letter) {
            case 'q': return array(is_wide ? DType::int32 : spec.format.storage, shape);
            case 'n': return number(is_tqt ? 128 : 1e-40f);
            case 'g': return number(0x1p-130f);
            case 'p': return array(DType::uint8, {40, 4});
            case 'k': return array(DType::int32, {2});
            case 'z': return array(DType::int32, scales);
            case 'e': return array(DType::int32, {scales[0], scales[1], 2});
            case 's': {
              if (is_tqt) return number(-126);
              Array s = array(scale_dtype(spec), scales);
              if (s.dtype() == DType::float32) fill(random, s, true);
              return s;
            }
            default: {
              Array x = array(dtype, shape);
              fill(random, x, false);
              for (int64_t i = 0; is_learned && i < x.elements(); ++i)
                x.put_number(i, double(random.between(1, 60'000)));
              return x;
            }
          }
        };
        const auto [name, ins, outs] = quark::kOps[op];
        const check::Note note([&] { return name + (" " + text) + " " + quark::name_of(dtype); });
        std::vector<Array> in, plain;
        const bool has_zero = !spec.symmetric && !is_learned;
        for (const char letter : std::string_view(ins))
          if (letter == 'z' ? has_zero : spec.takes(letter)) in.push_back(make(letter));
        for (const char letter : std::string_view(outs))
          if (letter == 'z' ? has_zero : spec.takes(letter)) plain.push_back(make(letter));
        std::vector<Array> flushed = plain;
        const auto run = [&](std::vector<Array>& results, quark::Executor& executor) {
          const auto inputs = arrays::views(in), outputs = arrays::views(results);
          const Status status = quark::run(Op(op), inputs, outputs, spec, executor);
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
        for (size_t i = 0; i < plain.size(); ++i) CHECK(plain[i].bytes() == flushed[i].bytes());
      }
    }
  }
}

/// 448 times such a range isn't a float.
TEST(the_scale_of_a_wide_range_in_any_float_environment) {
  for (const char* most : {"2543699", "8388607", "5000001", "4194305"}) {
    Call c(Op::choose_qparams, std::string("int2 scale=global ieee block=0 min=-1 max=") + most,
           {array(DType::float32, {3})}, {array(DType::float32, {1})});
    for (int i = 0; i < 3; ++i) c.arrays[0].put(i, 0.7f * float(i - 1));
    CHECK(c.run().ok());
    const auto plain = c.arrays[1].get<float>(0);
    {
      const hostile::Environment environment;
      CHECK(c.run().ok());
    }
    CHECK_EQ(c.arrays[1].get<float>(0), plain);
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
  CHECK(quark::parse_spec("int8 method=percentile:99.99", spec).ok());
  CHECK_EQ(spec.percentile, 99.99);
  CHECK(quark::parse_spec("int8 method=percentile:0.3", spec).ok());
  CHECK_EQ(spec.percentile, 0.3);
  for (const char* percent : {"nan", "-nan", "0", "1e-320x", "100.1"})
    CHECK(!quark::parse_spec(std::string("int8 method=percentile:") + percent, spec).ok());
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
