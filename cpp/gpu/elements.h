// Kernels for one element at a time: any dtype, strides, granularity and order of computing.
#pragma once
#include "arrays.h"

namespace quark::QUARK_LEVEL {
namespace {

struct ElementArguments {
  int64_t elements, first;  ///< first: where to begin; 0 where rows end in padding bits
  Numbers x, out;
  Array other;  ///< the second data operand, where there is one
  ScaleArrays scales;
  RandomKey random;
  Grid grid;
  float limit;  ///< where results saturate
  Order order;
  const Learned* learned;  ///< whose range counts, or null
  Paths paths;
};
static_assert(sizeof(ElementArguments) <= 4096, "a kernel's arguments have 4 KiB");

/// y = x: for conversions, packing and unpacking.
struct CopyBody {
  static constexpr bool kOrders = false, kFinite = false, kRounds = false;
  template <Arithmetic A, Rounding R>
  static QUARK_INLINE float apply(float x, float, float, float, float, uint32_t, const Grid&) {
    return x;
  }
};

/// Elements that a thread takes.
inline constexpr int kPerThread = int(kPack);

/// out = Body(x, other, s, z). A thread takes neighbours where they share bytes, else elements that are a block apart,
/// so that threads side by side are at neighbours.
template <class Body>
QUARK_KERNEL(kThreads)
each_element(QUARK_ARGUMENT const ElementArguments a) {
  const bool is_packed = a.out.form.is_packed;
  int64_t first = a.first + block() * kPerThread * kThreads + thread(), step = kThreads;
  int64_t count = min(int64_t(kPerThread), (a.elements - first + kThreads - 1) / kThreads);
  if (is_packed) {
    const int64_t pack = block() * kThreads + thread();
    // A row whose bytes end in padding bits is by itself.
    const int64_t row = a.out.form.row % 8 * a.out.form.bits % 8 == 0 ? a.elements : a.out.form.row;
    const int64_t packs = (row + kPack - 1) / kPack, in_row = divide(pack, packs);
    const int64_t begin = a.first + (pack - in_row * packs) * kPack;
    first = in_row * row + begin;
    step = 1;
    count = min(kPack, row - begin);
  }
  if (first >= a.elements) return;
  Grid g = a.grid;
  if (a.learned) g.lo = a.learned->lo, g.hi = a.learned->hi;
  const RandomWordsOf random(a.random, a.paths);
  float packed[kPack];
  QUARK_NO_UNROLL
  for (int k = 0; k < count; ++k) {
    const int64_t i = first + k * step;
    const float x = a.x.load(a.paths, i);
    float y = x;
    if constexpr (!std::is_same_v<Body, CopyBody>) {
      const float other = a.other.data ? a.other.load(a.paths, i) : x;
      const float s = a.scales.scale_at(a.paths, i), z = a.scales.zero_at(a.paths, i);
      const uint32_t word = random.at(a.paths, i);
      y = with_order<Body>(a.order, [&]<Arithmetic A, Rounding R>() -> float {
        return Body::template apply<A, R>(x, other, s, z, a.limit, word, g);
      });
    }
    if (is_packed) {
      packed[k] = y;
    } else {
      a.out.store(a.paths, i, y);
    }
  }
  if (is_packed) a.out.store_packed(a.paths, first, int(count), packed);
}

/// How many threads each_element takes.
inline int64_t threads_for_elements(const ElementArguments& a) {
  if (!a.out.form.is_packed) return (a.elements - a.first + kPerThread - 1) / kPerThread;
  if (a.first > 0) return (a.elements - a.first + kPack - 1) / kPack;
  const bool is_padded = a.out.form.row % 8 * a.out.form.bits % 8 != 0;
  const int64_t row = is_padded ? a.out.form.row : a.elements;
  return a.elements == 0 ? 0 : a.elements / row * ((row + kPack - 1) / kPack);
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
