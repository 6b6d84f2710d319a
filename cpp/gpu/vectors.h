// Kernels for neighbours that are taken together: what most calls are, at the speed of memory.
//
// A thread takes kVector neighbours of an array in one piece, with loads and stores of 16 bytes. Scales that are
// ordinary (numerics.h) take fewer steps; the others the same steps as in elements.h.
#pragma once
#include "groups.h"

namespace quark::QUARK_LEVEL {
namespace {

inline constexpr int kVector = 8;

/// A vector's bytes.
template <int kWords>
struct Raw {
  uint32_t word[kWords];
};
template <class T>
using RawOf = Raw<kVector* int(sizeof(T)) / 4>;

/// Number i of words of T.
template <class T>
QUARK_DEVICE float number_at(const uint32_t* words, int i) {
  if constexpr (std::is_same_v<T, BFloat16Bits>)
    return float_of(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  if constexpr (std::is_same_v<T, Float16Bits>) return from_half(uint16_t(words[i / 2] >> (i % 2 * 16)));
  return float_of(words[i]);
}

/// A number's bits. It is no other NaN than nan_like() gives.
template <class T>
QUARK_DEVICE uint32_t raw_of(float y) {
  const uint32_t u = bits_of(y);
  if constexpr (std::is_same_v<T, BFloat16Bits>) return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  if constexpr (std::is_same_v<T, Float16Bits>) return is_nan(y) ? 0x7e00u | sign_of(y) >> 16 : to_half(y);
  return u;
}

/// n numbers as words of T.
template <class T, int n>
QUARK_DEVICE void put_numbers(const float* y, uint32_t* words) {
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < n; ++i) words[i] = raw_of<T>(y[i]);
  } else {
    for (int i = 0; i < n; i += 2) words[i / 2] = raw_of<T>(y[i]) | raw_of<T>(y[i + 1]) << 16;
  }
}

/// A call on arrays in one piece, aligned to 16 bytes; kVector divides the elements that are taken so.
struct VectorArguments {
  ElementArguments each;  ///< the same call, one element at a time; its `first`: where the vectors end
  bool has_own_scales;    ///< a vector's elements may differ in their scales
  int lanes;              ///< dynamic scales: threads that share one; 0: scales are given
  int64_t row;            ///< of each_row: elements that share a scale
  KeyKind key;
  ScaleRuler scale_of;
  ScaleWriter writer;
  uint32_t bits;  ///< of codes: 8, or 4 that are packed
  float largest;  ///< magnitude of a code's number
};
static_assert(sizeof(VectorArguments) <= 4096, "a kernel's arguments have 4 KiB");

// What becomes of a vector: Ordinary of numerics.h, General of bodies.h, and whether codes are read or written.
struct FakeQuantizeVectors {
  using Ordinary = FakeQuantizeOrdinary;
  using General = FakeQuantizeBody;
  static constexpr bool kReadsCodes = false, kWritesCodes = false;
};
struct QuantizeVectors {
  using Ordinary = QuantizeOrdinary;
  using General = QuantizeBody;
  static constexpr bool kReadsCodes = false, kWritesCodes = true;
};
struct DequantizeVectors {
  using Ordinary = DequantizeOrdinary;
  using General = DequantizeBody;
  static constexpr bool kReadsCodes = true, kWritesCodes = false;
};

QUARK_DEVICE uint32_t code_of(float y, const Grid& g) { return encode_or_zero(y, g); }
QUARK_DEVICE uint32_t code_of(int32_t code, const Grid&) { return uint32_t(code); }

/// Eight codes of four bits as bytes.
QUARK_DEVICE Raw<2> spread(uint32_t codes) {
  Raw<2> bytes;
  for (int i = 0; i < 2; ++i) {
    uint32_t w = codes >> (16 * i) & 0xffffu;
    w = (w | w << 8) & 0x00ff00ffu;
    bytes.word[i] = (w | w << 4) & 0x0f0f0f0fu;
  }
  return bytes;
}
/// The reverse; bits above the lowest four don't matter.
QUARK_DEVICE Raw<1> squeeze(const Raw<2>& bytes) {
  uint32_t codes = 0;
  for (int i = 0; i < 2; ++i) {
    uint32_t w = bytes.word[i] & 0x0f0f0f0fu;
    w = (w | w >> 4) & 0x00ff00ffu;
    codes |= ((w | w >> 8) & 0xffffu) << (16 * i);
  }
  return {{codes}};
}

/// The vectors of a call. T: what numbers are stored as; codes are bytes, or four bits.
template <class Body, bool kIsFixed, Rounding R, class T>
class Vectors {
 public:
  QUARK_DEVICE explicit Vectors(const VectorArguments& arguments) : a_(arguments), g_(arguments.each.grid) {
    if (a_.each.learned) g_.lo = a_.each.learned->lo, g_.hi = a_.each.learned->hi;
    if constexpr (R == Rounding::stochastic) key_ = RandomWordsOf(a_.each.random, a_.each.paths).key;
  }

  /// The numbers from element i on.
  QUARK_DEVICE void load(int64_t i, float* x) const {
    if constexpr (Body::kReadsCodes) {
      const auto* from = static_cast<const uint8_t*>(a_.each.x.array.data) + i * a_.bits / 8;
      const Raw<2> codes = a_.bits == 8 ? load_words<Raw<2>>(from) : spread(load_words<Raw<1>>(from).word[0]);
      for (int j = 0; j < kVector; ++j) {
        const uint32_t code = codes.word[j / 4] >> (j % 4 * 8) & 0xffu;
        x[j] = kIsFixed ? a_.each.x.form.number_of(code, a_.bits) : decode(code, g_);
      }
    } else {
      const auto raw = load_words<RawOf<T>>(static_cast<const T*>(a_.each.x.array.data) + i);
      for (int j = 0; j < kVector; ++j) x[j] = number_at<T>(raw.word, j);
    }
  }

  /// The extremes of a vector.
  QUARK_DEVICE Extremes extremes(const float* x) const {
    return with_key(a_.key, [&]<class Key>() -> Extremes {
      Extremes e;
      for (int j = 0; j < kVector; ++j) e = max(e, Key::of(x[j], g_));
      return e;
    });
  }

  /// What becomes of a vector whose elements have one scale.
  QUARK_DEVICE void apply(int64_t i, const float* x, float s, float z) const {
    float largest = a_.largest;
    if constexpr (!Body::kReadsCodes) largest = largest_of(g_);
    if (!is_ordinary(s, z, largest, a_.each.limit)) {
      return one_by_one(i, x, [=](int) { return Scale{s, z}; });
    }
    const OrdinaryScale k = ordinary_scale<R>(s, z, g_);
    uint32_t words[kVector] = {};
    if constexpr (R == Rounding::stochastic) {
      for (int j = 0; j < kVector; j += 4) {
        const RandomWords four = philox(uint64_t(i + j) / 4, key_);
        for (int n = 0; n < 4; ++n) words[j + n] = four.word[n];
      }
    }
    const auto result = [&](int j) { return Body::Ordinary::template apply<kIsFixed, R>(x[j], words[j], k, g_); };
    if constexpr (Body::kWritesCodes) {
      Raw<2> codes{};
      for (int j = 0; j < kVector; ++j) codes.word[j / 4] |= (code_of(result(j), g_) & 0xffu) << (j % 4 * 8);
      store_codes(i, codes);
    } else {
      float y[kVector];
      for (int j = 0; j < kVector; ++j) y[j] = result(j);
      RawOf<T> raw;
      put_numbers<T, kVector>(y, raw.word);
      store_words(static_cast<T*>(a_.each.out.array.data) + i, raw);
    }
  }

  /// The same by the general steps, each element with its own scale.
  QUARK_DEVICE void apply(int64_t i, const float* x) const {
    one_by_one(i, x, [&](int j) {
      return Scale{a_.each.scales.scale_at(a_.each.paths, i + j), a_.each.scales.zero_at(a_.each.paths, i + j)};
    });
  }

 private:
  struct Scale {
    float s, z;
  };

  /// By the general steps: `scale(j)` is that of element i + j. A loop, as it is seldom needed.
  template <class Of>
  QUARK_DEVICE void one_by_one(int64_t i, const float* x, const Of& scale) const {
    float own[kVector];  // in memory; x stays in registers
    for (int j = 0; j < kVector; ++j) own[j] = x[j];
    uint64_t codes = 0;
    QUARK_NO_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Scale k = scale(j);
      const float y = general(own[j], random_word(i + j), k.s, k.z);
      if constexpr (Body::kWritesCodes) {
        const uint32_t code = kIsFixed ? uint32_t(int32_t(y * (1.0f / a_.each.out.form.step))) : code_of(y, g_);
        codes |= uint64_t(code & 0xffu) << (8 * j);
      } else {
        narrow(y, static_cast<T*>(a_.each.out.array.data)[i + j]);
      }
    }
    if constexpr (Body::kWritesCodes) store_codes(i, {{uint32_t(codes), uint32_t(codes >> 32)}});
  }

  QUARK_DEVICE float general(float x, uint32_t word, float s, float z) const {
    const auto by = [&]<Arithmetic A>() -> float {
      return Body::General::template apply<A, R>(x, x, s, z, a_.each.limit, word, g_);
    };
    const Arithmetic arithmetic = a_.each.order.arithmetic;
    if (arithmetic == Arithmetic::integer) return by.template operator()<Arithmetic::integer>();
    if (arithmetic == Arithmetic::affine) return by.template operator()<Arithmetic::affine>();
    return by.template operator()<Arithmetic::minifloat>();
  }

  QUARK_DEVICE uint32_t random_word(int64_t i) const {
    if constexpr (R == Rounding::stochastic) return philox(uint64_t(i) / 4, key_).word[i % 4];
    return 0;
  }

  QUARK_DEVICE void store_codes(int64_t i, const Raw<2>& codes) const {
    auto* to = static_cast<uint8_t*>(a_.each.out.array.data) + i * a_.bits / 8;
    a_.bits == 8 ? store_words(to, codes) : store_words(to, squeeze(codes));
  }

  const VectorArguments& a_;
  Grid g_;
  uint64_t key_ = 0;
};

/// Vectors that a thread takes, a block apart from one another: what is read before anything is computed.
template <class T>
inline constexpr int kVectorsPerThread = sizeof(T) == 4 ? 1 : 2;

/// Scales are given, or chosen by the threads that share one, whose vectors lie side by side.
template <class Body, bool kIsFixed, Rounding R, class T>
QUARK_KERNEL(kThreads)
each_vector(QUARK_ARGUMENT const VectorArguments a) {
  constexpr int kCount = kVectorsPerThread<T>;
  constexpr int64_t kApart = int64_t(kThreads) * kVector;
  const Vectors<Body, kIsFixed, R, T> vectors(a);
  const int64_t first = (block() * kCount * kThreads + thread()) * kVector, end = a.each.first;
  float x[kCount][kVector];
  for (int k = 0; k < kCount; ++k)
    if (first + k * kApart < end) vectors.load(first + k * kApart, x[k]);
  for (int k = 0; k < kCount; ++k) {
    const int64_t i = first + k * kApart;
    if (i >= end) break;  // so do all threads that share a scale
    if (a.lanes > 0) {
      Extremes e = vectors.extremes(x[k]);
      for (int mask = a.lanes / 2; mask > 0; mask /= 2)
        e = max(e, Extremes{shuffle_xor(e.low, mask, a.lanes), shuffle_xor(e.high, mask, a.lanes)});
      const ScaleAndZero r = a.scale_of(e);
      if (thread() % a.lanes == 0) a.writer.store(divide(i, int64_t(a.lanes) * kVector), r);
      vectors.apply(i, x[k], r.scale, float(r.zero_point));
    } else if (a.has_own_scales) {
      vectors.apply(i, x[k]);
    } else {
      vectors.apply(i, x[k], a.each.scales.scale_at(a.each.paths, i), a.each.scales.zero_at(a.each.paths, i));
    }
  }
}

/// A block chooses the scale of a row, then reads it again, from the caches, and applies it.
template <class Body, bool kIsFixed, Rounding R, class T>
QUARK_KERNEL(kThreads)
each_row(QUARK_ARGUMENT const VectorArguments a) {
  QUARK_SHARED(uint32_t, lows, kThreads / 32);
  QUARK_SHARED(uint32_t, highs, kThreads / 32);
  const Vectors<Body, kIsFixed, R, T> vectors(a);
  const int64_t begin = block() * a.row, end = begin + a.row;
  if (begin >= a.each.first) return;
  Extremes e;
  float x[kVector];
  for (int64_t i = begin + thread() * kVector; i < end; i += kThreads * kVector) {
    vectors.load(i, x);
    e = max(e, vectors.extremes(x));
  }
  for (int mask = 16; mask > 0; mask /= 2)
    e = max(e, Extremes{shuffle_xor(e.low, mask, 32), shuffle_xor(e.high, mask, 32)});
  if (thread() % 32 == 0) lows[thread() / 32] = e.low, highs[thread() / 32] = e.high;
  barrier();
  for (int i = 0; i < kThreads / 32; ++i) e = max(e, Extremes{lows[i], highs[i]});
  const ScaleAndZero r = a.scale_of(e);
  if (thread() == 0) a.writer.store(block(), r);
  for (int64_t i = begin + thread() * kVector; i < end; i += kThreads * kVector) {
    vectors.load(i, x);
    vectors.apply(i, x, r.scale, float(r.zero_point));
  }
}

// ---- learned scales -----------------------------------------------------------------------------------------------

/// learn_chunks of arrays in one piece, aligned to 16 bytes, that are rounded to nearest even, and of groups that are
/// runs of one length, a multiple of kOwnLanes: a thread's lanes at once.
template <class T>
QUARK_KERNEL(kThreads)
learn_vectors(QUARK_ARGUMENT const LearnArguments a) {
  using Four = Raw<kOwnLanes* int(sizeof(T)) / 4>;
  constexpr int kAtOnce = 4;  // steps of a team whose numbers are read before anything is computed
  const Chunk chunk(a.groups);
  if (!chunk.exists()) return;
  Grid g = a.grid;
  g.lo = a.learned->lo, g.hi = a.learned->hi;
  const int64_t begin = chunk.at(0), first = begin + thread() % kTeam * kOwnLanes, end = begin + chunk.count;
  const float s = a.scales.scale_at(a.paths, begin), z = a.scales.zero_at(a.paths, begin);
  const bool is_small = is_ordinary(1.0f, z, largest_of(g), float_of(kMaxFinite));
  double lane[kOwnLanes] = {};
  for (int64_t at = first; at < end; at += kAtOnce * kLanes) {
    Four x[kAtOnce], grad[kAtOnce];
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = at + k * kLanes;
      if (i >= end) break;
      x[k] = load_words<Four>(static_cast<const T*>(a.x.data) + i);
      grad[k] = load_words<Four>(static_cast<const T*>(a.grad.data) + i);
    }
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = at + k * kLanes;
      if (i >= end) break;
      float dx[kOwnLanes];
      for (int j = 0; j < kOwnLanes; ++j) {
        const float v = number_at<T>(x[k].word, j), w = number_at<T>(grad[k].word, j);
        const Slope r =
            is_small ? small_slope_of(v, w, s, z, g) : slope_of<Arithmetic::affine, Rounding::half_even>(v, w, s, z, g);
        dx[j] = sizeof(T) == 2 && is_nan(r.dx) ? nan_like(r.dx) : r.dx;
        lane[j] = plus_product(lane[j], r.weight, r.slope);
      }
      Four raw;
      put_numbers<T, kOwnLanes>(dx, raw.word);
      store_words(static_cast<T*>(a.dx.data) + i, raw);
    }
  }
  chunk.put(fold_lanes(lane), a.sums);
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
