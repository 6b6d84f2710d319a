// All threading is here: who runs the chunks of an operation, and in which float environment.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace quark {

/// Round to nearest even, subnormals honoured, no traps, for as long as this object lives; then as it was. The
/// environment is the host's, not ours: XLA runs its custom calls with subnormals flushed, and torch can be told to.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  uint64_t saved_;
};

/// Runs independent items of work on somebody's threads.
class Executor {
 public:
  using Chunk = void (*)(void* context, int64_t begin, int64_t end);

  virtual ~Executor() = default;

  /// Calls chunk(context, begin, end) over disjoint ranges that together are [0, items), each in a FloatEnvironment,
  /// and returns when all are done. An item is worth about `weight` elements, so small work stays on this thread.
  virtual void run(int64_t items, int64_t weight, Chunk chunk, void* context) = 0;
};

/// The calling thread.
class SerialExecutor final : public Executor {
 public:
  void run(int64_t items, int64_t weight, Chunk chunk, void* context) override;
};

/// The OpenMP threads that the process already has (torch's): libgomp isn't linked, it is looked up at first use.
/// Serial where there is none, and in a forked child, where libgomp hangs.
class OpenMPExecutor final : public Executor {
 public:
  explicit OpenMPExecutor(int threads) : threads_(threads) {}
  void run(int64_t items, int64_t weight, Chunk chunk, void* context) override;

 private:
  int threads_;
};

/// Chunks of an operation handed out one by one to however many threads ask. Its own memory orders are enough for what
/// threads see of each other's work: nothing need be known of those that the host starts them and waits for them by.
class ChunkQueue {
 public:
  /// About four chunks a thread, so that a slow thread doesn't keep the others waiting.
  ChunkQueue(int64_t items, int threads, Executor::Chunk chunk, void* context);
  ~ChunkQueue();
  ChunkQueue(const ChunkQueue&) = delete;
  ChunkQueue& operator=(const ChunkQueue&) = delete;

  /// Runs chunks until none is left. True for the caller that finished the last one.
  bool work();
  bool done() const;

 private:
  Executor::Chunk chunk_;
  void* context_;
  int64_t items_, size_, count_;
  int64_t next_ = 0, left_;
};

/// How many threads are worth waking for that many elements.
int threads_for(int64_t elements, int64_t elements_per_thread, int available);

}  // namespace quark
