// A test framework of one page: TEST(name) { CHECK(...); CHECK_EQ(...); } and `int main` calls check::run_all.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace check {

inline constexpr int64_t kMostPrinted = 20;  // of failures: a broken kernel would print millions

inline std::atomic<int64_t> failures{0};

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

/// What is being tested, printed with every failure for as long as the object lives.
class Note {
 public:
  explicit Note(std::function<std::string()> text) { stack().push_back(std::move(text)); }
  explicit Note(const char* text) : Note([text] { return std::string(text); }) {}
  ~Note() { stack().pop_back(); }
  Note(const Note&) = delete;
  Note& operator=(const Note&) = delete;

  static std::vector<std::function<std::string()>>& stack() {
    thread_local std::vector<std::function<std::string()>> notes;
    return notes;
  }
};

template <class T>
std::string text_of(const T& value) {
  char buffer[64];
  if constexpr (std::is_same_v<T, bool>) {
    return value ? "true" : "false";
  } else if constexpr (std::is_same_v<T, float>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    std::snprintf(buffer, sizeof buffer, "%a (%.9g, 0x%08x)", double(value), double(value), bits);
    return buffer;
  } else if constexpr (std::is_floating_point_v<T>) {
    std::snprintf(buffer, sizeof buffer, "%a (%.17g)", double(value), double(value));
    return buffer;
  } else if constexpr (std::is_enum_v<T>) {
    return std::to_string(static_cast<long long>(value));
  } else if constexpr (std::is_convertible_v<T, std::string_view>) {
    return '"' + std::string(std::string_view(value)) + '"';
  } else if constexpr (std::is_integral_v<T>) {
    std::snprintf(buffer, sizeof buffer, " (0x%llx)", static_cast<unsigned long long>(value));
    return std::to_string(value) + buffer;
  } else {
    return "?";
  }
}

inline void fail(const char* file, int line, const std::string& what) {
  const int64_t n = ++failures;
  if (n > kMostPrinted) return;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  for (const auto& note : Note::stack()) std::fprintf(stderr, "    with %s\n", note().c_str());
  if (n == kMostPrinted) std::fprintf(stderr, "... more failures are only counted\n");
}

/// Equality; floats by their bits, so that NaN equals itself and -0 isn't +0.
template <class A, class B>
bool same(const A& a, const B& b) {
  if constexpr (std::is_floating_point_v<A>) {
    static_assert(std::is_same_v<A, B>, "compare floats of one type");
    return std::memcmp(&a, &b, sizeof a) == 0;
  } else if constexpr (std::is_integral_v<A> && std::is_integral_v<B> && !std::is_same_v<A, B>) {
    return std::cmp_equal(a, b);
  } else {
    return a == b;
  }
}

template <class A, class B>
[[gnu::noinline, gnu::cold]] void fail_equal(const char* file, int line, const char* expression, const A& a,
                                             const B& b) {
  fail(file, line, std::string(expression) + ": " + text_of(a) + " != " + text_of(b));
}

template <class A, class B>
void equal(const char* file, int line, const char* expression, const A& a, const B& b) {
  if (!same(a, b)) fail_equal(file, line, expression, a, b);
}

/// The one source of randomness: fixed seeds, so a failure can be repeated.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint64_t bits() { return engine_(); }
  /// From low to high, both included.
  int64_t between(int64_t low, int64_t high) { return low + int64_t(bits() % uint64_t(high - low + 1)); }
  bool chance(int percent) { return between(0, 99) < percent; }
  template <class T>
  const T& pick(const std::vector<T>& from) {
    return from[size_t(between(0, int64_t(from.size()) - 1))];
  }

 private:
  std::mt19937_64 engine_;
};

/// Runs the tests whose name contains argv[1] (all without one). The exit status: 0 if nothing failed.
inline int run_all(int argc, char** argv) {
  int run = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    const int64_t before = failures;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(test.name, 0, std::string("exception: ") + error.what());
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s %s (%.2f s)\n", failures == before ? "ok  " : "FAIL", test.name, seconds.count());
    std::fflush(stdout);
    ++run;
  }
  std::printf("%d tests, %lld failures\n", run, static_cast<long long>(failures));
  return run > 0 && failures == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                        \
  static void test_##name();                                              \
  static const check::Registration registered_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) ((condition) ? void() : check::fail(__FILE__, __LINE__, "failed: " #condition))
#define CHECK_EQ(a, b) check::equal(__FILE__, __LINE__, #a " == " #b, a, b)
