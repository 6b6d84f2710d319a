// Which GPU platforms were compiled: QUARK_WITH_CUDA and QUARK_WITH_HIP; QUARK_SIMT: the tests' machine instead of
// CUDA.
#include <array>

#include "gpu.h"

namespace quark {

#if defined(QUARK_SIMT)
namespace simulated {
extern const GpuPlatform platform;
}
#endif
#if defined(QUARK_WITH_CUDA)
namespace cuda {
extern const GpuPlatform platform;
}
#endif
#if defined(QUARK_WITH_HIP)
namespace hip {
extern const GpuPlatform platform;
}
#endif

std::span<const GpuPlatform* const> gpu_platforms() {
  static constexpr size_t kCount = 0
#if defined(QUARK_SIMT)
                                   + 1
#endif
#if defined(QUARK_WITH_CUDA)
                                   + 1
#endif
#if defined(QUARK_WITH_HIP)
                                   + 1
#endif
      ;
  static constexpr std::array<const GpuPlatform*, kCount> kPlatforms = {
#if defined(QUARK_SIMT)
      &simulated::platform,
#endif
#if defined(QUARK_WITH_CUDA)
      &cuda::platform,
#endif
#if defined(QUARK_WITH_HIP)
      &hip::platform,
#endif
  };
  return kPlatforms;
}

Status gpu_platform(Device device, const GpuPlatform*& platform) {
  for (const GpuPlatform* p : gpu_platforms())
    if (p->device == device) return platform = p, Status();
  const char* name = device == Device::cuda ? "CUDA" : "HIP";
  return {ErrorKind::unsupported, std::string("the tensors are on a GPU; this build of quark-kernels has no ") + name +
                                      " kernels: build it with QUARK_" + name + "=ON"};
}

}  // namespace quark
