#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <mutex>

namespace quark {

// ---- float environment --------------------------------------------------------------------------------------------

#if defined(__x86_64__)
namespace {
constexpr unsigned kDefault = 0x1f80;  // all exceptions masked, nearest even, no flushing to zero
}
FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(kDefault); }
FloatEnvironment::~FloatEnvironment() { _mm_setcsr(unsigned(saved_)); }
#elif defined(__aarch64__)
FloatEnvironment::FloatEnvironment() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));  // the default: no traps, nearest even, no flushing to zero
}
FloatEnvironment::~FloatEnvironment() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
#error "quark-kernels: no FloatEnvironment for this processor (x86-64 and aarch64 have one)"
#endif

// ---- chunks -------------------------------------------------------------------------------------------------------

int threads_for(int64_t elements, int64_t elements_per_thread, int available) {
  return int(std::clamp<int64_t>(elements / elements_per_thread, 1, std::max(available, 1)));
}

ChunkQueue::ChunkQueue(int64_t items, int threads, Executor::Chunk chunk, void* context)
    : chunk_(chunk),
      context_(context),
      items_(items),
      size_(std::max<int64_t>(1, items / (int64_t(threads) * 4))),
      count_((items + size_ - 1) / size_),
      left_(count_) {
  std::atomic_ref(next_).store(0, std::memory_order_release);
}

ChunkQueue::~ChunkQueue() { (void)std::atomic_ref(next_).load(std::memory_order_acquire); }

bool ChunkQueue::work() {
  bool finished = false;
  (void)std::atomic_ref(next_).load(std::memory_order_acquire);  // and with it what the maker of the queue wrote
  const int64_t count = count_;
  for (;;) {
    const int64_t i = std::atomic_ref(next_).fetch_add(1, std::memory_order_acq_rel);
    if (i >= count) return finished;  // without another look at the queue, which may be gone
    {
      const FloatEnvironment environment;
      chunk_(context_, i * size_, std::min(items_, (i + 1) * size_));
    }
    finished = std::atomic_ref(left_).fetch_sub(1, std::memory_order_acq_rel) == 1;
  }
}

bool ChunkQueue::done() const {
  return std::atomic_ref(const_cast<int64_t&>(left_)).load(std::memory_order_acquire) == 0;
}

void SerialExecutor::run(int64_t items, int64_t /*weight*/, Chunk chunk, void* context) {
  if (items == 0) return;
  const FloatEnvironment environment;
  chunk(context, 0, items);
}

// ---- OpenMP -------------------------------------------------------------------------------------------------------

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// A forked child has none of libgomp's threads, and libgomp waits for them. The host may have started them before our
// first use, so forks are watched from the moment this library is loaded.
std::atomic<bool> is_forked_child{false};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

GompParallel find_gomp() {
  void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (!found) {
    if (void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_LOCAL)) found = dlsym(library, "GOMP_parallel");
  }
  return reinterpret_cast<GompParallel>(found);
}

GompParallel gomp() {
  static const GompParallel parallel = find_gomp();
  return parallel;
}

constexpr int64_t kElementsPerThread =
    32768;  // below about 64k elements waking a second thread costs more than it saves

}  // namespace

void OpenMPExecutor::run(int64_t items, int64_t weight, Chunk chunk, void* context) {
  const int threads = threads_for(items * weight, kElementsPerThread, threads_);
  if (threads == 1 || is_forked_child || !gomp()) return SerialExecutor().run(items, weight, chunk, context);
  ChunkQueue queue(items, threads, chunk, context);
  gomp()([](void* q) { static_cast<ChunkQueue*>(q)->work(); }, &queue, unsigned(threads), 0);
}

}  // namespace quark
