// Where the elements of an operand are: from the flat row-major index of the logical array to memory.
//
// Strides, broadcasting and every granularity are just Walks. Compiled once per CPU level and for every GPU platform,
// like numerics.h.
#pragma once
#include "numerics.h"

namespace quark::QUARK_LEVEL {
namespace {

QUARK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

/// The memory offsets of one operand in row-major order of the logical array. The index along an axis is divided by
/// `block` before it is multiplied by the stride.
struct Walk {
  int rank = 0;
  int64_t size[2 * kMaxRank], stride[2 * kMaxRank], block[2 * kMaxRank];

  // Only the axes that there are: a small call would see the cost of the others.
  Walk() = default;
  Walk(const Walk& other) { *this = other; }
  Walk& operator=(const Walk& other) {  // NOLINT(bugprone-unhandled-self-assignment): changes nothing
    rank = other.rank;
    for (int d = 0; d < rank; ++d) {
      size[d] = other.size[d];
      stride[d] = other.stride[d];
      block[d] = other.block[d];
    }
    return *this;
  }

  /// Adds an axis inside the others, merged with the axis before it where one stride serves both.
  void push(int64_t n, int64_t step, int64_t neighbours) {
    if (n == 1) return;
    if (rank > 0 && neighbours == 1 && block[rank - 1] == 1 && stride[rank - 1] == step * n) {
      size[rank - 1] *= n;
      stride[rank - 1] = step;
      return;
    }
    size[rank] = n;
    stride[rank] = step;
    block[rank] = neighbours;
    ++rank;
  }

  /// Calls f(position, offset, n, stride) for each run of the flat range [begin, begin + count): the elements
  /// position .. position + n of the range lie at offset, offset + stride, ...
  template <class F>
  QUARK_INLINE void runs(int64_t begin, int64_t count, F&& f) const {
    if (rank == 0) {
      if (count > 0) f(int64_t(0), int64_t(0), count, int64_t(0));
      return;
    }
    int64_t index[2 * kMaxRank];
    int64_t rest = begin;
    for (int d = rank - 1; d > 0; --d) {
      index[d] = rest % size[d];
      rest /= size[d];
    }
    index[0] = rest;
    const int last = rank - 1;
    for (int64_t position = 0; position < count;) {
      int64_t offset = 0;
      for (int d = 0; d < last; ++d) offset += index[d] / block[d] * stride[d];
      while (index[last] < size[last] && position < count) {
        const int64_t b = block[last];
        const int64_t inside = b == 1 ? size[last] - index[last] : min(b - index[last] % b, size[last] - index[last]);
        const int64_t n = min(inside, count - position);
        f(position, offset + index[last] / b * stride[last], n, b == 1 ? stride[last] : int64_t(0));
        position += n;
        index[last] += n;
      }
      index[last] = 0;
      for (int d = last - 1; d >= 0; --d) {
        if (++index[d] < size[d]) break;
        if (d > 0) index[d] = 0;
      }
    }
  }
};

/// The walk of a tensor over its own elements.
inline Walk walk_of(const TensorView& t) {
  Walk w;
  for (int d = 0; d < t.rank; ++d) w.push(t.shape[d], t.strides[d], 1);
  return w;
}

/// The walk of scales over the elements that they belong to. A scale of one element may have any rank.
inline Walk scale_walk(const TensorView& scale, const int64_t* shape, const QuantSpec& spec) {
  Walk w;
  const bool single = scale.elements() == 1;
  for (int d = 0; d < spec.rank; ++d) {
    const int64_t n = shape[d], b = spec.block[d];
    const int64_t step = single ? 0 : scale.strides[d];
    if (single || b == 0 || b >= n) {
      w.push(n, 0, 1);
    } else if (n % b == 0) {
      w.push(n / b, step, 1);
      w.push(b, 0, 1);
    } else {
      w.push(n, step, b);
    }
  }
  return w;
}

/// The walk from an element to the number of its group, of groups in row-major order.
inline Walk group_walk(const TensorView& x, const QuantSpec& spec) {
  TensorView numbers;
  numbers.rank = x.rank;
  int64_t step = 1;
  for (int d = x.rank - 1; d >= 0; --d) {
    numbers.shape[d] = scale_length(x.shape[d], spec.block[d]);
    numbers.strides[d] = step;
    step *= numbers.shape[d];
  }
  return scale_walk(numbers, x.shape, spec);
}

/// The walk of pair bits over the elements that they belong to; they have the data's axes, the block's one shorter.
inline Walk pair_walk(const TensorView& bits, const int64_t* shape, int axis) {
  Walk w;
  for (int d = 0; d < bits.rank; ++d) w.push(shape[d], bits.strides[d], d == axis ? kPairByte : 1);
  return w;
}

/// Which axes come first in a walk over groups: the scales' (the elements of each scale follow one another, in
/// row-major order) or the members' (the first elements of all scales, then the second ones).
enum class GroupOrder : uint8_t { scales_first, members_first };

/// The walk of a tensor of x's shape, whose axes are whole numbers of groups.
inline Walk grouped_walk(const TensorView& t, const QuantSpec& spec, GroupOrder order) {
  Walk w;
  const auto push = [&](bool members) {
    for (int d = 0; d < spec.rank; ++d) {
      const int64_t groups = scale_length(t.shape[d], spec.block[d]), length = t.shape[d] / groups;
      w.push(members ? length : groups, members ? t.strides[d] : length * t.strides[d], 1);
    }
  };
  push(order == GroupOrder::members_first);
  push(order == GroupOrder::scales_first);
  return w;
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
