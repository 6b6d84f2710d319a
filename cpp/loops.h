// From tensors to the scalar numerics: which element meets which scale, in tiles that stay in the first-level cache.
//
// Everything is addressed by the flat row-major index of the logical array. Each operand has a Walk, which turns a
// range of flat indices into runs of constant memory stride; strides, broadcasting and every granularity are just
// Walks. A tile is loaded and widened to float32, computed on, narrowed and stored.
//
// Compiled once per CPU level, like numerics.h.
#pragma once
#include <cstring>
#include <optional>

#include "bodies.h"
#include "cpu/levels.h"
#include "operands.h"
#include "parallel.h"
#include "scales.h"
#include "simd.h"
#include "walk.h"

namespace quark::QUARK_LEVEL {
namespace {

// ---- tiles --------------------------------------------------------------------------------------------------------

/// Room for a tile in any dtype.
struct RawTile {
  alignas(64) char bytes[kTile * 8];

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes);
  }
};

/// A tensor read or written tile by tile as float32.
struct Data {
  TensorView view;
  Walk walk;

  explicit Data(const TensorView& t) : view(t), walk(walk_of(t)) {}
  Data(const TensorView& t, const Walk& w) : view(t), walk(w) {}

  QUARK_INLINE bool is_whole() const {
    return walk.rank == 0 || (walk.rank == 1 && walk.stride[0] == 1 && walk.block[0] == 1);
  }
  DType dtype() const { return view.dtype; }
  int64_t bytes() const { return view.elements() * bytes_of(view.dtype); }

  /// The elements themselves where they are float32 in one piece, else nullptr.
  QUARK_INLINE float* direct(int64_t begin) const {
    return is_whole() && view.dtype == DType::float32 ? static_cast<float*>(view.data) + begin : nullptr;
  }

  /// Asks for the next elements, where the data is in one piece: a processor's own prefetching ends with a page of
  /// memory.
  QUARK_INLINE void prefetch(int64_t begin, int64_t count) const {
    if (!is_whole()) return;
    const int64_t width = bytes_of(view.dtype), end = min(begin + 2 * count, view.elements()) * width;
    const auto* bytes = static_cast<const char*>(view.data);
    for (int64_t at = (begin + count) * width; at < end; at += 64) __builtin_prefetch(bytes + at);
  }

  QUARK_INLINE const float* load(int64_t begin, int64_t count, float* buffer) const {
    if (const float* here = direct(begin)) {
      prefetch(begin, count);
      return here;
    }
    with_type(view.dtype, [&]<class T>(T*) {
      walk.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
        load_run(static_cast<const T*>(view.data) + offset, stride, buffer + position, n);
      });
    });
    return buffer;
  }

  /// Where to write a tile; `store` then moves it to the tensor.
  QUARK_INLINE float* target(int64_t begin, float* buffer, bool stream = false) const {
    float* here = stream ? nullptr : direct(begin);
    return here ? here : buffer;
  }

  QUARK_INLINE void store(int64_t begin, int64_t count, const float* values, bool stream = false) const {
    if (direct(begin) == values) return;
    with_type(view.dtype, [&]<class T>(T*) {
      walk.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
        store_run(values + position, static_cast<T*>(view.data) + offset, stride, n, stream);
      });
    });
  }

  // The same in the tensor's own dtype.

  /// The elements: where they are if they are in one piece, else gathered in the buffer.
  QUARK_INLINE const void* load_raw(int64_t begin, int64_t count, RawTile& buffer) const {
    if (is_whole()) return static_cast<const char*>(view.data) + begin * bytes_of(view.dtype);
    with_type(view.dtype, [&]<class T>(T*) {
      T* to = buffer.as<T>();
      walk.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
        const T* from = static_cast<const T*>(view.data) + offset;
        if (stride == 1) return void(std::memcpy(to + position, from, size_t(n) * sizeof(T)));
        for (int64_t i = 0; i < n; ++i) to[position + i] = from[i * stride];
      });
    });
    return buffer.bytes;
  }

  /// What load_raw gave, as float32.
  QUARK_INLINE const float* floats(const void* raw, int64_t count, float* buffer) const {
    if (view.dtype == DType::float32) return static_cast<const float*>(raw);
    with_type(view.dtype, [&]<class T>(T*) { read_all(Numbers<T>(raw), buffer, count); });
    return buffer;
  }

  /// Where to write: in place where that is possible, else to the buffer, from where `store_raw` moves it.
  QUARK_INLINE void* target_raw(int64_t begin, RawTile& buffer, bool stream) const {
    char* here = static_cast<char*>(view.data) + begin * bytes_of(view.dtype);
    return is_whole() && (!stream || is_line(here)) ? here : buffer.bytes;
  }

  QUARK_INLINE void store_raw(int64_t begin, int64_t count, const void* raw, bool stream) const {
    if (is_whole() && raw == static_cast<const char*>(view.data) + begin * bytes_of(view.dtype)) return;
    with_type(view.dtype, [&]<class T>(T*) {
      walk.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
        const T* from = static_cast<const T*>(raw) + position;
        T* to = static_cast<T*>(view.data) + offset;
        if (stride == 1) return copy_bytes(to, from, n * int64_t(sizeof(T)), stream);
        for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
      });
    });
  }
};

// ---- scales -------------------------------------------------------------------------------------------------------

/// The scales and zero points of one tile: an entry for every `step` neighbours.
struct TileScales {
  const float* s;
  const float* z;
  int64_t step;  ///< kTile: one entry serves the whole tile; else 1, or a multiple of kStep that divides the tile
};

alignas(64) inline constexpr float kNoZeroPoints[kTile] = {};

/// `n` numbers, each of `from` so many times in a row, the last one as often as there is room for it.
template <class T>
void repeat(const T* from, int64_t times, int64_t n, float* to) {
  const auto repeat_by = [=](auto count) {
    for (int64_t i = 0; i < n; ++i) to[i] = float(from[i / count]);  // NOLINT(bugprone-integer-division)
  };
  if (times == 1) return repeat_by(std::integral_constant<int64_t, 1>());
  if (times == 2) return repeat_by(std::integral_constant<int64_t, 2>());
  for (int64_t i = 0; i < n; ++from) {
    const auto number = float(*from);
    for (const int64_t end = min(i + times, n); i < end; ++i) to[i] = number;
  }
}

/// The one element of a float32 tensor.
QUARK_INLINE float element_of(const TensorView& t) { return *static_cast<const float*>(t.data); }

/// Scales as the float32 numbers that elements are divided by, whatever the dtype they are stored in.
class ScaleReader {
 public:
  ScaleReader(const TensorView& scale, const Walk& walk, const TensorView* tensor_scale, const QuantSpec& spec)
      : data_(scale, walk),
        e4m3_(e4m3_grid()),
        tensor_scale_(tensor_scale),
        shift_(spec.shares_exponent() ? make_grid(spec).code_exponent : 0),
        offset_(scale.dtype == DType::int8 ? 127 : 0),
        is_number_(bytes_of(scale.dtype) > 1) {}

  const Walk& walk() const { return data_.walk; }
  Walk& walk() { return data_.walk; }

  /// Entries [begin, begin + count) of the walk.
  QUARK_INLINE const float* load(int64_t begin, int64_t count, float* buffer) const {
    if (is_number_) return data_.load(begin, count, buffer);
    const auto* codes = static_cast<const uint8_t*>(data_.view.data);
    data_.walk.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
      float* to = buffer + position;
      if (stride == 1) return decode_scales(codes + offset, n, to);
      if (stride == 0) {
        decode_scales(codes + offset, 1, to);
        for (int64_t i = 1; i < n; ++i) to[i] = *to;
      } else {
        for (int64_t i = 0; i < n; ++i) decode_scales(codes + offset + i * stride, 1, to + i);
      }
    });
    return buffer;
  }

 private:
  QUARK_INLINE void decode_scales(const uint8_t* codes, int64_t n, float* to) const {
    if (tensor_scale_) {
      const float tensor_scale = element_of(*tensor_scale_);
      decode_all(codes, to, n, e4m3_);
      for (int64_t i = 0; i < n; ++i) to[i] *= tensor_scale;
    } else {
      const int32_t shift = shift_;
      const uint8_t offset = offset_;
      QUARK_VECTORIZE
      for (int64_t i = 0; i < n; ++i) to[i] = decode_e8m0(uint8_t(codes[i] + offset), shift);
    }
  }

  Data data_;
  Grid e4m3_;
  const TensorView* tensor_scale_;  ///< of scales that are E4M3 codes
  int32_t shift_;                   ///< the scale is 2^shift times the stored power of two
  uint8_t offset_;                  ///< from an exponent to its E8M0 code
  bool is_number_;
};

/// Entries for every kStep neighbours or for every group, where groups along the last axis are whole numbers of kStep.
/// Reader: Data or ScaleReader.
template <class Reader>
struct StepReader {
  Reader groups;  ///< its walk: an entry for every group
  bool found = true;
  int64_t group = 0;  ///< elements; 0: one entry for all

  explicit StepReader(const Reader& elements) : groups(elements) {
    Walk& w = walk_of_reader(groups);
    if (w.rank == 0) return;
    group = w.size[w.rank - 1];
    found = w.stride[w.rank - 1] == 0 && group % kStep == 0;
    --w.rank;
  }

  /// The `n` entries from the element `begin` on, which is the first of its step: kStep or `group`.
  QUARK_INLINE const float* load(int64_t begin, int64_t n, int64_t step, float* to) const {
    if (step == group) return groups.load(begin / group, n, to);
    float buffer[kTile / kStep + 1];
    const int64_t first = group == 0 ? 0 : begin / group;
    const int64_t count = group == 0 ? 1 : (begin + n * kStep - 1) / group - first + 1;
    const float* entry = groups.load(first, count, buffer);
    int64_t left = group == 0 ? n : (group - begin % group) / kStep;
    for (int64_t i = 0; i < n; ++i, --left) {
      if (left == 0) ++entry, left = group / kStep;
      to[i] = *entry;
    }
    return to;
  }

 private:
  static Walk& walk_of_reader(Data& data) { return data.walk; }
  static Walk& walk_of_reader(ScaleReader& scales) { return scales.walk(); }
};

/// The scales of up to kPairByte neighbours, from the first pair of a byte of pair bits on: halved where the bit is
/// set.
QUARK_INLINE void halve_pairs(uint32_t byte, const float* scales, int64_t n, float* to) {
  const auto halve = [=](int64_t i) { to[i] = scales[i] * (byte >> uint32_t(i / 2) & 1u ? 0.5f : 1.0f); };
  if (n == kPairByte) {
    QUARK_VECTORIZE_STEP
    for (int64_t i = 0; i < kPairByte; ++i) halve(i);
  } else {
    for (int64_t i = 0; i < n; ++i) halve(i);
  }
}

class Scales {
 public:
  Scales(const ScaleTensors& tensors, const int64_t* shape, const QuantSpec& spec)
      : scale_(*tensors.scale, scale_walk(*tensors.scale, shape, spec), tensors.tensor_scale, spec),
        zero_(zero_or_scale(tensors), tensors.zero_point ? scale_walk(*tensors.zero_point, shape, spec) : Walk()),
        scale_steps_(scale_),
        zero_steps_(zero_),
        has_zero_(tensors.zero_point != nullptr) {
    if (!tensors.pair_bits) return;
    const int axis = spec.block_axis();
    pair_bits_ = static_cast<const uint8_t*>(tensors.pair_bits->data);
    pairs_ = pair_walk(*tensors.pair_bits, shape, axis);
    length_ = shape[axis];
    for (int d = axis + 1; d < spec.rank; ++d) inner_ *= shape[d];
  }

  bool has_zero_points() const { return has_zero_; }

  /// Fills the tile's entries into the buffers.
  QUARK_INLINE TileScales load(int64_t begin, int64_t count, float* s, float* z) const {
    const int64_t step = step_of(begin, count), n = step == kTile ? 1 : count / step;
    const bool in_steps = step != 1 && step != kTile;
    const float* scales = in_steps ? scale_steps_.load(begin, n, step, s) : scale_.load(begin, n, s);
    if (pair_bits_) scales = with_pairs(begin, count, scales, s);
    if (!has_zero_) return {scales, kNoZeroPoints, step};
    return {scales, in_steps ? zero_steps_.load(begin, n, step, z) : zero_.load(begin, n, z), step};
  }

 private:
  static const TensorView& zero_or_scale(const ScaleTensors& t) { return t.zero_point ? *t.zero_point : *t.scale; }

  static QUARK_INLINE bool is_uniform(const Walk& walk, int64_t begin, int64_t count) {
    if (walk.rank == 0) return true;
    const int last = walk.rank - 1;
    const int64_t index = begin % walk.size[last];
    if (index + count > walk.size[last]) return false;
    const int64_t b = walk.block[last];
    return b == 1 ? walk.stride[last] == 0 : index / b == (index + count - 1) / b;
  }

  QUARK_INLINE int64_t step_of(int64_t begin, int64_t count) const {
    if (pair_bits_) return 1;
    if (is_uniform(scale_.walk(), begin, count) && (!has_zero_ || is_uniform(zero_.walk, begin, count))) return kTile;
    const bool has_steps = scale_steps_.found && (!has_zero_ || zero_steps_.found);
    if (!has_steps || begin % kStep != 0 || count % kStep != 0) return 1;
    const int64_t group = scale_steps_.group;
    const bool has_groups = group > 0 && group < kTile && (!has_zero_ || zero_steps_.group == group);
    return has_groups && begin % group == 0 && count % group == 0 ? group : kStep;
  }

  /// Halves the scales of the pairs whose bit is set.
  QUARK_INLINE const float* with_pairs(int64_t begin, int64_t count, const float* scales, float* to) const {
    pairs_.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
      const int64_t along = (begin + position) / inner_ % length_, step = inner_ == 1 && length_ > 1 ? 1 : 0;
      if (step == 1 && stride == 0 && along % kPairByte == 0)
        return halve_pairs(pair_bits_[offset], scales + position, n, to + position);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t bit = (along + i * step) % kPairByte / 2;
        const bool is_half = (pair_bits_[offset + i * stride] >> bit & 1) != 0;
        to[position + i] = scales[position + i] * (is_half ? 0.5f : 1.0f);
      }
    });
    return to;
  }

  ScaleReader scale_;
  Data zero_;
  StepReader<ScaleReader> scale_steps_;
  StepReader<Data> zero_steps_;
  bool has_zero_;
  Walk pairs_;
  const uint8_t* pair_bits_ = nullptr;
  int64_t length_ = 1, inner_ = 1;  ///< of the block's axis: its length, and the elements from one index to the next
};

// ---- random numbers -----------------------------------------------------------------------------------------------

/// The random word of every element: word i % 4 of Philox's block i / 4, i being the flat index; of a shard that of the
/// whole array.
class Random {
 public:
  /// `key`: int32 words, low and high, then where a shard begins; null where nothing is random.
  Random(const TensorView* key, const int64_t* shape, const QuantSpec& spec) : has_key_(key != nullptr) {
    if (!key) return;
    const auto* words = static_cast<const uint32_t*>(key->data);
    key_ = uint64_t(words[0]) | uint64_t(words[key->strides[0]]) << 32;
    if (!spec.is_shard) return;
    int64_t strides[kMaxRank], step = 1;
    for (int d = spec.rank - 1; d >= 0; --d) {
      strides[d] = step;
      begin_ += int64_t(words[(2 + d) * key->strides[0]]) * step;
      step *= spec.whole[d] > 0 ? spec.whole[d] : 1;
    }
    shard_.emplace();
    for (int d = 0; d < spec.rank; ++d) shard_->push(shape[d], strides[d], 1);
  }

  /// Room for a tile's words, which may begin within a block.
  static constexpr int64_t kBuffer = kTile + 4;

  QUARK_INLINE const uint32_t* load(int64_t begin, int64_t count, uint32_t* buffer) const {
    if (!has_key_) return buffer;
    return shard_ ? load_shard(*shard_, begin, count, buffer) : load_run(begin, count, buffer);
  }

 private:
  QUARK_INLINE const uint32_t* load_run(int64_t begin, int64_t count, uint32_t* buffer) const {
    const auto first = uint64_t(begin / 4);
    const int64_t skip = begin % 4, blocks = (skip + count + 3) / 4;
    random_words(first, blocks, key_, buffer);
    return buffer + skip;
  }

  /// The shard's rows are runs of the whole array.
  const uint32_t* load_shard(const Walk& shard, int64_t begin, int64_t count, uint32_t* buffer) const {
    alignas(64) uint32_t words[kBuffer];
    shard.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
      const int64_t from = begin_ + offset;
      if (stride == 1) {
        std::memcpy(buffer + position, load_run(from, n, words), size_t(n) * sizeof(uint32_t));
        return;
      }
      for (int64_t i = 0; i < n; ++i) buffer[position + i] = *load_run(from + i * stride, 1, words);
    });
    return buffer;
  }

  uint64_t key_ = 0;
  bool has_key_;
  std::optional<Walk> shard_;  ///< its elements' places in the whole array, after that of the first
  int64_t begin_ = 0;          ///< and that
};

// ---- the elementwise loops ----------------------------------------------------------------------------------------

using TileLoop = void (*)(const float* x, const float* other, const uint32_t* random, float* out, int64_t n,
                          const TileScales&, float limit, const Grid&);

template <class Body, Arithmetic A, Rounding R>
void tile_loop(const float* x, const float* other, const uint32_t* random, float* out, int64_t n,
               const TileScales& scales, float limit, const Grid& grid) {
  constexpr bool kIsRandom = R == Rounding::stochastic;
  const Grid g = grid;  // a copy that no store can alias
  if (scales.step == kTile) {
    const float s = scales.s[0], z = scales.z[0];
    QUARK_VECTORIZE
    for (int64_t i = 0; i < n; ++i)
      out[i] = Body::template apply<A, R>(x[i], other[i], s, z, limit, kIsRandom ? random[i] : 0u, g);
    return;
  }
  const float *s = scales.s, *z = scales.z;
  alignas(64) float all_s[kTile], all_z[kTile];
  if (scales.step > 1) {
    repeat(s, scales.step, n, all_s);
    repeat(z, scales.step, n, all_z);
    s = all_s, z = all_z;
  }
  QUARK_VECTORIZE
  for (int64_t i = 0; i < n; ++i)
    out[i] = Body::template apply<A, R>(x[i], other[i], s[i], z[i], limit, kIsRandom ? random[i] : 0u, g);
}

/// The loop for a spec and x's dtype.
template <class Body>
TileLoop tile_loop_for(const QuantSpec& spec, DType data, bool has_zero_point) {
  return with_order<Body>(order_of<Body>(spec, data, has_zero_point),
                          []<Arithmetic A, Rounding R>() -> TileLoop { return tile_loop<Body, A, R>; });
}

// ---- loops for ordinary scales ------------------------------------------------------------------------------------

/// Whether all scales of a tile are ordinary: the extreme ones are, in the order of bits, where NaN and negative
/// numbers come last.
inline bool are_ordinary(const TileScales& scales, int64_t n, float largest, float limit) {
  const float *s = scales.s, *z = scales.z;
  const int64_t entries = scales.step == kTile ? 1 : n / scales.step;
  uint32_t least = ~0u, most = 0, zeros = 0;
  QUARK_VECTORIZE
  for (int64_t i = 0; i < entries; ++i) {
    const uint32_t u = bits_of(s[i]);
    least = u < least ? u : least;
    most = u > most ? u : most;
    zeros |= bits_of(z[i]) & ~kSign;
  }
  if (!is_ordinary(float_of(least), 0.0f, largest, limit)) return false;
  if (zeros == 0) return is_ordinary(float_of(most), 0.0f, largest, limit);
  uint32_t others = 0;
  QUARK_VECTORIZE
  for (int64_t i = 0; i < entries; ++i) others |= is_ordinary(float_of(most), z[i], largest, limit) ? 0u : 1u;
  return others == 0;
}

/// What follows from a tile's scales, of which there are not more than steps.
template <Rounding R>
struct OrdinaryScales {
  static constexpr int64_t kCount = kTile / kStep;
  alignas(64) float s[kCount], z[kCount], inverse[kCount], lo[kCount], hi[kCount];

  OrdinaryScales(const TileScales& scales, int64_t n, const Grid& g) {
    QUARK_VECTORIZE
    for (int64_t i = 0; i < n; ++i) {
      const OrdinaryScale k = ordinary_scale<R>(scales.s[i], scales.z[i], g);
      s[i] = k.s, z[i] = k.z, inverse[i] = k.inverse, lo[i] = k.lo, hi[i] = k.hi;
    }
  }
  OrdinaryScale at(int64_t i) const { return {s[i], z[i], inverse[i], lo[i], hi[i]}; }
};

/// In and out: a tile in the dtypes of its tensors, codes a byte each.
using OrdinaryLoop = void (*)(const void* x, const uint32_t* random, void* out, int64_t n, const TileScales&,
                              const Grid&, bool stream);

/// tile_loop where all scales are ordinary, from what a Reader reads to what a Writer writes.
template <class Body, bool kIsFixed, Rounding R, class Reader, class Writer>
void ordinary_loop(const void* x, const uint32_t* random, void* out, int64_t n, const TileScales& scales,
                   const Grid& grid, bool stream) {
  using Result = decltype(Body::template apply<kIsFixed, R>(0.0f, 0u, OrdinaryScale(), grid));
  const Grid g = grid;
  const Reader numbers(x, g);
  const Writer to(out, g);
  const auto apply = [&](float v, int64_t i, const OrdinaryScale& k) {
    return Body::template apply<kIsFixed, R>(v, R == Rounding::stochastic ? random[i] : 0u, k, g);
  };
  // scale(i) is that of element i.
  const auto steps = [&](int64_t begin, int64_t end, const auto& scale) {
    for (int64_t i = begin; i + kStep <= end; i += kStep) {
      alignas(64) float v[kStep];
      alignas(64) Result y[kStep];
      numbers.step(i, v);
      QUARK_VECTORIZE_STEP
      for (int64_t j = 0; j < kStep; ++j) y[j] = apply(v[j], i + j, scale(i + j));
      put_step(to, y, i, stream);
    }
  };
  const auto all = [&](const auto& scale) {
    steps(0, n, scale);
    for (int64_t i = n / kStep * kStep; i < n; ++i) to.one(apply(numbers.one(i), i, scale(i)), to.at[i]);
  };
  if (scales.step == kTile) {
    const OrdinaryScale k = ordinary_scale<R>(scales.s[0], scales.z[0], g);
    all([=](int64_t) { return k; });
  } else if (scales.step > 1) {
    const OrdinaryScales<R> groups(scales, n / scales.step, g);
    for (int64_t i = 0, group = 0; i < n; i += scales.step, ++group) {
      const OrdinaryScale k = groups.at(group);
      steps(i, i + scales.step, [=](int64_t) { return k; });
    }
  } else {
    const float *s = scales.s, *z = scales.z;
    all([=, &g](int64_t i) { return ordinary_scale<R>(s[i], z[i], g); });
  }
}

/// Quantization and fake quantization of numbers of type T.
template <class Body, Rounding R, class T>
OrdinaryLoop ordinary_loop_for(const QuantSpec& spec, const Grid& g) {
  constexpr bool kIsCode = std::is_same_v<Body, QuantizeOrdinary>;
  using FixedOut = NumbersOut<std::conditional_t<kIsCode, Stored<uint8_t>, T>>;
  using MinifloatOut = std::conditional_t<kIsCode, MinifloatsOut, NumbersOut<T>>;
  const Format& f = spec.format;
  if (f.is_integer() || (f.is_fixed_point() && R != Rounding::stochastic))
    return ordinary_loop<Body, true, R, Numbers<T>, FixedOut>;
  if (kIsCode && (f.is_fixed_point() || !HalfForm(g).holds())) return nullptr;
  return ordinary_loop<Body, false, R, Numbers<T>, MinifloatOut>;
}

template <class Body, class T>
OrdinaryLoop ordinary_loop_for(const QuantSpec& spec, const Grid& g, bool is_narrow) {
  const bool is_finite_only = spec.shares_exponent() && spec.ieee;
  if (spec.reciprocal || spec.shifted || (spec.narrow && is_narrow) || is_finite_only) return nullptr;
  switch (spec.rounding) {
    case Rounding::half_even: return ordinary_loop_for<Body, Rounding::half_even, T>(spec, g);
    case Rounding::stochastic: return ordinary_loop_for<Body, Rounding::stochastic, T>(spec, g);
    default: return nullptr;
  }
}

/// The loop for ordinary scales, or nullptr where a spec or the dtypes of numbers (x) and results have none.
template <class Body>
OrdinaryLoop ordinary_loop_for(const QuantSpec& spec, const Grid& g, DType x, DType out) {
  if (spec.format.is_cast()) return nullptr;
  if constexpr (std::is_same_v<Body, QuantizeOrdinary>) {
    if (bytes_of(out) > 1) return nullptr;
  } else if (x != out) {
    return nullptr;
  }
  switch (x) {
    case DType::float32: return ordinary_loop_for<Body, Stored<float>>(spec, g, false);
    case DType::float16: return ordinary_loop_for<Body, Float16Bits>(spec, g, true);
    case DType::bfloat16: return ordinary_loop_for<Body, BFloat16Bits>(spec, g, true);
    default: return nullptr;
  }
}

/// The same for dequantization.
template <class Out>
OrdinaryLoop dequantize_loop_for(const Format& f, const Grid& g, DType codes) {
  constexpr Rounding kNone = Rounding::half_even;
  if (!f.is_fixed_point())
    return HalfForm(g).holds() ? ordinary_loop<DequantizeOrdinary, false, kNone, Minifloats, NumbersOut<Out>> : nullptr;
  if (!f.is_integer()) return nullptr;
  if (codes == DType::int8)
    return ordinary_loop<DequantizeOrdinary, true, kNone, Numbers<Stored<int8_t>>, NumbersOut<Out>>;
  return ordinary_loop<DequantizeOrdinary, true, kNone, Numbers<Stored<uint8_t>>, NumbersOut<Out>>;
}

inline OrdinaryLoop dequantize_loop_for(const QuantSpec& spec, const Grid& g, DType codes, DType out) {
  if (spec.format.is_cast() || bytes_of(codes) > 1) return nullptr;
  switch (out) {
    case DType::float32: return dequantize_loop_for<Stored<float>>(spec.format, g, codes);
    case DType::float16: return dequantize_loop_for<Float16Bits>(spec.format, g, codes);
    case DType::bfloat16: return dequantize_loop_for<BFloat16Bits>(spec.format, g, codes);
    default: return nullptr;
  }
}

// ---- codes --------------------------------------------------------------------------------------------------------

/// The codes of a logical array, one apiece or packed along the last axis, read and written as the floats that
/// quantize_value makes.
class Codes {
 public:
  Codes(const TensorView& t, const QuantSpec& spec, int64_t row_length)
      : data_(t), grid_(make_grid(spec)), form_(spec, row_length) {}

  QUARK_INLINE float* target(int64_t, float* buffer, bool = false) const { return buffer; }

  QUARK_INLINE void store(int64_t begin, int64_t count, const float* y, bool stream = false) const {
    if (form_.is_number) return data_.store(begin, count, y, stream);
    RawTile codes;
    if (form_.is_fixed_point) {
      encode_fixed(y, codes.as<uint8_t>(), count, 1.0f / form_.step);
    } else {
      encode_all(y, codes.as<uint8_t>(), count, grid_);
    }
    store_bytes(begin, count, codes.as<uint8_t>(), stream);
  }

  QUARK_INLINE const float* load(int64_t begin, int64_t count, float* buffer) const {
    if (form_.is_number) return data_.load(begin, count, buffer);
    RawTile codes;
    decode_bytes(load_raw(begin, count, codes), count, buffer);
    return buffer;
  }

  // The same as codes: a byte each where they were packed, else in the tensor's own dtype.

  QUARK_INLINE const void* load_raw(int64_t begin, int64_t count, RawTile& buffer) const {
    if (!form_.is_packed) return data_.load_raw(begin, count, buffer);
    auto* codes = buffer.as<uint8_t>();
    load_packed(begin, count, codes);
    if (form_.is_signed && form_.bits < 8) extend_signs(codes, count, form_.bits);
    return codes;
  }

  QUARK_INLINE const float* floats(const void* raw, int64_t count, float* buffer) const {
    if (form_.is_number) return data_.floats(raw, count, buffer);
    decode_bytes(raw, count, buffer);
    return buffer;
  }

  QUARK_INLINE void* target_raw(int64_t begin, RawTile& buffer, bool stream) const {
    return form_.is_packed ? buffer.bytes : data_.target_raw(begin, buffer, stream);
  }

  QUARK_INLINE void store_raw(int64_t begin, int64_t count, const void* raw, bool stream) const {
    if (!form_.is_packed) return data_.store_raw(begin, count, raw, stream);
    store_bytes(begin, count, static_cast<const uint8_t*>(raw), stream);
  }

  /// Of what load_raw gives.
  DType dtype() const { return !form_.is_packed ? data_.dtype() : form_.is_signed ? DType::int8 : DType::uint8; }
  int64_t bytes() const { return data_.bytes(); }

  /// The largest magnitude that a code can have.
  float largest() const {
    if (!form_.is_fixed_point) return grid_.hi;
    return form_.largest_of(form_.is_packed ? form_.bits : uint32_t(8 * bytes_of(data_.view.dtype)));
  }

  /// How far before this element packed codes must be read from: back to the start of a byte.
  QUARK_INLINE int64_t lead(int64_t begin) const { return form_.is_packed ? begin % form_.row % 8 : 0; }

 private:
  QUARK_INLINE void decode_bytes(const void* raw, int64_t count, float* buffer) const {
    const auto* codes = static_cast<const uint8_t*>(raw);
    if (form_.is_fixed_point) {
      decode_fixed(codes, buffer, count, form_.is_signed, form_.step);
    } else {
      decode_all(codes, buffer, count, grid_);
    }
  }

  /// Codes, one a byte; bits above their width don't matter where they are packed.
  QUARK_INLINE void store_bytes(int64_t begin, int64_t count, const uint8_t* codes, bool stream) const {
    alignas(64) uint8_t packed[kTile + kPackingSlack];
    const uint8_t* bytes = codes;
    if (form_.is_packed) {
      pack_codes(codes, count, form_.bits, packed);
      bytes = packed;
      to_bytes(begin, count);
    }
    auto* to = static_cast<uint8_t*>(data_.view.data);
    data_.walk.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
      if (stride == 1) {
        copy_bytes(to + offset, bytes + position, n, stream);
      } else {
        for (int64_t i = 0; i < n; ++i) to[offset + i * stride] = bytes[position + i];
      }
    });
  }

  /// Packed codes, one a byte. There is room for whole words.
  QUARK_INLINE void load_packed(int64_t begin, int64_t count, uint8_t* codes) const {
    alignas(64) uint8_t packed[kTile + kPackingSlack];
    const int64_t wanted = count;
    to_bytes(begin, count);
    const auto* from = static_cast<const uint8_t*>(data_.view.data);
    data_.walk.runs(begin, count, [&](int64_t position, int64_t offset, int64_t n, int64_t stride) {
      if (stride == 1) {
        __builtin_memcpy(packed + position, from + offset, size_t(n));
      } else {
        for (int64_t i = 0; i < n; ++i) packed[position + i] = from[offset + i * stride];
      }
    });
    unpack_codes(packed, wanted, form_.bits, codes);
  }

  /// Turns a range of codes, which starts on a byte and stays in one row (or in rows of whole bytes), into its bytes.
  QUARK_INLINE void to_bytes(int64_t& begin, int64_t& count) const {
    begin = begin / form_.row * form_.row_bytes + begin % form_.row * form_.bits / 8;
    count = (count * form_.bits + 7) / 8;
  }

  Data data_;
  Grid grid_;
  CodeForm form_;
};

/// Whether results are written past the caches: with what they are made from they fill half of the last one, which
/// other cores and other data share. Written there, they would be read first.
inline bool is_streamed(int64_t read, int64_t written) { return read + written > last_cache_bytes() / 2; }

// ---- tiles of an operation ----------------------------------------------------------------------------------------

/// The logical array cut into tiles: anywhere in the flat order, but where rows end in padding bits each row by itself.
struct Tiling {
  int64_t row, per_row, count;

  Tiling(int64_t elements, int64_t row_length, const QuantSpec& spec) {
    const bool padded = spec.packed && row_length % 8 * spec.format.bits % 8 != 0;
    row = padded ? row_length : elements;
    per_row = (row + kTile - 1) / kTile;
    count = elements == 0 ? 0 : elements / row * per_row;
  }

  QUARK_INLINE int64_t begin(int64_t tile) const { return tile / per_row * row + tile % per_row * kTile; }
  QUARK_INLINE int64_t size(int64_t tile) const { return min(kTile, row - tile % per_row * kTile); }
};

/// Runs f(begin, count) for every tile, on the executor's threads.
template <class F>
void for_each_tile(Executor& executor, const Tiling& tiling, const F& f) {
  struct Task {
    const Tiling& tiling;
    const F& f;
  } task{tiling, f};
  executor.run(
      tiling.count, kTile,
      [](void* context, int64_t first, int64_t last) {
        const Task& t = *static_cast<const Task*>(context);
        for (int64_t tile = first; tile < last; ++tile) t.f(t.tiling.begin(tile), t.tiling.size(tile));
        stream_fence();
      },
      &task);
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
