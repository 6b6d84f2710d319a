// Kernels from elements to scales: extremes, sums in the fixed tree, searches.
#pragma once
#include "elements.h"

namespace quark::QUARK_LEVEL {
namespace {

// ---- groups -------------------------------------------------------------------------------------------------------

/// Who shares a scale, by the number of the scale in row-major order.
struct Groups {
  int rank = 0;
  bool are_runs = true;           ///< the elements of each follow one another
  bool are_alike = true;          ///< of one length
  int64_t count = 1, chunks = 1;  ///< groups, and chunks of the longest of them
  int64_t shape[kMaxRank], block[kMaxRank];

  Groups(const TensorView& x, const QuantSpec& spec) : rank(spec.rank) {
    int64_t longest = 1;
    bool is_inside = false;
    for (int d = 0; d < rank; ++d) {
      shape[d] = x.shape[d];
      block[d] = spec.block[d] == 0 ? x.shape[d] : min(spec.block[d], x.shape[d]);
      if (is_inside && block[d] != shape[d]) are_runs = false;
      is_inside = is_inside || block[d] != 1;
      if (block[d] == 0 || shape[d] % block[d] != 0) are_alike = false;
      longest *= block[d];
      count *= scale_length(x.shape[d], spec.block[d]);
    }
    if (longest > kChunk) chunks = (longest + kChunk - 1) / kChunk;
  }
};

/// One of them.
struct Group {
  const Groups& all;
  int64_t index, begin = 0, count = 1;

  QUARK_DEVICE Group(const Groups& groups, int64_t number) : all(groups), index(number) {
    int64_t step = 1;
    for (int d = all.rank - 1; d >= 0; --d) {
      const Part part(all, d, number);
      begin += part.from * step;
      count *= part.width;
      number = part.outer;
      step *= all.shape[d];
    }
  }

  /// The flat index of the k-th element.
  QUARK_DEVICE int64_t at(int64_t k) const {
    if (all.are_runs) return begin + k;
    int64_t flat = 0, step = 1, number = index;
    for (int d = all.rank - 1; d >= 0; --d) {
      const Part part(all, d, number);
      const int64_t rest = divide(k, part.width);
      flat += (part.from + k - rest * part.width) * step;
      number = part.outer;
      k = rest;
      step *= all.shape[d];
    }
    return flat;
  }

 private:
  /// The group along an axis: its first index, its width, and its number among the groups of the axes before.
  struct Part {
    int64_t outer, from, width;

    QUARK_DEVICE Part(const Groups& all, int d, int64_t number) {
      const int64_t n = all.shape[d], b = all.block[d], along = b == 0 ? 1 : divide(n + b - 1, b);
      outer = divide(number, along);
      from = (number - outer * along) * b;
      width = min(b, n - from);
    }
  };
};

// ---- extremes -----------------------------------------------------------------------------------------------------

struct ExtremesArguments {
  int64_t elements;
  Array x;
  Path groups;  ///< from an element to its group's number
  KeyKind key;
  Grid grid;
  uint32_t *low, *high;
  int64_t step;  ///< from one group's entry to the next
  Paths paths;
};

/// Neighbours, kThreads apart, that a thread takes.
inline constexpr int kKeysPerThread = 16;

/// Raises low and high, which have an entry per group, to the keys of its elements. Both may be the same memory, where
/// one maximum of both is enough.
QUARK_KERNEL(kThreads) find_extremes(QUARK_ARGUMENT const ExtremesArguments a) {
  const auto raise = [&](int64_t group, const Extremes& e) {
    if (e.high) atomic_max(a.high + group * a.step, e.high);
    if (e.low) atomic_max(a.low + group * a.step, e.low);
  };
  int64_t group = -1;
  Extremes e;
  for (int k = 0; k < kKeysPerThread; ++k) {
    const int64_t i = (block() * kKeysPerThread + k) * kThreads + thread();
    if (i >= a.elements) break;
    const float x = a.x.load(a.paths, i);
    const Extremes own = with_key(a.key, [&]<class Key>() -> Extremes { return Key::of(x, a.grid); });
    const int64_t at = offset_of(a.groups, a.paths, i);
    if (at == group) {
      e = max(e, own);
      continue;
    }
    if (group >= 0) raise(group, e);
    group = at;
    e = own;
  }
  // Where 32 threads are in one group, one of them speaks for all.
  bool is_alone = true;
  for (int mask = 1; mask < 32; mask *= 2) {
    const int64_t other = shuffle_xor(group, mask, 32);
    const Extremes found{shuffle_xor(e.low, mask, 32), shuffle_xor(e.high, mask, 32)};
    const int has_others = shuffle_xor(int(is_alone), mask, 32) == 0;
    is_alone = is_alone && !has_others && other == group;
    if (other == group) e = max(e, found);
  }
  if (group >= 0 && (!is_alone || thread() % 32 == 0)) raise(group, e);
}

struct ScalesArguments {
  int64_t scales;
  const uint32_t *low, *high;
  ScaleRuler scale_of;
  ScaleWriter writer;
};

/// Extremes to scales.
QUARK_KERNEL(kThreads) finish_scales(QUARK_ARGUMENT const ScalesArguments a) {
  const int64_t i = block() * kThreads + thread();
  if (i < a.scales) a.writer.store(i, a.scale_of({a.low[i], a.high[i]}));
}

struct EndsArguments {
  int64_t groups;
  uint32_t* ends;  ///< of each the bits of high, then of low
};

/// The letter e (ops.inc) in place.
QUARK_KERNEL(kThreads) finish_extremes(QUARK_ARGUMENT const EndsArguments a) {
  const int64_t i = block() * kThreads + thread();
  if (i >= a.groups) return;
  const Ends ends = ends_of({a.ends[2 * i + 1], a.ends[2 * i]});
  a.ends[2 * i] = ends.high;
  a.ends[2 * i + 1] = ends.low;
}

struct PairsArguments {
  int64_t bytes;
  Array x;
  ScaleArrays scales;
  int64_t length, along, inner;  ///< of the block's axis: elements, bytes, and the elements from one index to the next
  Grid grid;
  uint8_t* bits;
  Paths paths;
};

/// The bits of pairs, a byte a thread: whether both neighbours lie below the power of two of their block, whose scale
/// has been chosen. A neighbour beyond the end counts as 0.
QUARK_KERNEL(kThreads) choose_pairs(QUARK_ARGUMENT const PairsArguments a) {
  const int64_t index = block() * kThreads + thread();
  if (index >= a.bytes) return;
  const int64_t outer = divide(index, a.inner), row = divide(outer, a.along);
  const int64_t at = (outer - row * a.along) * kPairByte;
  const int64_t from = (row * a.length + at) * a.inner + index - outer * a.inner;
  const int64_t n = min(kPairByte, a.length - at);
  uint32_t below = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t flat = from + i * a.inner;
    const float x = a.x.load(a.paths, flat), s = a.scales.whole_scale_at(a.paths, flat);
    below |= is_below_exponent(x, s, a.grid) ? 1u << uint32_t(i) : 0u;
  }
  a.bits[index] = pair_bits_of(below, n);
}

// ---- sums ---------------------------------------------------------------------------------------------------------

// A chunk's 64 lanes are those of 16 threads, four neighbours each, so that a thread's loads are neighbours as well.

inline constexpr int kTeam = 16, kOwnLanes = kLanes / kTeam;
inline constexpr int kTeams = kThreads / kTeam;  // in a block

/// The number of this thread's chunk among all.
QUARK_DEVICE int64_t team() { return block() * kTeams + thread() / kTeam; }

/// How many threads take a team for every chunk of the groups.
inline int64_t team_threads(const Groups& groups) { return groups.count * groups.chunks * kTeam; }

/// The part of a group that this thread's team takes.
struct Chunk {
  int64_t item;  ///< its number among the chunks of all groups
  Group group;
  int64_t first, count;  ///< elements of the group; count: none past its end

  QUARK_DEVICE explicit Chunk(const Groups& groups)
      : item(team()),
        group(groups, divide(item, groups.chunks)),
        first((item - group.index * groups.chunks) * kChunk),
        count(min(int64_t(kChunk), group.count - first)) {}

  /// False past the last group.
  QUARK_DEVICE bool exists() const { return group.index < group.all.count; }
  /// The flat index of the k-th element.
  QUARK_DEVICE int64_t at(int64_t k) const { return group.at(first + k); }
  /// Writes the chunk's sum, which all of its threads have.
  QUARK_DEVICE void put(double sum, double* sums) const {
    if (thread() % kTeam == 0) sums[item] = sum;
  }
};

/// The sum of a team's lanes, which fold in halves. All of its threads have it.
QUARK_DEVICE double fold_lanes(double* lane) {
  for (int mask = kTeam / 2; mask > 0; mask /= 2)
    for (int j = 0; j < kOwnLanes; ++j) lane[j] += shuffle_xor(lane[j], mask, kTeam);
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

/// The sum of up to a chunk's terms: term(k), k < count, in float64. All threads of the team have it.
template <class Term>
QUARK_DEVICE double sum_of(int64_t count, const Term& term) {
  const int first = thread() % kTeam * kOwnLanes;
  double lane[kOwnLanes] = {};
  for (int64_t k = first; k < count; k += kLanes)
    for (int j = 0; j < kOwnLanes && k + j < count; ++j) lane[j] += term(k + j);
  return fold_lanes(lane);
}

struct FoldArguments {
  int64_t scales, from, to;  ///< sums for each scale, before and after
  const double* in;
  double* out;
};

/// Sums of chunks to sums of chunks of these.
QUARK_KERNEL(kThreads) fold_sums(QUARK_ARGUMENT const FoldArguments a) {
  const int64_t item = team(), scale = divide(item, a.to);
  if (scale >= a.scales) return;
  const int64_t begin = (item - scale * a.to) * kChunk;
  const double* in = a.in + scale * a.from + begin;
  const double sum = sum_of(min(int64_t(kChunk), a.from - begin), [&](int64_t k) { return in[k]; });
  if (thread() % kTeam == 0) a.out[item] = sum;
}

struct LearnArguments {
  Groups groups;
  Array x, grad, dx;
  ScaleArrays scales;
  Order order;
  Grid grid;
  const Learned* learned;
  double* sums;  ///< of every chunk
  Paths paths;
};
static_assert(sizeof(LearnArguments) <= 4096, "a kernel's arguments have 4 KiB");

/// The gradients of learned scales: dx = slope_of().dx, and the sum of weight * slope of every chunk.
QUARK_KERNEL(kThreads) learn_chunks(QUARK_ARGUMENT const LearnArguments a) {
  const Chunk chunk(a.groups);
  if (!chunk.exists()) return;
  Grid g = a.grid;
  g.lo = a.learned->lo, g.hi = a.learned->hi;
  const bool is_empty = chunk.group.count == 0;
  const float s = is_empty ? 1.0f : a.scales.scale_at(a.paths, chunk.group.begin);
  const float z = is_empty ? 0.0f : a.scales.zero_at(a.paths, chunk.group.begin);
  const double sum = sum_of(chunk.count, [&](int64_t k) {
    const int64_t i = chunk.at(k);
    const float x = a.x.load(a.paths, i), grad = a.grad.load(a.paths, i);
    const Slope r =
        with_slope(a.order, [&]<Arithmetic A, Rounding R>() -> Slope { return slope_of<A, R>(x, grad, s, z, g); });
    a.dx.store(a.paths, i, r.dx);
    return double(r.weight) * double(r.slope);
  });
  chunk.put(sum, a.sums);
}

struct CodeSumArguments {
  Groups groups;
  Array grad;
  Numbers codes;
  ScaleArrays scales;
  double* sums;  ///< of every chunk
  Paths paths;
};
static_assert(sizeof(CodeSumArguments) <= 4096, "a kernel's arguments have 4 KiB");

/// The gradients of scales of codes: the sum of dx * (q - z) of every chunk.
QUARK_KERNEL(kThreads) dequantize_chunks(QUARK_ARGUMENT const CodeSumArguments a) {
  const Chunk chunk(a.groups);
  if (!chunk.exists()) return;
  const double z = chunk.group.count > 0 ? double(a.scales.zero_at(a.paths, chunk.group.begin)) : 0.0;
  const double sum = sum_of(chunk.count, [&](int64_t k) {
    const int64_t i = chunk.at(k);
    return double(a.grad.load(a.paths, i)) * (double(a.codes.load(a.paths, i)) - z);
  });
  chunk.put(sum, a.sums);
}

struct TotalArguments {
  int64_t scales;
  const double* sums;
  const Learned* learned;  ///< whose factor counts, or null
  Array out;
  Paths paths;
};

/// Sums to gradients of scales.
QUARK_KERNEL(kThreads) finish_sums(QUARK_ARGUMENT const TotalArguments a) {
  const int64_t i = block() * kThreads + thread();
  if (i >= a.scales) return;
  const auto total = float(a.learned ? a.sums[i] * a.learned->factor : a.sums[i]);
  a.out.store(a.paths, i, is_nan(total) ? float_of(kNaN) : total);
}

struct LearnedArguments {
  Array threshold, number;  ///< threshold: absent for LSQ
  float lo, hi;
  Learned* learned;
  Paths paths;
};

/// LSQ: `number` is the factor. TQT: it is the domain.
QUARK_KERNEL(kThreads) read_learned(QUARK_ARGUMENT const LearnedArguments a) {
  if (thread() != 0) return;
  const float number = a.number.load(a.paths, 0);
  const bool is_threshold = a.threshold.data != nullptr;
  *a.learned = is_threshold ? learned_of_threshold(a.threshold.load(a.paths, 0), number)
                            : Learned{double(number), 1.0f, a.lo, a.hi};
}

// ---- searches -----------------------------------------------------------------------------------------------------

struct SearchArguments {
  Groups groups;
  Array x;
  uint32_t *low, *high;     ///< the extremes of the groups
  uint32_t *below, *above;  ///< what has been found of them
  uint64_t *lesser, *less;  ///< how many keys are less than that
  uint32_t bit;             ///< that is to be decided
  double part;              ///< of a group's elements that the percentile doesn't exceed
  bool is_symmetric;
  Paths paths;
};

/// Counts the keys of every chunk that are less than what has been found with the bit set.
QUARK_KERNEL(kThreads) count_keys(QUARK_ARGUMENT const SearchArguments a) {
  const Chunk chunk(a.groups);
  if (!chunk.exists()) return;
  const int64_t index = chunk.group.index;
  const uint32_t below = a.below[index] | a.bit, above = a.above[index] | a.bit;
  uint32_t lesser = 0, less = 0;
  for (int64_t k = thread() % kTeam; k < chunk.count; k += kTeam) {
    const float x = a.x.load(a.paths, chunk.at(k));
    less += (a.is_symmetric ? magnitude_key(x) : above_zero(x)) < above ? 1 : 0;
    lesser += below_zero(x) < below ? 1 : 0;
  }
  if (less) atomic_add(a.less + index, less);
  if (lesser) atomic_add(a.lesser + index, lesser);
}

/// Keeps the bit where less than the wanted number of keys are below.
QUARK_KERNEL(kThreads) decide_bit(QUARK_ARGUMENT const SearchArguments a) {
  const int64_t index = block() * kThreads + thread();
  if (index >= a.groups.count) return;
  const int64_t wanted = percentile_rank(a.part, Group(a.groups, index).count);
  if (int64_t(a.less[index]) < wanted) a.above[index] |= a.bit;
  if (int64_t(a.lesser[index]) < wanted) a.below[index] |= a.bit;
  a.less[index] = a.lesser[index] = 0;
}

/// The percentiles instead of the extremes, where there is something to search.
QUARK_KERNEL(kThreads) take_percentiles(QUARK_ARGUMENT const SearchArguments a) {
  const int64_t i = block() * kThreads + thread();
  if (i >= a.groups.count || !is_searched({a.low[i], a.high[i]})) return;
  a.low[i] = a.is_symmetric ? 0u : a.below[i];
  a.high[i] = a.above[i];
}

struct ErrorArguments {
  Groups groups;
  Array x;
  const uint32_t *low, *high;
  float share;  ///< of the extremes
  ScaleRuler scale_of;
  ScaleWriter writer;
  Order order;
  double *sums, *least;
  bool is_first;
  Paths paths;

  QUARK_DEVICE Extremes extremes(int64_t index) const { return {low[index], high[index]}; }
  /// The scale of that share of the extremes.
  QUARK_DEVICE ScaleAndZero scale(int64_t index) const { return scale_of(extremes(index) * share); }
};
static_assert(sizeof(ErrorArguments) <= 4096, "a kernel's arguments have 4 KiB");

/// The squared error that a share of the extremes leaves, of every chunk.
QUARK_KERNEL(kThreads) error_chunks(QUARK_ARGUMENT const ErrorArguments a) {
  const Chunk chunk(a.groups);
  if (!chunk.exists()) return;
  const ScaleAndZero r = a.scale(chunk.group.index);
  const double sum = sum_of(chunk.count, [&](int64_t k) {
    const float x = a.x.load(a.paths, chunk.at(k));
    const float y = with_order<FakeQuantizeBody>(a.order, [&]<Arithmetic A, Rounding R>() -> float {
      return FakeQuantizeBody::apply<A, R>(x, x, r.scale, float(r.zero_point), float_of(kMaxFinite), 0u,
                                           a.scale_of.grid);
    });
    const double d = double(y) - double(x);
    return d * d;
  });
  chunk.put(sum, a.sums);
}

/// Keeps the scale of a share whose error is less than that of those before.
QUARK_KERNEL(kThreads) compare_errors(QUARK_ARGUMENT const ErrorArguments a) {
  const int64_t i = block() * kThreads + thread();
  if (i >= a.groups.count) return;
  if (!is_searched(a.extremes(i))) {
    if (a.is_first) a.writer.store(i, a.scale_of(a.extremes(i)));
    return;
  }
  if (!a.is_first && a.sums[i] >= a.least[i]) return;
  a.least[i] = a.sums[i];
  a.writer.store(i, a.scale(i));
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
