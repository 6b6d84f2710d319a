// What the kernels of a call find in its tensors and its spec.
//
// Compiled once per CPU level and for every GPU platform, like numerics.h.
#pragma once
#include "numerics.h"
#include "ops.h"

namespace quark::QUARK_LEVEL {
namespace {

/// What a call knows of its scales: the tensors of ops.inc's letters s, g, p and z; absent ones are null.
struct ScaleTensors {
  const TensorView* scale;
  const TensorView* tensor_scale = nullptr;
  const TensorView* pair_bits = nullptr;
  const TensorView* zero_point = nullptr;
};

/// A call's tensors by the letters of its row. Optional ones that are absent are null.
class Operands {
 public:
  Operands(Op op, Tensors in, Tensors out, const QuantSpec& spec) {
    take(kOps[int(op)].ins, in, spec);
    take(kOps[int(op)].outs, out, spec);
  }

  /// Inputs, or outputs where no input has the letter.
  const TensorView* operator[](char letter) const { return found_[letter - 'a']; }

  ScaleTensors scales() const { return {found_['s' - 'a'], found_['g' - 'a'], found_['p' - 'a'], found_['z' - 'a']}; }

 private:
  void take(const char* letters, Tensors tensors, const QuantSpec& spec) {
    size_t at = 0;
    for (; *letters && at < tensors.size(); ++letters) {
      if (!spec.takes(*letters)) continue;
      const TensorView*& slot = found_[*letters - 'a'];
      if (!slot) slot = &tensors[at];
      ++at;
    }
  }

  const TensorView* found_['z' - 'a' + 1] = {};
};

inline int64_t last_length(const TensorView& t) { return t.rank > 0 ? t.shape[t.rank - 1] : 1; }

/// `spec` for codes: a format without NaN has no code for it.
inline QuantSpec code_spec(QuantSpec spec) {
  spec.ieee = spec.ieee && spec.format.specials != Specials::none;
  return spec;
}

/// How the codes of an array with this last axis are stored.
struct CodeForm {
  uint32_t bits;
  bool is_packed;
  bool is_fixed_point;  ///< of equal steps, two's complement where signed
  bool is_number;       ///< stored in a dtype that holds the values themselves
  bool is_signed;
  float step;              ///< fixed point: the value of code 1
  int64_t row, row_bytes;  ///< packed: of the last axis

  CodeForm(const QuantSpec& spec, int64_t row_length)
      : bits(spec.format.bits),
        is_packed(spec.packed),
        is_fixed_point(spec.format.is_fixed_point()),
        is_number(!is_packed && (spec.format.is_integer() || spec.format.is_cast())),
        is_signed(is_fixed_point && spec.format.lo < 0),
        step(float_of(uint32_t(spec.format.min_exp - spec.format.mantissa_bits + 127) << 23)),
        row(row_length),
        row_bytes(is_packed ? packed_length(row_length, bits) : 0) {}

  /// Fixed point: the number of a code that is stored in so many bits, above which there are zeros.
  QUARK_INLINE float number_of(uint32_t code, uint32_t stored_bits) const {
    const uint32_t top = is_signed ? 1u << (stored_bits - 1) : 0u;
    return float(int32_t((code ^ top) - top)) * step;
  }
  /// The largest magnitude that such a code can have.
  QUARK_INLINE float largest_of(uint32_t stored_bits) const { return float_of((127 + stored_bits) << 23) * step; }
};

}  // namespace
}  // namespace quark::QUARK_LEVEL
