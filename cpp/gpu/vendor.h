// CUDA, HIP and the machine of tests/cpp/simt under one set of names: the only place with vendors' words.
//
// Kernels take one struct of arguments, by value, and blocks and threads have one dimension.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../numerics.h"
#include "../status.h"
#include "../tensor.h"

#if defined(QUARK_SIMT)
#include "simt.h"
#elif defined(__HIP__)
#include <hip/hip_runtime.h>
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// ---- kernels --------------------------------------------------------------------------------------------------------

// A kernel of at most so many threads a block, its argument, a function of kernels, memory that a block shares, and a
// loop that stays one. (nvcc compiles a function that isn't inlined once more for every kernel that calls it.)
#if defined(QUARK_SIMT)
#define QUARK_KERNEL(threads) void
#define QUARK_ARGUMENT
#define QUARK_DEVICE inline
#define QUARK_NO_UNROLL
#define QUARK_SHARED(T, name, n) T* name = static_cast<T*>(simt::shared(sizeof(T) * (n)))
#else
#define QUARK_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define QUARK_DEVICE __device__ inline __attribute__((always_inline))
#define QUARK_NO_UNROLL _Pragma("unroll 1")
#define QUARK_SHARED(T, name, n) __shared__ T name[n]
#if defined(__HIP__)
#define QUARK_ARGUMENT
#else
#define QUARK_ARGUMENT __grid_constant__
#endif
#endif

namespace quark::QUARK_LEVEL {
namespace {

#if defined(QUARK_SIMT)

using simt::atomic_add;
using simt::atomic_max;
using simt::barrier;
using simt::block;
using simt::shuffle_xor;
using simt::thread;

#else

/// The number of this thread in its block, and of the block.
QUARK_DEVICE int thread() { return int(threadIdx.x); }
QUARK_DEVICE int64_t block() { return int64_t(blockIdx.y) * gridDim.x + blockIdx.x; }

/// Waits for all threads of the block.
QUARK_DEVICE void barrier() { __syncthreads(); }

/// `value` of the thread whose number differs in the bits of `mask`, within groups of `width` threads: a power of two,
/// at most 32. All threads of a group must get here; groups needn't go together.
template <class T>
QUARK_DEVICE T shuffle_xor(T value, int mask, int width) {
#if defined(__HIP__)
  return __shfl_xor(value, mask, width);
#else
  const unsigned first = (threadIdx.x & 31u) & ~unsigned(width - 1);
  const unsigned group = width == 32 ? ~0u : ((1u << width) - 1u) << first;
  return __shfl_xor_sync(group, value, mask, width);
#endif
}

QUARK_DEVICE void atomic_max(uint32_t* to, uint32_t value) { atomicMax(to, value); }
QUARK_DEVICE void atomic_add(uint64_t* to, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

#endif

#if defined(QUARK_SIMT)
/// Ends the process as a GPU would end the kernel.
inline void check_alignment(const void* address, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  std::fprintf(stderr, "SIMT error: words at an address that isn't aligned to %d bytes\n", int(bytes));
  std::_Exit(simt::kErrorStatus);
}
#endif

/// A struct of words, as many as possible with one instruction. Memory is aligned to it, up to 16 bytes, and may be of
/// any type.
template <class Words>
QUARK_DEVICE Words load_words(const void* from) {
  constexpr int kCount = sizeof(Words) / 4, kPart = kCount < 4 ? kCount : 4;
  Words words;
#if defined(QUARK_SIMT)
  check_alignment(from, 4 * kPart);
  std::memcpy(&words, from, sizeof(words));
#else
  struct alignas(4 * kPart) [[gnu::may_alias]] Part {
    uint32_t word[kPart];
  };
  for (int i = 0; i < kCount; i += kPart) {
    const Part part = static_cast<const Part*>(from)[i / kPart];
    for (int j = 0; j < kPart; ++j) words.word[i + j] = part.word[j];
  }
#endif
  return words;
}
template <class Words>
QUARK_DEVICE void store_words(void* to, const Words& words) {
  constexpr int kCount = sizeof(Words) / 4, kPart = kCount < 4 ? kCount : 4;
#if defined(QUARK_SIMT)
  check_alignment(to, 4 * kPart);
  std::memcpy(to, &words, sizeof(words));
#else
  struct alignas(4 * kPart) [[gnu::may_alias]] Part {
    uint32_t word[kPart];
  };
  for (int i = 0; i < kCount; i += kPart) {
    Part part;
    for (int j = 0; j < kPart; ++j) part.word[j] = words.word[i + j];
    static_cast<Part*>(to)[i / kPart] = part;
  }
#endif
}

// A float16's bits to float32, and to nearest even back, as one instruction does it. NaN: unspecified bits.
#if defined(QUARK_SIMT)
QUARK_DEVICE float converted_half(uint16_t bits) { return with_nan(from_float16(bits), float_of(~kSign)); }
QUARK_DEVICE uint16_t to_half(float x) { return to_float16(x); }
#elif defined(__HIP__)
QUARK_DEVICE float converted_half(uint16_t bits) { return float(__builtin_bit_cast(_Float16, bits)); }
QUARK_DEVICE uint16_t to_half(float x) { return __builtin_bit_cast(uint16_t, _Float16(x)); }
#else
QUARK_DEVICE float converted_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
QUARK_DEVICE uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
#endif

/// A float16's bits to float32. NaN keeps its sign.
QUARK_DEVICE float from_half(uint16_t bits) {
  const uint32_t nan = kNaN | uint32_t(bits & 0x8000u) << 16;
  return (bits & 0x7fffu) > 0x7c00u ? float_of(nan) : converted_half(bits);
}

// ---- the host's side ------------------------------------------------------------------------------------------------

#if defined(QUARK_SIMT)

inline constexpr const char* kPlatformName = "SIMT";
inline constexpr Device kPlatformDevice = Device::cuda;

inline Status check_device() { return {}; }

struct OnDevice {
  explicit OnDevice(int) {}
  Status status() const { return {}; }
};

inline constexpr int64_t kMostBlocks = 50;  // so that tests see grids of two dimensions

template <class Arguments>
Status launch_grid(void (*kernel)(Arguments), int64_t across, int64_t down, int threads, void*,
                   const Arguments& arguments) {
  simt::launch(across * down, threads, [&] { kernel(arguments); });
  return {};
}

inline Status clear(void* to, int64_t bytes, void*) {
  std::memset(to, 0, size_t(bytes));
  return {};
}

#else

#if defined(__HIP__)
#define QUARK_VENDOR(name) hip##name
inline constexpr const char* kPlatformName = "HIP";
inline constexpr Device kPlatformDevice = Device::hip;
#else
#define QUARK_VENDOR(name) cuda##name
inline constexpr const char* kPlatformName = "CUDA";
inline constexpr Device kPlatformDevice = Device::cuda;
#endif

inline Status status_of(const char* what, QUARK_VENDOR(Error_t) error) {
  if (error == QUARK_VENDOR(Success)) return {};
  const ErrorKind kind = error == QUARK_VENDOR(ErrorMemoryAllocation) ? ErrorKind::memory : ErrorKind::device;
  return {kind, std::string(kPlatformName) + ": " + what + " failed: " + QUARK_VENDOR(GetErrorString)(error)};
}

/// An error where there is no device, or no driver for one.
inline Status check_device() {
  int count = 0;
  const QUARK_VENDOR(Error_t) error = QUARK_VENDOR(GetDeviceCount)(&count);
  if (error == QUARK_VENDOR(Success) && count > 0) return {};
  (void)QUARK_VENDOR(GetLastError)();  // else the next call on this thread would report it
  const char* why = error == QUARK_VENDOR(Success) ? "none is visible" : QUARK_VENDOR(GetErrorString)(error);
  return {ErrorKind::device, std::string("no ") + kPlatformName + " device: " + why};
}

/// Makes a device the current one for as long as this object lives; -1: that which is.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (device < 0) return;
    status_ = status_of("asking for the current device", QUARK_VENDOR(GetDevice)(&before_));
    if (status_.ok() && before_ != device) {
      status_ = status_of("choosing the device", QUARK_VENDOR(SetDevice)(device));
      is_changed_ = status_.ok();
    }
  }
  ~OnDevice() {
    if (is_changed_) (void)QUARK_VENDOR(SetDevice)(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const Status& status() const { return status_; }

 private:
  int before_ = 0;
  bool is_changed_ = false;
  Status status_;
};

// In one dimension of a grid. HIP counts threads with 32 bits.
#if defined(__HIP__)
inline constexpr int64_t kMostBlocks = (int64_t(1) << 32) / 1024 - 1;
#else
inline constexpr int64_t kMostBlocks = 0x7fffffff;
#endif

template <class Arguments>
Status launch_grid(void (*kernel)(Arguments), int64_t across, int64_t down, int threads, void* stream,
                   const Arguments& arguments) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  const auto error =
      QUARK_VENDOR(LaunchKernel)(reinterpret_cast<const void*>(kernel), dim3(unsigned(across), unsigned(down)),
                                 dim3(unsigned(threads)), pointers, 0, static_cast<QUARK_VENDOR(Stream_t)>(stream));
  return status_of("launching a kernel", error);
}

inline Status clear(void* to, int64_t bytes, void* stream) {
  return status_of("clearing memory",
                   QUARK_VENDOR(MemsetAsync)(to, 0, size_t(bytes), static_cast<QUARK_VENDOR(Stream_t)>(stream)));
}

#endif

/// At least so many blocks.
template <class Arguments>
Status launch(void (*kernel)(Arguments), int64_t blocks, int threads, void* stream, const Arguments& arguments) {
  const int64_t down = (blocks + kMostBlocks - 1) / kMostBlocks;
  if (down > 0xffff) return value_error("the arrays are too large for one launch on a GPU");
  return launch_grid(kernel, (blocks + down - 1) / down, down, threads, stream, arguments);
}

}  // namespace
}  // namespace quark::QUARK_LEVEL
