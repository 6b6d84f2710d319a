// The kernel tables that kernels.cpp makes, one per level it is compiled for.
#pragma once
#include "../ops.h"

namespace quark {
namespace baseline {
extern const Kernel kernels[kOpCount];
}
#if defined(__x86_64__) && !defined(QUARK_SIMT)
namespace v3 {
extern const Kernel kernels[kOpCount];
}
namespace v4 {
extern const Kernel kernels[kOpCount];
}
#endif

#if defined(QUARK_SIMT)
/// Those of the GPUs, on the machine of tests/cpp/simt.
namespace simulated {
extern const Kernel kernels[kOpCount];
}
#endif

/// The size of the cache that cores share. Tests set it to 0: then every result is written past it.
int64_t& last_cache_bytes();

}  // namespace quark
