// A small machine that runs GPU kernels on the CPU, one thread at a time, for tests: what a GPU would do now and then
// (another order, a hang, wrong results) it does always, or ends the process with a line on stderr and status 86.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <source_location>
#include <type_traits>

namespace simt {

using Site = std::source_location;

inline constexpr int kErrorStatus = 86;
inline constexpr int kMaxThreads = 1024;               // in a block
inline constexpr int kMaxWidth = 32;                   // of a shuffle
inline constexpr size_t kMaxSharedBytes = 48u * 1024;  // in a block

namespace detail {

// Only the machine writes these.
extern int current_thread;
extern int64_t current_block;

uint64_t shuffle_bits(uint64_t bits, int mask, int width, const Site& site);
void launch(int64_t blocks, int threads, void (*body)(const void*), const void* context);

}  // namespace detail

// ---- for kernels ----------------------------------------------------------------------------------------------------

/// The number of the running thread in its block, and of the block.
inline int thread() { return detail::current_thread; }
inline int64_t block() { return detail::current_block; }

/// Waits for all threads of the block, which must all come to this place.
void barrier(Site site = Site::current());

/// `value` of the thread whose number differs in the bits of `mask`, within groups of `width` threads: a power of two,
/// at most 32 and the warp. All threads of a group must come to this place with one mask; groups needn't go together.
template <class T>
T shuffle_xor(T value, int mask, int width, Site site = Site::current()) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = detail::shuffle_bits(bits, mask, width, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// Memory that the block shares, one for each place that asks; all bits are 1 at first, so that reading what nobody
/// wrote shows.
void* shared(size_t bytes, Site site = Site::current());

void atomic_max(uint32_t* to, uint32_t value);
void atomic_add(uint64_t* to, uint64_t value);

// ---- for the host ---------------------------------------------------------------------------------------------------

/// Calls body() for every thread of every block. Host threads that launch at once wait for each other.
template <class F>
void launch(int64_t blocks, int threads, const F& body) {
  detail::launch(blocks, threads, [](const void* f) { (*static_cast<const F*>(f))(); }, std::addressof(body));
}

/// Who goes first of the threads that can run, and of the blocks.
enum class Order { forward, backward, shuffled };

/// At first as the environment says: QUARK_SIMT_WARP, QUARK_SIMT_ORDER, QUARK_SIMT_SEED.
struct Options {
  int warp = 32;  ///< or 64
  Order order = Order::forward;
  uint64_t seed = 0;
};
void configure(const Options& options);

/// How often the machine has gone from one stack to another.
uint64_t switches();

}  // namespace simt
