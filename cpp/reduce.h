// Reductions from elements to scales: extremes (exact in any order) and sums (one fixed tree).
//
// Compiled once per CPU level, like numerics.h.
#pragma once
#include <cstdlib>
#include <cstring>

#include "loops.h"
#include "scales.h"

namespace quark::QUARK_LEVEL {
namespace {

// ---- extremes -----------------------------------------------------------------------------------------------------

template <class Key>
QUARK_INLINE Extremes extremes_of(const float* x, int64_t n, const Grid& grid) {
  const Grid g = grid;
  uint32_t low = 0, high = 0;
  QUARK_VECTORIZE_STEP
  for (int64_t i = 0; i < n; ++i) {
    const Extremes e = Key::of(x[i], g);
    low = max(low, e.low);
    high = max(high, e.high);
  }
  return {low, high};
}

/// The extremes of neighbouring groups, the last of which may be shorter: of(x + at, n) of each.
template <class T, class Of>
QUARK_INLINE void each_group(const T* x, int64_t n, int64_t group, uint32_t* low, uint32_t* high, const Of& of) {
  // The usual short groups have loops of their own length.
  const auto each = [&](auto length) {
    for (int64_t at = 0, k = 0; at < n; at += length, ++k) {
      const Extremes e = of(x + at, length);
      low[k] = e.low;
      high[k] = e.high;
    }
  };
  if (group == 16 && n % 16 == 0) return each(std::integral_constant<int64_t, 16>());
  if (group == 32 && n % 32 == 0) return each(std::integral_constant<int64_t, 32>());
  for (int64_t at = 0, k = 0; at < n; at += group, ++k) {
    const Extremes e = of(x + at, min(group, n - at));
    low[k] = e.low;
    high[k] = e.high;
  }
}

using ExtremesLoop = void (*)(const float* x, int64_t n, int64_t group, const Grid&, uint32_t* low, uint32_t* high);

template <class Key>
void extremes_loop(const float* x, int64_t n, int64_t group, const Grid& grid, uint32_t* low, uint32_t* high) {
  const Grid g = grid;
  each_group(x, n, group, low, high,
             [&](const float* from, int64_t length) { return extremes_of<Key>(from, length, g); });
}

/// MagnitudeKey's of 16-bit floats, whose magnitudes have the order of their bits.
template <class T>
void word_extremes(const T* x, int64_t n, int64_t group, uint32_t* low, uint32_t* high) {
  each_group(x, n, group, low, high, [&](const T* from, int64_t length) {
    uint16_t most = 0;
    QUARK_VECTORIZE_STEP
    for (int64_t i = 0; i < length; ++i) {
      const auto m = uint16_t(from[i].raw & 0x7fffu);
      most = m > most ? m : most;
    }
    return Extremes{0, magnitude_key(widen(T{most}))};
  });
}

/// The extremes of runs of a tensor.
class ExtremesReader {
 public:
  ExtremesReader(const TensorView& x, const QuantSpec& spec)
      : data_(x),
        grid_(make_grid(spec, x.dtype)),
        loop_(with_key(key_of(spec), []<class Key>() -> ExtremesLoop { return &extremes_loop<Key>; })),
        is_magnitude_(loop_ == &extremes_loop<MagnitudeKey>) {}
  /// Of both signs, whatever the scales.
  static ExtremesReader of_bounds(const TensorView& x, const QuantSpec& spec) {
    ExtremesReader r(x, spec);
    r.loop_ = &extremes_loop<BoundsKey>;
    r.is_magnitude_ = false;
    return r;
  }

  const Grid& grid() const { return grid_; }
  const Data& data() const { return data_; }

  /// Of the groups of a tile that data().load_raw gave.
  QUARK_INLINE void groups(const void* raw, int64_t n, int64_t group, uint32_t* low, uint32_t* high) const {
    if (is_magnitude_ && data_.dtype() == DType::bfloat16)
      return word_extremes(static_cast<const BFloat16Bits*>(raw), n, group, low, high);
    if (is_magnitude_ && data_.dtype() == DType::float16)
      return word_extremes(static_cast<const Float16Bits*>(raw), n, group, low, high);
    alignas(64) float buffer[kTile];
    loop_(data_.floats(raw, n, buffer), n, group, grid_, low, high);
  }

  /// Of up to a tile's elements from `begin` on.
  QUARK_INLINE Extremes run(int64_t begin, int64_t n) const {
    RawTile buffer;
    Extremes e;
    data_.prefetch(begin, n);
    groups(data_.load_raw(begin, n, buffer), n, n, &e.low, &e.high);
    return e;
  }

  /// Of any number of elements.
  Extremes run_all(int64_t begin, int64_t count) const {
    Extremes e;
    for (int64_t at = 0; at < count; at += kTile) e = max(e, run(begin + at, min(kTile, count - at)));
    return e;
  }

  /// Of a group that has been loaded as float32.
  QUARK_INLINE Extremes of(const float* x, int64_t n) const {
    Extremes e;
    loop_(x, n, n, grid_, &e.low, &e.high);
    return e;
  }

 private:
  Data data_;
  Grid grid_;
  ExtremesLoop loop_;
  bool is_magnitude_;
};

/// The scales of up to a tile's groups: what they follow from, and what they are.
struct GroupScales {
  alignas(64) uint32_t low[kTile], high[kTile];
  alignas(64) float scale[kTile];
  alignas(64) int32_t zero_point[kTile];
  alignas(64) uint32_t code[kTile];
};

/// From groups' extremes to their scales and zero points.
class ScaleRuler {
 public:
  ScaleRuler(const QuantSpec& spec, const Grid& grid, const TensorView* tensor_scale)
      : kind_(scale_kind_of(spec)),
        grid_(grid),
        e4m3_(e4m3_grid()),
        tensor_scale_(tensor_scale ? element_of(*tensor_scale) : 1.0f) {}

  ScaleAndZero operator()(const Extremes& e) const {
    return with_scale_kind(kind_, [&]<ScaleKind kind>() { return scale_of<kind>(e, tensor_scale_, grid_, e4m3_); });
  }

  void operator()(GroupScales& groups, int64_t n) const {
    with_scale_kind(kind_, [&]<ScaleKind kind>() {
      const Grid g = grid_, e4m3 = e4m3_;
      const float tensor_scale = tensor_scale_;
      QUARK_VECTORIZE
      for (int64_t i = 0; i < n; ++i) {
        const ScaleAndZero r = scale_of<kind>({groups.low[i], groups.high[i]}, tensor_scale, g, e4m3);
        groups.scale[i] = r.scale;
        groups.zero_point[i] = r.zero_point;
        groups.code[i] = r.code;
      }
    });
  }

 private:
  ScaleKind kind_;
  const Grid& grid_;
  Grid e4m3_;
  float tensor_scale_;
};

/// Writes scales and zero points, contiguous tensors, by the flat index of the (first) group.
class ScaleWriter {
 public:
  ScaleWriter(const TensorView& scale, const TensorView* zero) : scale_(scale), zero_(zero) {}

  bool has_zero_points() const { return zero_ != nullptr; }

  void store(int64_t index, const ScaleAndZero& r) const {
    if (zero_) static_cast<int32_t*>(zero_->data)[index] = r.zero_point;
    if (scale_.dtype == DType::float32) {
      static_cast<float*>(scale_.data)[index] = r.scale;
    } else {
      static_cast<uint8_t*>(scale_.data)[index] = uint8_t(r.code - offset());
    }
  }

  void store(int64_t index, const GroupScales& groups, int64_t n) const {
    if (zero_) std::memcpy(static_cast<int32_t*>(zero_->data) + index, groups.zero_point, size_t(n) * 4);
    if (scale_.dtype == DType::float32) {
      std::memcpy(static_cast<float*>(scale_.data) + index, groups.scale, size_t(n) * 4);
      return;
    }
    auto* codes = static_cast<uint8_t*>(scale_.data) + index;
    const uint32_t less = offset();
    for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(groups.code[i] - less);
  }

 private:
  /// An int8 is the exponent of an E8M0 code, NaN -128.
  uint32_t offset() const { return scale_.dtype == DType::int8 ? 127 : 0; }

  const TensorView& scale_;
  const TensorView* zero_;
};

/// Raises *to to at least `value`; threads may race.
QUARK_INLINE void raise(uint32_t* to, uint32_t value) {  // NOLINT(readability-non-const-parameter)
  uint32_t seen = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(to, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

/// The scales that a flat range of elements can touch, as a range of offsets.
struct OffsetRange {
  int64_t first = 0, count = 1;

  OffsetRange(const Walk& w, int64_t begin, int64_t end) {
    if (w.rank == 0) return;
    int64_t inner = 1;
    for (int d = 1; d < w.rank; ++d) {
      inner *= w.size[d];
      count += (w.size[d] - 1) / w.block[d] * w.stride[d];
    }
    first = begin / inner / w.block[0] * w.stride[0];
    count += (end - 1) / inner / w.block[0] * w.stride[0] - first;
  }
};

/// One reduction of x to its groups' extremes: `low` and `high` have an entry per scale, and may be the same, where one
/// maximum of both is enough.
struct Reduction {
  const ExtremesReader& extremes;
  Walk walk;
  int64_t elements;
  uint32_t *low, *high;
  bool out_of_memory;
  int64_t step = 1;  ///< from one scale's entry to the next

  /// Tiles [first, last), into accumulators of this thread's own, then into the outputs.
  template <class Key>
  void run(int64_t first, int64_t last) {
    const int64_t begin = first * kTile, end = min(last * kTile, elements);
    const OffsetRange range(walk, begin, end);
    auto* mine = static_cast<Extremes*>(std::calloc(size_t(range.count), sizeof(Extremes)));
    if (!mine) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
    const Grid g = extremes.grid();
    alignas(64) float buffer[kTile];
    for (int64_t at = begin; at < end; at += kTile) {
      const int64_t n = min(kTile, end - at);
      if (range.count == 1) {
        *mine = max(*mine, extremes.run(at, n));
        continue;
      }
      const float* values = extremes.data().load(at, n, buffer);
      walk.runs(at, n, [&](int64_t position, int64_t offset, int64_t count, int64_t stride) {
        Extremes* to = mine + (offset - range.first);
        if (stride == 0) {
          *to = max(*to, extremes_of<Key>(values + position, count, g));
          return;
        }
        QUARK_VECTORIZE
        for (int64_t i = 0; i < count; ++i) to[i * stride] = max(to[i * stride], Key::of(values[position + i], g));
      });
    }
    for (int64_t i = 0; i < range.count; ++i) {
      const int64_t at = (range.first + i) * step;
      raise(high + at, mine[i].high);
      raise(low + at, mine[i].low);
    }
    std::free(mine);
  }

  template <class Key>
  static void chunk(void* self, int64_t first, int64_t last) {
    static_cast<Reduction*>(self)->run<Key>(first, last);
  }
};

/// Writes the scale (and, if the spec is asymmetric, the zero point) of every group. False where memory runs out.
inline bool choose_scales(const TensorView& x, const ScaleTensors& out, const QuantSpec& spec, Executor& executor) {
  const TensorView& scale = *out.scale;
  const int64_t scales = scale.elements();
  if (scales == 0) return true;
  // The extremes' bits wait where the results will be, or, where these are too narrow, in memory of their own.
  uint32_t* own = nullptr;
  if (scale.dtype != DType::float32) {
    own = static_cast<uint32_t*>(std::malloc(size_t(scales) * 4 + 1));
    if (!own) return false;
  }
  auto* high = own ? own : static_cast<uint32_t*>(scale.data);
  auto* low = out.zero_point ? static_cast<uint32_t*>(out.zero_point->data) : high;
  std::memset(high, 0, size_t(scales) * 4);
  std::memset(low, 0, size_t(scales) * 4);

  const ExtremesReader extremes(x, spec);
  Reduction reduction{extremes, group_walk(x, spec), x.elements(), low, high, false};
  if (!spec.format.is_cast()) {
    executor.run((reduction.elements + kTile - 1) / kTile, kTile,
                 with_key(key_of(spec), []<class Key>() -> Executor::Chunk { return &Reduction::chunk<Key>; }),
                 &reduction);
  }

  struct Finish {
    ScaleRuler scale_of;
    ScaleWriter writer;
    const uint32_t *low, *high;
  } finish{ScaleRuler(spec, extremes.grid(), out.tensor_scale), ScaleWriter(scale, out.zero_point), low, high};
  executor.run(
      reduction.out_of_memory ? 0 : scales, 1,
      [](void* context, int64_t first, int64_t last) {
        const Finish& f = *static_cast<const Finish*>(context);
        GroupScales groups;
        for (int64_t at = first; at < last; at += kTile) {
          const int64_t n = min(kTile, last - at);
          std::memcpy(groups.low, f.low + at, size_t(n) * 4);
          std::memcpy(groups.high, f.high + at, size_t(n) * 4);
          f.scale_of(groups, n);
          f.writer.store(at, groups, n);
        }
      },
      &finish);
  std::free(own);
  return !reduction.out_of_memory;
}

/// Writes the bit of every pair: whether both neighbours lie below the power of two of their block, whose scale has
/// been chosen. A neighbour beyond the end counts as 0.
inline void choose_pairs(const TensorView& x, const ScaleTensors& out, const QuantSpec& spec, Executor& executor) {
  const int axis = spec.block_axis();
  const TensorView& bits = *out.pair_bits;
  struct Task {
    const TensorView &x, &bits;
    int axis;
    Data data;
    ScaleReader scales;
    Grid grid;
  } task{x,
         bits,
         axis,
         Data(x),
         ScaleReader(*out.scale, scale_walk(*out.scale, x.shape, spec), nullptr, spec),
         make_grid(spec, x.dtype)};
  executor.run(
      bits.elements(), kPairByte,
      [](void* context, int64_t first, int64_t last) {
        const Task& t = *static_cast<const Task*>(context);
        int64_t inner = 1;
        for (int d = t.axis + 1; d < t.x.rank; ++d) inner *= t.x.shape[d];
        const int64_t length = t.x.shape[t.axis], bytes = t.bits.shape[t.axis];
        for (int64_t index = first; index < last; ++index) {
          const int64_t along = index / inner % bytes * kPairByte;
          const int64_t from = (index / inner / bytes * length + along) * inner + index % inner;
          const int64_t n = min(kPairByte, length - along);
          uint32_t below = 0xffffu;
          alignas(64) float buffer[kPairByte], scale[kPairByte];
          if (inner == 1) {
            const float* values = t.data.load(from, n, buffer);
            const float* scales = t.scales.load(from, n, scale);
            for (int64_t i = 0; i < n; ++i)
              if (!is_below_exponent(values[i], scales[i], t.grid)) below &= ~(1u << i);
          } else {
            for (int64_t i = 0; i < n; ++i) {
              const float value = *t.data.load(from + i * inner, 1, buffer);
              if (!is_below_exponent(value, *t.scales.load(from + i * inner, 1, scale), t.grid)) below &= ~(1u << i);
            }
          }
          static_cast<uint8_t*>(t.bits.data)[index] = pair_bits_of(below, n);
        }
      },
      &task);
}

// ---- groups of one row --------------------------------------------------------------------------------------------

/// Groups whose elements follow one another in the flat order, cut into units that one thread takes: whole groups of up
/// to a tile in all, or one longer group. A unit never crosses the end of a row.
struct GroupRuns {
  bool found = false;
  int64_t group = 1, row = 1, unit = 1;  ///< elements
  int64_t rows = 0;

  /// Not found where a group is spread over rows, or so long that threads should share it. Codes that `spec` packs
  /// start on whole bytes.
  GroupRuns(const TensorView& x, const QuantSpec& spec) {
    constexpr int64_t kLongest = 1 << 18;
    const int last = x.rank - 1;
    const int64_t elements = x.elements();
    if (last < 0 || elements == 0 || spec.format.is_cast()) return;
    for (int d = 0; d < last; ++d)
      if (x.shape[d] != 1 && spec.block[d] != 1) return;
    const int64_t n = x.shape[last], b = spec.block[last];
    const bool is_padded = spec.packed && n % 8 * spec.format.bits % 8 != 0;
    group = b == 0 || b > n ? n : b;
    row = n % group == 0 && !is_padded ? elements : n;
    rows = elements / row;
    const int64_t in_step = group % 8 * spec.format.bits % 8 == 0 ? 1 : 8;  // groups from byte to byte
    if (group >= row) {
      unit = row;
    } else if (!spec.packed) {
      unit = group > kTile ? group : kTile / group * group;
    } else {
      unit = group * in_step > kTile ? group * in_step : kTile / (group * in_step) * (group * in_step);
    }
    // A tile must have all the pair bits of its bytes.
    const bool has_whole_pairs = !spec.has_pairs() || (group % kPairByte == 0 && group <= kTile);
    found = group <= kLongest && (unit == group || unit <= kTile) && has_whole_pairs;
  }

  int64_t units_per_row() const { return (row + unit - 1) / unit; }
  int64_t groups_per_row() const { return (row + group - 1) / group; }
};

/// Runs f(begin, count, index, pair_byte) for every unit, on the executor's threads; `index` is that of its first
/// group, `pair_byte` that of its first pairs.
template <class F>
void for_each_unit(const GroupRuns& runs, Executor& executor, const F& f) {
  struct Task {
    const GroupRuns& runs;
    const F& f;
  } task{runs, f};
  executor.run(
      runs.rows * runs.units_per_row(), runs.unit,
      [](void* context, int64_t first, int64_t last) {
        const Task& t = *static_cast<const Task*>(context);
        const GroupRuns& r = t.runs;
        for (int64_t item = first; item < last; ++item) {
          const int64_t row = item / r.units_per_row(), inside = item % r.units_per_row() * r.unit;
          t.f(row * r.row + inside, min(r.unit, r.row - inside), row * r.groups_per_row() + inside / r.group,
              row * scale_length(r.row, kPairByte) + inside / kPairByte);
        }
        stream_fence();
      },
      &task);
}

/// The bits of a tile's pairs, as choose_pairs writes them, and their scales halved. The tile starts on a byte of bits.
inline void choose_tile_pairs(const float* x, float* s, int64_t n, uint8_t* bytes, const Grid& grid) {
  const Grid g = grid;
  for (int64_t at = 0; at < n; at += kPairByte) {
    const int64_t count = min(kPairByte, n - at);
    uint32_t below = 0;
    const auto add = [&](int64_t i) { below |= is_below_exponent(x[at + i], s[at + i], g) ? 1u << uint32_t(i) : 0u; };
    if (count == kPairByte) {
      QUARK_VECTORIZE_STEP
      for (int64_t i = 0; i < kPairByte; ++i) add(i);
    } else {
      for (int64_t i = 0; i < count; ++i) add(i);
    }
    const uint8_t byte = pair_bits_of(below, count);
    bytes[at / kPairByte] = byte;
    halve_pairs(byte, s + at, count, s + at);
  }
}

/// The scales of a tile's `n` groups as TileScales, `by_element` an entry for every element. No zero points: `z` is
/// null.
inline TileScales tile_scales(const GroupScales& groups, int64_t group, int64_t n, int64_t count, bool by_element,
                              float* s, float* z) {
  const bool in_steps = group % kStep == 0 && count % group == 0;
  const int64_t step = by_element ? 1 : n == 1 ? kTile : in_steps ? group : 1;
  const int64_t times = step == 1 ? group : 1, entries = step == 1 ? count : n;
  if (times > 1) repeat(groups.scale, times, entries, s);
  if (z) repeat(groups.zero_point, times, entries, z);
  return {times > 1 ? s : groups.scale, z ? z : kNoZeroPoints, step};
}

/// Chooses the scales of runs and calls apply(begin, count, raw, scales) for every tile while it is in the cache.
/// `raw` is what Data::load_raw gives, `scales` its TileScales.
template <class Apply>
void choose_runs(const TensorView& x, const GroupRuns& runs, const ScaleTensors& out, const QuantSpec& spec,
                 Executor& executor, const Apply& apply) {
  struct Task {
    const GroupRuns& runs;
    const Apply& apply;
    ExtremesReader extremes;
    ScaleRuler scale_of;
    ScaleWriter writer;
    uint8_t* pair_bits;

    /// A unit of several groups, which is one tile.
    void groups(int64_t begin, int64_t count, int64_t index, int64_t pair_byte) const {
      RawTile buffer;
      alignas(64) float s[kTile], z[kTile];
      GroupScales groups;
      const void* raw = extremes.data().load_raw(begin, count, buffer);
      const int64_t n = scale_length(count, runs.group);
      extremes.groups(raw, count, runs.group, groups.low, groups.high);
      scale_of(groups, n);
      writer.store(index, groups, n);
      const bool has_pairs = pair_bits != nullptr;
      const TileScales scales =
          tile_scales(groups, runs.group, n, count, has_pairs, s, writer.has_zero_points() ? z : nullptr);
      if (has_pairs) {
        alignas(64) float x[kTile];
        choose_tile_pairs(extremes.data().floats(raw, count, x), s, count, pair_bits + pair_byte, extremes.grid());
      }
      apply(begin, count, raw, scales);
    }

    /// A group of several tiles: once for its scale, once more to apply it.
    void group(int64_t begin, int64_t count, int64_t index) const {
      RawTile buffer;
      const ScaleAndZero r = scale_of(extremes.run_all(begin, count));
      writer.store(index, r);
      const float s = r.scale, z = float(r.zero_point);
      for (int64_t at = 0; at < count; at += kTile) {
        const int64_t n = min(kTile, count - at);
        apply(begin + at, n, extremes.data().load_raw(begin + at, n, buffer), TileScales{&s, &z, kTile});
      }
    }
  };
  ExtremesReader extremes(x, spec);
  const Task task{runs,
                  apply,
                  extremes,
                  ScaleRuler(spec, extremes.grid(), out.tensor_scale),
                  ScaleWriter(*out.scale, out.zero_point),
                  out.pair_bits ? static_cast<uint8_t*>(out.pair_bits->data) : nullptr};
  for_each_unit(runs, executor, [&task](int64_t begin, int64_t count, int64_t index, int64_t pair_byte) {
    count <= kTile ? task.groups(begin, count, index, pair_byte) : task.group(begin, count, index);
  });
}

/// The tensor of the letter e (ops.inc), by the flat index of the group.
struct ExtremesWriter {
  uint32_t* to;

  void store(int64_t index, const Extremes& e) const {
    const Ends ends = ends_of(e);
    to[2 * index] = ends.high;
    to[2 * index + 1] = ends.low;
  }
};

/// Writes the extremes of every group. False where memory runs out.
inline bool find_extremes(const TensorView& x, const TensorView& out, const QuantSpec& spec, Executor& executor) {
  const int64_t groups = out.elements() / 2;
  if (groups == 0) return true;
  ExtremesWriter writer{static_cast<uint32_t*>(out.data)};
  const ExtremesReader extremes = ExtremesReader::of_bounds(x, spec);
  if (const GroupRuns runs(x, spec); runs.found) {
    for_each_unit(runs, executor, [&](int64_t begin, int64_t count, int64_t index, int64_t) {
      if (count <= kTile) {
        RawTile buffer;
        GroupScales found;
        const void* raw = extremes.data().load_raw(begin, count, buffer);
        extremes.groups(raw, count, runs.group, found.low, found.high);
        for (int64_t i = 0; i < scale_length(count, runs.group); ++i)
          writer.store(index + i, {found.low[i], found.high[i]});
        return;
      }
      writer.store(index, extremes.run_all(begin, count));
    });
    return true;
  }
  std::memset(out.data, 0, size_t(groups) * 2 * sizeof(uint32_t));
  Reduction reduction{extremes, group_walk(x, spec), x.elements(), writer.to + 1, writer.to, false, 2};
  executor.run((reduction.elements + kTile - 1) / kTile, kTile, &Reduction::chunk<BoundsKey>, &reduction);
  executor.run(
      reduction.out_of_memory ? 0 : groups, 1,
      [](void* context, int64_t first, int64_t last) {
        const auto& w = *static_cast<const ExtremesWriter*>(context);
        for (int64_t i = first; i < last; ++i) w.store(i, {w.to[2 * i + 1], w.to[2 * i]});
      },
      &writer);
  return !reduction.out_of_memory;
}

// ---- sums ---------------------------------------------------------------------------------------------------------

static_assert(kChunk == kTile, "a chunk of a sum is computed as one tile");

/// The sum of the lanes, which fold in halves.
QUARK_INLINE double fold_lanes(double* lane) {
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
  return lane[0];
}

/// The sum of a stream of terms in the fixed order.
class TreeSum {
 public:
  QUARK_INLINE void add(double term) { push(0, term); }

  /// The sum. The object is spent.
  double finish() {
    for (int k = 0; k < kLevels; ++k) {
      if (k + 1 == kLevels || levels_[k].pushed <= 1) return fold(levels_[k]);
      if (levels_[k].held > 0) push(k + 1, fold(levels_[k]));
    }
    return 0.0;
  }

 private:
  static constexpr int kLevels = 7;  // 1024^7 terms

  struct Level {
    double lane[kLanes] = {};
    int held = 0;
    int64_t pushed = 0;
  };

  void push(int k, double term) {
    Level& level = levels_[k];
    level.lane[level.held % kLanes] += term;
    ++level.pushed;
    if (++level.held < kChunk) return;
    const double sum = fold(level);
    if (k + 1 < kLevels) push(k + 1, sum);
  }

  static double fold(Level& level) {
    const double sum = fold_lanes(level.lane);
    for (double& lane : level.lane) lane = 0.0;
    level.held = 0;
    return sum;
  }

  Level levels_[kLevels];
};

/// Calls f(begin, n) for each run of consecutive elements of x that belongs to scale number `index`, in row-major
/// order.
template <class F>
void for_each_run_of_scale(int64_t index, const int64_t* shape, const QuantSpec& spec, const F& f) {
  int64_t from[kMaxRank] = {}, to[kMaxRank] = {}, at[kMaxRank] = {};
  for (int d = spec.rank - 1; d >= 0; --d) {
    const int64_t b = spec.block[d] == 0 ? shape[d] : spec.block[d], n = scale_length(shape[d], spec.block[d]);
    from[d] = at[d] = index % n * b;
    to[d] = from[d] + min(b, shape[d] - from[d]);
    index /= n;
    if (from[d] >= to[d]) return;  // an empty axis
  }
  const int last = spec.rank - 1;
  for (;;) {
    int64_t begin = 0;
    for (int d = 0; d < spec.rank; ++d) begin = begin * shape[d] + at[d];
    f(begin, last < 0 ? 1 : to[last] - from[last]);
    int d = last - 1;
    for (; d >= 0; --d) {
      if (++at[d] < to[d]) break;
      at[d] = from[d];
    }
    if (d < 0) return;
  }
}

// ---- learned scales -----------------------------------------------------------------------------------------------

/// Scales whose elements lie side by side in memory are taken together, so many at a time.
inline constexpr int64_t kPanel = 128;

/// A run of neighbours: elements of one scale, or one of each scale of a panel.
struct SlopeRun {
  const void *x, *grad;
  void* dx;
  int64_t n;
  int64_t wrap;   ///< element i is a term of lane i % wrap; a multiple of kStep, or beyond n
  int64_t ahead;  ///< where the elements are that come next
  double* lane;
  bool stream;
};

/// The scales and zero points of a run: one, or one of each element.
struct SlopeScales {
  alignas(64) float s[kPanel], z[kPanel];
  int64_t step;   ///< from an element's scale to the next one's: 0 or 1
  bool is_small;  ///< small_slope_of serves
};

/// dx = slope_of().dx, and weight * slope is added to the lanes. slope_loop's numbers are float32, small_slope_loop's
/// T.
using SlopeLoop = void (*)(const SlopeRun&, const SlopeScales&, const Grid&);

template <Arithmetic A, Rounding R>
void slope_loop(const SlopeRun& run, const SlopeScales& scales, const Grid& grid) {
  alignas(64) float s[kTile], z[kTile], weight[kTile], slope[kTile];
  const auto *x = static_cast<const float*>(run.x), *grad = static_cast<const float*>(run.grad);
  auto* dx = static_cast<float*>(run.dx);
  for (int64_t i = 0; i < run.n; ++i) s[i] = scales.s[i * scales.step], z[i] = scales.z[i * scales.step];
  const Grid g = grid;
  QUARK_VECTORIZE
  for (int64_t i = 0; i < run.n; ++i) {
    const Slope r = slope_of<A, R>(x[i], grad[i], s[i], z[i], g);
    weight[i] = r.weight;
    slope[i] = r.slope;
    dx[i] = r.dx;
  }
  for (int64_t i = 0; i < run.n; i += run.wrap)
    for (int64_t j = 0; j < min(run.wrap, run.n - i); ++j)
      run.lane[j] = plus_product(run.lane[j], weight[i + j], slope[i + j]);
}

template <class T>
void small_slope_loop(const SlopeRun& run, const SlopeScales& scales, const Grid& grid) {
  const Grid g = grid;
  const Numbers<T> x(run.x, g), grad(run.grad, g);
  const NumbersOut<T> dx(run.dx, g);
  const int64_t n = run.n, wrap = run.wrap, ahead = run.ahead;
  double* lanes = run.lane;
  const bool stream = run.stream;
  // s(i) and z(i) are those of element i.
  const auto all = [&](const auto& s, const auto& z) {
    int64_t i = 0, at = 0;  // at = i % wrap
    for (; i + kStep <= n; i += kStep) {
      alignas(64) float v[kStep], w[kStep], y[kStep], weight[kStep], slope[kStep];
      x.step(i, v, ahead);
      grad.step(i, w, ahead);
      QUARK_VECTORIZE_STEP
      for (int64_t j = 0; j < kStep; ++j) {
        const Slope r = small_slope_of(v[j], w[j], s(i + j), z(i + j), g);
        y[j] = sizeof(T) == 2 && is_nan(r.dx) ? nan_like(r.dx) : r.dx;
        weight[j] = r.weight, slope[j] = r.slope;
      }
      put_step(dx, y, i, stream);
      double* lane = lanes + at;
      QUARK_VECTORIZE_STEP
      for (int64_t j = 0; j < kStep; ++j) lane[j] = plus_product(lane[j], weight[j], slope[j]);
      at = at + kStep == wrap ? 0 : at + kStep;
    }
    for (; i < n; ++i) {
      const Slope r = small_slope_of(x.one(i), grad.one(i), s(i), z(i), g);
      dx.one(r.dx, dx.at[i]);
      lanes[i % wrap] = plus_product(lanes[i % wrap], r.weight, r.slope);
    }
  };
  if (scales.step == 0) {
    const float one_s = scales.s[0], one_z = scales.z[0];
    all([=](int64_t) { return one_s; }, [=](int64_t) { return one_z; });
  } else {
    all([&](int64_t i) { return scales.s[i]; }, [&](int64_t i) { return scales.z[i]; });
  }
}

inline SlopeLoop slope_loop_for(const QuantSpec& spec) {
  return with_slope(slope_order_of(spec), []<Arithmetic A, Rounding R>() -> SlopeLoop { return slope_loop<A, R>; });
}

/// nullptr where there is none.
inline SlopeLoop small_slope_loop_for(const QuantSpec& spec, DType x, DType grad, DType dx) {
  if (spec.rounding != Rounding::half_even || spec.shifted || x != grad || x != dx) return nullptr;
  switch (x) {
    case DType::float32: return small_slope_loop<Stored<float>>;
    case DType::float16: return small_slope_loop<Float16Bits>;
    case DType::bfloat16: return small_slope_loop<BFloat16Bits>;
    default: return nullptr;
  }
}

/// The gradients of a fake quantization to x and to its scales, in one pass.
class LearnScales {
 public:
  /// dx = slope_of().dx, and ds = factor * sum(weight * slope) over each group. False where memory runs out.
  static bool run(const TensorView& x, const TensorView& grad, const TensorView& scale, const TensorView* zero,
                  const TensorView& dx, const TensorView& ds, double factor, const QuantSpec& spec,
                  Executor& executor) {
    const int64_t scales = ds.elements();
    if (scales == 0) return true;
    LearnScales task(x, grad, scale, zero, dx, ds, factor, spec);
    task.sums_ = static_cast<double*>(std::calloc(size_t(scales * task.chunks_) + 1, sizeof(double)));
    if (!task.sums_) return false;
    const int64_t panels = (scales + task.panel_ - 1) / task.panel_;
    executor.run(panels * task.chunks_, task.panel_ * min(task.group_, kChunk), chunk<&LearnScales::terms>, &task);
    executor.run(scales, task.chunks_, chunk<&LearnScales::finish>, &task);
    std::free(task.sums_);
    return true;
  }

 private:
  LearnScales(const TensorView& x, const TensorView& grad, const TensorView& scale, const TensorView* zero,
              const TensorView& dx, const TensorView& ds, double factor, const QuantSpec& spec)
      : order_(order_for(x, spec)),
        x_(x, grouped_walk(x, spec, order_)),
        grad_(grad, grouped_walk(grad, spec, order_)),
        dx_(dx, grouped_walk(dx, spec, order_)),
        scale_(scale),
        zero_(zero ? *zero : scale),
        ds_(ds),
        has_zero_(zero != nullptr),
        scales_(ds.elements()),
        group_(x.elements() / scales_),
        chunks_((group_ + kChunk - 1) / kChunk),
        panel_(order_ == GroupOrder::members_first ? kPanel : 1),
        factor_(factor),
        grid_(make_grid(spec)),
        largest_(largest_of(grid_)),
        stream_(is_streamed(x_.bytes() + grad_.bytes(), dx_.bytes())),
        loop_(slope_loop_for(spec)),
        small_(small_slope_loop_for(spec, x.dtype, grad.dtype, dx.dtype)) {}

  static GroupOrder order_for(const TensorView& x, const QuantSpec& spec) {
    const auto steps_by_one = [&](GroupOrder order) {
      const Walk w = grouped_walk(x, spec, order);
      return w.rank == 0 || w.stride[w.rank - 1] == 1;
    };
    if (steps_by_one(GroupOrder::scales_first)) return GroupOrder::scales_first;
    return steps_by_one(GroupOrder::members_first) ? GroupOrder::members_first : GroupOrder::scales_first;
  }

  template <void (LearnScales::*method)(int64_t, int64_t) const>
  static void chunk(void* self, int64_t first, int64_t last) {
    (static_cast<const LearnScales*>(self)->*method)(first, last);
    stream_fence();
  }

  float scale_at(int64_t index) const {
    float s;
    return *scale_.load(scale_.view.elements() == 1 ? 0 : index, 1, &s);
  }
  float zero_at(int64_t index) const {
    float z;
    return has_zero_ ? *zero_.load(zero_.view.elements() == 1 ? 0 : index, 1, &z) : 0.0f;
  }

  /// Items: one chunk of one panel each, panel after panel within a chunk.
  void terms(int64_t first, int64_t last) const {
    const int64_t panels = (scales_ + panel_ - 1) / panel_;
    for (int64_t item = first; item < last; ++item) {
      if (panel_ == 1) {
        row(item / chunks_, item % chunks_);
      } else {
        panel(item % panels * panel_, item / panels);
      }
    }
  }

  /// One chunk of one scale, whose elements follow one another.
  void row(int64_t index, int64_t chunk) const {
    const int64_t inside = chunk * kChunk, n = min(kChunk, group_ - inside);
    double lane[kLanes] = {};
    add_run(index * group_ + inside, n, kLanes, kChunk, scales_from(index, 1), lane);
    sums_[index * chunks_ + chunk] = fold_lanes(lane);
  }

  /// One chunk of the scales from `index`: a run of one element of each after the other.
  void panel(int64_t index, int64_t chunk) const {
    const int64_t width = min(kPanel, scales_ - index), begin = chunk * kChunk, end = min(group_, begin + kChunk);
    alignas(64) double lanes[kLanes][kPanel];
    int64_t rows = 1;  // lanes that have terms, up to a power of two; the others stay 0
    while (rows < kLanes && rows < end - begin) rows *= 2;
    std::memset(lanes, 0, size_t(rows) * sizeof(lanes[0]));
    const SlopeScales scales = scales_from(index, width);
    for (int64_t at = begin; at < end; ++at)
      add_run(at * scales_ + index, width, kPanel, scales_, scales, lanes[(at - begin) % kLanes]);
    for (int64_t w = rows / 2; w > 0; w /= 2)
      for (int64_t i = 0; i < w; ++i)
        for (int64_t j = 0; j < width; ++j) lanes[i][j] += lanes[i + w][j];
    for (int64_t j = 0; j < width; ++j) sums_[(index + j) * chunks_ + chunk] = lanes[0][j];
  }

  /// The scales of a run from `index` on.
  SlopeScales scales_from(int64_t index, int64_t n) const {
    SlopeScales r;
    r.step = n == 1 ? 0 : 1;
    r.is_small = true;
    for (int64_t i = 0; i < n; ++i) {
      r.s[i] = scale_at(index + i);
      r.z[i] = zero_at(index + i);
      r.is_small = r.is_small && is_ordinary(1.0f, r.z[i], largest_, float_of(kMaxFinite));
    }
    return r;
  }

  /// dx of a run, and its terms added to the lanes.
  QUARK_INLINE void add_run(int64_t begin, int64_t n, int64_t wrap, int64_t ahead, const SlopeScales& scales,
                            double* lane) const {
    if (small_ && scales.is_small) {
      RawTile x, grad, dx;
      void* to = dx_.target_raw(begin, dx, stream_);
      small_({x_.load_raw(begin, n, x), grad_.load_raw(begin, n, grad), to, n, wrap, ahead, lane,
              stream_ && to != dx.bytes},
             scales, grid_);
      return dx_.store_raw(begin, n, to, stream_);
    }
    alignas(64) float x[kTile], grad[kTile], dx[kTile];
    float* to = dx_.target(begin, dx);
    loop_({x_.load(begin, n, x), grad_.load(begin, n, grad), to, n, wrap, ahead, lane, false}, scales, grid_);
    dx_.store(begin, n, to);
  }

  /// Items: one scale each.
  void finish(int64_t first, int64_t last) const {
    for (int64_t index = first; index < last; ++index) {
      const auto total = float(sum_of_chunks(sums_ + index * chunks_) * factor_);
      const float value = is_nan(total) ? float_of(kNaN) : total;
      ds_.store(index, 1, &value);
    }
  }

  double sum_of_chunks(const double* chunk) const {
    if (chunks_ == 1) return *chunk + 0.0;  // as the tree adds it
    TreeSum sum;
    for (int64_t c = 0; c < chunks_; ++c) sum.add(chunk[c]);
    return sum.finish();
  }

  GroupOrder order_;
  Data x_, grad_, dx_, scale_, zero_, ds_;
  bool has_zero_;
  int64_t scales_, group_, chunks_, panel_;
  double factor_;
  Grid grid_;
  float largest_;  ///< magnitude in the range
  bool stream_;
  SlopeLoop loop_, small_;
  double* sums_ = nullptr;  // of every chunk
};

}  // namespace
}  // namespace quark::QUARK_LEVEL
