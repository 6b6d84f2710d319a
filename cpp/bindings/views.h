// Python objects as TensorViews, without a copy: torch tensors through the DLPack C exchange API, NumPy arrays (with
// ml_dtypes' dtypes, which have no DLPack form) through __array_interface__.
#pragma once
#include <nanobind/nanobind.h>

#include <vector>

#include "../gpu/gpu.h"

struct DLManagedTensorVersioned;
struct DLPackExchangeAPI;

namespace quark {

/// The view of a tensor. Raises TypeError for anything that isn't one, and for dtypes the core doesn't have.
TensorView view_of(nanobind::handle object, const char* role, size_t index);

/// The current stream of a GPU tensor's framework, and memory from its allocator: freed memory is given out again to
/// later work on the same stream, so nothing has to wait.
class FrameworkQueue final : public Queue {
 public:
  FrameworkQueue(nanobind::handle tensor, const TensorView& view);
  ~FrameworkQueue() override;

  void* scratch(int64_t bytes) override;
  void release() override;

 private:
  FrameworkQueue(const DLPackExchangeAPI* api, const TensorView& view);

  const DLPackExchangeAPI* api_;
  Device device_;
  std::vector<DLManagedTensorVersioned*> blocks_;
};

}  // namespace quark
