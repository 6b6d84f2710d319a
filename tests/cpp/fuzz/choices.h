// A fuzzer's bytes as choices: the interface of check::Random, so that generators take either.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fuzz {

/// Zeros follow the last byte, and zeros choose the plain case.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  bool empty() const { return at_ == end_; }
  uint8_t byte() { return at_ == end_ ? uint8_t(0) : *at_++; }
  uint64_t bits() { return take(~uint64_t(0)); }
  /// From low to high, both included, by as few bytes as can say it.
  int64_t between(int64_t low, int64_t high) {
    const uint64_t range = uint64_t(high) - uint64_t(low), value = take(range);
    return int64_t(uint64_t(low) + (range == ~uint64_t(0) ? value : value % (range + 1)));
  }
  bool chance(int percent) { return between(0, 99) >= 100 - percent; }
  template <class T>
  const T& pick(const std::vector<T>& from) {
    return from[size_t(between(0, int64_t(from.size()) - 1))];
  }

 private:
  uint64_t take(uint64_t range) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64 && range >> shift; shift += 8) value |= uint64_t(byte()) << shift;
    return value;
  }

  const uint8_t *at_, *end_;
};

/// Cheap random bits, where a fuzzer has nothing to gain from choosing each.
class Noise {
 public:
  explicit Noise(uint64_t seed) : state_(seed) {}

  uint64_t bits() {  // splitmix64
    uint64_t x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
  int64_t between(int64_t low, int64_t high) { return low + int64_t(bits() % uint64_t(high - low + 1)); }

 private:
  uint64_t state_;
};

}  // namespace fuzz
