#include "views.h"

#include <dlpack/dlpack.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace quark {
namespace {

[[noreturn]] void refuse(const char* role, size_t index, const std::string& why) {
  throw nb::type_error((std::string(role) + " " + std::to_string(index) + " " + why).c_str());
}

std::string kind_of(nb::handle object) { return nb::cast<std::string>(nb::str(object.type().attr("__name__"))); }

/// The exchange API of an object's type, or nullptr. Types are few; each is asked once and kept alive.
const DLPackExchangeAPI* exchange_api(nb::handle object) {
  struct Known {
    PyObject* type;
    const DLPackExchangeAPI* api;
  };
  static std::mutex mutex;
  static std::vector<Known> known;
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  {
    const std::lock_guard lock(mutex);
    for (const Known& k : known)
      if (k.type == type) return k.api;
  }
  const DLPackExchangeAPI* api = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__")) {
    api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    if (api && api->header.version.major != DLPACK_MAJOR_VERSION) api = nullptr;
  }
  PyErr_Clear();
  const std::lock_guard lock(mutex);
  constexpr size_t kMost = 32;  // a program that makes types forever isn't kept from freeing them
  if (known.size() < kMost) {
    Py_INCREF(type);
    known.push_back({type, api});
  }
  return api;
}

bool dtype_of(DLDataType t, DType& dtype) {
  if (t.lanes != 1) return false;
#define QUARK_DTYPE(name, bytes, dlpack, xla) \
  if (t.code == dlpack && t.bits == 8 * bytes) return dtype = DType::name, true;
  QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
  return false;
}

bool device_of(DLDeviceType type, Device& device) {
  switch (type) {
    case kDLCPU:
    case kDLCUDAHost:
    case kDLROCMHost: return device = Device::cpu, true;
    case kDLCUDA:
    case kDLCUDAManaged: return device = Device::cuda, true;
    case kDLROCM: return device = Device::hip, true;
    default: return false;
  }
}

bool dtype_of(std::string_view numpy_name, DType& dtype) {
#define QUARK_DTYPE(name, bytes, dlpack, xla) \
  if (numpy_name == #name) return dtype = DType::name, true;
  QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
  return false;
}

void set_rank(TensorView& view, size_t rank, const char* role, size_t index) {
  if (rank > size_t(kMaxRank))
    throw nb::value_error((std::string(role) + " " + std::to_string(index) + " has " + std::to_string(rank) +
                           " dimensions; at most " + std::to_string(kMaxRank) + " are supported")
                              .c_str());
  view.rank = int(rank);
}

void compact_strides(TensorView& view) {
  int64_t step = 1;
  for (int d = view.rank - 1; d >= 0; --d) {
    view.strides[d] = step;
    step *= view.shape[d];
  }
}

TensorView from_dlpack(const DLPackExchangeAPI& api, nb::handle object, const char* role, size_t index) {
  DLTensor t;
  if (!api.dltensor_from_py_object_no_sync || api.dltensor_from_py_object_no_sync(object.ptr(), &t) != 0) {
    if (PyErr_Occurred()) throw nb::python_error();
    refuse(role, index, "has no DLPack view");
  }
  TensorView view;
  if (!dtype_of(t.dtype, view.dtype))
    refuse(role, index, "has dtype " + nb::cast<std::string>(nb::str(object.attr("dtype"))) + ", which has no kernel");
  if (!device_of(t.device.device_type, view.device))
    refuse(role, index, "is on a kind of device that has no kernels; allowed: CPU, CUDA, ROCm");
  if (view.device != Device::cpu) view.device_number = t.device.device_id;
  set_rank(view, size_t(t.ndim), role, index);
  std::copy_n(t.shape, t.ndim, view.shape);
  if (t.strides) {
    std::copy_n(t.strides, t.ndim, view.strides);
  } else {
    compact_strides(view);
  }
  view.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  return view;
}

TensorView from_numpy(nb::handle object, const char* role, size_t index) {
  const auto interface = nb::cast<nb::dict>(object.attr("__array_interface__"));
  TensorView view;
  const auto name = nb::cast<std::string>(object.attr("dtype").attr("name"));
  if (!dtype_of(name, view.dtype)) refuse(role, index, "has dtype " + name + ", which has no kernel");
  if (nb::cast<std::string>(interface["typestr"]).starts_with('>')) refuse(role, index, "is big-endian");
  const auto data = nb::cast<nb::tuple>(interface["data"]);
  view.data = reinterpret_cast<void*>(nb::cast<uintptr_t>(data[0]));  // NOLINT(performance-no-int-to-ptr)
  if (std::string_view(role) == "output" && nb::cast<bool>(data[1])) {
    throw nb::value_error(("output " + std::to_string(index) + " is read-only").c_str());
  }
  const auto shape = nb::cast<nb::tuple>(interface["shape"]);
  set_rank(view, shape.size(), role, index);
  for (size_t d = 0; d < shape.size(); ++d) view.shape[d] = nb::cast<int64_t>(shape[d]);
  const nb::object strides = interface["strides"];
  if (strides.is_none()) {
    compact_strides(view);
    return view;
  }
  const int64_t bytes = bytes_of(view.dtype);
  for (size_t d = 0; d < shape.size(); ++d) {
    const auto step = nb::cast<int64_t>(strides[d]);
    if (step % bytes != 0 && view.shape[d] > 1) refuse(role, index, "has strides that aren't whole elements");
    view.strides[d] = step / bytes;
  }
  return view;
}

}  // namespace

TensorView view_of(nb::handle object, const char* role, size_t index) {
  if (const DLPackExchangeAPI* api = exchange_api(object)) return from_dlpack(*api, object, role, index);
  if (nb::hasattr(object, "__array_interface__")) return from_numpy(object, role, index);
  refuse(role, index, "is a " + kind_of(object) + "; allowed: torch tensors and NumPy arrays");
}

// ---- a tensor's framework as a queue --------------------------------------------------------------------------------

namespace {

DLDeviceType type_of(Device device) { return device == Device::hip ? kDLROCM : kDLCUDA; }

/// The stream that the framework takes to be current on the view's device.
void* stream_of(const DLPackExchangeAPI* api, const TensorView& view) {
  void* stream = nullptr;
  if (!api || !api->current_work_stream ||
      api->current_work_stream(type_of(view.device), view.device_number, &stream) != 0) {
    if (PyErr_Occurred()) throw nb::python_error();
    throw nb::type_error("the tensors' framework doesn't say what its current stream is");
  }
  return stream;
}

}  // namespace

FrameworkQueue::FrameworkQueue(nb::handle tensor, const TensorView& view)
    : FrameworkQueue(exchange_api(tensor), view) {}

FrameworkQueue::FrameworkQueue(const DLPackExchangeAPI* api, const TensorView& view)
    : Queue(stream_of(api, view), view.device_number), api_(api), device_(view.device) {}

FrameworkQueue::~FrameworkQueue() { release(); }

void FrameworkQueue::release() {
  for (DLManagedTensorVersioned* block : blocks_)
    if (block->deleter) block->deleter(block);
  blocks_.clear();
}

void* FrameworkQueue::scratch(int64_t bytes) {
  if (!api_->managed_tensor_allocator) return nullptr;
  DLTensor wanted{};
  wanted.device = {type_of(device_), device()};
  wanted.ndim = 1;
  wanted.dtype = {kDLUInt, 8, 1};
  wanted.shape = &bytes;
  DLManagedTensorVersioned* block = nullptr;
  const auto keep = [](void* why, const char*, const char* message) { *static_cast<std::string*>(why) = message; };
  if (api_->managed_tensor_allocator(&wanted, &block, &why_, keep) != 0 || !block) return nullptr;
  blocks_.push_back(block);
  return static_cast<char*>(block->dl_tensor.data) + block->dl_tensor.byte_offset;
}

}  // namespace quark
