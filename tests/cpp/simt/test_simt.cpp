// The machine for GPU kernels: results in all orders, and the errors that it must find, in processes of their own.
#include <fenv.h>
#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "../check.h"
#include "simt.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TEST_ASAN
#endif
#if __has_feature(thread_sanitizer)
#define TEST_TSAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define TEST_ASAN
#endif
#if defined(__SANITIZE_THREAD__)
#define TEST_TSAN
#endif

namespace {

using simt::barrier;
using simt::block;
using simt::launch;
using simt::Order;
using simt::shuffle_xor;
using simt::thread;

#if defined(TEST_ASAN)
constexpr bool kHasAsan = true;
#else
constexpr bool kHasAsan = false;
#endif
#if defined(TEST_TSAN)
constexpr bool kHasTsan = true;
#else
constexpr bool kHasTsan = false;
#endif

template <class T>
T* shared_array(int n, simt::Site site = simt::Site::current()) {
  return static_cast<T*>(simt::shared(sizeof(T) * size_t(n), site));
}

/// Calls test() for every warp and order.
template <class Test>
void in_all_orders(const Test& test) {
  for (const int warp : {32, 64}) {
    for (const Order order : {Order::forward, Order::backward, Order::shuffled}) {
      for (const uint64_t seed : {1u, 2u}) {
        if (seed > 1 && order != Order::shuffled) continue;
        const check::Note note([=] {
          return "warp " + std::to_string(warp) + ", order " + std::to_string(int(order)) + ", seed " +
                 std::to_string(seed);
        });
        simt::configure({warp, order, seed});
        test();
      }
    }
  }
  simt::configure({});
}

// ---- who runs -------------------------------------------------------------------------------------------------------

TEST(every_thread_of_every_block_runs_once) {
  in_all_orders([] {
    for (const int threads : {64, 128, 256, 320, 1024}) {
      for (const int64_t blocks : {1, 2, 7}) {
        const check::Note note([=] { return std::to_string(blocks) + " blocks of " + std::to_string(threads); });
        std::vector<int> count(size_t(blocks * threads));
        launch(blocks, threads, [&] { ++count[size_t(block() * threads + thread())]; });
        CHECK_EQ(std::count(count.begin(), count.end(), 1), blocks * threads);
      }
    }
  });
  int odd = 0;
  launch(3, 96, [&] {  // no multiple of the larger warp
    if (block() == 2 && thread() == 95) odd = 1;
    barrier();
  });
  CHECK_EQ(odd, 1);
}

TEST(big_grids) {
  in_all_orders([] {
    const int64_t blocks = kHasTsan ? 300 : 50'000;
    std::vector<uint8_t> count(size_t(blocks) * 64);
    launch(blocks, 64, [&] { ++count[size_t(block() * 64 + thread())]; });
    CHECK_EQ(std::count(count.begin(), count.end(), 1), blocks * 64);
  });
}

/// When each of 10 blocks of 64 threads ran: first all before a barrier, then all after it.
std::vector<int> times(Order order, uint64_t seed) {
  simt::configure({32, order, seed});
  std::vector<int> at(2 * 640);
  std::atomic<int> now{0};
  launch(10, 64, [&] {
    const size_t me = size_t(block() * 64 + thread());
    at[me] = now.fetch_add(1, std::memory_order_relaxed);
    barrier();
    at[640 + me] = now.fetch_add(1, std::memory_order_relaxed);
  });
  simt::configure({});
  return at;
}

TEST(orders) {
  const std::vector<int> forward = times(Order::forward, 0), backward = times(Order::backward, 0);
  for (int b = 0; b < 10; ++b) {
    for (int t = 0; t < 64; ++t) {
      const size_t me = size_t(b * 64 + t);
      CHECK_EQ(forward[me], b * 128 + t);
      CHECK_EQ(forward[640 + me], b * 128 + 64 + t);
      CHECK_EQ(backward[me], (9 - b) * 128 + 63 - t);
      CHECK_EQ(backward[640 + me], (9 - b) * 128 + 64 + 63 - t);
    }
  }
  const std::vector<int> shuffled = times(Order::shuffled, 1);
  CHECK(shuffled == times(Order::shuffled, 1));
  for (const auto& other : {forward, backward, times(Order::shuffled, 2)}) CHECK(shuffled != other);
  for (size_t b = 0; b < 10; ++b) {
    const auto first = shuffled.begin() + int64_t(b * 64), second = first + 640;
    CHECK(*std::max_element(first, first + 64) < *std::min_element(second, second + 64));
  }
}

TEST(threads_that_never_wait_share_a_stack) {
  if (kHasTsan) {
    std::printf("     skipped: with the thread sanitizer each has its own\n");
    return;
  }
  const uint64_t before = simt::switches();
  int sum = 0;
  launch(5, 256, [&] { sum += thread(); });
  CHECK_EQ(sum, 5 * 255 * 128);
  CHECK_EQ(simt::switches() - before, 10u);
}

// ---- what threads share ---------------------------------------------------------------------------------------------

struct Pair {
  float a;
  int16_t b, c;
  bool operator==(const Pair&) const = default;
};

template <class T, class Make>
void test_shuffles(const Make& make) {
  constexpr int kThreads = 192;
  for (int width = 1; width <= 32; width *= 2) {
    for (int mask = 0; mask < width; mask += kHasTsan ? 3 : 1) {
      const check::Note note([=] { return "width " + std::to_string(width) + ", mask " + std::to_string(mask); });
      T got[2 * kThreads];
      launch(2, kThreads, [&] {
        const int me = int(block()) * kThreads + thread();
        got[me] = shuffle_xor(make(me), mask, width);
      });
      for (int i = 0; i < 2 * kThreads; ++i) CHECK(got[i] == make(i ^ mask));
    }
  }
}

TEST(shuffles) {
  in_all_orders([] {
    test_shuffles<int>([](int i) { return -i; });
    test_shuffles<double>([](int i) { return 1.0 / (i + 1); });
    test_shuffles<Pair>([](int i) { return Pair{float(i), int16_t(i), int16_t(-i)}; });
  });
  test_shuffles<uint32_t>([](int i) { return ~uint32_t(i); });
  test_shuffles<float>([](int i) { return float(i) / 3; });
  test_shuffles<int64_t>([](int i) { return i * -0x123456789abl; });
}

TEST(many_shuffles_in_a_row) {
  in_all_orders([] {
    for (int width = 2; width <= 32; width *= 2) {
      int sums[256];
      launch(1, 256, [&] {
        int sum = 0, value = thread();
        for (int k = 0; k < 10; ++k) {
          for (int mask = 1; mask < width; mask *= 2) value += shuffle_xor(value, mask, width);
          sum += value;
          value = thread() + shuffle_xor(k, width / 2, width) + 1;
        }
        sums[thread()] = sum;
      });
      for (int i = 0; i < 256; ++i) {
        const int group = i / width * width * width + width * (width - 1) / 2;
        CHECK_EQ(sums[i], 10 * group + width * 45);
      }
    }
  });
}

TEST(groups_of_a_warp_go_separate_ways) {
  in_all_orders([] {
    int got[128] = {};
    launch(1, 128, [&] {
      const int lane = thread() % 32;
      int value = thread();
      if (lane < 8) {
        for (int k = 0; k < 3 + thread() / 8; ++k) value = shuffle_xor(value, 1, 8);
        value = shuffle_xor(value, 1 + (thread() / 8 & 1), 8);
      } else if (lane < 16) {
        if (lane < 12) return;
        value = shuffle_xor(value, 3, 4);
      } else {
        if (lane >= 24) value = shuffle_xor(value, 7, 8);
        value = shuffle_xor(value, 15, 16);  // the others wait here, where the narrower groups come later
      }
      got[thread()] = value;
    });
    for (int i = 0; i < 128; ++i) {
      const int lane = i % 32;
      const int odd = (3 + i / 8) % 2;
      const int other = i ^ 15;
      if (lane < 8)
        CHECK_EQ(got[i], i ^ (1 + (i / 8 & 1)) ^ odd);
      else if (lane < 16)
        CHECK_EQ(got[i], lane < 12 ? 0 : i ^ 3);
      else
        CHECK_EQ(got[i], other % 32 >= 24 ? other ^ 7 : other);
    }
  });
}

TEST(sums_of_blocks) {
  in_all_orders([] {
    for (const int threads : {64, 256, 1024}) {
      std::vector<int> x(size_t(threads) * 3), sums(3);
      for (size_t i = 0; i < x.size(); ++i) x[i] = int(i * i % 1000);
      launch(3, threads, [&] {
        int* sum = shared_array<int>(threads);
        sum[thread()] = x[size_t(block() * threads + thread())];
        for (int step = threads / 2; step > 0; step /= 2) {
          barrier();
          if (thread() < step) sum[thread()] += sum[thread() + step];
        }
        if (thread() == 0) sums[size_t(block())] = sum[0];
      });
      for (int b = 0; b < 3; ++b) {
        int want = 0;
        for (int i = 0; i < threads; ++i) want += x[size_t(b * threads + i)];
        CHECK_EQ(sums[size_t(b)], want);
      }
    }
  });
}

TEST(sums_of_warps_and_then_of_a_block) {
  in_all_orders([] {
    double sums[4];
    launch(4, 256, [&] {
      double* of_warps = shared_array<double>(8);
      double sum = thread() + double(block()) / 4;
      for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask, 32);
      if (thread() % 32 == 0) of_warps[thread() / 32] = sum;
      barrier();
      if (thread() >= 8) return;
      sum = of_warps[thread()];
      for (int mask = 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask, 8);
      if (thread() == 0) sums[block()] = sum;
    });
    for (int b = 0; b < 4; ++b) CHECK_EQ(sums[b], 255.0 * 128 + 64 * b);
  });
}

TEST(shared_memory_is_the_blocks_and_unwritten) {
  in_all_orders([] {
    std::atomic<int> wrong{0};
    launch(6, 64, [&] {
      auto* bytes = shared_array<uint8_t>(1000);
      auto* words = shared_array<uint64_t>(65);
      if (reinterpret_cast<uintptr_t>(words) % 16 != 0) ++wrong;
      for (int i = thread(); i < 1000; i += 64)
        if (bytes[i] != 0xff) ++wrong;
      if (words[thread()] != ~uint64_t(0) || words[64] != ~uint64_t(0)) ++wrong;
      barrier();
      for (int i = thread(); i < 1000; i += 64) bytes[i] = uint8_t(i);
      words[thread()] = uint64_t(thread());
      barrier();
      for (int i = 0; i < 1000; ++i)
        if (bytes[i] != uint8_t(i)) ++wrong;
      if (words[63 - thread()] != uint64_t(63 - thread())) ++wrong;
    });
    CHECK_EQ(wrong.load(), 0);
  });
  uint8_t last = 0;
  launch(2, 32, [&] {  // all that there is
    auto* bytes = shared_array<uint8_t>(int(simt::kMaxSharedBytes));
    if (block() == 1 && thread() == 31) last = bytes[simt::kMaxSharedBytes - 1];
  });
  CHECK_EQ(last, 0xff);
}

TEST(atomics) {
  in_all_orders([] {
    uint32_t most = 0, small = 4'000'000'000u;
    uint64_t sum = uint64_t(1) << 40;
    launch(7, 192, [&] {
      const uint32_t me = uint32_t(block() * 192 + thread());
      simt::atomic_max(&most, me * 7919 % 1344);
      simt::atomic_max(&small, me);
      simt::atomic_add(&sum, me);
    });
    CHECK_EQ(most, 1343u);
    CHECK_EQ(small, 4'000'000'000u);
    CHECK_EQ(sum, (uint64_t(1) << 40) + 1344 * 1343 / 2);
  });
}

TEST(every_waiting_thread_has_a_stack) {
  bool right[2] = {};
  launch(2, 64, [&] {
    volatile int large[25'000];
    for (int i = 0; i < 25'000; ++i) large[i] = thread() * i;
    barrier();
    bool is_right = true;
    for (int i = 0; i < 25'000; ++i) is_right = is_right && large[i] == thread() * i;
    const int others = shuffle_xor(int(is_right), 1, 2);
    if (thread() == 0) right[block()] = is_right && others;
  });
  CHECK(right[0] && right[1]);
}

// ---- host threads ---------------------------------------------------------------------------------------------------

TEST(host_threads_launch_at_once) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> hosts;
  for (int host = 0; host < 4; ++host) {
    hosts.emplace_back([&, host] {
      for (int k = 0; k < (kHasTsan ? 10 : 300); ++k) {
        int got[3 * 128] = {};
        launch(3, 128, [&] {
          int* all = shared_array<int>(128);
          const int value = host * 1000 + k + thread();
          all[127 - thread()] = shuffle_xor(value, 4, 8);
          barrier();
          got[block() * 128 + thread()] = all[thread()] + int(block());
        });
        for (int i = 0; i < 3 * 128; ++i)
          if (got[i] != host * 1000 + k + ((127 - i % 128) ^ 4) + i / 128) ++wrong;
      }
    });
  }
  for (std::thread& host : hosts) host.join();
  CHECK_EQ(wrong.load(), 0);
}

TEST(kernels_run_in_the_float_environment_of_the_launch) {
  const volatile float one = 1, three = 3;
  for (const int rounding : {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TONEAREST}) {
    fesetround(rounding);
    const float want = one / three;
    float before[64], after[64];
    launch(1, 64, [&] {
      before[thread()] = one / three;
      barrier();
      after[thread()] = one / three;
    });
    CHECK_EQ(fegetround(), rounding);
    fesetround(FE_TONEAREST);
    for (int i = 0; i < 64; ++i) {
      CHECK_EQ(before[i], want);
      CHECK_EQ(after[i], want);
    }
  }
}

// ---- other processes ------------------------------------------------------------------------------------------------

// What this program does instead of its tests when it is run with --child and a name.
struct Child {
  const char* name;
  void (*body)();
};
std::vector<Child>& children() {
  static std::vector<Child> all;
  return all;
}
struct ChildRegistration {
  ChildRegistration(const char* name, void (*body)()) { children().push_back({name, body}); }
};
#define CHILD(name)                                                     \
  void child_##name();                                                  \
  const ChildRegistration registered_child_##name(#name, child_##name); \
  void child_##name()

int run_as_child(std::string_view name) {
  for (const Child& child : children()) {
    if (name != child.name) continue;
    child.body();
    return 0;
  }
  return 1;
}

constexpr int kSanitizerStatus = 66;

struct End {
  int status = -1;
  std::string output;

  bool says(std::string_view text) const { return output.find(text) != output.npos; }
};

/// A process, not only a fork, since TSan looks away in forks of programs with several threads.
End run_child(const std::string& name, const std::string& environment) {
  static const std::string program = std::filesystem::read_symlink("/proc/self/exe").string();
  const std::string status = "exitcode=" + std::to_string(kSanitizerStatus);
  const std::string command = "ASAN_OPTIONS=" + status + " TSAN_OPTIONS=atexit_sleep_ms=0:" + status + " " +
                              environment + " '" + program + "' --child " + name;
  End end;
  std::fflush(nullptr);
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (!pipe) return end;
  char buffer[4096];
  while (const size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) end.output.append(buffer, n);
  const int result = pclose(pipe);
  if (WIFEXITED(result)) end.status = WEXITSTATUS(result);
  return end;
}

/// In all orders, but where a process takes long to start.
const std::vector<std::string> kOrders =
    kHasTsan ? std::vector<std::string>{"forward"} : std::vector<std::string>{"forward", "backward", "shuffled"};

/// The child must end with this error and its place.
void expect_error(const std::string& name, const std::string& what, const std::string& place) {
  for (const std::string& order : kOrders) {
    const End end = run_child(name, "QUARK_SIMT_ORDER=" + order);
    const check::Note note([&] { return name + " " + order + ", which says: " + end.output; });
    CHECK_EQ(end.status, simt::kErrorStatus);
    CHECK(end.output.starts_with("SIMT error: " + what));
    CHECK(end.says(place));
    CHECK(place.empty() || end.says("test_simt.cpp:"));
    CHECK(end.output.ends_with("\n"));
    CHECK_EQ(std::count(end.output.begin(), end.output.end(), '\n'), 1);
  }
}

void expect_error(const std::string& name, const std::string& what) { expect_error(name, what, ""); }

void expect_error_at(const std::string& name, const std::string& what) {
  expect_error(name, what, " (block 0, thread ");
}

// ---- errors ---------------------------------------------------------------------------------------------------------

CHILD(shuffles_at_different_places) {
  launch(1, 64, [] {
    if (thread() % 32 < 16)
      shuffle_xor(1, 1, 32);
    else
      shuffle_xor(1, 1, 32);
  });
}
CHILD(shuffles_with_different_widths) {
  launch(1, 64, [] { shuffle_xor(1, 1, thread() % 2 == 0 ? 32 : 16); });
}
CHILD(shuffles_with_different_masks) {
  launch(1, 64, [] { shuffle_xor(1, thread() % 32 == 9 ? 1 : 2, 32); });
}
TEST(groups_must_shuffle_together) {
  expect_error_at("shuffles_at_different_places", "threads of a group shuffle at different places: thread ");
  expect_error_at("shuffles_with_different_widths", "threads of a group shuffle with different widths: ");
  expect_error_at("shuffles_with_different_masks", "threads of a group shuffle with different masks: ");
}

CHILD(shuffle_after_a_lane_left) {
  launch(1, 64, [] {
    if (thread() == 37) return;
    shuffle_xor(1.0, 1, 8);
  });
}
CHILD(shuffle_with_a_lane_at_a_barrier) {
  launch(1, 64, [] {
    if (thread() == 37) barrier();
    shuffle_xor(1.0f, 1, 8);
  });
}
CHILD(shuffle_with_a_lane_in_a_narrower_one) {
  launch(1, 64, [] {
    if (thread() == 33) return;
    if (thread() < 36)
      shuffle_xor(1, 1, 4);
    else
      shuffle_xor(1, 1, 8);
  });
}
CHILD(shuffle_once_more) {
  launch(1, 64, [] {
    for (int k = 0; k < (thread() < 60 ? 3 : 2); ++k) shuffle_xor(k, 1, 16);
  });
}
TEST(all_of_a_group_must_shuffle) {
  const std::string what = "a shuffle that not all threads of the group come to: thread ";
  expect_error_at("shuffle_after_a_lane_left", what + "37 has left the kernel");
  expect_error_at("shuffle_with_a_lane_at_a_barrier", what + "37 waits at the barrier at ");
  expect_error_at("shuffle_with_a_lane_in_a_narrower_one", what + "33 has left the kernel");
  expect_error_at("shuffle_once_more", what + "60 has left the kernel");
}

CHILD(shuffle_of_width_0) {
  launch(1, 64, [] { shuffle_xor(1, 0, 0); });
}
CHILD(shuffle_of_width_24) {
  launch(1, 64, [] { shuffle_xor(1, 1, 24); });
}
CHILD(shuffle_of_width_64) {
  simt::configure({64});
  launch(1, 64, [] { shuffle_xor(1, 1, 64); });
}
CHILD(shuffle_beyond_the_group) {
  launch(1, 64, [] { shuffle_xor(1, 8, 8); });
}
CHILD(shuffle_with_a_negative_mask) {
  launch(1, 64, [] { shuffle_xor(1, -1, 8); });
}
TEST(shuffles_have_widths_and_masks) {
  expect_error_at("shuffle_of_width_0", "a shuffle among 0 threads; allowed: powers of two up to 32");
  expect_error_at("shuffle_of_width_24", "a shuffle among 24 threads; allowed: powers of two up to 32");
  expect_error_at("shuffle_of_width_64", "a shuffle among 64 threads; allowed: powers of two up to 32");
  expect_error_at("shuffle_beyond_the_group", "a shuffle with mask 8 among 8 threads");
  expect_error_at("shuffle_with_a_negative_mask", "a shuffle with mask -1 among 8 threads");
}

CHILD(barrier_after_a_thread_left) {
  launch(1, 128, [] {
    if (thread() == 70) return;
    barrier();
  });
}
CHILD(barrier_once_more) {
  launch(1, 128, [] {
    for (int k = 0; k < (thread() < 127 ? 3 : 2); ++k) barrier();
  });
}
CHILD(different_barriers) {
  launch(1, 128, [] {
    // clang-format off
    if (thread() < 64) barrier(); else barrier();
    // clang-format on
  });
}
TEST(all_of_a_block_must_come_to_a_barrier) {
  const std::string what = "a barrier that not all threads of the block come to: thread ";
  expect_error_at("barrier_after_a_thread_left", what + "70 has left the kernel");
  expect_error_at("barrier_once_more", what + "127 has left the kernel");
  expect_error_at("different_barriers", "threads of a block wait at different barriers: thread ");
}

CHILD(much_shared_memory) {
  launch(1, 64, [] {
    shared_array<float>(10'000);
    shared_array<float>(2'500);
  });
}
CHILD(shared_memory_of_two_sizes) {
  launch(1, 64, [] { shared_array<char>(thread() < 7 ? 10 : 20); });
}
TEST(shared_memory_is_limited) {
  expect_error_at("much_shared_memory", "50000 bytes of shared memory in a block; allowed: 49152");
  expect_error_at("shared_memory_of_two_sizes", "shared memory of different sizes: ");
}

CHILD(no_blocks) {
  launch(0, 64, [] {});
}
CHILD(no_threads) {
  launch(1, 0, [] {});
}
CHILD(half_a_warp) {
  launch(1, 48, [] {});
}
CHILD(half_a_large_warp) {
  simt::configure({64});
  launch(1, 32, [] {});
}
CHILD(many_threads) {
  launch(1, 1056, [] {});
}
CHILD(warp_of_16) { simt::configure({16}); }
TEST(launches_have_sizes) {
  expect_error("no_blocks", "a launch of 0 blocks");
  expect_error("no_threads", "a block of 0 threads; allowed: multiples of the warp, 32, up to 1024");
  expect_error("half_a_warp", "a block of 48 threads; allowed: multiples of the warp, 32, up to 1024");
  expect_error("half_a_large_warp", "a block of 32 threads; allowed: multiples of the warp, 64, up to 1024");
  expect_error("many_threads", "a block of 1056 threads; allowed: multiples of the warp, 32, up to 1024");
  expect_error("warp_of_16", "a warp of 16 threads; allowed: 32, 64");
}

CHILD(late_in_a_grid) {
  launch(9, 64, [] {
    barrier();
    if (block() == 7 && thread() == 5) shuffle_xor(1, 1, 3);
    barrier();
  });
}
TEST(errors_name_the_place) {
  expect_error("late_in_a_grid", "a shuffle among 3 threads; allowed: powers of two up to 32", " (block 7, thread 5, ");
}

CHILD(print_options) {
  std::atomic<int> now{0};
  int first = -1, second = -1;
  launch(1, 64, [&] {
    const int turn = now.fetch_add(1, std::memory_order_relaxed);
    if (turn == 0) first = thread();
    if (turn == 1) second = thread();
  });
  std::printf("%d, %d\n", first, second);
  std::fflush(stdout);
  launch(1, 96, [] {});
}
TEST(options_from_the_environment) {
  const auto says = [](const char* environment) {
    const End end = run_child("print_options", environment);
    return end.output + (end.status == 0 ? "" : " " + std::to_string(end.status));
  };
  const std::string large = "SIMT error: a block of 96 threads; allowed: multiples of the warp, 64, up to 1024\n 86";
  CHECK_EQ(says(""), "0, 1\n");
  CHECK_EQ(says("QUARK_SIMT_WARP=32 QUARK_SIMT_ORDER=forward QUARK_SIMT_SEED=3"), "0, 1\n");
  CHECK_EQ(says("QUARK_SIMT_WARP=64"), "0, 1\n" + large);
  CHECK_EQ(says("QUARK_SIMT_ORDER=backward"), "63, 62\n");
  const std::string one = says("QUARK_SIMT_ORDER=shuffled QUARK_SIMT_SEED=1");
  CHECK_EQ(one, says("QUARK_SIMT_ORDER=shuffled QUARK_SIMT_SEED=1"));
  CHECK(one != says("QUARK_SIMT_ORDER=shuffled QUARK_SIMT_SEED=18446744073709551615"));
  CHECK_EQ(says("QUARK_SIMT_WARP=16"), "SIMT error: QUARK_SIMT_WARP is '16'; allowed: 32, 64\n 86");
  CHECK_EQ(says("QUARK_SIMT_WARP="), "SIMT error: QUARK_SIMT_WARP is ''; allowed: 32, 64\n 86");
  CHECK_EQ(says("QUARK_SIMT_ORDER=random"),
           "SIMT error: QUARK_SIMT_ORDER is 'random'; allowed: forward, backward, shuffled\n 86");
  for (const std::string seed : {"", "x", "-1", "1x", "18446744073709551616"})
    CHECK_EQ(says(("QUARK_SIMT_SEED=" + seed).c_str()),
             "SIMT error: QUARK_SIMT_SEED is '" + seed + "'; allowed: integers from 0 to 2^64 - 1\n 86");
}

// ---- sanitizers -----------------------------------------------------------------------------------------------------

int results[4 * 64];  // of the kernels below

template <class Kernel>
void launch_blocks(int64_t blocks, const Kernel& kernel) {
  launch(blocks, 64, [&] { results[block() * 64 + thread()] = kernel(thread()); });
}

// Each of these once with the error and once without.

template <bool is_wrong>
void read_others() {
  launch_blocks(2, [](int t) {
    int* all = shared_array<int>(64);
    all[t] = t;
    if (!is_wrong) barrier();
    return all[63 - t];
  });
}
CHILD(race_before_reading) { read_others<true>(); }
CHILD(order_before_reading) { read_others<false>(); }

template <bool is_wrong>
void write_what_others_read() {
  launch_blocks(2, [](int t) {
    int* all = shared_array<int>(64);
    for (int k = 0; k < 3; ++k) {
      all[t] = k;
      barrier();
      results[block() * 64 + t] += all[t ^ 7];
      if (!is_wrong) barrier();
    }
    return 0;
  });
}
CHILD(race_after_reading) { write_what_others_read<true>(); }
CHILD(order_after_reading) { write_what_others_read<false>(); }

/// A shuffle passes values, not what was written before it.
template <bool is_wrong>
void read_after_a_shuffle() {
  launch_blocks(1, [](int t) {
    int* all = shared_array<int>(64);
    all[t] = t;
    int sum = 0;
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(all[t], mask, 32);
    return sum + all[is_wrong ? t ^ 1 : t];
  });
}
CHILD(race_over_a_shuffle) { read_after_a_shuffle<true>(); }
CHILD(order_over_a_shuffle) { read_after_a_shuffle<false>(); }

template <bool is_wrong>
void write_from_threads() {
  int words[64] = {};
  launch_blocks(1, [&](int t) { return words[is_wrong ? t / 2 : t] = 1; });
}
CHILD(race_of_threads) { write_from_threads<true>(); }
CHILD(order_of_threads) { write_from_threads<false>(); }

/// By threads of one number, and barriers of one block say nothing to another.
template <bool is_wrong>
void write_from_blocks() {
  int words[3] = {};
  launch_blocks(3, [&](int t) {
    barrier();
    if (t == 0) words[is_wrong ? block() % 2 : block()] = 1;
    barrier();
    barrier();
    return 0;
  });
}
CHILD(race_of_blocks) { write_from_blocks<true>(); }
CHILD(order_of_blocks) { write_from_blocks<false>(); }

template <bool is_wrong>
void add_from_blocks() {
  uint64_t sum = 0;
  launch_blocks(2, [&](int t) {
    if (t == 63 && is_wrong)
      sum += 1;
    else
      simt::atomic_add(&sum, 1);
    return 0;
  });
}
CHILD(race_with_atomics) { add_from_blocks<true>(); }
CHILD(order_with_atomics) { add_from_blocks<false>(); }

/// The host's own accesses, and those of several launches, are in order.
CHILD(order_of_launches) {
  std::vector<int> words(64, 1);
  for (int k = 0; k < 3; ++k) {
    launch_blocks(1, [&](int t) { return words[size_t(t)] += 1; });
    for (int& w : words) w *= 2;
    launch_blocks(1, [&](int t) { return words[size_t(63 - t)] += 1; });
  }
}

TEST(races_are_reported) {
  if (!kHasTsan) {
    std::printf("     skipped: built without the thread sanitizer\n");
    return;
  }
  for (const Child& child : children()) {
    const std::string name = child.name;
    if (!name.starts_with("race_") && !name.starts_with("order_")) continue;
    for (const std::string order : {"forward", "backward"}) {
      const End end = run_child(name, "QUARK_SIMT_ORDER=" + order);
      const check::Note note([&] { return name + " " + order + ", which says: " + end.output.substr(0, 2000); });
      const bool has_race = name.starts_with("race_");
      CHECK_EQ(end.status, has_race ? kSanitizerStatus : 0);
      CHECK_EQ(end.says("WARNING: ThreadSanitizer: data race"), has_race);
    }
  }
}

CHILD(beyond_shared_memory) {
  launch_blocks(1, [](int t) {
    int* all = shared_array<int>(63);
    int* more = shared_array<int>(64);
    more[t] = 0;
    return all[t] = 1;
  });
}
CHILD(before_shared_memory) {
  launch_blocks(1, [](int t) {
    int* all = shared_array<int>(64);
    barrier();
    return all[t - 1];
  });
}
CHILD(beyond_global_memory) {
  std::vector<int> words(64 * 3 - 1);
  launch_blocks(3, [&](int t) { return words.data()[block() * 64 + t]; });
}
CHILD(beyond_a_local_array) {
  launch_blocks(1, [](int t) {
    volatile int local[16] = {};
    volatile int* volatile any = local;  // so that UBSan doesn't see it first
    barrier();
    return any[t / 3];
  });
}
CHILD(shared_memory_of_another_block) {
  int* kept = nullptr;
  launch_blocks(2, [&](int t) {
    int* all = shared_array<int>(64);
    if (block() == 0 && t == 0) kept = all;
    barrier();
    return block() == 1 ? kept[t] : 0;
  });
}
TEST(wrong_addresses_are_reported) {
  if (!kHasAsan) {
    std::printf("     skipped: built without the address sanitizer\n");
    return;
  }
  const auto expect = [](const std::string& name, const std::string& what) {
    const End end = run_child(name, "");
    const check::Note note([&] { return name + ", which says: " + end.output.substr(0, 2000); });
    CHECK_EQ(end.status, kSanitizerStatus);
    CHECK(end.says("ERROR: AddressSanitizer: " + what));
  };
  expect("beyond_shared_memory", "heap-buffer-overflow");
  expect("before_shared_memory", "heap-buffer-overflow");
  expect("beyond_global_memory", "heap-buffer-overflow");
  expect("beyond_a_local_array", "stack-buffer-overflow");
  expect("shared_memory_of_another_block", "heap-use-after-free");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::string_view(argv[1]) == "--child") return run_as_child(argv[2]);
  for (const char* name : {"QUARK_SIMT_WARP", "QUARK_SIMT_ORDER", "QUARK_SIMT_SEED"}) unsetenv(name);  // not the user's
  return check::run_all(argc, argv);
}
