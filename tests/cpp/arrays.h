// Arrays for the tests: any dtype, shape and strides, in memory with other bytes around and between the elements.
#pragma once
#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "numerics.h"
#include "tensor.h"

namespace arrays {

using quark::DType;
using Shape = std::vector<int64_t>;

inline int64_t product(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
}

enum class Layout { aligned, contiguous, strided, broadcast };

/// Strides of an array, in elements; the element of all indices 0 is number `first` of the `span` that it reaches over.
struct Steps {
  Shape strides;
  int64_t first = 0, span = 1;
};

/// `strided`: permuted, sliced and reversed axes; `broadcast`: also axes of stride zero.
template <class Random>
Steps random_steps(Random& random, const Shape& shape, Layout layout) {
  const size_t rank = shape.size();
  Steps steps{Shape(rank)};
  std::vector<size_t> order(rank);
  std::iota(order.begin(), order.end(), size_t(0));
  std::reverse(order.begin(), order.end());  // the last axis is the innermost
  const bool is_contiguous = layout == Layout::aligned || layout == Layout::contiguous;
  if (!is_contiguous)
    for (size_t i = rank; i > 1; --i) std::swap(order[i - 1], order[size_t(random.between(0, int64_t(i) - 1))]);
  for (const size_t d : order) {
    const int64_t n = std::max<int64_t>(shape[d], 1);
    int64_t step = steps.span;
    if (!is_contiguous) step *= random.chance(75) ? 1 : random.between(2, 3);
    const bool repeated = layout == Layout::broadcast && random.chance(20);
    if (!repeated) steps.span = step * n;
    if (!is_contiguous && random.chance(25)) {
      if (!repeated) steps.first += step * (n - 1);
      step = -step;
    }
    steps.strides[d] = repeated ? 0 : step;
  }
  return steps;
}

/// Writes a number as an element of that dtype; fp8 dtypes are codes.
inline void store_number(unsigned char* to, DType dtype, double value) {
  namespace n = quark::QUARK_LEVEL;
  const auto store = [&](auto element) { std::memcpy(to, &element, sizeof element); };
  switch (dtype) {
    case DType::float32: return store(float(value));
    case DType::float64: return store(value);
    case DType::float16: return store(n::to_float16(float(value)));
    case DType::bfloat16: return store(n::to_bfloat16(float(value)));
    case DType::int8: return store(int8_t(int64_t(value)));
    case DType::int16: return store(int16_t(int64_t(value)));
    case DType::uint16: return store(uint16_t(int64_t(value)));
    case DType::int32: return store(int32_t(value));
    case DType::int64: return store(int64_t(value));
    default: return store(uint8_t(int64_t(value)));
  }
}

class Array {
 public:
  /// Random bytes. `aligned`: contiguous, from a boundary of 16 bytes on.
  Array(check::Random& random, DType dtype, const Shape& shape, Layout layout = Layout::contiguous)
      : dtype_(dtype), shape_(shape) {
    // With no guard, a sanitizer sees every access outside; with one, the test sees every write.
    const int64_t guard = random.chance(50) ? 0 : 64, shift = layout == Layout::aligned ? 0 : random.between(0, 7);
    const Steps steps = random_steps(random, shape, layout);
    strides_ = steps.strides;
    first_ = shift + guard + steps.first;
    bytes_.resize(size_t((shift + steps.span + 2 * guard) * quark::bytes_of(dtype)));
    for (auto& byte : bytes_) byte = static_cast<unsigned char>(random.bits());
  }

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  int64_t elements() const { return product(shape_); }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  quark::TensorView view() {
    quark::TensorView t;
    t.data = bytes_.data() + first_ * quark::bytes_of(dtype_);
    t.dtype = dtype_;
    t.rank = int(shape_.size());
    std::copy(shape_.begin(), shape_.end(), t.shape);
    std::copy(strides_.begin(), strides_.end(), t.strides);
    return t;
  }

  /// Where element number `flat` of the row-major order lies, in bytes.
  size_t offset(int64_t flat) const {
    int64_t at = first_;
    for (size_t d = shape_.size(); d-- > 0; flat /= shape_[d]) at += flat % shape_[d] * strides_[d];
    return size_t(at * quark::bytes_of(dtype_));
  }
  unsigned char* at(int64_t flat) { return bytes_.data() + offset(flat); }
  const unsigned char* at(int64_t flat) const { return bytes_.data() + offset(flat); }
  template <class T>
  T get(int64_t flat) const {
    T value;
    std::memcpy(&value, at(flat), sizeof value);
    return value;
  }
  template <class T>
  void put(int64_t flat, T value) {
    std::memcpy(at(flat), &value, sizeof value);
  }

  /// An element as the kernels see it; fp8 dtypes are codes.
  float number(int64_t flat) const {
    namespace n = quark::QUARK_LEVEL;
    switch (dtype_) {
      case DType::float32: return get<float>(flat);
      case DType::float64: return float(get<double>(flat));
      case DType::float16: return n::from_float16(get<uint16_t>(flat));
      case DType::bfloat16: return n::from_bfloat16(get<uint16_t>(flat));
      case DType::int8: return float(get<int8_t>(flat));
      case DType::int16: return float(get<int16_t>(flat));
      case DType::uint16: return float(get<uint16_t>(flat));
      case DType::int32: return float(get<int32_t>(flat));
      case DType::int64: return float(get<int64_t>(flat));
      default: return float(get<uint8_t>(flat));
    }
  }
  void put_number(int64_t flat, double value) { store_number(bytes_.data() + offset(flat), dtype_, value); }

  std::string text() const {
    std::string text = quark::name_of(dtype_);
    for (size_t d = 0; d < shape_.size(); ++d)
      text += (d ? ", " : " (") + std::to_string(shape_[d]) + ":" + std::to_string(strides_[d]);
    return shape_.empty() ? text + " ()" : text + ")";
  }

 private:
  DType dtype_;
  Shape shape_, strides_;
  int64_t first_ = 0;
  std::vector<unsigned char> bytes_;
};

inline std::vector<quark::TensorView> views(std::vector<Array>& all) {
  std::vector<quark::TensorView> result;
  for (Array& a : all) result.push_back(a.view());
  return result;
}

}  // namespace arrays
