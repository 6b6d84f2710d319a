// The GPU's kernels as one more CPU level, so that every test of the core is a test of them.
#include <cstdlib>
#include <vector>

#define QUARK_ONE_NAN  // as on a GPU
#include "cpu/levels.h"
#include "gpu/kernels.cu"

namespace quark::simulated {
namespace {

/// Memory that is as undefined as a GPU's.
class HostQueue final : public Queue {
 public:
  explicit HostQueue(Op op) : Queue(nullptr, 0), takes_scratch_(takes_scratch(op)) {}
  ~HostQueue() override {
    for (void* block : blocks_) std::free(block);
  }

  void* scratch(int64_t bytes) override {
    void* block = takes_scratch_ ? std::malloc(size_t(bytes)) : nullptr;
    if (!block) return nullptr;
    std::memset(block, 0xa5, size_t(bytes));
    blocks_.push_back(block);
    return block;
  }

 private:
  bool takes_scratch_;
  std::vector<void*> blocks_;
};

template <Op op>
Status run_simulated(Tensors in, Tensors out, const QuantSpec& spec, Executor&) {
  const FloatEnvironment environment;
  HostQueue queue(op);
  return platform.kernels[int(op)](in, out, spec, queue);
}

}  // namespace

const Kernel kernels[kOpCount] = {
#define QUARK_OP(name, ins, outs) run_simulated<Op::name>,
#include "ops.inc"
#undef QUARK_OP
};

}  // namespace quark::simulated
