// The kernel tables that kernels.cpp makes, one per level it is compiled for.
#pragma once
#include "../ops.h"

namespace quark {
namespace baseline {
extern const Kernel kernels[kOpCount];
}
#if defined(__x86_64__)
namespace v3 {
extern const Kernel kernels[kOpCount];
}
namespace v4 {
extern const Kernel kernels[kOpCount];
}
#endif
}  // namespace quark
