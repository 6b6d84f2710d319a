#include "ops.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>

#include "gpu/gpu.h"

namespace quark {
namespace {

/// A shape as people write it: (2, 3).
std::string text_of(const int64_t* shape, int rank) {
  std::string text = "(";
  for (int d = 0; d < rank; ++d) text.append(d ? ", " : "").append(std::to_string(shape[d]));
  return text.append(rank == 1 ? ",)" : ")");
}
std::string text_of(const TensorView& t) { return text_of(t.shape, t.rank); }

bool same_shape(const TensorView& a, const int64_t* shape, int rank) {
  return a.rank == rank && std::memcmp(a.shape, shape, sizeof(int64_t) * size_t(rank)) == 0;
}

bool is_float(DType t) {
  return t == DType::float32 || t == DType::float16 || t == DType::bfloat16 || t == DType::float64;
}
bool is_integer(DType t) {
  return t == DType::int8 || t == DType::uint8 || t == DType::int16 || t == DType::uint16 || t == DType::int32 ||
         t == DType::int64;
}

bool is_contiguous(const TensorView& t) {
  if (t.elements() == 0) return true;
  int64_t expected = 1;
  for (int d = t.rank - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

/// The bytes a tensor may touch, as addresses [first, last).
struct Extent {
  uintptr_t first, last;
  bool is_possible = true;  ///< else some would be beyond all addresses, or more than an offset can count

  explicit Extent(const TensorView& t) : first(reinterpret_cast<uintptr_t>(t.data)), last(first) {
    if (t.elements() == 0) return;
    const auto bytes = uintptr_t(bytes_of(t.dtype));
    is_possible = !__builtin_add_overflow(last, bytes, &last);
    for (int d = 0; d < t.rank; ++d) {
      const bool is_down = t.strides[d] < 0;
      const uintptr_t step = is_down ? -uintptr_t(t.strides[d]) : uintptr_t(t.strides[d]);
      uintptr_t reach = 0;
      if (__builtin_mul_overflow(uintptr_t(t.shape[d] - 1) * bytes, step, &reach) ||
          (is_down ? __builtin_sub_overflow(first, reach, &first) : __builtin_add_overflow(last, reach, &last)))
        is_possible = false;
    }
    if (last - first > uintptr_t(std::numeric_limits<ptrdiff_t>::max())) is_possible = false;
  }
};

/// Whether no two elements share memory, for the layouts that torch and NumPy make: sorted by stride, each axis steps
/// over all that is inside it.
bool is_injective(const TensorView& t) {
  int64_t reach = 1;
  bool used[kMaxRank] = {};
  for (int k = 0; k < t.rank; ++k) {
    int next = -1;
    for (int d = 0; d < t.rank; ++d)  // an axis of one element has no step, whatever its stride says
      if (!used[d] && t.shape[d] > 1 && (next < 0 || std::abs(t.strides[d]) < std::abs(t.strides[next]))) next = d;
    if (next < 0) return true;
    used[next] = true;
    if (std::abs(t.strides[next]) < reach) return false;
    reach += (t.shape[next] - 1) * std::abs(t.strides[next]);
  }
  return true;
}

bool same_view(const TensorView& a, const TensorView& b) {
  return a.data == b.data && a.dtype == b.dtype && same_shape(a, b.shape, b.rank) &&
         std::memcmp(a.strides, b.strides, sizeof(int64_t) * size_t(a.rank)) == 0;
}

/// A device as people write it: cuda:0.
std::string text_of(const Place& place) {
  if (place.device == Device::cpu)
    return place.number == 0 ? "the CPU" : "the CPU with device number " + std::to_string(place.number);
  return (place.device == Device::cuda ? "cuda:" : "hip:") + std::to_string(place.number);
}

/// A tensor in a message, which most calls don't come to write.
struct Name {
  const char* role;
  size_t index;
};

/// One call's tensors against its row and spec.
class Checker {
 public:
  Checker(const OpRow& row, Tensors in, Tensors out, const QuantSpec& spec)
      : row_(row), ins_(letters(row.ins, spec)), outs_(letters(row.outs, spec)), in_(in), out_(out), spec_(spec) {}

  /// `place`: where the tensors have to be.
  Status check(const Place& place) {
    if (Status s = check_tensors(place); !s.ok()) return s;
    if (Status s = check_kinds(); !s.ok()) return s;
    if (Status s = check_overlaps(); !s.ok()) return s;
    return place.device == Device::cpu ? check_numbers() : Status();
  }

  /// What must hold of a batch of calls beside what holds of each. Gives the batch's lengths: those of the inputs that
  /// the examples don't share.
  Status check_batch(const Place& place, int64_t* lengths) const {
    if (Status s = check_tensors(place); !s.ok()) return s;
    for (int d = 0; d < spec_.batch; ++d) lengths[d] = 1;
    const auto take = [&](const TensorView& t, Name name, bool is_output) -> Status {
      if (t.rank < spec_.batch)
        return value_error(here(name) + " has shape " + text_of(t) + "; the spec has " + std::to_string(spec_.batch) +
                           " batch axes");
      for (int d = 0; d < spec_.batch; ++d) {
        if (!is_output && lengths[d] == 1) lengths[d] = t.shape[d];
        if (t.shape[d] != lengths[d] && (is_output || t.shape[d] != 1))
          return value_error(here(name) + " has shape " + text_of(t) + "; along batch axis " + std::to_string(d) +
                             " there are " + std::to_string(lengths[d]) + " examples");
      }
      return {};
    };
    for (size_t i = 0; i < in_.size(); ++i)
      if (Status s = take(in_[i], Name{"input ", i}, false); !s.ok()) return s;
    for (size_t i = 0; i < out_.size(); ++i)
      if (Status s = take(out_[i], Name{"output ", i}, true); !s.ok()) return s;
    return check_overlaps();
  }

  /// Shapes and dtypes. Reads no element.
  Status check_kinds() {
    if (Status s = find_logical_shape(); !s.ok()) return s;
    for (size_t i = 0; i < in_.size(); ++i)
      if (Status s = check_kind(in_[i], ins_[i], Name{"input ", i}, false); !s.ok()) return s;
    for (size_t i = 0; i < out_.size(); ++i)
      if (Status s = check_kind(out_[i], outs_[i], Name{"output ", i}, true); !s.ok()) return s;
    if (Status s = check_formats(); !s.ok()) return s;
    return is_learned() ? check_learned() : Status();
  }

  /// Whether elements of an input have to be checked.
  bool has_numbers() const { return is_threshold() || (spec_.is_shard && ins_.find('k') != std::string::npos); }

  /// These elements, after check_kinds.
  Status check_numbers() const {
    if (is_threshold()) return check_domain();
    return has_numbers() ? check_place() : Status();
  }

 private:
  /// A row's letters without those that calls with this spec don't have.
  static std::string letters(std::string_view row, const QuantSpec& spec) {
    std::string present;
    for (const char letter : row)
      if (spec.takes(letter)) present += letter;
    return present;
  }

  std::string here(const std::string& argument) const { return std::string(row_.name) + ": " + argument; }
  std::string here(Name name) const { return here(std::string(name.role) + std::to_string(name.index)); }

  bool is_learned() const { return std::strchr(row_.ins, 'n') != nullptr; }
  bool is_threshold() const { return std::string_view(row_.name).starts_with("tqt"); }

  /// Their number and their memory. From then on shapes can be computed with.
  Status check_tensors(const Place& place) const {
    if (Status s = check_counts(); !s.ok()) return s;
    for (size_t i = 0; i < in_.size(); ++i)
      if (Status s = check_memory(in_[i], Name{"input ", i}, place, false); !s.ok()) return s;
    for (size_t i = 0; i < out_.size(); ++i)
      if (Status s = check_memory(out_[i], Name{"output ", i}, place, true); !s.ok()) return s;
    return {};
  }

  Status check_counts() const {
    const auto fits = [](size_t given, std::string_view kinds) {
      return given == kinds.size() || (kinds.back() == 'z' && given + 1 == kinds.size());
    };
    if (!fits(in_.size(), ins_) || !fits(out_.size(), outs_))
      return value_error(here("got ") + std::to_string(in_.size()) + " inputs and " + std::to_string(out_.size()) +
                         " outputs; with this spec its row is (" + ins_ + ") -> (" + outs_ + "), z optional");
    if (outs_.back() == 'z' && (out_.size() == outs_.size()) == spec_.symmetric)
      return value_error(here("a zero point output goes with an asymmetric spec, and only with one"));
    return {};
  }

  /// The logical shape is that of the data, or of the codes where there is none.
  Status find_logical_shape() {
    const TensorView* codes = nullptr;
    const auto look = [&](Tensors tensors, const std::string& kinds) {
      for (size_t i = 0; i < tensors.size(); ++i)
        if (kinds[i] == 'x' || kinds[i] == 'c') codes = codes ? codes : &tensors[i];
    };
    look(in_, ins_);
    look(out_, outs_);
    rank_ = codes->rank;
    std::memcpy(shape_, codes->shape, sizeof(shape_));
    const bool has_scales = std::strchr(row_.ins, 's') || std::strpbrk(row_.outs, "se");
    if (has_scales && rank_ != spec_.rank)
      return value_error(here("the spec's block has ") + std::to_string(spec_.rank) + " axes; the data has shape " +
                         text_of(shape_, rank_));
    return {};
  }

  Status check_memory(const TensorView& t, Name name, const Place& place, bool is_output) const {
    if (!(t.place() == place))
      return value_error(here(name) + " is on " + text_of(t.place()) + "; the call is on " + text_of(place) +
                         ": all of its tensors must be");
    if (t.rank < 0 || t.rank > kMaxRank)
      return value_error(here(name) + " has " + std::to_string(t.rank) + " axes; allowed: 0 to " +
                         std::to_string(kMaxRank));
    int64_t n = 1, room = 1;  // without the zeros: lengths of an empty array are multiplied, too
    for (int d = 0; d < t.rank; ++d) {
      if (t.shape[d] < 0 || __builtin_mul_overflow(room, std::max<int64_t>(t.shape[d], 1), &room))
        return value_error(here(name) + " has the impossible shape " + text_of(t));
      if (t.shape[d] == 0) n = 0;
    }
    if (n > 0) n = room;
    if (n > std::numeric_limits<int64_t>::max() / 64)
      return value_error(here(name) + " is too large: shape " + text_of(t));
    if (n > 0 && !t.data) return value_error(here(name) + " has no memory (a fake or meta tensor?)");
    if (reinterpret_cast<uintptr_t>(t.data) % uintptr_t(bytes_of(t.dtype)) != 0)
      return value_error(here(name) + " is not aligned to its dtype, " + name_of(t.dtype));
    if (!Extent(t).is_possible)
      return value_error(here(name) + " is too large: shape " + text_of(t) + ", strides " + text_of(t.strides, t.rank));
    if (is_output && n > 0 && !is_injective(t))
      return value_error(here(name) + " overlaps itself; an output needs memory of its own for every element");
    return {};
  }

  Status check_kind(const TensorView& t, char kind, Name name, bool is_output) const {
    switch (kind) {
      case 'x':
        if (!is_float(t.dtype)) return wrong_dtype(t, name, "float32, float16, bfloat16 or float64");
        return expect_shape(t, shape_, rank_, name);
      case 'n':
      case 'g':
        if (t.dtype != DType::float32) return wrong_dtype(t, name, "float32");
        if (t.elements() == 1) return {};
        return value_error(here(name) + " has shape " + text_of(t) + "; expected one element");
      case 'k': {
        const int64_t words[] = {spec_.is_shard ? 2 + rank_ : 2};
        if (t.dtype != DType::int32) return wrong_dtype(t, name, "int32");
        return expect_shape(t, words, 1, name);
      }
      case 'e': {
        if (t.dtype != DType::int32) return wrong_dtype(t, name, "int32");
        if (!is_contiguous(t)) return value_error(here(name) + " must be contiguous");
        if (rank_ == kMaxRank)
          return value_error(here("the data has ") + std::to_string(rank_) + " dimensions; extremes take at most " +
                             std::to_string(kMaxRank - 1));
        int64_t shape[kMaxRank];
        scale_shape(shape);
        shape[rank_] = 2;
        return expect_shape(t, shape, rank_ + 1, name);
      }
      case 'p': {
        if (t.dtype != DType::uint8) return wrong_dtype(t, name, "uint8");
        if (is_output && !is_contiguous(t)) return value_error(here(name) + " must be contiguous");
        int64_t shape[kMaxRank];
        std::memcpy(shape, shape_, sizeof(shape));
        int64_t& along = shape[spec_.block_axis()];
        along = scale_length(along, kPairByte);
        return expect_shape(t, shape, rank_, name);
      }
      case 'c':
        if (t.dtype != DType::int8 && t.dtype != DType::uint8) return wrong_dtype(t, name, "int8 or uint8");
        return expect_shape(t, shape_, rank_, name);
      case 'q': return check_codes(t, name, is_output);
      case 's':
        if (!is_scale_dtype(t.dtype, is_output)) return wrong_dtype(t, name, scale_dtypes(is_output));
        return check_scales(t, name, is_output);
      default:
        if (is_output ? t.dtype != DType::int32
                      : !is_integer(t.dtype) && !(t.dtype == DType::float32 && takes_float_zero()))
          return wrong_dtype(t, name, is_output ? "int32" : "an integer dtype");
        if (!spec_.format.is_integer())
          return value_error(here(name) + ": " + spec_.format.name + " has no zero point");
        return check_scales(t, name, is_output);
    }
  }

  /// Whether scales may be of a dtype: numbers, or the codes of the spec's scale format.
  bool is_scale_dtype(DType t, bool is_output) const {
    const bool is_number = is_output ? t == DType::float32 : is_float(t);
    const bool is_free = spec_.shares_exponent() && spec_.ieee;  // exponents beyond those that codes have
    switch (spec_.scale_format) {
      case ScaleFormat::e4m3: return t == DType::float8_e4m3fn;
      case ScaleFormat::e8m0: return is_number || t == DType::float8_e8m0fnu;
      case ScaleFormat::exponent:
      case ScaleFormat::microexponents:
        return is_number || (!is_free && (t == DType::int8 || t == DType::float8_e8m0fnu));
      default: return is_number;
    }
  }
  const char* scale_dtypes(bool is_output) const {
    switch (spec_.scale_format) {
      case ScaleFormat::e4m3: return "float8_e4m3fn";
      case ScaleFormat::e8m0: return is_output ? "float32 or float8_e8m0fnu" : "a float dtype or float8_e8m0fnu";
      case ScaleFormat::exponent:
      case ScaleFormat::microexponents:
        if (!spec_.ieee) return is_output ? "float32, int8 or float8_e8m0fnu" : "a float dtype, int8 or float8_e8m0fnu";
        break;
      default: break;
    }
    return is_output ? "float32" : "a float dtype";
  }

  /// A floating zero point has no place in codes, unless it is added before rounding.
  bool takes_float_zero() const { return spec_.shifted || !std::strchr(row_.outs, 'q'); }

  Status check_codes(const TensorView& t, Name name, bool is_output) const {
    const DType wanted = spec_.packed ? DType::uint8 : spec_.format.storage;
    const bool is_wide = spec_.ieee && spec_.format.is_integer() && !spec_.packed;
    if (is_wide && is_output && t.dtype != DType::int32) return wrong_dtype(t, name, "int32");
    if (is_wide ? !is_integer(t.dtype) : t.dtype != wanted && !(spec_.format.is_fp8() && t.dtype == DType::uint8))
      return wrong_dtype(t, name, is_wide ? "an integer dtype" : name_of(wanted));
    if (spec_.shares_exponent() && spec_.ieee)
      return {ErrorKind::unsupported, here(name) + ": there are no codes for exponents of the finite elements alone"};
    if (!spec_.packed) return expect_shape(t, shape_, rank_, name);
    int64_t shape[kMaxRank] = {1};
    std::memcpy(shape, shape_, sizeof(int64_t) * size_t(rank_));
    const int rank = rank_ == 0 ? 1 : rank_;
    if (spec_.length >= 0 && spec_.length != shape[rank - 1])
      return value_error(here("the spec's length is ") + std::to_string(spec_.length) + "; the data has shape " +
                         text_of(shape_, rank_));
    shape[rank - 1] = packed_length(shape[rank - 1], spec_.format.bits);
    return expect_shape(t, shape, rank, name);
  }

  /// The normal form of the scales; returns how many there are.
  int64_t scale_shape(int64_t* shape) const {
    int64_t n = 1;
    for (int d = 0; d < rank_; ++d) n *= shape[d] = scale_length(shape_[d], spec_.block[d]);
    return n;
  }

  Status check_scales(const TensorView& t, Name name, bool is_output) const {
    int64_t shape[kMaxRank];
    const int64_t n = scale_shape(shape);
    if (is_output && !is_contiguous(t)) return value_error(here(name) + " must be contiguous");
    if (n == 1 && t.elements() == 1) return {};  // any shape of one element
    return expect_shape(t, shape, rank_, name);
  }

  /// Which operators take which formats, scales and roundings.
  Status check_formats() const {
    const std::string_view name = row_.name;
    if ((std::strchr(row_.ins, 'c') || std::strchr(row_.outs, 'c')) && spec_.format.name != std::string_view("codes"))
      return value_error(here("the format is ") + spec_.format.name + "; expected codes, which have no values");
    const bool chooses = name == "choose_qparams";
    if (spec_.method != Method::extremes && !chooses) return value_error(here("a method is for choose_qparams"));
    if (spec_.scale_format == ScaleFormat::global && !chooses && name != "extremes")
      return value_error(here("scale=global is for choose_qparams and extremes"));
    if (name == "quantize_values" && (spec_.shares_exponent() || spec_.scale_format == ScaleFormat::e4m3))
      return {ErrorKind::unsupported, here("the numbers are written for float32 and e8m0 scales only")};
    if (spec_.rounding == Rounding::stochastic && (name == "quantize_values" || std::strchr(row_.ins, 'n')))
      return value_error(here("rounding is stochastic; there is no key"));
    if ((name == "dequantize_backward" || std::strchr(row_.ins, 'n')) && spec_.scale_format != ScaleFormat::float32)
      return value_error(here("a scale has a gradient only where its format is float32"));
    return {};
  }

  /// What the operators with learned scales need besides.
  Status check_learned() const {
    for (int d = 0; d < rank_; ++d)
      if (spec_.block[d] > 0 && shape_[d] > spec_.block[d] && shape_[d] % spec_.block[d] != 0)
        return value_error(here("axis ") + std::to_string(d) + " has length " + std::to_string(shape_[d]) +
                           "; expected a multiple of the group's, " + std::to_string(spec_.block[d]));
    if (!spec_.format.is_integer() || spec_.shares_exponent())
      return value_error(here("the format is ") + spec_.format.name + "; expected an integer one");
    const size_t at = ins_.find('s');
    if (is_threshold() && in_[at].elements() != 1)
      return value_error(here("input " + std::to_string(at)) + " has shape " + text_of(in_[at]) +
                         "; expected one element");
    return {};
  }

  Status check_domain() const {
    const auto domain = *static_cast<const float*>(in_[ins_.find('n')].data);
    if (is_domain(domain)) return {};
    return value_error(here("domain is ") + std::to_string(domain) + "; allowed: an integer from 1 to 2^22");
  }

  /// Whether the shard that the key places lies in the whole array.
  Status check_place() const {
    const size_t at = ins_.find('k');
    const TensorView& key = in_[at];
    for (int d = 0; d < rank_; ++d) {
      const int64_t begin = static_cast<const int32_t*>(key.data)[(2 + d) * key.strides[0]];
      if (begin < 0 || begin > spec_.whole[d] || shape_[d] > spec_.whole[d] - begin)
        return value_error(here("input " + std::to_string(at)) + " places the shard at " + std::to_string(begin) +
                           " along axis " + std::to_string(d) + "; its shape is " + text_of(shape_, rank_) +
                           ", the whole array's " + text_of(spec_.whole, rank_));
    }
    return {};
  }

  Status expect_shape(const TensorView& t, const int64_t* shape, int rank, Name name) const {
    if (same_shape(t, shape, rank)) return {};
    return value_error(here(name) + " has shape " + text_of(t) + "; expected " + text_of(shape, rank));
  }

  Status wrong_dtype(const TensorView& t, Name name, const char* allowed) const {
    return type_error(here(name) + " has dtype " + name_of(t.dtype) + "; allowed: " + allowed);
  }

  Status check_overlaps() const {
    for (size_t o = 0; o < out_.size(); ++o) {
      if (out_[o].elements() == 0) continue;
      const Extent mine(out_[o]);
      const auto meets = [&](const TensorView& t) {
        const Extent other(t);
        return t.elements() > 0 && mine.first < other.last && other.first < mine.last;
      };
      for (size_t i = 0; i < in_.size(); ++i)
        if (meets(in_[i]) && !(ins_[i] == 'x' && outs_[o] == 'x' && same_view(in_[i], out_[o])))
          return value_error(here("output ") + std::to_string(o) + " overlaps input " + std::to_string(i) +
                             "; only data may be the very same tensor in and out");
      for (size_t p = 0; p < o; ++p)
        if (meets(out_[p]))
          return value_error(here("outputs ") + std::to_string(p) + " and " + std::to_string(o) + " overlap");
    }
    return {};
  }

  const OpRow& row_;
  std::string ins_, outs_;
  Tensors in_, out_;
  const QuantSpec& spec_;
  int rank_ = 0;
  int64_t shape_[kMaxRank] = {};
};

/// The most tensors that a call may have.
constexpr size_t kMostTensors = [] {
  size_t most = 0;
  for (const OpRow& row : kOps)
    most = std::max(most, std::string_view(row.ins).size() + std::string_view(row.outs).size());
  return most;
}();

/// Calls a kernel, of a CPU level or a GPU. The strides of an empty array may be anything, and are computed with all
/// the same.
template <class AnyKernel, class Runner>
Status call(AnyKernel kernel, Tensors in, Tensors out, const QuantSpec& spec, Runner& runner) {
  const auto is_empty = [](const TensorView& t) { return t.elements() == 0; };
  if (std::none_of(in.begin(), in.end(), is_empty) && std::none_of(out.begin(), out.end(), is_empty))
    return kernel(in, out, spec, runner);
  TensorView views[kMostTensors];
  std::ranges::copy(out, std::ranges::copy(in, views).out);
  for (TensorView& view : views)
    if (is_empty(view)) std::fill_n(view.strides, kMaxRank, 0);
  return kernel({views, in.size()}, {views + in.size(), out.size()}, spec, runner);
}

/// The tensors of a batch's examples, of one after another. They are as safe as the whole batch's are.
class Examples {
 public:
  Examples() = default;
  Examples(Tensors in, Tensors out, const int64_t* lengths, int axes) : ins_(in.size()), outs_(out.size()) {
    for (; axes_ < axes; ++axes_) count_ *= lengths_[axes_] = lengths[axes_];
    for (size_t i = 0; i < ins_ + outs_; ++i) {
      const TensorView& whole = i < ins_ ? in[i] : out[i - ins_];
      TensorView& view = views_[i];
      view = whole;
      view.rank = whole.rank - axes;
      std::copy_n(whole.shape + axes, view.rank, view.shape);
      std::copy_n(whole.strides + axes, view.rank, view.strides);
      first_[i] = static_cast<char*>(whole.data);
      if (whole.elements() == 0) continue;  // there may be no memory to step through
      for (int d = 0; d < axes; ++d)
        if (whole.shape[d] != 1) steps_[i][d] = whole.strides[d] * bytes_of(whole.dtype);
    }
  }

  int64_t count() const { return count_; }
  Tensors in() const { return {views_, ins_}; }
  Tensors out() const { return {views_ + ins_, outs_}; }

  void move_to(int64_t example) {
    int64_t offsets[kMostTensors] = {};
    for (int d = axes_ - 1; d >= 0; --d) {
      const int64_t index = example % lengths_[d];
      example /= lengths_[d];
      for (size_t i = 0; i < ins_ + outs_; ++i) offsets[i] += index * steps_[i][d];
    }
    for (size_t i = 0; i < ins_ + outs_; ++i) views_[i].data = first_[i] + offsets[i];
  }

 private:
  size_t ins_ = 0, outs_ = 0;
  int axes_ = 0;
  int64_t count_ = 1, lengths_[kMaxRank] = {};
  TensorView views_[kMostTensors];
  char* first_[kMostTensors] = {};
  int64_t steps_[kMostTensors][kMaxRank] = {};  ///< bytes
};

int64_t most_elements(Tensors tensors) {
  int64_t most = 0;
  for (const TensorView& t : tensors) most = std::max(most, t.elements());
  return most;
}

/// A batch of calls, checked before the first is run.
struct Batch {
  QuantSpec spec;  ///< an example's
  Examples examples;
  bool is_empty = false;

  Status prepare(Op op, Tensors in, Tensors out, const QuantSpec& given, const Place& place) {
    const OpRow& row = kOps[int(op)];
    int64_t lengths[kMaxRank] = {};
    if (Status s = Checker(row, in, out, given).check_batch(place, lengths); !s.ok()) return s;
    spec = given;
    spec.batch = 0;
    examples = Examples(in, out, lengths, given.batch);
    Checker checker(row, examples.in(), examples.out(), spec);
    if (const Status s = checker.check_kinds(); !s.ok()) return {s.kind(), s.message() + " (of one example)"};
    is_empty = most_elements(out) == 0;  // else each example writes something, so they are not too many to count
    if (is_empty || place.device != Device::cpu || !checker.has_numbers()) return {};
    for (int64_t i = 0; i < examples.count(); ++i) {
      examples.move_to(i);
      if (Status s = checker.check_numbers(); !s.ok()) return s;
    }
    return {};
  }
};

/// One call for every example.
Status run_batch(Op op, Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  Batch batch;
  if (Status s = batch.prepare(op, in, out, spec, Place{}); !s.ok() || batch.is_empty) return s;
  const CpuLevel* level = nullptr;
  if (Status status = cpu_level(level); !status.ok()) return status;

  struct Task {
    Kernel kernel;
    const Examples& examples;
    const QuantSpec& spec;
    Executor& executor;
    std::mutex mutex{};
    Status status{};

    static void run(void* self, int64_t first, int64_t last) {
      Task& t = *static_cast<Task*>(self);
      Examples mine = t.examples;
      for (int64_t i = first; i < last; ++i) {
        mine.move_to(i);
        const Status status = call(t.kernel, mine.in(), mine.out(), t.spec, t.executor);
        if (status.ok()) continue;
        const std::lock_guard lock(t.mutex);
        t.status = status;
      }
    }
  };
  constexpr int64_t kLarge = 1 << 18;  // elements that keep several threads busy
  const Examples& examples = batch.examples;
  const int64_t size = std::max(most_elements(examples.in()), most_elements(examples.out()));
  const bool is_large = size >= kLarge;
  SerialExecutor serial;
  Task task{level->kernels[int(op)], examples, batch.spec, is_large ? executor : static_cast<Executor&>(serial)};
  if (is_large) {
    Task::run(&task, 0, examples.count());
  } else {
    executor.run(examples.count(), size, &Task::run, &task);
  }
  return task.status;
}

/// The same on a GPU, where the calls follow one another on the stream.
Status run_batch(Op op, Tensors in, Tensors out, const QuantSpec& spec, Queue& queue, const GpuPlatform& platform) {
  Batch batch;
  if (Status s = batch.prepare(op, in, out, spec, in[0].place()); !s.ok() || batch.is_empty) return s;
  for (int64_t i = 0; i < batch.examples.count(); ++i) {
    batch.examples.move_to(i);
    const Status s = call(platform.kernels[int(op)], batch.examples.in(), batch.examples.out(), batch.spec, queue);
    if (!s.ok()) return s;
    queue.release();
  }
  return {};
}

}  // namespace

Status run(Op op, Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const FloatEnvironment environment;  // what chunks share is computed before the first of them
  if (spec.batch > 0) return run_batch(op, in, out, spec, executor);
  if (Status status = Checker(kOps[int(op)], in, out, spec).check(Place{}); !status.ok()) return status;
  const CpuLevel* level = nullptr;
  if (Status status = cpu_level(level); !status.ok()) return status;
  return call(level->kernels[int(op)], in, out, spec, executor);
}

Status run(Op op, Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Place place = in.empty() ? Place{} : in[0].place();
  if (place.device == Device::cpu)
    return value_error(std::string(kOps[int(op)].name) + ": input 0 is on the CPU; a GPU's queue takes tensors on it");
  const FloatEnvironment environment;
  const GpuPlatform* platform = nullptr;
  if (Status status = gpu_platform(place.device, platform); !status.ok()) return status;
  if (spec.batch > 0) return run_batch(op, in, out, spec, queue, *platform);
  if (Status status = Checker(kOps[int(op)], in, out, spec).check(place); !status.ok()) return status;
  return call(platform->kernels[int(op)], in, out, spec, queue);
}

}  // namespace quark
