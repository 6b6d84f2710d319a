// Memory of which every tensor has exactly the bytes that its view claims; all around them a sanitizer sees any access,
// and without one a comparison sees any write.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "choices.h"
#include "tensor.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QUARK_HAS_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define QUARK_HAS_ASAN
#endif
#if defined(QUARK_HAS_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace fuzz {

using quark::TensorView;

/// What a view claims.
struct Claim {
  bool is_possible = true;  ///< else no such tensor can be, and the core has to say so
  int64_t elements = 1;
  int64_t low = 0, high = 0;  ///< bytes from its first element on
};

inline Claim claim_of(const TensorView& t) {
  Claim c;
  const auto impossible = [] { return Claim{false, 0, 0, 0}; };
  if (t.rank < 0 || t.rank > quark::kMaxRank) return impossible();
  int64_t room = 1;  // without the zeros
  for (int d = 0; d < t.rank; ++d) {
    if (t.shape[d] < 0 || __builtin_mul_overflow(room, std::max<int64_t>(t.shape[d], 1), &room)) return impossible();
    if (t.shape[d] == 0) c.elements = 0;
  }
  c.elements *= room;
  if (c.elements > std::numeric_limits<int64_t>::max() / 64) return impossible();
  if (c.elements == 0) return c;
  const int64_t bytes = quark::bytes_of(t.dtype);
  c.high = bytes;
  for (int d = 0; d < t.rank; ++d) {
    int64_t reach = 0;
    if (t.shape[d] > 1 && __builtin_mul_overflow(t.shape[d] - 1, t.strides[d], &reach)) return impossible();
    if (__builtin_mul_overflow(reach, bytes, &reach)) return impossible();
    if (__builtin_add_overflow(reach < 0 ? c.low : c.high, reach, reach < 0 ? &c.low : &c.high)) return impossible();
  }
  if (int64_t all; __builtin_sub_overflow(c.high, c.low, &all)) return impossible();
  return c;
}

/// Calls f(offset in elements) for every element of a view that can be.
template <class F>
void for_each_element(const TensorView& t, const F& f) {
  int64_t index[quark::kMaxRank] = {}, at = 0;
  for (int64_t left = claim_of(t).elements; left > 0; --left) {
    f(at);
    for (int d = t.rank - 1; d >= 0; --d) {
      if (t.shape[d] == 1) continue;  // there is no step, whatever the stride says
      at += t.strides[d];
      if (++index[d] < t.shape[d]) break;
      at -= index[d] * t.strides[d];
      index[d] = 0;
    }
  }
}

class Memory {
 public:
  static constexpr int64_t kCapacity = 1 << 20, kGap = 64;

  Memory() { reset(); }

  /// Forgets all blocks.
  void reset() {
    used_ = kGap;
    blocks_.clear();
  }

  /// A block of so many bytes, `shift` after a boundary of 16; null where there is no room.
  unsigned char* add(int64_t bytes, int64_t shift) {
    const int64_t first = (used_ + 15) / 16 * 16 + shift;
    if (first + bytes + kGap > kCapacity) return nullptr;
    used_ = first + bytes + kGap;
    blocks_.emplace_back(first, bytes);
    return bytes_ + first;
  }
  int64_t used() const { return used_; }
  /// Where nothing may be read.
  unsigned char* nowhere() { return bytes_ + kCapacity; }

  void fill(Noise noise) {
    open();
    for (int64_t i = 0; i < used_; i += 8) {
      const uint64_t word = noise.bits();
      std::memcpy(bytes_ + i, &word, sizeof word);
    }
  }

  /// All bytes; the memory is open for the fuzzer then.
  std::vector<unsigned char> snapshot() {
    open();
    return {bytes_, bytes_ + used_};
  }
  void restore(const std::vector<unsigned char>& all) {
    open();
    std::memcpy(bytes_, all.data(), all.size());
  }
  bool is(const std::vector<unsigned char>& all) {
    open();
    return std::memcmp(bytes_, all.data(), all.size()) == 0;
  }
  int64_t offset(const void* data) const { return static_cast<const unsigned char*>(data) - bytes_; }

  /// Only the blocks may be touched.
  void close() {
    ASAN_POISON_MEMORY_REGION(bytes_, size_t(used_));
    ASAN_POISON_MEMORY_REGION(nowhere(), kNowhere);
    for (const auto& [first, bytes] : blocks_) ASAN_UNPOISON_MEMORY_REGION(bytes_ + first, size_t(bytes));
  }
  void open() { ASAN_UNPOISON_MEMORY_REGION(bytes_, size_t(used_)); }

 private:
  static constexpr int64_t kNowhere = 256;

  std::vector<std::pair<int64_t, int64_t>> blocks_;
  int64_t used_ = 0;
  alignas(64) unsigned char bytes_[kCapacity + kNowhere];
};

}  // namespace fuzz
