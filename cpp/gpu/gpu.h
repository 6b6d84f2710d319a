// The kernels of a GPU platform, as the rest of the core sees them: no vendor's word is here.
#pragma once
#include <string>

#include "../ops.h"

namespace quark {

/// Where the kernels of one call are enqueued, and whose memory they borrow. Nothing waits for them.
class Queue {
 public:
  /// `stream` is the platform's own handle; `device` the number of the device, or -1: the one that is current.
  Queue(void* stream, int device) : stream_(stream), device_(device) {}
  virtual ~Queue() = default;
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void* stream() const { return stream_; }
  int device() const { return device_; }

  /// Memory on the device for what is enqueued until `release` or the end of this object, aligned to 16 bytes (XLA has
  /// no more); nullptr where it runs out. Later work on the stream may get the same memory.
  virtual void* scratch(int64_t bytes) = 0;
  /// What has been given is only needed by what has been enqueued.
  virtual void release() {}

  /// Why there was no memory, in the framework's words, if it has any.
  const std::string& why() const { return why_; }

 protected:
  std::string why_;

 private:
  void* stream_;
  int device_;
};

/// Whether an operator may ask for scratch memory. Only calls of the others can be replayed from a recording (XLA's
/// command buffers), as the memory is somebody else's by then.
constexpr bool takes_scratch(Op op) {
  switch (op) {
    case Op::quantize:
    case Op::quantize_values:
    case Op::dequantize:
    case Op::fake_quantize:
    case Op::fake_quantize_backward:
    case Op::extremes:
    case Op::convert:
    case Op::pack:
    case Op::unpack: return false;
    default: return true;
  }
}

/// A kernel behind an operator; what it is given has been checked, but for the numbers in the tensors.
using GpuKernel = Status (*)(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue);

struct GpuPlatform {
  const char* name;
  Device device;
  const GpuKernel* kernels;  ///< in the order of ops.inc
  Status (*check)();         ///< an error where there is no device
};

/// The compiled platforms.
std::span<const GpuPlatform* const> gpu_platforms();

/// The platform of a device. An error where it wasn't compiled.
Status gpu_platform(Device device, const GpuPlatform*& platform);

/// run() for tensors on one GPU. What the numbers in the tensors have to be is not checked, as that would wait for
/// them: domains of TQT that are no integers from 1 to 2^22 make NaN, and a shard that isn't in its array other random
/// words.
Status run(Op op, Tensors in, Tensors out, const QuantSpec& spec, Queue& queue);

}  // namespace quark
