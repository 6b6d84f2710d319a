// The same call gives the same bits: whatever the host's float environment, on any number of threads, wherever the
// arrays lie and in whichever order of axes. What they should be is for test_kernels.cpp to say.
#include <cfenv>
#include <thread>

#include "cases.h"
#include "hostile.h"
#include "parallel.h"

namespace {

using namespace cases;

// ---- the host -----------------------------------------------------------------------------------------------------

/// A float environment that a host may have.
struct Mode {
  int rounding;
  uint64_t flushing;  ///< bits of the control register

  std::string text() const {
    const char* name = rounding == FE_UPWARD       ? "upward"
                       : rounding == FE_DOWNWARD   ? "downward"
                       : rounding == FE_TOWARDZERO ? "toward zero"
                                                   : "to nearest";
    char buffer[64];
    std::snprintf(buffer, sizeof buffer, "rounding %s, control bits 0x%x", name, unsigned(flushing));
    return buffer;
  }
};

#if defined(__x86_64__)
constexpr uint64_t kFlushing[] = {0, 0x8000, 0x0040, 0x8040};  // FTZ, DAZ, both
#else
constexpr uint64_t kFlushing[] = {0, 1u << 24};
#endif

std::vector<Mode> all_modes() {
  std::vector<Mode> all;
  for (const int rounding : {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO})
    for (const uint64_t flushing : kFlushing) all.push_back({rounding, flushing});
  return all;
}

/// This thread has that environment for as long as the object lives.
class Host {
 public:
  explicit Host(const Mode& mode) : mode_(mode), control_(hostile::control()), rounding_(std::fegetround()) {
    std::fesetround(mode.rounding);
    hostile::set_control(hostile::control() | mode.flushing);
    during_ = hostile::control();
  }
  ~Host() {
    std::fesetround(rounding_);
    hostile::set_control(control_);
  }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  /// Whether it still is as it was made.
  bool is_unchanged() const { return hostile::control() == during_ && std::fegetround() == mode_.rounding; }

 private:
  Mode mode_;
  uint64_t control_, during_ = 0;
  int rounding_;
};

/// So many threads, every one in that environment.
class Threads final : public quark::Executor {
 public:
  Threads(int count, const Mode& mode) : count_(count), mode_(mode) {}

  void run(int64_t items, int64_t, Chunk chunk, void* context) override {
    quark::ChunkQueue queue(items, count_, chunk, context);
    const auto work = [&] {
      const Host host(mode_);
      queue.work();
      if (!host.is_unchanged()) ++changed;
    };
    std::vector<std::thread> others;
    for (int i = 1; i < count_; ++i) others.emplace_back(work);
    work();
    for (std::thread& t : others) t.join();
  }

  std::atomic<int> changed{0};

 private:
  int count_;
  Mode mode_;
};

/// What the call gives alone and undisturbed.
std::vector<Array> plain_results(const Case& c) {
  std::vector<Array> in = c.in, out = c.out;
  quark::SerialExecutor serial;
  const Status status = quark::run(c.op, arrays::views(in), arrays::views(out), c.spec, serial);
  if (!status.ok()) check::fail(__FILE__, __LINE__, c.description() + ": " + status.message());
  return out;
}

TEST(any_float_environment_gives_the_same_bits) {
  Random random(700);
  quark::SerialExecutor serial;
  for (int i = 0; i < 60 * quark::kOpCount; ++i) {
    Case c = random_case(random, Op(i % quark::kOpCount), i % 5 == 0 ? Size::tiles : Size::small);
    const std::vector<Array> want = plain_results(c);
    for (const Mode& mode : all_modes()) {
      bool is_unchanged = false;
      const std::string how = mode.text();
      const auto in_mode = [&](const auto& call) {
        check_run(c, want, how.c_str(), [&](quark::Tensors in, quark::Tensors out) {
          const Host host(mode);
          Status status = call(in, out);
          is_unchanged = host.is_unchanged();
          return status;
        });
        CHECK(is_unchanged);
      };
      in_mode([&](quark::Tensors in, quark::Tensors out) { return quark::run(c.op, in, out, c.spec, serial); });
      for (const quark::CpuLevel& level : levels()) {
        const check::Note note(level.name);
        in_mode(
            [&](quark::Tensors in, quark::Tensors out) { return level.kernels[int(c.op)](in, out, c.spec, serial); });
      }
    }
  }
}

TEST(any_number_of_threads_in_any_environment_gives_the_same_bits) {
  Random random(701);
  const std::vector<Mode> modes = all_modes();
  for (int i = 0; i < 4 * quark::kOpCount; ++i) {
    Case c = random_case(random, Op(i % quark::kOpCount), i / quark::kOpCount % 2 ? Size::tiles : Size::large);
    const std::vector<Array> want = plain_results(c);
    for (const int count : {1, 2, 3, 8, 64}) {
      const Mode mode = random.pick(modes);
      Threads threads(count, mode);
      const std::string how = std::to_string(count) + " threads, " + mode.text();
      for (const quark::CpuLevel& level : levels()) {
        const check::Note note(level.name);
        check_run(c, want, how.c_str(), [&](quark::Tensors in, quark::Tensors out) {
          return level.kernels[int(c.op)](in, out, c.spec, threads);
        });
      }
      CHECK_EQ(threads.changed.load(), 0);
    }
    quark::OpenMPExecutor openmp(64);
    check_run(c, want, "OpenMP with 64 threads",
              [&](quark::Tensors in, quark::Tensors out) { return quark::run(c.op, in, out, c.spec, openmp); });
  }
}

/// A spec is parsed once and remembered, so what it says mustn't depend on who was first.
TEST(specs_are_read_alike_in_any_environment) {
  Random random(702);
  for (int i = 0; i < 3000; ++i) {
    char number[32];
    std::snprintf(number, sizeof number, "%.*f", int(random.between(0, 17)), double(random.between(1, 100'000)) / 1000);
    const std::string text = std::string("int8 block=0 method=percentile:") + number;
    const check::Note note([&] { return text; });
    QuantSpec want;
    if (!quark::parse_spec(text, want).ok()) continue;  // it was rounded to 0
    CHECK_EQ(want.percentile, std::strtod(number, nullptr));
    for (const Mode& mode : all_modes()) {
      const check::Note in_mode([&] { return mode.text(); });
      QuantSpec spec;
      bool is_unchanged = false;
      {
        const Host host(mode);
        CHECK(quark::parse_spec(text, spec).ok());
        is_unchanged = host.is_unchanged();
      }
      CHECK_EQ(spec.percentile, want.percentile);
      CHECK(is_unchanged);
    }
  }
}

// ---- memory -------------------------------------------------------------------------------------------------------

/// The elements of an array at another place: `offset` bytes past a boundary of 64, with the axes in that order, the
/// innermost last.
class Placed {
 public:
  Placed(const Array& array, size_t offset, const std::vector<size_t>& order)
      : shape_(array.shape()), size_(size_t(quark::bytes_of(array.dtype()))) {
    bytes_.resize(size_t(array.elements()) * size_ + offset + 64);
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    start_ = (64 - address % 64) % 64 + offset / size_ * size_;
    view_.dtype = array.dtype();
    view_.rank = int(shape_.size());
    int64_t step = 1;
    for (size_t i = order.size(); i-- > 0; step *= shape_[order[i]]) view_.strides[order[i]] = step;
    std::copy(shape_.begin(), shape_.end(), view_.shape);
    view_.data = bytes_.data() + start_;
    for (int64_t i = 0; i < array.elements(); ++i) std::memcpy(at(i), array.bytes().data() + array.offset(i), size_);
  }
  Placed(Placed&&) = default;

  const quark::TensorView& view() const { return view_; }

  void check_same_elements(const Array& want, const char* name) {
    for (int64_t i = 0; i < want.elements(); ++i) {
      if (std::memcmp(at(i), want.bytes().data() + want.offset(i), size_) == 0) continue;
      return check::fail(__FILE__, __LINE__, name + (" differs at element " + std::to_string(i)));
    }
  }

 private:
  unsigned char* at(int64_t flat) {
    int64_t element = 0;
    for (size_t d = shape_.size(); d-- > 0; flat /= shape_[d]) element += flat % shape_[d] * view_.strides[d];
    return bytes_.data() + start_ + size_t(element) * size_;
  }

  Shape shape_;
  size_t size_, start_;
  std::vector<unsigned char> bytes_;
  quark::TensorView view_;
};

std::vector<size_t> in_order(size_t rank) {
  std::vector<size_t> order(rank);
  std::iota(order.begin(), order.end(), size_t(0));
  return order;
}

/// Whether an output may have any strides: scales and what goes with them lie in one piece.
bool is_data(const Case& c, size_t output) {
  std::string letters;
  for (const char letter : std::string_view(quark::kOps[int(c.op)].outs))
    if (letter == 'z' ? !c.spec.symmetric : c.spec.takes(letter)) letters += letter;
  return std::strchr("xqc", letters[output]) != nullptr;
}

/// The call on arrays that `place` puts somewhere, at every level. It is told whether they may have any strides.
template <class Place>
void check_placed(const Case& c, const std::vector<Array>& want, const Place& place) {
  for (const quark::CpuLevel& level : levels()) {
    std::vector<Placed> in, out;
    std::vector<quark::TensorView> inputs, outputs;
    for (const Array& a : c.in) in.push_back(place(a, true));
    for (size_t i = 0; i < c.out.size(); ++i) out.push_back(place(c.out[i], is_data(c, i)));
    for (const Placed& p : in) inputs.push_back(p.view());
    for (const Placed& p : out) outputs.push_back(p.view());
    const check::Note note([&] { return std::string(level.name) + ", " + c.description(); });
    quark::SerialExecutor serial;
    const Status status = level.kernels[int(c.op)](inputs, outputs, c.spec, serial);
    if (!status.ok()) return check::fail(__FILE__, __LINE__, status.message());
    for (size_t i = 0; i < in.size(); ++i) in[i].check_same_elements(c.in[i], "an input");
    for (size_t i = 0; i < out.size(); ++i) out[i].check_same_elements(want[i], "an output");
  }
}

TEST(arrays_may_begin_anywhere) {
  Random random(703);
  for (int i = 0; i < 6 * quark::kOpCount; ++i) {
    const auto op = Op(i % quark::kOpCount);
    const Shape shape = i / quark::kOpCount % 3 == 0 ? Shape{2, random.between(1000, 1100)}
                                                     : Shape{random.between(1, 5), random.between(1, 90)};
    const DType dtype = random.pick(kFloats);
    const Case c = make_case(random, op, shape, random_spec(random, op, shape), dtype);
    const std::vector<Array> want = plain_results(c);
    for (size_t offset = 0; offset < 64; ++offset) {
      const check::Note note([&] { return "all arrays " + std::to_string(offset) + " bytes past a boundary"; });
      check_placed(c, want, [&](const Array& a, bool) { return Placed(a, offset, in_order(a.shape().size())); });
    }
    const check::Note note("arrays at any distance from a boundary");
    check_placed(c, want, [&](const Array& a, bool) {
      return Placed(a, size_t(random.between(0, 63)), in_order(a.shape().size()));
    });
  }
}

TEST(axes_may_lie_in_any_order) {
  Random random(704);
  for (int i = 0; i < 12 * quark::kOpCount; ++i) {
    const auto op = Op(i % quark::kOpCount);
    const Shape shape = {random.between(1, 5), random.between(2, 6), random.between(1, 6), random.between(2, 40)};
    const Case c = make_case(random, op, shape, random_spec(random, op, shape));
    const std::vector<Array> want = plain_results(c);
    std::vector<size_t> order = in_order(4);
    do {
      const check::Note note([&] {
        std::string text = "axes in the order";
        for (const size_t d : order) text.append(" ").append(std::to_string(d));
        return text;
      });
      const auto order_of = [&](const Array& a, bool is_free) {
        return is_free && a.shape().size() == 4 ? order : in_order(a.shape().size());
      };
      check_placed(c, want, [&](const Array& a, bool is_free) { return Placed(a, 0, order_of(a, is_free)); });
      // Each array in an order of its own.
      check_placed(c, want, [&](const Array& a, bool is_free) {
        std::vector<size_t> own = order_of(a, is_free);
        if (is_free && random.chance(50)) std::reverse(own.begin(), own.end());
        return Placed(a, 0, own);
      });
    } while (std::next_permutation(order.begin(), order.end()));
  }
}

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
