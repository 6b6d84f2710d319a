// Scales that are searched for: from percentiles of a group, or by the squared error that they would leave.
//
// Compiled once per CPU level, like numerics.h.
#pragma once
#include "reduce.h"

namespace quark::QUARK_LEVEL {
namespace {

/// How many of the keys are less than `bound`.
template <class KeyOf>
int64_t count_below(const float* x, int64_t n, uint32_t bound, const KeyOf& key_of) {
  int64_t total = 0;
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t count = min(kTile, n - at);
    int32_t found = 0;
    QUARK_VECTORIZE
    for (int64_t i = 0; i < count; ++i) found += key_of(x[at + i]) < bound ? 1 : 0;
    total += found;
  }
  return total;
}

/// The k-th smallest key, counted from 1, bit by bit from the top.
template <class KeyOf>
uint32_t select_key(const float* x, int64_t n, int64_t k, const KeyOf& key_of) {
  uint32_t found = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const uint32_t candidate = found | 1u << bit;
    if (count_below(x, n, candidate, key_of) < k) found = candidate;
  }
  return found;
}

/// Chooses the scale of one group at a time.
class SearchScales {
 public:
  /// False where memory runs out.
  static bool run(const TensorView& x, const ScaleTensors& out, const QuantSpec& spec, Executor& executor) {
    SearchScales task(x, out, spec);
    executor.run(
        out.scale->elements(), task.longest_ * (spec.method == Method::mse ? kShares : 1),
        [](void* self, int64_t first, int64_t last) { static_cast<SearchScales*>(self)->chunk(first, last); }, &task);
    return !task.out_of_memory_;
  }

 private:
  SearchScales(const TensorView& x, const ScaleTensors& out, const QuantSpec& spec)
      : x_(x),
        spec_(spec),
        extremes_(x, spec),
        scale_of_(spec, extremes_.grid(), nullptr),
        writer_(*out.scale, out.zero_point),
        loop_(tile_loop_for<FakeQuantizeBody>(spec, x.dtype, out.zero_point != nullptr)) {
    for (int d = 0; d < spec.rank; ++d) longest_ *= spec.block[d] == 0 ? x.shape[d] : min(spec.block[d], x.shape[d]);
  }

  void chunk(int64_t first, int64_t last) {
    auto* buffer = static_cast<float*>(std::malloc(size_t(longest_) * sizeof(float) + 1));
    if (!buffer) {
      __atomic_store_n(&out_of_memory_, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t index = first; index < last; ++index) writer_.store(index, choose(index, buffer));
    std::free(buffer);
  }

  ScaleAndZero choose(int64_t index, float* buffer) const {
    int64_t n = 0;
    const float* x = buffer;
    for_each_run_of_scale(index, x_.shape, spec_, [&](int64_t begin, int64_t count) {
      if (const float* here = n == 0 && count == longest_ ? extremes_.data().direct(begin) : nullptr) {
        x = here;  // the whole group, as it is
      } else {
        for (int64_t at = 0; at < count; at += kTile) {
          const int64_t part = min(kTile, count - at);
          const float* values = extremes_.data().load(begin + at, part, buffer + n + at);
          if (values != buffer + n + at) std::memcpy(buffer + n + at, values, size_t(part) * sizeof(float));
        }
      }
      n += count;
    });
    const Extremes all = extremes_.of(x, n);
    if (spec_.format.is_cast() || !is_searched(all)) return scale_of_(all);
    return spec_.method == Method::percentile ? by_percentile(x, n) : by_error(x, n, all);
  }

  ScaleAndZero by_percentile(const float* x, int64_t n) const {
    const int64_t k = percentile_rank(spec_.percentile / 100.0, n);
    if (spec_.symmetric) return scale_of_({0, select_key(x, n, k, [](float v) { return magnitude_key(v); })});
    return scale_of_({select_key(x, n, k, [](float v) { return below_zero(v); }),
                      select_key(x, n, k, [](float v) { return above_zero(v); })});
  }

  ScaleAndZero by_error(const float* x, int64_t n, const Extremes& all) const {
    ScaleAndZero best{};
    double least = 0.0;
    for (int i = 0; i < kShares; ++i) {
      const ScaleAndZero r = scale_of_(all * share_of(i));
      const double error = squared_error(x, n, r);
      if (i > 0 && error >= least) continue;
      best = r;
      least = error;
    }
    return best;
  }

  double squared_error(const float* x, int64_t n, const ScaleAndZero& r) const {
    const float s = r.scale, z = float(r.zero_point);
    const TileScales scales{&s, &z, kTile};
    TreeSum sum;
    alignas(64) float y[kTile];
    for (int64_t at = 0; at < n; at += kTile) {
      const int64_t count = min(kTile, n - at);
      const float* from = x + at;
      loop_(from, from, nullptr, y, count, scales, float_of(kMaxFinite), extremes_.grid());
      double lane[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        const double d = double(y[i]) - double(from[i]);
        lane[i % kLanes] += d * d;
      }
      sum.add(fold_lanes(lane));
    }
    return sum.finish();
  }

  const TensorView& x_;
  const QuantSpec& spec_;
  ExtremesReader extremes_;
  ScaleRuler scale_of_;
  ScaleWriter writer_;
  TileLoop loop_;
  int64_t longest_ = 1;
  bool out_of_memory_ = false;
};

}  // namespace
}  // namespace quark::QUARK_LEVEL
