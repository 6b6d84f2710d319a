// Every operator as an XLA FFI handler, from one template.
#include "xla_ffi.h"

#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>

#include "../gpu/gpu.h"
#include "../ops.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace quark {
namespace {

/// XLA's own threads. The caller takes chunks too and never waits for a task that hasn't started, so a busy or
/// one-thread pool can't deadlock it.
class XlaExecutor final : public Executor {
 public:
  explicit XlaExecutor(ffi::ThreadPool pool) : pool_(pool) {}

  void run(int64_t items, int64_t weight, Chunk chunk, void* context) override {
    constexpr int64_t kElementsPerThread = 131072;
    const int threads = threads_for(items * weight, kElementsPerThread, int(pool_.num_threads()));
    if (threads == 1) return SerialExecutor().run(items, weight, chunk, context);
    // Shared: a task may start after everything is done, and must still find the (empty) queue.
    auto work = std::make_shared<Work>(items, threads, chunk, context);
    for (int i = 1; i < threads; ++i) pool_.Schedule([work] { work->run(); });
    work->run();
    std::unique_lock lock(work->mutex);
    work->all_done.wait(lock, [&] { return work->queue.done(); });
  }

 private:
  struct Work {
    Work(int64_t items, int threads, Chunk chunk, void* context) : queue(items, threads, chunk, context) {}
    void run() {
      if (!queue.work()) return;
      const std::lock_guard lock(mutex);
      all_done.notify_all();
    }
    ChunkQueue queue;
    std::mutex mutex;
    std::condition_variable all_done;
  };

  ffi::ThreadPool pool_;
};

bool dtype_of(ffi::DataType t, DType& dtype) {
  switch (t) {
#define QUARK_DTYPE(name, bytes, dlpack, xla) \
  case ffi::xla: return dtype = DType::name, true;
    QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
    default: return false;
  }
}

ffi::Error error_of(const Status& status) {
  switch (status.kind()) {
    case ErrorKind::none: return ffi::Error::Success();
    case ErrorKind::memory: return ffi::Error(ffi::ErrorCode::kResourceExhausted, status.message());
    case ErrorKind::unsupported: return ffi::Error(ffi::ErrorCode::kUnimplemented, status.message());
    case ErrorKind::device: return ffi::Error(ffi::ErrorCode::kInternal, status.message());
    default: return ffi::Error::InvalidArgument(status.message());
  }
}

Status view_of(const ffi::AnyBuffer& buffer, TensorView& view) {
  if (!dtype_of(buffer.element_type(), view.dtype)) return type_error("a tensor has a dtype without kernels");
  const auto shape = buffer.dimensions();
  if (shape.size() > size_t(kMaxRank))
    return value_error("a tensor has more than " + std::to_string(kMaxRank) + " dimensions");
  view.rank = int(shape.size());
  view.data = buffer.untyped_data();
  int64_t step = 1;
  for (int d = view.rank - 1; d >= 0; --d) {
    view.shape[d] = shape[size_t(d)];
    view.strides[d] = step;
    step *= view.shape[d];
  }
  return {};
}

/// What a call is given.
struct Arguments {
  static constexpr size_t kMost = 8;
  QuantSpec spec;
  TensorView in[kMost], out[kMost];
  size_t ins = 0, outs = 0;

  ffi::Error read(ffi::RemainingArgs arguments, ffi::RemainingRets results, std::string_view text, Device device) {
    if (const Status status = cached_spec(text, spec); !status.ok()) return error_of(status);
    if (arguments.size() > kMost || results.size() > kMost) return ffi::Error::InvalidArgument("too many tensors");
    for (; ins < arguments.size(); ++ins) {
      const auto buffer = arguments.get<ffi::AnyBuffer>(ins);
      if (buffer.has_error()) return buffer.error();
      if (const Status status = view_of(*buffer, in[ins]); !status.ok()) return error_of(status);
      in[ins].device = device;
    }
    for (; outs < results.size(); ++outs) {
      auto buffer = results.get<ffi::AnyBuffer>(outs);
      if (buffer.has_error()) return buffer.error();
      if (const Status status = view_of(**buffer, out[outs]); !status.ok()) return error_of(status);
      out[outs].device = device;
    }
    return ffi::Error::Success();
  }
};

/// Reads the arguments and runs the operator on a CPU's Executor or a GPU's Queue. Nothing may be thrown into XLA.
template <class Where>
ffi::Error handle(Op op, ffi::RemainingArgs arguments, ffi::RemainingRets results, std::string_view text, Device device,
                  Where&& where) {
  try {
    Arguments given;
    if (ffi::Error error = given.read(arguments, results, text, device); error.failure()) return error;
    return error_of(run(op, Tensors(given.in, given.ins), Tensors(given.out, given.outs), given.spec, where));
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(kOps[int(op)].name) + ": " + error.what());
  }
}

template <Op op>
ffi::Error handle_on_cpu(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                         std::string_view text) {
  return handle(op, arguments, results, text, Device::cpu, XlaExecutor(pool));
}

template <Op op>
XLA_FFI_Error* cpu_handler(XLA_FFI_CallFrame* frame) {
  static const auto* bound = ffi::Ffi::Bind()
                                 .Ctx<ffi::ThreadPool>()
                                 .RemainingArgs()
                                 .RemainingRets()
                                 .Attr<std::string_view>("spec")
                                 .To(handle_on_cpu<op>)
                                 .release();
  return bound->Call(frame);
}

/// XLA's stream, on the device that XLA has made the current one, and memory that XLA frees after the call.
class XlaQueue final : public Queue {
 public:
  XlaQueue(void* stream, ffi::ScratchAllocator* allocator) : Queue(stream, -1), allocator_(allocator) {}

  void* scratch(int64_t bytes) override {
    return allocator_ ? allocator_->Allocate(size_t(bytes), 16).value_or(nullptr) : nullptr;
  }

 private:
  ffi::ScratchAllocator* allocator_;
};

template <Op op, Device device>
ffi::Error handle_with_scratch(void* stream, ffi::ScratchAllocator allocator, ffi::RemainingArgs arguments,
                               ffi::RemainingRets results, std::string_view text) {
  return handle(op, arguments, results, text, device, XlaQueue(stream, &allocator));
}
template <Op op, Device device>
ffi::Error handle_on_gpu(void* stream, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                         std::string_view text) {
  return handle(op, arguments, results, text, device, XlaQueue(stream, nullptr));
}

template <Op op, Device device>
XLA_FFI_Error* gpu_handler(XLA_FFI_CallFrame* frame) {
  if constexpr (takes_scratch(op)) {
    static const auto* bound = ffi::Ffi::Bind()
                                   .Ctx<ffi::PlatformStream<void*>>()
                                   .Ctx<ffi::ScratchAllocator>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attr<std::string_view>("spec")
                                   .To(handle_with_scratch<op, device>)
                                   .release();
    return bound->Call(frame);
  } else {
    static const auto* bound = ffi::Ffi::Bind()
                                   .Ctx<ffi::PlatformStream<void*>>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attr<std::string_view>("spec")
                                   .To(handle_on_gpu<op, device>, {ffi::Traits::kCmdBufferCompatible})
                                   .release();
    return bound->Call(frame);
  }
}

template <Op op>
XLA_FFI_Handler* handler_for(std::string_view platform) {
  if (platform == "cpu") return &cpu_handler<op>;
  for (const GpuPlatform* gpu : gpu_platforms()) {
    if (platform == "CUDA" && gpu->device == Device::cuda) return &gpu_handler<op, Device::cuda>;
    if (platform == "ROCM" && gpu->device == Device::hip) return &gpu_handler<op, Device::hip>;
  }
  return nullptr;
}

}  // namespace

nb::dict xla_handlers(std::string_view platform) {
  nb::dict handlers;
#define QUARK_OP(name, ins, outs)                                 \
  if (XLA_FFI_Handler* handler = handler_for<Op::name>(platform)) \
    handlers["quark_kernels." #name] = nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
#include "../ops.inc"
#undef QUARK_OP
  return handlers;
}

std::tuple<int, int> xla_ffi_api() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

}  // namespace quark
