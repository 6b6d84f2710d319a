// The worst float environment a host may have.
#pragma once
#include <cfloat>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace hostile {

/// The control register of float arithmetic, without the flags that any operation may raise.
inline uint64_t control() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;
#else
  uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
#endif
}
inline void set_control(uint64_t value) {
#if defined(__x86_64__)
  _mm_setcsr(unsigned(value));
#else
  asm volatile("msr fpcr, %0" : : "r"(value));
#endif
}

/// Subnormals flushed to zero, rounding upward and, on x86-64, traps, for as long as the object lives.
class Environment {
 public:
  Environment() : saved_(control()) {
#if defined(__x86_64__)
    // FTZ, DAZ, upward; the masks of invalid operation, division by zero and overflow off.
    set_control((saved_ & ~uint64_t(0x6000 | 0x0680)) | 0x8040 | 0x4000);
#else
    set_control((saved_ & ~(uint64_t(3) << 22)) | 1u << 24 | 1u << 22);  // FZ, upward
#endif
  }
  ~Environment() { set_control(saved_); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  uint64_t saved_;
};

inline float product(float a, float b) {
  volatile float x = a, y = b;
  return x * y;
}
inline bool keeps_subnormals() { return product(0x1p-120f, 0x1p-10f) == 0x1p-130f && product(0x1p-130f, 0x1p10f) != 0; }
inline bool rounds_to_nearest() {
  constexpr float x = 1 + FLT_EPSILON;  // x * x is just above 1 + 2 epsilon
  return product(x, x) == 1 + 2 * FLT_EPSILON && product(-x, x) == -1 - 2 * FLT_EPSILON;
}
inline bool is_plain() { return keeps_subnormals() && rounds_to_nearest() && product(0x1p100f, 0x1p100f) > FLT_MAX; }

}  // namespace hostile
