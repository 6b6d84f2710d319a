#include "calls.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "arrays.h"
#include "choices.h"
#include "hostile.h"
#include "memory.h"
#include "random_specs.h"

namespace fuzz {
namespace {

using arrays::Layout;
using arrays::Shape;
using quark::CpuLevel;
using quark::Device;
using quark::DType;
using quark::ErrorKind;
using quark::Op;
using quark::QuantSpec;
using quark::Status;

constexpr int64_t kMostElements = 4096, kMostBytes = 1 << 16;  // of a tensor: small calls are fast, and many
constexpr int kDTypes = int(DType::float8_e8m0fnu) + 1;

Counts all_counts;

// ---- specs --------------------------------------------------------------------------------------------------------

/// Words and numbers in any order, most of which are of the language of specs.
std::string words(Choices& choices) {
  static const std::vector<const char*> parts = {
#define QUARK_FORMAT(name, ...) #name,
#include "formats.inc"
#undef QUARK_FORMAT
      "codes",
      "bits=",
      "signed",
      "block=",
      "whole=",
      "batch=",
      "rounding=",
      "scale=",
      "rule=",
      "method=",
      "min=",
      "max=",
      "length=",
      "dtype=",
      "scales=",
      "asymmetric",
      "packed",
      "reciprocal",
      "shifted",
      "narrow",
      "plus_zero",
      "ieee",
#define QUARK_WORD(name) #name,
      QUARK_ROUNDINGS(QUARK_WORD) QUARK_SCALE_FORMATS(QUARK_WORD) QUARK_SCALE_RULES(QUARK_WORD)
#undef QUARK_WORD
          "mse",
      "percentile:",
      "0",
      "1",
      "2",
      "16",
      "32",
      "-",
      ",",
      "=",
      " ",
      ".",
      "e",
      "nan",
      "inf",
      "0x",
      "99.9",
      "1e-300",
      "2147483648",
      "9223372036854775807",
      "9223372036854775808",
      "8388608",
      "0,0",
      "1,16",
      "0,0,0"};
  std::string text = quark::formats()[size_t(choices.between(0, int64_t(quark::formats().size()) - 1))].name;
  for (int64_t left = choices.between(0, 15); left > 0; --left) {
    const std::string_view part = choices.pick(parts);
    if (part.size() > 2 && !text.ends_with('=') && !text.ends_with(',')) text += ' ';
    text += part;
  }
  return text;
}

std::string raw_text(Choices& choices) {
  std::string text(size_t(choices.between(0, 63)), '\0');
  for (char& c : text) c = char(choices.byte());
  return text;
}

// ---- tensors ------------------------------------------------------------------------------------------------------

struct Operand {
  TensorView view{};
  char letter = '?';
  bool is_output = false;
  int onto = -1;         ///< the operand whose memory it shares
  int64_t distance = 0;  ///< of its first element from that one's, in bytes
  bool has_memory = true;
};

int64_t random_length(Choices& choices, bool is_last, size_t rank) {
  switch (choices.between(0, 11)) {
    case 0: return 1;
    case 1: return choices.chance(50) ? 0 : 2;
    case 2: return is_last && rank < 6 ? choices.between(10, 140) : 3;
    case 3: return is_last && rank < 4 ? choices.between(100, 600) : 4;
    case 4: return is_last && rank < 3 ? choices.between(900, 2100) : 5;
    default: return rank > 4 ? choices.between(1, 2) : choices.between(1, 9);
  }
}

Shape random_shape(Choices& choices, int64_t rank = -1) {
  if (rank < 0) rank = choices.pick(std::vector<int64_t>{2, 1, 3, 2, 0, 1, 2, 4, 5, 3, 2, 1, 6, 9, 15, 16});
  Shape shape(size_t(rank), 1);
  int64_t n = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    const int64_t length = random_length(choices, d + 1 == shape.size(), shape.size());
    if (n * std::max<int64_t>(length, 1) > kMostElements) continue;
    n *= std::max<int64_t>(length, 1);
    shape[d] = length;
  }
  return shape;
}

Shape shape_of(const TensorView& t) { return {t.shape, t.shape + t.rank}; }

/// The operands that an operator takes with this spec, mostly.
class Call {
 public:
  Call(Choices& choices, Op op, const QuantSpec& spec, const Shape& shape)
      : choices_(choices), spec_(spec), shape_(shape), scale_shape_(shape) {
    for (size_t d = 0; d < shape.size(); ++d) scale_shape_[d] = quark::scale_length(shape[d], spec.block[d]);
    const auto& row = quark::kOps[int(op)];
    ins_ = row.ins;
    outs_ = row.outs;
    for (size_t d = 0; d < std::min(size_t(spec.batch), quark::kMaxRank - std::min<size_t>(shape.size() + 1, 16)); ++d)
      batch_.push_back(choices.chance(5) ? 0 : choices.between(1, 3));
    for (const char letter : std::string_view(ins_))
      if (letter == 'z' ? spec.format.is_integer() && !spec.shares_exponent() && choices.chance(50)
                        : spec.takes(letter))
        add(letter, false);
    for (const char letter : std::string_view(outs_))
      if (letter == 'z' ? !spec.symmetric : spec.takes(letter)) add(letter, true);
  }

  std::vector<Operand> operands;

 private:
  void add(char letter, bool is_output) {
    Operand o;
    o.letter = letter;
    o.is_output = is_output;
    Shape shape = batch_;
    if (!is_output && !operands.empty())
      for (int64_t& n : shape) n = choices_.chance(25) ? 1 : n;
    const Shape own = shape_of_letter(letter);
    shape.insert(shape.end(), own.begin(), own.end());
    o.view.dtype = dtype_of_letter(letter, is_output);
    o.view.rank = int(shape.size());
    std::copy(shape.begin(), shape.end(), o.view.shape);
    const bool has_rows = is_output && std::strchr("spze", letter);  // must be contiguous
    const Layout layout = has_rows || !choices_.chance(50) ? Layout::contiguous
                          : is_output                      ? Layout::strided
                                                           : Layout::broadcast;
    const Shape strides = arrays::random_steps(choices_, shape, layout).strides;
    std::copy(strides.begin(), strides.end(), o.view.strides);
    operands.push_back(o);
  }

  Shape shape_of_letter(char letter) {
    const auto one = [&] { return choices_.chance(50) ? Shape{1, 1} : Shape{}; };
    Shape shape = shape_;
    switch (letter) {
      case 'q':
        if (!spec_.packed) return shape;
        if (shape.empty()) shape = {1};
        shape.back() = (shape.back() * spec_.format.bits + 7) / 8;
        return shape;
      case 's':
      case 'z': return arrays::product(scale_shape_) == 1 && choices_.chance(30) ? one() : scale_shape_;
      case 'e':
        shape = scale_shape_;
        shape.resize(std::min<size_t>(shape.size() + 1, quark::kMaxRank), 2);
        return shape;
      case 'p':
        if (const int axis = spec_.block_axis(); axis >= 0 && size_t(axis) < shape.size())
          shape[size_t(axis)] = quark::scale_length(shape[size_t(axis)], quark::kPairByte);
        return shape;
      case 'k': return {spec_.is_shard ? int64_t(2 + shape.size()) : 2};
      case 'n':
      case 'g': return one();
      default: return shape;
    }
  }

  DType dtype_of_letter(char letter, bool is_output) {
    const quark::Format& f = spec_.format;
    switch (letter) {
      case 'x': return choices_.pick(specs::kFloats);
      case 'c': return choices_.chance(50) ? DType::uint8 : DType::int8;
      case 'q':
        if (spec_.packed || (f.is_fp8() && choices_.chance(30))) return DType::uint8;
        if (!spec_.ieee || !f.is_integer()) return f.storage;
        return is_output ? DType::int32 : choices_.pick(specs::kIntegers);
      case 's': return choices_.pick(specs::scale_dtypes(spec_, is_output));
      case 'p': return DType::uint8;
      case 'k':
      case 'e': return DType::int32;
      case 'z':
        if (is_output) return DType::int32;
        if ((spec_.shifted || !std::strchr(outs_, 'q')) && choices_.chance(30)) return DType::float32;
        return choices_.pick(specs::kIntegers);
      default: return DType::float32;
    }
  }

  Choices& choices_;
  const QuantSpec& spec_;
  const Shape& shape_;
  Shape scale_shape_, batch_;
  const char *ins_, *outs_;
};

/// Makes one thing about the operands wrong, or only different.
void spoil(Choices& choices, std::vector<Operand>& operands) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  static const std::vector<int64_t> lengths = {
      0, 1, 2, 3, 7, -1, kMost, kMost / 2, kMost / 64, int64_t(1) << 32, int64_t(1) << 62, -kMost - 1};
  static const std::vector<int64_t> steps = {0,     1,          2,         -1,        -2,           5,
                                             kMost, -kMost - 1, kMost / 8, kMost / 4, -(kMost / 2), int64_t(1) << 33};
  if (operands.empty()) return;
  const size_t at = size_t(choices.between(0, int64_t(operands.size()) - 1));
  const size_t other = size_t(choices.between(0, int64_t(operands.size()) - 1));
  TensorView& t = operands[at].view;
  const int axis = t.rank > 0 ? int(choices.between(0, std::min(t.rank, quark::kMaxRank) - 1)) : 0;
  switch (choices.between(0, 13)) {
    case 0: operands.erase(operands.begin() + int64_t(at)); break;
    case 1: operands.insert(operands.begin() + int64_t(at), Operand(operands[other])); break;
    case 2: std::swap(operands[at].view, operands[other].view); break;
    case 3: t.dtype = DType(choices.between(0, kDTypes - 1)); break;
    case 4: t.shape[axis] = choices.pick(lengths); break;
    case 5: t.shape[axis] = choices.chance(50) ? std::min(t.shape[axis], kMost - 1) + 1 : t.shape[axis] / 2; break;
    case 6: t.rank = choices.chance(75) ? t.rank - 1 : -1; break;
    case 7:
      if (t.rank >= 0 && t.rank < quark::kMaxRank) t.shape[t.rank] = choices.between(0, 2), t.strides[t.rank] = 1;
      t.rank = choices.chance(75) ? t.rank + 1 : quark::kMaxRank + 1;
      break;
    case 8: t.strides[axis] = choices.pick(steps); break;
    case 9: operands[at].has_memory = false; break;
    case 10: t.device = choices.chance(50) ? Device::cuda : Device::hip; break;
    case 11: t.device_number = int(choices.between(0, 2)); break;
    default:  // in the memory of another, or the very same tensor
      operands[at].onto = int(other);
      operands[at].distance = choices.chance(50) ? choices.between(-40, 40) : 0;
      if (choices.chance(50)) t = operands[other].view;
  }
}

/// An operand whose claim is possible but can't be had here becomes a small one.
void shrink(TensorView& t) {
  const auto fits = [&] {
    const Claim c = claim_of(t);
    return !c.is_possible || (c.elements <= kMostElements && c.high - c.low <= kMostBytes);
  };
  for (const int64_t most : {3, 1}) {
    if (fits()) return;
    int64_t step = 1;
    for (int d = t.rank - 1; d >= 0; --d) {
      t.shape[d] = std::min(t.shape[d], most);
      t.strides[d] = step;
      step *= std::max<int64_t>(t.shape[d], 1);
    }
  }
}

// ---- memory -------------------------------------------------------------------------------------------------------

Memory memory;

/// Gives every operand the bytes that it claims. Those that claim the impossible get memory that nobody may read.
bool place(Choices& choices, std::vector<Operand>& operands) {
  memory.reset();
  const int count = int(operands.size());
  // Onto one that has memory of its own.
  for (int i = 0; i < count; ++i) {
    Operand& o = operands[size_t(i)];
    if (o.onto >= count || o.onto == i || (o.onto >= 0 && operands[size_t(o.onto)].onto >= 0)) o.onto = -1;
  }
  for (int i = 0; i < count; ++i) {
    Operand& root = operands[size_t(i)];
    if (root.onto >= 0) continue;
    Claim all = claim_of(root.view);
    for (const Operand& o : operands) {
      if (o.onto != i) continue;
      const Claim c = claim_of(o.view);
      all.low = std::min(all.low, c.low + o.distance);
      all.high = std::max(all.high, c.high + o.distance);
    }
    const int64_t bytes = quark::bytes_of(root.view.dtype);
    const int64_t shift = (-all.low % bytes + bytes) % bytes + bytes * choices.between(0, 15 / bytes);
    unsigned char* block = memory.add(all.high - all.low, shift % 16);
    if (!block) return false;
    root.view.data = block - all.low;
    for (Operand& o : operands)
      if (o.onto == i) o.view.data = block - all.low + o.distance;
  }
  for (Operand& o : operands) {
    if (!claim_of(o.view).is_possible) o.view.data = memory.nowhere();
    if (!o.has_memory) o.view.data = nullptr;
  }
  return true;
}

/// What the core has to refuse, whatever the operator.
bool is_unsafe(const TensorView& t) {
  const Claim c = claim_of(t);
  return !c.is_possible || t.device != Device::cpu || t.device_number != 0 || (!t.data && c.elements > 0) ||
         uintptr_t(t.data) % uintptr_t(quark::bytes_of(t.dtype)) != 0;
}

/// Numbers that the operators like, where random bytes are none.
void fill(Choices& choices, const Operand& o, Op op, const QuantSpec& spec, const Shape& shape) {
  const TensorView& t = o.view;
  Noise noise(choices.byte());
  const bool is_float = quark::bytes_of(t.dtype) > 1 && t.dtype <= DType::float64;
  const int64_t style = choices.between(0, 7);
  if (is_unsafe(t) || style == 7 || (o.letter != 'k' && std::strchr("qcpe", o.letter))) return;
  const auto bytes = quark::bytes_of(t.dtype);
  int64_t number = 0;
  const auto value = [&]() -> double {
    static constexpr double kSpecial[] = {0.0, -0.0, 1e-45, -1e-40, 0x1p-126, 1e300, -3.4e38, INFINITY, -INFINITY, NAN};
    if (o.letter == 'k') {  // then where a shard begins
      const int64_t d = number++ - 2;
      if (d < 0 || d >= int64_t(shape.size())) return double(noise.between(INT32_MIN, INT32_MAX));
      const int64_t room = std::clamp<int64_t>(spec.whole[d] - shape[size_t(d)], 0, INT32_MAX);
      return double(noise.between(0, room) + (style == 6 ? noise.between(-1, 1) : 0));
    }
    if (o.letter == 'n' && op != Op::lsq_backward)
      return style == 6 ? double(noise.between(-2, 1 << 23)) / 2 : double(int64_t(1) << noise.between(0, 22));
    if (!is_float) return double(t.dtype == DType::float8_e8m0fnu ? noise.between(90, 140) : noise.between(-20, 20));
    if ((style >= 4 && noise.between(0, 15) == 0) || style == 6) return kSpecial[noise.between(0, 9)];
    const double s = o.letter == 's' || o.letter == 'g' ? std::ldexp(1.0, int(noise.between(-9, 3))) : 1.0;
    if (style & 1) return s * double(noise.between(-64, 64)) / 4;
    return std::ldexp(s * (1 + double(noise.between(0, 4095)) / 4096), int(noise.between(-12, 12))) *
           (noise.bits() & 1 && s == 1.0 ? -1 : 1);
  };
  for_each_element(
      t, [&](int64_t at) { arrays::store_number(static_cast<unsigned char*>(t.data) + at * bytes, t.dtype, value()); });
}

// ---- what must hold -----------------------------------------------------------------------------------------------

/// A call as text, where something doesn't hold.
struct Description {
  Op op;
  std::string text;
  const std::vector<Operand>& operands;

  void print() const {
    std::fprintf(stderr, "%s \"%s\"\n", quark::kOps[int(op)].name, text.c_str());
    for (const Operand& o : operands) {
      const TensorView& t = o.view;
      std::fprintf(stderr, "  %s %c %s at %p", o.is_output ? "out" : "in ", o.letter, quark::name_of(t.dtype), t.data);
      for (int d = 0; d < std::min(t.rank, quark::kMaxRank); ++d)
        std::fprintf(stderr, "%s%lld:%lld", d ? ", " : " (", static_cast<long long>(t.shape[d]),
                     static_cast<long long>(t.strides[d]));
      std::fprintf(stderr, "%s rank %d\n", t.rank > 0 ? ")" : "", t.rank);
    }
  }
  [[noreturn, gnu::cold]] void fail(const std::string& what) const {
    std::fprintf(stderr, "%s: ", what.c_str());
    print();
    std::abort();
  }
};

/// Chunks of one length, the last one first.
class BackwardExecutor final : public quark::Executor {
 public:
  explicit BackwardExecutor(int64_t length) : length_(length) {}
  void run(int64_t items, int64_t, Chunk chunk, void* context) override {
    const quark::FloatEnvironment environment;
    for (int64_t left = (items + length_ - 1) / length_; left-- > 0;)
      chunk(context, left * length_, std::min(items, (left + 1) * length_));
  }

 private:
  int64_t length_;
};

struct Views {
  std::vector<TensorView> in, out;
};

/// Whether they are the same elements in the same order.
bool is_same(const TensorView& a, const TensorView& b) {
  bool steps_alike = true;
  for (int d = 0; d < std::min(a.rank, b.rank); ++d) steps_alike &= a.shape[d] == 1 || a.strides[d] == b.strides[d];
  return steps_alike && a.data == b.data && a.dtype == b.dtype && shape_of(a) == shape_of(b);
}

/// The views of one example of a batch, as its lengths have it.
TensorView example_of(const TensorView& whole, const Shape& lengths, int64_t example) {
  TensorView t = whole;
  const int axes = int(lengths.size());
  t.rank -= axes;
  std::copy_n(whole.shape + axes, t.rank, t.shape);
  std::copy_n(whole.strides + axes, t.rank, t.strides);
  if (claim_of(whole).elements == 0) {
    std::fill_n(t.strides, quark::kMaxRank, 0);  // as kernels are promised
    return t;
  }
  int64_t at = 0;
  for (int d = axes - 1; d >= 0; --d) {
    if (whole.shape[d] != 1) at += example % lengths[size_t(d)] * whole.strides[d];
    example /= lengths[size_t(d)];
  }
  t.data = static_cast<char*>(whole.data) + at * quark::bytes_of(t.dtype);
  return t;
}

/// An output has its bytes for itself, unless it is data that is the very same view as an input's.
void check_disjoint(const Views& views, const Description& call) {
  static std::vector<uint8_t> marks;
  marks.assign(size_t(memory.used()), 0);
  const auto each_byte = [&](const TensorView& t, const auto& f) {
    const int64_t bytes = quark::bytes_of(t.dtype), first = claim_of(t).elements ? memory.offset(t.data) : 0;
    for_each_element(t, [&](int64_t at) {
      for (int64_t i = 0; i < bytes; ++i) f(marks[size_t(first + at * bytes + i)]);
    });
  };
  for (const TensorView& t : views.out)
    each_byte(t, [&](uint8_t& mark) {
      if (mark++) call.fail("outputs overlap and were accepted");
    });
  for (const TensorView& t : views.in) {
    if (std::any_of(views.out.begin(), views.out.end(), [&](const TensorView& o) { return is_same(t, o); })) continue;
    each_byte(t, [&](uint8_t mark) {
      if (mark) call.fail("an output overlaps an input and was accepted");
    });
  }
}

/// Where an output has other bytes than it had.
std::string first_difference(const Views& views, const std::vector<unsigned char>& then) {
  std::string found;
  for (size_t i = 0; i < views.out.size(); ++i) {
    const TensorView& t = views.out[i];
    const auto bytes = size_t(quark::bytes_of(t.dtype));
    int64_t number = -1;
    for_each_element(t, [&](int64_t at) {
      ++number;
      const auto* now = static_cast<const unsigned char*>(t.data) + at * int64_t(bytes);
      const unsigned char* before = then.data() + memory.offset(now);
      if (!found.empty() || std::memcmp(now, before, bytes) == 0) return;
      uint64_t words[2] = {};
      std::memcpy(&words[0], now, bytes);
      std::memcpy(&words[1], before, bytes);
      char text[96];
      std::snprintf(text, sizeof text, ", output %d element %lld: 0x%llx, not 0x%llx", int(i),
                    static_cast<long long>(number), static_cast<unsigned long long>(words[0]),
                    static_cast<unsigned long long>(words[1]));
      found = text;
    });
  }
  return found;
}

/// Another level, cut into chunks of some length, with each example of a batch by itself: the same bits.
void check_level(const CpuLevel& level, const Views& views, const QuantSpec& spec, const Description& call,
                 int64_t chunk, const std::vector<unsigned char>& before, const std::vector<unsigned char>& after) {
  QuantSpec one = spec;
  one.batch = 0;
  Shape lengths(size_t(spec.batch), 1);
  int64_t examples = 1;
  for (int d = 0; d < spec.batch; ++d) examples *= lengths[size_t(d)] = views.out[0].shape[d];
  BackwardExecutor executor(chunk);
  memory.restore(before);
  for (const TensorView& t : views.out) {  // what isn't written now differs
    if (std::any_of(views.in.begin(), views.in.end(), [&](const TensorView& i) { return is_same(i, t); })) continue;
    const int64_t bytes = quark::bytes_of(t.dtype);
    for_each_element(t, [&](int64_t at) {
      auto* element = static_cast<unsigned char*>(t.data) + at * bytes;
      for (int64_t i = 0; i < bytes; ++i) element[i] = static_cast<unsigned char>(~element[i]);
    });
  }
  memory.close();
  for (int64_t i = 0; i < examples; ++i) {
    Views example = views;
    for (auto* tensors : {&example.in, &example.out})
      for (TensorView& t : *tensors) t = example_of(t, lengths, i);
    const Status status = level.kernels[int(call.op)](example.in, example.out, one, executor);
    if (!status.ok()) call.fail(std::string(level.name) + " refused: " + status.message());
  }
  if (!memory.is(after)) call.fail(std::string(level.name) + " gave other bits" + first_difference(views, after));
}

void check_refusal(const Status& status, const Description& call) {
  if (status.kind() == ErrorKind::none || status.message().empty()) call.fail("refused without a message");
  for (const char c : status.message())
    if (c == '\0' && call.text.find('\0') == std::string::npos) call.fail("a message with a zero byte");
}

}  // namespace

const Counts& counts() { return all_counts; }

void print_counts() {
  const Counts& c = all_counts;
  int64_t accepted = 0, refused = 0;
  for (int op = 0; op < quark::kOpCount; ++op) {
    accepted += c.accepted[size_t(op)];
    refused += c.refused[size_t(op)];
    std::fprintf(stderr, "%-24s %10lld accepted %10lld refused\n", quark::kOps[op].name,
                 static_cast<long long>(c.accepted[size_t(op)]), static_cast<long long>(c.refused[size_t(op)]));
  }
  std::fprintf(stderr, "%-24s %10lld accepted %10lld refused, and %lld specs\n", "all",
               static_cast<long long>(accepted), static_cast<long long>(refused),
               static_cast<long long>(c.refused_specs));
}

void run(const uint8_t* data, size_t size, bool is_verbose) {
  Choices choices(data, size);
  const auto op = Op(choices.between(0, quark::kOpCount - 1));
  const int64_t style = choices.between(0, 15);
  Shape shape = random_shape(choices);
  std::string text;
  if (style == 15) {
    text = raw_text(choices);
  } else if (style >= 13) {
    text = words(choices);
  } else {
    text = specs::random_spec(choices, op, shape);
    if (choices.chance(15)) text += " batch=" + std::to_string(choices.between(1, 3));
  }
  std::vector<Operand> operands;
  const Description call{op, text, operands};

  QuantSpec spec, cached;
  const Status parsed = quark::parse_spec(text, spec), again = quark::cached_spec(text, cached);
  if (parsed.kind() != again.kind() || parsed.message() != again.message()) call.fail("the cached spec differs");
  if (!parsed.ok()) {
    if (is_verbose) std::fprintf(stderr, "%s\n", parsed.message().c_str());
    ++all_counts.refused_specs;
    return check_refusal(parsed, call);
  }
  if (style >= 13 && op != Op::pack && op != Op::unpack && op != Op::convert) shape = random_shape(choices, spec.rank);

  operands = Call(choices, op, spec, shape).operands;
  for (int64_t left = choices.chance(35) ? choices.between(1, 3) : 0; left > 0; --left) spoil(choices, operands);
  for (Operand& o : operands) shrink(o.view);
  if (!place(choices, operands)) return;
  memory.fill(Noise(choices.byte()));
  for (const Operand& o : operands)
    if (!o.is_output) fill(choices, o, op, spec, shape);

  if (is_verbose) call.print();

  Views views;
  for (const Operand& o : operands) (o.is_output ? views.out : views.in).push_back(o.view);
  const std::vector<unsigned char> before = memory.snapshot();
  memory.close();
  Status status;
  {
    std::optional<hostile::Environment> environment;
    quark::SerialExecutor executor;
    if (choices.chance(25)) environment.emplace();
    status = quark::run(op, views.in, views.out, choices.chance(50) ? cached : spec, executor);
  }
  if (is_verbose) std::fprintf(stderr, "%s\n", status.ok() ? "accepted" : status.message().c_str());
  if (!status.ok()) {
    ++all_counts.refused[size_t(op)];
    check_refusal(status, call);
    if (!memory.is(before)) call.fail("refused, but something was written");
    return;
  }
  ++all_counts.accepted[size_t(op)];
  if (std::any_of(operands.begin(), operands.end(), [](const Operand& o) { return is_unsafe(o.view); }))
    call.fail("unsafe, and was accepted");
  check_disjoint(views, call);
  const std::vector<unsigned char> after = memory.snapshot();
  for (const TensorView& t : views.out) {
    const int64_t bytes = quark::bytes_of(t.dtype), first = claim_of(t).elements ? memory.offset(t.data) : 0;
    for_each_element(t, [&](int64_t at) {
      std::memcpy(static_cast<unsigned char*>(t.data) + at * bytes, before.data() + first + at * bytes, size_t(bytes));
    });
  }
  if (!memory.is(before)) call.fail("something beside the outputs was written");
  const int64_t chunk = choices.between(1, 9);
  const std::span<const CpuLevel> levels = quark::cpu_levels();
  // A fuzzer has time for one of them; for a few files there is time for all.
  const auto chosen = size_t(choices.between(0, int64_t(levels.size()) - 1));
  for (size_t i = 0; i < levels.size(); ++i)
    if (levels[i].is_supported() && (is_verbose || i == chosen))
      check_level(levels[i], views, spec, call, chunk, before, after);
}

}  // namespace fuzz
