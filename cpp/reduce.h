// Reductions from elements to scales: extremes (exact in any order) and sums (one fixed tree).
//
// Compiled once per CPU level, like numerics.h.
#pragma once
#include <cstdlib>
#include <cstring>

#include "loops.h"

namespace quark::QUARK_LEVEL {
namespace {

// ---- extremes -----------------------------------------------------------------------------------------------------

/// What a reduction keeps per scale: bits of max(-x, 0) and of max(x, 0).
struct Extremes {
  uint32_t low, high;
};

QUARK_INLINE uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

inline Extremes extremes_of(const float* x, int64_t n) {
  uint32_t low = 0, high = 0;
  QUARK_VECTORIZE
  for (int64_t i = 0; i < n; ++i) {
    low = max(low, below_zero(x[i]));
    high = max(high, above_zero(x[i]));
  }
  return {low, high};
}

/// Raises *to to at least `value`; threads may race.
QUARK_INLINE void raise(uint32_t* to, uint32_t value) {
  uint32_t seen = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(to, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

/// The scales that a flat range of elements can touch, as a range of offsets.
struct OffsetRange {
  int64_t first, count;

  OffsetRange(const Walk& w, int64_t begin, int64_t end) : first(0), count(1) {
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

/// Writes the scale (and, if the spec is asymmetric, the zero point) of every group. `scale` and `zero` are contiguous;
/// they hold the extremes' bits until the end, so nothing is allocated but a thread's own accumulators.
inline bool choose_scales(const TensorView& x, const TensorView& scale, const TensorView* zero, const QuantSpec& spec,
                          Executor& executor) {
  const Grid grid = make_grid(spec);
  const int64_t scales = scale.elements();
  auto* high = static_cast<uint32_t*>(scale.data);
  auto* low = zero ? static_cast<uint32_t*>(zero->data) : high;  // symmetric: one maximum of both
  std::memset(high, 0, size_t(scales) * 4);
  std::memset(low, 0, size_t(scales) * 4);

  struct Task {
    Data data;
    Walk walk;
    int64_t elements;
    uint32_t *low, *high;
    bool out_of_memory;
  } task{Data(x), scale_walk(scale, x.shape, spec), x.elements(), low, high, false};

  const bool is_cast = spec.format.is_cast();
  if (!is_cast) {
    executor.run((task.elements + kTile - 1) / kTile, kTile,
                 [](void* context, int64_t first, int64_t last) {
                   Task& t = *static_cast<Task*>(context);
                   const int64_t begin = first * kTile, end = min(last * kTile, t.elements);
                   const OffsetRange range(t.walk, begin, end);
                   auto* mine = static_cast<Extremes*>(std::calloc(size_t(range.count), sizeof(Extremes)));
                   if (!mine) {
                     __atomic_store_n(&t.out_of_memory, true, __ATOMIC_RELAXED);
                     return;
                   }
                   alignas(64) float buffer[kTile];
                   for (int64_t at = begin; at < end; at += kTile) {
                     const int64_t n = min(kTile, end - at);
                     const float* values = t.data.load(at, n, buffer);
                     t.walk.runs(at, n, [&](int64_t position, int64_t offset, int64_t count, int64_t stride) {
                       Extremes* to = mine + (offset - range.first);
                       if (stride == 0) {
                         const Extremes e = extremes_of(values + position, count);
                         *to = {max(to->low, e.low), max(to->high, e.high)};
                         return;
                       }
                       QUARK_VECTORIZE
                       for (int64_t i = 0; i < count; ++i) {
                         Extremes& e = to[i * stride];
                         e = {max(e.low, below_zero(values[position + i])),
                              max(e.high, above_zero(values[position + i]))};
                       }
                     });
                   }
                   for (int64_t i = 0; i < range.count; ++i) {
                     raise(t.high + range.first + i, mine[i].high);
                     raise(t.low + range.first + i, mine[i].low);
                   }
                   std::free(mine);
                 },
                 &task);
    if (task.out_of_memory) return false;
  }

  struct Finish {
    const Grid& grid;
    uint32_t *low, *high;
    bool symmetric, is_cast;
  } finish{grid, low, high, spec.symmetric, is_cast};
  executor.run(
      scales, 1,
      [](void* context, int64_t first, int64_t last) {
        const Finish& f = *static_cast<const Finish*>(context);
        for (int64_t i = first; i < last; ++i) {
          const ScaleAndZero r =
              f.is_cast ? ScaleAndZero{1.0f, 0} : scale_from_bounds(f.low[i], f.high[i], f.symmetric, f.grid);
          if (f.low != f.high) f.low[i] = uint32_t(r.zero_point);
          f.high[i] = bits_of(r.scale);
        }
      },
      &finish);
  return true;
}

// ---- sums ---------------------------------------------------------------------------------------------------------

/// The sum of a stream of float64 terms in one fixed order, whatever the machine: chunks of 1024 terms; in a chunk,
/// lane j (0..63) adds terms j, j + 64, ... and the lanes fold in halves; chunk sums are summed by the same rule.
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
  static constexpr int kLanes = 64, kChunk = 1024;

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
    for (int w = kLanes / 2; w > 0; w /= 2)
      for (int j = 0; j < w; ++j) level.lane[j] += level.lane[j + w];
    const double sum = level.lane[0];
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

}  // namespace
}  // namespace quark::QUARK_LEVEL
