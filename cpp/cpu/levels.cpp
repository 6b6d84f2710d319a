// Which level this machine runs.
#include "levels.h"

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

namespace quark {
namespace {

bool always() { return true; }

#if defined(__x86_64__) && !defined(QUARK_SIMT)
bool has_v3() { return __builtin_cpu_supports("x86-64-v3"); }
bool has_v4() { return __builtin_cpu_supports("x86-64-v4"); }
#endif

constexpr CpuLevel kLevels[] = {
#if defined(QUARK_SIMT)
    {"simt", simulated::kernels, always},  // only where its name is asked for
#endif
    {"baseline", baseline::kernels, always},
#if defined(__x86_64__) && !defined(QUARK_SIMT)
    {"v3", v3::kernels, has_v3},
    {"v4", v4::kernels, has_v4},
#endif
};

struct Choice {
  Status status;
  const CpuLevel* level = nullptr;
};

Choice choose() {
  const char* variable = std::getenv("QUARK_CPU_LEVEL");
  const std::string_view wanted = variable ? variable : "";
  std::string names;
  const CpuLevel* best = nullptr;
  for (const CpuLevel& level : kLevels) {
    if (!level.is_supported()) continue;
    names += names.empty() ? level.name : std::string(", ") + level.name;
    if (wanted.empty() || level.name == wanted) best = &level;
  }
  if (best) return {Status(), best};
  return {value_error("QUARK_CPU_LEVEL is '" + std::string(wanted) + "'; this machine and build support: " + names),
          nullptr};
}

}  // namespace

std::span<const CpuLevel> cpu_levels() { return kLevels; }

namespace {

// Read when this library is loaded, not at the first use: a child forked within that would wait for the thread whose it
// was, which it doesn't have.
int64_t last_cache = [] {
  // What glibc's sysconf says of it is, on some virtual machines, that of several.
  int64_t kib = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%" SCNd64 "K", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  return kib > 0 ? kib * 1024 : int64_t(16) << 20;
}();

}  // namespace

int64_t& last_cache_bytes() { return last_cache; }

Status cpu_level(const CpuLevel*& level) {
  // Not a static that the first thread makes: a child forked within that would wait for it too. Whoever comes at the
  // same time chooses the same.
  static constinit std::atomic<const Choice*> chosen{nullptr};
  const Choice* choice = chosen.load(std::memory_order_acquire);
  if (!choice) {
    auto mine = std::make_unique<const Choice>(choose());
    if (chosen.compare_exchange_strong(choice, mine.get(), std::memory_order_acq_rel)) choice = mine.release();
  }
  level = choice->level;
  return choice->status;
}

}  // namespace quark
