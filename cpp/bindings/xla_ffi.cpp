// Every operator as an XLA FFI handler, from one template.
#include <nanobind/nanobind.h>

#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

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

constexpr size_t kMostTensors = 8;

ffi::Error handle(Op op, ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                  std::string_view text) {
  QuantSpec spec;
  if (Status status = cached_spec(text, spec); !status.ok()) return error_of(status);
  if (arguments.size() > kMostTensors || results.size() > kMostTensors)
    return ffi::Error::InvalidArgument("too many tensors");
  TensorView in[kMostTensors], out[kMostTensors];
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto buffer = arguments.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    if (Status status = view_of(*buffer, in[i]); !status.ok()) return error_of(status);
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    if (Status status = view_of(**buffer, out[i]); !status.ok()) return error_of(status);
  }
  XlaExecutor executor(pool);
  return error_of(run(op, Tensors(in, arguments.size()), Tensors(out, results.size()), spec, executor));
}

/// Nothing may be thrown into XLA.
template <Op op>
ffi::Error handle_safely(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                         std::string_view text) {
  try {
    return handle(op, pool, arguments, results, text);
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string(kOps[int(op)].name) + ": " + error.what());
  }
}

template <Op op>
XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  static const auto* bound = ffi::Ffi::Bind()
                                 .Ctx<ffi::ThreadPool>()
                                 .RemainingArgs()
                                 .RemainingRets()
                                 .Attr<std::string_view>("spec")
                                 .To(handle_safely<op>)
                                 .release();
  return bound->Call(frame);
}

}  // namespace

nb::dict xla_handlers() {
  nb::dict handlers;
#define QUARK_OP(name, ins, outs)    \
  handlers["quark_kernels." #name] = \
      nb::capsule(reinterpret_cast<void*>(&handler<Op::name>), "xla._CUSTOM_CALL_TARGET");
#include "../ops.inc"
#undef QUARK_OP
  return handlers;
}

std::tuple<int, int> xla_ffi_api() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

}  // namespace quark
