// Executors: every item once, in a plain float environment, from many threads and after a fork.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>

#include "arrays.h"
#include "check.h"
#include "hostile.h"
#include "ops.h"
#include "parallel.h"

namespace {

using arrays::Array;
using quark::ChunkQueue;
using quark::DType;
using quark::Executor;
using quark::OpenMPExecutor;
using quark::SerialExecutor;

bool has_gomp() {
  static const bool found = dlopen("libgomp.so.1", RTLD_NOW | RTLD_LOCAL) != nullptr;
  return found;
}

std::vector<int64_t> many_lengths() {
  std::vector<int64_t> all;
  for (int64_t n = 0; n <= 130; ++n) all.push_back(n);
  for (int64_t n : {255, 256, 257, 1000, 1023, 1024, 4096, 65535, 65536, 65537, 99991}) all.push_back(n);
  return all;
}

/// Counts how often each item was run, and by whom.
struct Coverage {
  std::vector<std::atomic<int>> counts;
  std::atomic<bool> bad_range{false}, bad_environment{false};
  std::mutex mutex;
  std::set<std::thread::id> threads;

  explicit Coverage(int64_t items) : counts(size_t(items)) {}

  static void chunk(void* context, int64_t begin, int64_t end) {
    auto& self = *static_cast<Coverage*>(context);
    if (begin < 0 || begin >= end || end > int64_t(self.counts.size())) self.bad_range = true;
    if (!hostile::is_plain()) self.bad_environment = true;
    if (self.bad_range) return;
    for (int64_t i = begin; i < end; ++i) ++self.counts[size_t(i)];
    const std::lock_guard lock(self.mutex);
    self.threads.insert(std::this_thread::get_id());
  }

  void check() {
    CHECK(!bad_range);
    CHECK(!bad_environment);
    for (const auto& count : counts) CHECK_EQ(count.load(), 1);
  }
};

TEST(serial_executor_runs_every_item_once) {
  for (const int64_t n : many_lengths()) {
    const check::Note note([=] { return std::to_string(n) + " items"; });
    Coverage coverage(n);
    SerialExecutor().run(n, 1, Coverage::chunk, &coverage);
    coverage.check();
    CHECK_EQ(coverage.threads.size(), n > 0 ? 1u : 0u);
    CHECK(n == 0 || coverage.threads.contains(std::this_thread::get_id()));
  }
}

TEST(openmp_executor_runs_every_item_once) {
  for (const int threads : {0, 1, 2, 3, 8}) {
    for (const int64_t weight : {0, 1, 1000, 100'000}) {
      for (const int64_t n : many_lengths()) {
        const check::Note note([=] {
          return std::to_string(n) + " items of " + std::to_string(weight) + ", " + std::to_string(threads) +
                 " threads";
        });
        Coverage coverage(n);
        OpenMPExecutor(threads).run(n, weight, Coverage::chunk, &coverage);
        coverage.check();
      }
    }
  }
}

TEST(openmp_executor_has_threads) {
  if (!has_gomp()) {
    std::printf("     skipped: no libgomp.so.1 here, so OpenMPExecutor is serial\n");
    return;
  }
  // A chunk waits for another thread's, so that one thread can't take them all.
  struct Meeting {
    std::atomic<int> here{0};
    std::atomic<bool> met{false};
  } meeting;
  OpenMPExecutor(2).run(
      100, 100'000,
      [](void* context, int64_t, int64_t) {
        auto& m = *static_cast<Meeting*>(context);
        ++m.here;
        for (int i = 0; i < 5000 && !m.met; ++i) {
          if (m.here > 1) m.met = true;
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        --m.here;
      },
      &meeting);
  CHECK(meeting.met);
}

TEST(small_work_stays_on_this_thread) {
  Coverage coverage(60);
  OpenMPExecutor(8).run(60, 1000, Coverage::chunk, &coverage);
  coverage.check();
  CHECK_EQ(coverage.threads.size(), 1u);
  CHECK(coverage.threads.contains(std::this_thread::get_id()));
}

TEST(threads_for) {
  CHECK_EQ(quark::threads_for(0, 100, 8), 1);
  CHECK_EQ(quark::threads_for(199, 100, 8), 1);
  CHECK_EQ(quark::threads_for(200, 100, 8), 2);
  CHECK_EQ(quark::threads_for(1'000'000'000'000, 100, 8), 8);
  CHECK_EQ(quark::threads_for(1'000'000'000'000, 100, 0), 1);
  CHECK_EQ(quark::threads_for(1'000'000'000'000, 100, -1), 1);
}

TEST(chunk_queue_hands_out_every_item_once) {
  for (const int workers : {1, 2, 3, 7}) {
    for (const int64_t n : many_lengths()) {
      const check::Note note([=] { return std::to_string(n) + " items, " + std::to_string(workers) + " workers"; });
      Coverage coverage(n);
      ChunkQueue queue(n, workers, Coverage::chunk, &coverage);
      CHECK_EQ(queue.done(), n == 0);
      std::atomic<int> last{0};
      std::vector<std::thread> threads;
      for (int i = 1; i < workers; ++i) threads.emplace_back([&] { last += queue.work(); });
      last += queue.work();
      for (std::thread& t : threads) t.join();
      CHECK(queue.done());
      CHECK_EQ(last.load(), n > 0 ? 1 : 0);  // one caller, whoever it is, finished the last chunk
      coverage.check();
      CHECK(!queue.work());
    }
  }
}

TEST(chunk_queue_makes_more_chunks_than_threads) {
  std::atomic<int> chunks{0};
  ChunkQueue queue(
      1000, 5, [](void* context, int64_t, int64_t) { ++*static_cast<std::atomic<int>*>(context); }, &chunks);
  queue.work();
  CHECK(chunks >= 20);
  CHECK(chunks <= 40);
}

TEST(chunks_run_in_a_plain_environment_on_every_thread) {
  std::atomic<int> restored{0};
  const auto hostile_run = [&](const auto& run) {
    const hostile::Environment environment;
    const uint64_t before = hostile::control();
    run();
    restored += hostile::control() == before;
  };
  Coverage queued(1000), serial(10), openmp(1000);
  ChunkQueue queue(1000, 4, Coverage::chunk, &queued);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back([&] { hostile_run([&] { queue.work(); }); });
  for (std::thread& t : threads) t.join();
  hostile_run([&] { SerialExecutor().run(10, 1, Coverage::chunk, &serial); });
  hostile_run([&] { OpenMPExecutor(4).run(1000, 1000, Coverage::chunk, &openmp); });
  CHECK_EQ(restored.load(), 6);
  queued.check();
  serial.check();
  openmp.check();
}

/// quantize_dynamic of many elements, as bytes.
class Work {
 public:
  explicit Work(uint64_t seed) : random_(seed), x_(random_, DType::float32, {300, 1000}) {
    for (int64_t i = 0; i < x_.elements(); ++i) x_.put(i, float(random_.between(-1000, 1000)) / 7);
    CHECK(quark::parse_spec("int4 block=1,32 asymmetric packed", spec_).ok());
  }

  std::vector<unsigned char> run(Executor& executor) {
    check::Random random(1);  // the same memory around the results each time
    std::vector<Array> out = {Array(random, DType::uint8, {300, 500}), Array(random, DType::float32, {300, 32}),
                              Array(random, DType::int32, {300, 32})};
    const quark::TensorView in[] = {x_.view()};
    const auto outputs = arrays::views(out);
    CHECK(quark::run(quark::Op::quantize_dynamic, in, outputs, spec_, executor).ok());
    std::vector<unsigned char> bytes;
    for (const Array& a : out) bytes.insert(bytes.end(), a.bytes().begin(), a.bytes().end());
    return bytes;
  }

 private:
  check::Random random_;
  Array x_;
  quark::QuantSpec spec_;
};

TEST(many_threads_may_call_at_once) {
  Work shared(1);
  SerialExecutor serial;
  const auto want = shared.run(serial);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      SerialExecutor mine;
      OpenMPExecutor openmp(1 + i % 3);
      for (int k = 0; k < 6; ++k) {
        quark::QuantSpec spec;
        if (!quark::cached_spec("int8 block=" + std::to_string(k), spec).ok() || spec.block[0] != k) ++wrong;
        if (shared.run(i % 2 ? static_cast<Executor&>(mine) : openmp) != want) ++wrong;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK_EQ(wrong.load(), 0);
}

/// After openmp has had threads, a child has none of them and must not wait for them.
TEST(a_forked_child_runs_serially) {
  Work work(2);
  OpenMPExecutor openmp(4);
  const auto want = work.run(openmp);
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // rather than hang
    int status = work.run(openmp) == want ? 0 : 1;
    Coverage coverage(1000);
    openmp.run(1000, 100'000, Coverage::chunk, &coverage);
    if (coverage.threads.size() != 1 || !coverage.threads.contains(std::this_thread::get_id())) status = 2;
    for (const auto& count : coverage.counts)
      if (count != 1) status = 3;
    quark::QuantSpec spec;
    if (!quark::cached_spec("int4 block=1,32 asymmetric packed", spec).ok()) status = 5;
    // And a child of the child.
    const pid_t grandchild = fork();
    if (grandchild == 0) _exit(work.run(openmp) == want ? 0 : 1);
    int result = 0;
    if (waitpid(grandchild, &result, 0) != grandchild || result != 0) status = 4;
    _exit(status);
  }
  CHECK(child > 0);
  int result = -1;
  CHECK_EQ(waitpid(child, &result, 0), child);
  CHECK(WIFEXITED(result));
  CHECK_EQ(WEXITSTATUS(result), 0);
  CHECK(work.run(openmp) == want);  // the parent still has its threads
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
