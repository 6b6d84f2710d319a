// What kernels read and write: arrays, codes, scales and random words by the flat index of the logical array.
#pragma once
#include "../bodies.h"
#include "../operands.h"
#include "../scales.h"
#include "../stored.h"
#include "../walk.h"
#include "vendor.h"

namespace quark::QUARK_LEVEL {
namespace {

inline constexpr int kThreads = 256;  // of every block

// ---- paths --------------------------------------------------------------------------------------------------------

/// A Walk in the arguments of a kernel, whose memory all share: a size, a stride and, where there are any, a block for
/// every axis.
struct Path {
  int first = 0, rank = 0;
  bool has_blocks = false;
};

struct Paths {
  // The most that a call can need: three operands of data, two of scales, whose axes are cut in two, and a shard.
  int64_t entry[3 * 2 * kMaxRank + 2 * 3 * (2 * kMaxRank - 1) + 3 * kMaxRank];
  int used = 0;

  Path add(const Walk& w) {
    Path path{used, w.rank, false};
    for (int d = 0; d < w.rank; ++d) path.has_blocks = path.has_blocks || w.block[d] != 1;
    for (int d = 0; d < w.rank; ++d) {
      entry[used++] = w.size[d];
      entry[used++] = w.stride[d];
      if (path.has_blocks) entry[used++] = w.block[d];
    }
    return path;
  }
};

/// a / b of numbers that aren't negative; 32 bits take a third of the time.
QUARK_DEVICE int64_t divide(int64_t a, int64_t b) {
  if ((uint64_t(a | b) >> 32) == 0) return int64_t(uint32_t(a) / uint32_t(b));
  return a / b;
}

/// Where the element is, in elements.
QUARK_DEVICE int64_t offset_of(const Path& path, const Paths& paths, int64_t flat) {
  const int64_t* axes = paths.entry + path.first;
  const int width = path.has_blocks ? 3 : 2;
  int64_t offset = 0;
  for (int d = path.rank - 1; d >= 0; --d) {
    const int64_t* axis = axes + d * width;
    const int64_t outer = d > 0 ? divide(flat, axis[0]) : 0;
    int64_t index = flat - outer * axis[0];
    if (path.has_blocks) index = divide(index, axis[2]);
    offset += index * axis[1];
    flat = outer;
  }
  return offset;
}

// ---- arrays -------------------------------------------------------------------------------------------------------

/// A tensor whose elements are read and written as float32.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  Path path;

  Array() = default;
  Array(const TensorView& t, const Walk& w, Paths& paths) : data(t.data), dtype(t.dtype), path(paths.add(w)) {}
  Array(const TensorView& t, Paths& paths) : Array(t, walk_of(t), paths) {}

  QUARK_DEVICE float load(const Paths& paths, int64_t flat) const {
    const int64_t at = offset_of(path, paths, flat);
    float x = 0.0f;
    with_type(dtype, [&]<class T>(T*) { x = widen(static_cast<const T*>(data)[at]); });
    return x;
  }
  QUARK_DEVICE void store(const Paths& paths, int64_t flat, float x) const {
    const int64_t at = offset_of(path, paths, flat);
    with_type(dtype, [&]<class T>(T*) { narrow(x, static_cast<T*>(data)[at]); });
  }
  QUARK_DEVICE uint8_t& byte(const Paths& paths, int64_t flat) const {
    return static_cast<uint8_t*>(data)[offset_of(path, paths, flat)];
  }
};

// ---- codes --------------------------------------------------------------------------------------------------------

/// Codes that are packed begin on a byte every so many.
inline constexpr int64_t kPack = 8;

/// The codes of a logical array, read and written as the floats that quantize_value makes; or, where it has none, its
/// data.
struct Numbers {
  Array array;  ///< packed: of bytes
  CodeForm form;
  Grid grid;
  bool is_data;

  /// Data.
  Numbers(const TensorView& t, Paths& paths) : array(t, paths), form(QuantSpec(), 1), grid(), is_data(true) {
    form.is_packed = false;
  }
  /// Codes.
  Numbers(const TensorView& t, const QuantSpec& spec, int64_t row_length, Paths& paths)
      : array(t, paths), form(spec, row_length), grid(make_grid(spec)), is_data(false) {}

  QUARK_DEVICE float load(const Paths& paths, int64_t flat) const {
    if (is_data || form.is_number) return array.load(paths, flat);
    const uint32_t code = code_at(paths, flat);
    return form.is_fixed_point ? form.number_of(code, stored_bits()) : decode(code, grid);
  }

  QUARK_DEVICE void store(const Paths& paths, int64_t flat, float y) const {
    if (is_data || form.is_number) return array.store(paths, flat, y);
    array.byte(paths, flat) = uint8_t(code_of(y));
  }

  /// Up to kPack neighbours from a byte's first code on, packed.
  QUARK_DEVICE void store_packed(const Paths& paths, int64_t flat, int count, const float* y) const {
    uint64_t bits = 0;
    for (int i = 0; i < count; ++i)
      bits |= uint64_t(code_of(y[i]) & ((1u << form.bits) - 1u)) << (uint32_t(i) * form.bits);
    const int64_t row = divide(flat, form.row);
    const int64_t byte = row * form.row_bytes + (flat - row * form.row) * form.bits / 8;
    for (int i = 0; i < int(uint32_t(count) * form.bits + 7) / 8; ++i)
      array.byte(paths, byte + i) = uint8_t(bits >> (8 * i));
  }

 private:
  QUARK_DEVICE uint32_t stored_bits() const { return form.is_packed ? form.bits : 8; }

  QUARK_DEVICE uint32_t code_of(float y) const {
    return form.is_fixed_point ? uint32_t(int32_t(y * (1.0f / form.step))) : encode(y, grid);
  }

  QUARK_DEVICE uint32_t code_at(const Paths& paths, int64_t flat) const {
    if (!form.is_packed) return array.byte(paths, flat);
    const int64_t row = divide(flat, form.row), bit = (flat - row * form.row) * form.bits;
    const int64_t byte = row * form.row_bytes + bit / 8;
    const auto shift = uint32_t(bit % 8);
    uint32_t bits = array.byte(paths, byte);
    if (shift + form.bits > 8) bits |= uint32_t(array.byte(paths, byte + 1)) << 8;
    return bits >> shift & ((1u << form.bits) - 1u);
  }
};

// ---- scales -------------------------------------------------------------------------------------------------------

/// The scales and zero points of the elements of an array.
struct ScaleArrays {
  Array scale, zero;
  Grid e4m3;
  const float* tensor_scale = nullptr;  ///< of scales that are E4M3 codes
  int32_t shift = 0;                    ///< the scale is 2^shift times the stored power of two
  uint8_t offset = 0;                   ///< from an exponent to its E8M0 code
  bool is_number = true, has_zero = false;
  const uint8_t* pair_bits = nullptr;
  Path pairs;
  int64_t length = 1, inner = 1;  ///< of the block's axis: its length, and the elements from one index to the next

  ScaleArrays(const ScaleTensors& t, const int64_t* shape, const QuantSpec& spec, Paths& paths)
      : scale(*t.scale, scale_walk(*t.scale, shape, spec), paths),
        e4m3(e4m3_grid()),
        tensor_scale(t.tensor_scale ? static_cast<const float*>(t.tensor_scale->data) : nullptr),
        shift(spec.shares_exponent() ? make_grid(spec).code_exponent : 0),
        offset(t.scale->dtype == DType::int8 ? 127 : 0),
        is_number(bytes_of(t.scale->dtype) > 1),
        has_zero(t.zero_point != nullptr) {
    if (has_zero) zero = Array(*t.zero_point, scale_walk(*t.zero_point, shape, spec), paths);
    if (!t.pair_bits) return;
    const int axis = spec.block_axis();
    pair_bits = static_cast<const uint8_t*>(t.pair_bits->data);
    pairs = paths.add(pair_walk(*t.pair_bits, shape, axis));
    length = shape[axis];
    for (int d = axis + 1; d < spec.rank; ++d) inner *= shape[d];
  }

  QUARK_DEVICE float scale_at(const Paths& paths, int64_t flat) const {
    const float s = whole_scale_at(paths, flat);
    if (!pair_bits) return s;
    const int64_t row = divide(flat, inner), along = row - divide(row, length) * length;
    const uint8_t byte = pair_bits[offset_of(pairs, paths, flat)];
    return s * (byte >> (along % kPairByte / 2) & 1 ? 0.5f : 1.0f);
  }

  /// Before pairs are halved.
  QUARK_DEVICE float whole_scale_at(const Paths& paths, int64_t flat) const {
    if (is_number) return scale.load(paths, flat);
    const uint8_t code = scale.byte(paths, flat);
    return tensor_scale ? decode(code, e4m3) * *tensor_scale : decode_e8m0(uint8_t(code + offset), shift);
  }

  QUARK_DEVICE float zero_at(const Paths& paths, int64_t flat) const {
    return has_zero ? zero.load(paths, flat) : 0.0f;
  }
};

/// Writes scales and zero points, contiguous tensors, by the number of the group.
struct ScaleWriter {
  void* scale;
  int32_t* zero;
  bool is_number;
  uint32_t offset;  ///< an int8 is the exponent of an E8M0 code, NaN -128

  explicit ScaleWriter(const ScaleTensors& t)
      : scale(t.scale->data),
        zero(t.zero_point ? static_cast<int32_t*>(t.zero_point->data) : nullptr),
        is_number(t.scale->dtype == DType::float32),
        offset(t.scale->dtype == DType::int8 ? 127 : 0) {}

  QUARK_DEVICE void store(int64_t index, const ScaleAndZero& r) const {
    if (zero) zero[index] = r.zero_point;
    if (is_number) {
      static_cast<float*>(scale)[index] = r.scale;
    } else {
      static_cast<uint8_t*>(scale)[index] = uint8_t(r.code - offset);
    }
  }
};

/// From a group's extremes to its scale and zero point.
struct ScaleRuler {
  ScaleKind kind;
  Grid grid, e4m3;
  const float* tensor_scale;

  ScaleRuler(const QuantSpec& spec, const Grid& g, const TensorView* tensor_scale_view)
      : kind(scale_kind_of(spec)),
        grid(g),
        e4m3(e4m3_grid()),
        tensor_scale(tensor_scale_view ? static_cast<const float*>(tensor_scale_view->data) : nullptr) {}

  QUARK_DEVICE ScaleAndZero operator()(Extremes e) const {
    const float t = tensor_scale ? *tensor_scale : 1.0f;
    return with_scale_kind(kind, [&]<ScaleKind k>() -> ScaleAndZero { return scale_of<k>(e, t, grid, e4m3); });
  }
};

// ---- random numbers -----------------------------------------------------------------------------------------------

/// The random word of every element, by the flat index in the whole array.
struct RandomKey {
  const uint32_t* words = nullptr;  ///< the key's; null where nothing is random
  int64_t stride = 0;
  bool is_shard = false;
  int rank = 0;
  Path shard;     ///< where its elements are in the whole array, after that of the first
  int first = 0;  ///< entry of the paths: the strides of the whole array

  RandomKey(const TensorView* key, const int64_t* shape, const QuantSpec& spec, Paths& paths) {
    if (!key) return;
    words = static_cast<const uint32_t*>(key->data);
    stride = key->strides[0];
    is_shard = spec.is_shard;
    if (!is_shard) return;
    rank = spec.rank;
    int64_t strides[kMaxRank], step = 1;
    for (int d = rank - 1; d >= 0; --d) {
      strides[d] = step;
      step *= spec.whole[d] > 0 ? spec.whole[d] : 1;
    }
    Walk w;
    for (int d = 0; d < rank; ++d) w.push(shape[d], strides[d], 1);
    shard = paths.add(w);
    first = paths.used;
    for (int d = 0; d < rank; ++d) paths.entry[paths.used++] = strides[d];
  }
};

/// The same as one thread knows it.
struct RandomWordsOf {
  const RandomKey& from;
  uint64_t key = 0;
  int64_t begin = 0;

  QUARK_DEVICE RandomWordsOf(const RandomKey& random, const Paths& paths) : from(random) {
    if (!from.words) return;
    key = uint64_t(from.words[0]) | uint64_t(from.words[from.stride]) << 32;
    for (int d = 0; d < from.rank; ++d)
      begin += int64_t(from.words[(2 + d) * from.stride]) * paths.entry[from.first + d];
  }

  QUARK_DEVICE uint32_t at(const Paths& paths, int64_t flat) const {
    if (!from.words) return 0;
    const int64_t index = from.is_shard ? begin + offset_of(from.shard, paths, flat) : flat;
    return philox(uint64_t(index) / 4, key).word[index % 4];
  }
};

}  // namespace
}  // namespace quark::QUARK_LEVEL
