#include "simt.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

// Another stack is a few instructions away on x86-64; elsewhere, or with SIMT_UCONTEXT, a system call.
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <fenv.h>
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#if __has_feature(thread_sanitizer)
#define SIMT_TSAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#endif
#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace simt {

int detail::current_thread = 0;
int64_t detail::current_block = 0;

namespace {

using detail::current_block;
using detail::current_thread;

// ---- errors ---------------------------------------------------------------------------------------------------------

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "SIMT error: %s\n", what.c_str());
  std::_Exit(kErrorStatus);
}

std::string text_of(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

std::string name_of(int thread) { return "thread " + std::to_string(thread); }

[[noreturn]] void die(const std::string& what, int thread, const Site& site) {
  die(what + " (block " + std::to_string(current_block) + ", " + name_of(thread) + ", " + text_of(site) + ")");
}

bool same_text(const char* a, const char* b) { return a == b || std::string_view(a) == b; }

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && same_text(a.file_name(), b.file_name()) &&
         same_text(a.function_name(), b.function_name());  // which tells apart what a template was made for
}

// ---- sanitizers -----------------------------------------------------------------------------------------------------

// To TSan every thread of a block is one of its fibers. It sees what kernels do and not what the machine does between
// them, and of an order only what acquire and release say.
#if defined(SIMT_TSAN)
constexpr bool kHasTsan = true;

void hide() { __tsan_ignore_thread_begin(); }
void unhide() { __tsan_ignore_thread_end(); }
void acquire(void* from) { __tsan_acquire(from); }
void release(void* to) { __tsan_release(to); }
#else
constexpr bool kHasTsan = false;

void hide() {}
void unhide() {}
void acquire(void*) {}
void release(void*) {}
#endif

/// For as long as this object lives TSan sees none of this thread's accesses.
struct Hidden {
  Hidden() { hide(); }
  ~Hidden() { unhide(); }
  Hidden(const Hidden&) = delete;
  Hidden& operator=(const Hidden&) = delete;
};

// ---- fibers ---------------------------------------------------------------------------------------------------------

constexpr size_t kStackBytes = 256u * 1024;

/// A stack of the machine, or that of the host's thread.
struct Fiber {
#if defined(SIMT_UCONTEXT)
  ucontext_t registers;
#else
  void* top = nullptr;  ///< of the stack while another runs; the registers that a call keeps are there
#endif
  const void* bottom = nullptr;  ///< and size of the stack
  size_t bytes = 0;
  void* fake_stack = nullptr;  ///< ASan's
  void* tsan = nullptr;
};

#if defined(SIMT_UCONTEXT)

void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  if (getcontext(&fiber.registers) != 0) die("getcontext failed");
  fiber.registers.uc_stack.ss_sp = stack;
  fiber.registers.uc_stack.ss_size = kStackBytes;
  fiber.registers.uc_link = nullptr;
  makecontext(&fiber.registers, entry, 0);
}

#else

// The float environment stays, since it is the launch's and not a fiber's.
extern "C" void quark_simt_swap(void** save, void* top);
asm(R"(
.text
.globl quark_simt_swap
.hidden quark_simt_swap
.type quark_simt_swap, @function
quark_simt_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size quark_simt_swap, .-quark_simt_swap
)");

void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where entry would return to: unwinders end there
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.top = top;
}

#endif

Fiber* make_fiber(void (*entry)()) {
  const size_t guard = size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) die("no memory for a stack");
  auto* fiber = new Fiber;
  char* stack = static_cast<char*>(memory) + guard;
  fiber->bottom = stack;
  fiber->bytes = kStackBytes;
  prepare(*fiber, stack, entry);
#if defined(SIMT_TSAN)
  fiber->tsan = __tsan_create_fiber(0);
#endif
  return fiber;
}

/// Goes from fiber to fiber.
class Switcher {
 public:
  uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  Fiber& running() const { return *running_; }
  void start(Fiber& host) { running_ = &host; }

  void go_to(Fiber& to) {
    Fiber& from = *running_;
    last_ = &from;
    running_ = &to;
    count_.store(count() + 1, std::memory_order_relaxed);
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#if defined(SIMT_UCONTEXT)
    fegetenv(&environment_);
#else
    void* top = to.top;
#endif
    // From here on TSan takes what this function does for the other fiber's.
#if defined(SIMT_TSAN)
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_UCONTEXT)
    swapcontext(&from.registers, &to.registers);
    fesetenv(&environment_);
#else
    quark_simt_swap(&from.top, top);
#endif
    arrive();
  }

  /// What a fiber does first whenever it is gone to.
  void arrive() {
#if defined(SIMT_ASAN)
    // Of the last stack, which matters where it is a host thread's: each launch may have another.
    __sanitizer_finish_switch_fiber(running_->fake_stack, &last_->bottom, &last_->bytes);
#endif
  }

 private:
  Fiber *running_ = nullptr, *last_ = nullptr;
  std::atomic<uint64_t> count_{0};
#if defined(SIMT_UCONTEXT)
  fenv_t environment_;  // is the launch's, not a fiber's
#endif
};

// ---- the machine ----------------------------------------------------------------------------------------------------

enum class State { shuffling, at_barrier, finished };

struct Thread {
  Fiber* fiber = nullptr;         ///< whose stack it is on; none before it starts
  State state = State::finished;  ///< of a thread that neither runs nor can
  Site site;                      ///< where it waits
  int mask = 0, width = 0;        ///< of the shuffle
  uint64_t sent = 0, received = 0;
};

bool same_shuffle(const Thread& a, const Thread& b) {
  return a.mask == b.mask && a.width == b.width && same(a.site, b.site);
}

struct Shared {
  Site site;
  size_t bytes;
  void* memory;
};

class Machine {
 public:
  Machine() { configure(options_from_environment()); }

  void configure(const Options& options);
  uint64_t switches() const { return switcher_.count(); }
  void launch(int64_t blocks, int threads, void (*body)(const void*), const void* context);

  // For the running thread.
  void barrier(const Site& site);
  uint64_t shuffle(uint64_t bits, int mask, int width, const Site& site);
  void* shared(size_t bytes, const Site& site);

  /// A fiber's life.
  [[noreturn]] void run_threads() noexcept;

 private:
  static Options options_from_environment();

  void order_threads();
  void run_block();
  void run_thread();

  int take_ready();
  void make_ready(int thread);
  void make_all_ready();
  void resume(int thread);
  void go_on();
  Fiber* take_fiber();

  [[noreturn]] void die_of_difference(const Thread& other) const;
  [[noreturn]] void die_of_waiting() const;

  std::mutex mutex_;
  Options options_;
  std::mt19937_64 random_;

  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  int count_ = 0;  // of threads in the block
  Thread threads_[kMaxThreads];

  // Who can run, by their places in the order: the first of them is next.
  uint64_t ready_[kMaxThreads / 64] = {};
  int thread_at_[kMaxThreads] = {}, place_of_[kMaxThreads] = {};

  int finished_ = 0, at_barrier_ = 0, first_at_barrier_ = 0;
  uint32_t shuffling_[kMaxThreads / 32] = {};  // lanes
  std::vector<Shared> shared_;
  size_t shared_bytes_ = 0;

  Switcher switcher_;
  Fiber host_;
  std::vector<Fiber*> fibers_;  // that nobody is on; under TSan all, in a ring
  size_t ring_ = 0, next_in_ring_ = 0;

  // What TSan's edges go through.
  char started_ = 0, ended_ = 0;
  char* barriers_ = nullptr;  // two in turn: a thread may come to the next before another has left this one
  int turn_ = 0;
};

Machine& machine() {
  static Machine& only = *new Machine;  // never destroyed: its stacks are in use until the end
  return only;
}

void enter() {
  hide();
  machine().run_threads();
}

// ---- options --------------------------------------------------------------------------------------------------------

Options Machine::options_from_environment() {
  Options options;
  const auto wrong = [](const char* name, std::string_view value, const char* allowed) {
    die(std::string(name) + " is '" + std::string(value) + "'; allowed: " + allowed);
  };
  if (const char* text = std::getenv("QUARK_SIMT_WARP")) {
    const std::string_view warp = text;
    if (warp != "32" && warp != "64") wrong("QUARK_SIMT_WARP", warp, "32, 64");
    options.warp = warp == "32" ? 32 : 64;
  }
  if (const char* text = std::getenv("QUARK_SIMT_ORDER")) {
    constexpr std::string_view names[] = {"forward", "backward", "shuffled"};
    const auto* found = std::find(std::begin(names), std::end(names), text);
    if (found == std::end(names)) wrong("QUARK_SIMT_ORDER", text, "forward, backward, shuffled");
    options.order = Order(found - std::begin(names));
  }
  if (const char* text = std::getenv("QUARK_SIMT_SEED")) {
    const char* end = text + std::strlen(text);
    const auto [after, error] = std::from_chars(text, end, options.seed);
    if (error != std::errc() || after != end) wrong("QUARK_SIMT_SEED", text, "integers from 0 to 2^64 - 1");
  }
  return options;
}

void Machine::configure(const Options& options) {
  if (options.warp != 32 && options.warp != 64)
    die("a warp of " + std::to_string(options.warp) + " threads; allowed: 32, 64");
  const std::lock_guard lock(mutex_);
  options_ = options;
  random_.seed(options.seed);
}

// ---- launches -------------------------------------------------------------------------------------------------------

void Machine::launch(int64_t blocks, int threads, void (*body)(const void*), const void* context) {
  const std::lock_guard lock(mutex_);
  if (blocks <= 0) die("a launch of " + std::to_string(blocks) + " blocks");
  if (threads <= 0 || threads > kMaxThreads || threads % options_.warp != 0)
    die("a block of " + std::to_string(threads) + " threads; allowed: multiples of the warp, " +
        std::to_string(options_.warp) + ", up to " + std::to_string(kMaxThreads));
  body_ = body;
  context_ = context;
  count_ = threads;
  switcher_.start(host_);
#if defined(SIMT_TSAN)
  host_.tsan = __tsan_get_current_fiber();
  // Two threads on one fiber are one to TSan. With a prime number of fibers no two of neighbouring blocks are, nor two
  // of the same number in any that are near; too many make everything slow. (LLVM 14 and later, and GCC 13, have a TSan
  // that tells only 255 threads apart, which we can't help.)
  ring_ = count_ <= 256 ? 1031 : 2053;
  next_in_ring_ = 0;
#endif
  int64_t first = 0, step = 1;
  switch (options_.order) {
    case Order::forward: break;
    case Order::backward: first = step = blocks - 1; break;
    case Order::shuffled:
      // A step that has no factor in common with the number of blocks meets each of them once.
      first = int64_t(random_() % uint64_t(blocks));
      do step = 1 + int64_t(random_() % uint64_t(blocks));
      while (std::gcd(step, blocks) != 1);
      break;
  }
  release(&started_);
  {
    const Hidden hidden;
    order_threads();
    current_block = first;
    for (int64_t i = 0; i < blocks; ++i) {
      if (i > 0 && options_.order == Order::shuffled) order_threads();
      run_block();
      current_block = (current_block + step) % blocks;
    }
  }
  acquire(&ended_);
}

void Machine::order_threads() {
  int* end = thread_at_ + count_;
  std::iota(thread_at_, end, 0);
  if (options_.order == Order::backward) std::reverse(thread_at_, end);
  if (options_.order == Order::shuffled) std::shuffle(thread_at_, end, random_);
  for (int i = 0; i < count_; ++i) place_of_[thread_at_[i]] = i;
}

void Machine::run_block() {
  // To TSan both these and shared memory are other objects in every block, even at one address: it forgets what it knew
  // of memory that is allocated.
  const auto barriers = std::make_unique<char[]>(2);
  barriers_ = barriers.get();
  if (kHasTsan) {
    // Here, since a fiber starts after all that its maker has done.
    while (fibers_.size() < std::min(next_in_ring_ + size_t(count_), ring_)) fibers_.push_back(make_fiber(enter));
  }
  finished_ = 0;
  make_all_ready();
  resume(take_ready());
  for (const Shared& s : shared_) std::free(s.memory);
  shared_.clear();
  shared_bytes_ = 0;
}

void Machine::run_threads() noexcept {
  switcher_.arrive();
  Fiber& own = switcher_.running();
  for (;;) {
    run_thread();
    threads_[current_thread].fiber = nullptr;
    threads_[current_thread].state = State::finished;
    ++finished_;
    const int next = take_ready();
    if (next < 0 && finished_ < count_) die_of_waiting();
    if (next >= 0 && !threads_[next].fiber && !kHasTsan) {
      // Threads that never wait run one after another without a switch.
      threads_[next].fiber = &own;
      current_thread = next;
      continue;
    }
    if (!kHasTsan) fibers_.push_back(&own);
    if (next < 0)
      switcher_.go_to(host_);
    else
      resume(next);
  }
}

void Machine::run_thread() {
  void (*body)(const void*) = body_;
  const void* context = context_;
  acquire(&started_);
  unhide();
  body(context);
  hide();
  release(&ended_);
}

// ---- who runs -------------------------------------------------------------------------------------------------------

/// The next that can run, which isn't ready any longer; -1: none can.
int Machine::take_ready() {
  for (int first = 0; first < count_; first += 64) {
    uint64_t& word = ready_[first / 64];
    if (word == 0) continue;
    const int place = first + std::countr_zero(word);
    word &= word - 1;
    return thread_at_[place];
  }
  return -1;
}

void Machine::make_ready(int thread) {
  const int place = place_of_[thread];
  ready_[place / 64] |= uint64_t(1) << (place % 64);
}

void Machine::make_all_ready() {
  for (int first = 0; first < count_; first += 64)
    ready_[first / 64] = ~uint64_t(0) >> (count_ - first < 64 ? 64 - (count_ - first) : 0);
}

void Machine::resume(int thread) {
  if (!threads_[thread].fiber) threads_[thread].fiber = take_fiber();
  current_thread = thread;
  switcher_.go_to(*threads_[thread].fiber);
}

/// The running thread waits, unless it is its turn.
void Machine::go_on() {
  const int next = take_ready();
  if (next < 0) die_of_waiting();
  if (next != current_thread) resume(next);
}

Fiber* Machine::take_fiber() {
  if (kHasTsan) return fibers_[next_in_ring_++ % ring_];
  if (fibers_.empty()) return make_fiber(enter);
  Fiber* fiber = fibers_.back();
  fibers_.pop_back();
  return fiber;
}

// ---- what threads wait for ------------------------------------------------------------------------------------------

void Machine::barrier(const Site& site) {
  Thread& self = threads_[current_thread];
  if (at_barrier_ == 0) first_at_barrier_ = current_thread;
  const Thread& first = threads_[first_at_barrier_];
  self.state = State::at_barrier;
  self.site = site;
  if (!same(site, first.site))
    die("threads of a block wait at different barriers: " + name_of(first_at_barrier_) + " at " + text_of(first.site),
        current_thread, site);
  char* edge = barriers_ + turn_;
  release(edge);
  if (++at_barrier_ == count_) {
    at_barrier_ = 0;
    turn_ ^= 1;
    make_all_ready();
  }
  go_on();
  acquire(edge);
}

uint64_t Machine::shuffle(uint64_t bits, int mask, int width, const Site& site) {
  if (width < 1 || width > kMaxWidth || !std::has_single_bit(unsigned(width)))
    die("a shuffle among " + std::to_string(width) + " threads; allowed: powers of two up to " +
            std::to_string(kMaxWidth),
        current_thread, site);
  if (mask < 0 || mask >= width)
    die("a shuffle with mask " + std::to_string(mask) + " among " + std::to_string(width) + " threads", current_thread,
        site);
  Thread& self = threads_[current_thread];
  self.state = State::shuffling;
  self.site = site;
  self.mask = mask;
  self.width = width;
  self.sent = bits;
  const int first = current_thread - current_thread % width;
  const uint32_t group = (~0u >> (32 - width)) << (first % 32);
  uint32_t& shuffling = shuffling_[current_thread / 32];
  shuffling |= 1u << (current_thread % 32);
  if ((shuffling & group) == group) {
    Thread* lanes = threads_ + first;
    for (int i = 0; i < width; ++i)
      if (!same_shuffle(lanes[i], self)) die_of_difference(lanes[i]);
    for (int i = 0; i < width; ++i) {
      lanes[i].received = lanes[i ^ mask].sent;
      make_ready(first + i);
    }
    shuffling &= ~group;
  }
  go_on();
  return self.received;
}

void* Machine::shared(size_t bytes, const Site& site) {
  for (const Shared& s : shared_) {
    if (!same(s.site, site)) continue;
    if (s.bytes != bytes)
      die("shared memory of different sizes: " + std::to_string(bytes) + " bytes, and before " +
              std::to_string(s.bytes),
          current_thread, site);
    return s.memory;
  }
  shared_bytes_ += bytes;
  if (shared_bytes_ > kMaxSharedBytes || bytes > kMaxSharedBytes)
    die(std::to_string(shared_bytes_) +
            " bytes of shared memory in a block; allowed: " + std::to_string(kMaxSharedBytes),
        current_thread, site);
  // Each its own allocation, with ASan's red zones.
  void* memory = std::malloc(bytes);
  if (!memory) die("no memory to share", current_thread, site);
  std::memset(memory, 0xff, bytes);
  shared_.push_back({site, bytes, memory});
  return memory;
}

// ---- errors of waiting threads --------------------------------------------------------------------------------------

/// All threads of the running one's group shuffle, but `other` doesn't as it does.
void Machine::die_of_difference(const Thread& other) const {
  const Thread& self = threads_[current_thread];
  const std::string name = name_of(int(&other - threads_));
  if (!same(self.site, other.site))
    die("threads of a group shuffle at different places: " + name + " at " + text_of(other.site), current_thread,
        self.site);
  if (self.width != other.width)
    die("threads of a group shuffle with different widths: " + std::to_string(self.width) + ", and " + name + " " +
            std::to_string(other.width),
        current_thread, self.site);
  die("threads of a group shuffle with different masks: " + std::to_string(self.mask) + ", and " + name + " " +
          std::to_string(other.mask),
      current_thread, self.site);
}

/// No thread can run. One that shuffles is told of first, since the others may wait for it.
void Machine::die_of_waiting() const {
  const auto why = [&](int thread) {
    const Thread& t = threads_[thread];
    const std::string name = name_of(thread);
    if (t.state == State::finished) return name + " has left the kernel";
    return name + " waits " + (t.state == State::at_barrier ? "at the barrier at " : "for the shuffle at ") +
           text_of(t.site);
  };
  for (int i = 0; i < count_; ++i) {
    const Thread& t = threads_[i];
    if (t.state != State::shuffling) continue;
    for (int other = i - i % t.width; other < i - i % t.width + t.width; ++other)
      if (threads_[other].state != State::shuffling || !same_shuffle(threads_[other], t))
        die("a shuffle that not all threads of the group come to: " + why(other), i, t.site);
  }
  for (int i = 0; i < count_; ++i)
    if (threads_[i].state == State::finished)
      die("a barrier that not all threads of the block come to: " + why(i), first_at_barrier_,
          threads_[first_at_barrier_].site);
  die("no thread can run");  // which would be the machine's fault
}

}  // namespace

// ---- the interface --------------------------------------------------------------------------------------------------

uint64_t detail::shuffle_bits(uint64_t bits, int mask, int width, const Site& site) {
  const Hidden hidden;
  return machine().shuffle(bits, mask, width, site);
}

void detail::launch(int64_t blocks, int threads, void (*body)(const void*), const void* context) {
  machine().launch(blocks, threads, body, context);
}

void barrier(Site site) {
  const Hidden hidden;
  machine().barrier(site);
}

void* shared(size_t bytes, Site site) {
  const Hidden hidden;
  return machine().shared(bytes, site);
}

void atomic_max(uint32_t* to, uint32_t value) {
  uint32_t now = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (now < value && !__atomic_compare_exchange_n(to, &now, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

void atomic_add(uint64_t* to, uint64_t value) { __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }

void configure(const Options& options) { machine().configure(options); }

uint64_t switches() { return machine().switches(); }

}  // namespace simt
