// Calls on a GPU's queue: which platform runs them, what is refused, and, where tests/cpp/simt is built, that the bits
// are the CPU's.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "gpu/gpu.h"

namespace {

using quark::Device;
using quark::DType;
using quark::ErrorKind;
using quark::Op;
using quark::TensorView;

/// Memory of the host; `left` blocks can be had.
/// Counts what is asked of it, and has no memory after so many times.
class TestQueue final : public quark::Queue {
 public:
  explicit TestQueue(int left = 1 << 20) : Queue(nullptr, -1), left_(left) {}
  ~TestQueue() override {
    for (void* block : blocks_) std::free(block);
  }

  void* scratch(int64_t bytes) override {
    if (left_-- == 0) {
      why_ = "none is left";
      return nullptr;
    }
    blocks_.push_back(std::malloc(size_t(bytes)));
    return blocks_.back();
  }
  void release() override { ++released; }

  int released = 0;

 private:
  int left_;
  std::vector<void*> blocks_;
};

quark::QuantSpec spec_of(const char* text) {
  quark::QuantSpec spec;
  CHECK(quark::parse_spec(text, spec).ok());
  return spec;
}

struct Numbers {
  std::vector<float> x;
  std::vector<uint8_t> codes;
  float scale = 0.1f;

  explicit Numbers(int64_t n) : x(size_t(n)), codes(size_t(n)) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = 0.37f * float(i % 19) - 3.0f;
  }
};

TensorView view(void* data, DType dtype, std::vector<int64_t> shape, Device device, int number = 0) {
  TensorView t;
  t.data = data;
  t.dtype = dtype;
  t.device = device;
  t.device_number = number;
  t.rank = int(shape.size());
  int64_t step = 1;
  for (int d = t.rank - 1; d >= 0; --d) {
    t.shape[d] = shape[size_t(d)];
    t.strides[d] = step;
    step *= t.shape[d];
  }
  return t;
}

quark::Status quantize(Numbers& n, const char* text, std::vector<int64_t> shape, Device device, quark::Queue& queue,
                       Device other, int number) {
  const TensorView in[] = {view(n.x.data(), DType::float32, shape, device),
                           view(&n.scale, DType::float32, std::vector<int64_t>(), other, number)};
  const TensorView out[] = {view(n.codes.data(), DType::int8, shape, device)};
  return quark::run(Op::quantize, in, out, spec_of(text), queue);
}

TEST(platforms) {
  for (const quark::GpuPlatform* platform : quark::gpu_platforms())
    std::printf("     %s: %s\n", platform->name,
                platform->check().ok() ? "has a device" : platform->check().message().c_str());
  for (const Device device : {Device::cuda, Device::hip}) {
    const quark::GpuPlatform* platform = nullptr;
    const quark::Status status = quark::gpu_platform(device, platform);
    CHECK(status.ok() == (platform != nullptr));
    if (status.ok()) continue;
    CHECK(status.kind() == ErrorKind::unsupported);
    const char* option = device == Device::cuda ? "QUARK_CUDA=ON" : "QUARK_HIP=ON";
    CHECK(status.message().find(option) != std::string::npos);
    Numbers n(12);
    TestQueue queue;
    CHECK(quantize(n, "int8 block=0,0", {3, 4}, device, queue, device, 0).kind() == ErrorKind::unsupported);
  }
}

#if defined(QUARK_SIMT)

TEST(several_devices) {
  Numbers n(12);
  TestQueue queue;
  for (const auto& [other, number] :
       {std::pair(Device::cpu, 0), std::pair(Device::hip, 0), std::pair(Device::cuda, 1)}) {
    const quark::Status status = quantize(n, "int8 block=0,0", {3, 4}, Device::cuda, queue, other, number);
    CHECK(status.kind() == ErrorKind::value);
    CHECK(status.message().find("quantize: input 1 is on") != std::string::npos);
    CHECK(status.message().find("the call is on cuda:0") != std::string::npos);
  }
}

TEST(wrong_calls) {
  Numbers n(12);
  TestQueue queue;
  CHECK(quantize(n, "int8 block=0", {3, 4}, Device::cuda, queue, Device::cuda, 0).kind() == ErrorKind::value);
  CHECK(quantize(n, "int16 block=0,0", {3, 4}, Device::cuda, queue, Device::cuda, 0).kind() == ErrorKind::type);
  const quark::Status none = quark::run(Op::quantize, {}, {}, spec_of("int8"), queue);
  CHECK(!none.ok());
}

TEST(the_cpu_s_bits) {
  for (const int64_t length : {1, 7, 8, 64, 1000, 4096, 5000}) {
    Numbers on_gpu(3 * length), on_cpu(3 * length);
    TestQueue queue;
    CHECK(quantize(on_gpu, "int8 block=0,0", {3, length}, Device::cuda, queue, Device::cuda, 0).ok());
    const TensorView in[] = {view(on_cpu.x.data(), DType::float32, {3, length}, Device::cpu),
                             view(&on_cpu.scale, DType::float32, {}, Device::cpu)};
    const TensorView out[] = {view(on_cpu.codes.data(), DType::int8, {3, length}, Device::cpu)};
    quark::SerialExecutor executor;
    CHECK(quark::run(Op::quantize, in, out, spec_of("int8 block=0,0"), executor).ok());
    CHECK(on_gpu.codes == on_cpu.codes);
    CHECK(on_gpu.x == on_cpu.x);
  }
}

TEST(batches_on_a_queue) {
  Numbers n(24), one(24);
  TestQueue queue;
  CHECK(quantize(n, "int8 block=0 batch=2", {2, 3, 4}, Device::cuda, queue, Device::cuda, 0).kind() ==
        ErrorKind::value);  // the scale has no batch axes
  const TensorView in[] = {view(n.x.data(), DType::float32, {2, 3, 4}, Device::cuda),
                           view(&n.scale, DType::float32, {1, 1}, Device::cuda)};
  const TensorView out[] = {view(n.codes.data(), DType::int8, {2, 3, 4}, Device::cuda)};
  CHECK(quark::run(Op::quantize, in, out, spec_of("int8 block=0 batch=2"), queue).ok());
  CHECK_EQ(queue.released, 6);
  CHECK(quantize(one, "int8 block=0,0,0", {2, 3, 4}, Device::cuda, queue, Device::cuda, 0).ok());
  CHECK(n.codes == one.codes);
}

TEST(no_scratch_memory) {
  // Groups of rows: their extremes need memory of their own.
  std::vector<float> x(40, 1.5f), scale(4);
  const TensorView in[] = {view(x.data(), DType::float32, {10, 4}, Device::cuda)};
  const TensorView out[] = {view(scale.data(), DType::float32, {1, 4}, Device::cuda)};
  for (int left = 0; left < 3; ++left) {
    TestQueue queue(left);
    const quark::Status status = quark::run(Op::choose_qparams, in, out, spec_of("int8 block=0,1 method=mse"), queue);
    CHECK(status.kind() == ErrorKind::memory);
    CHECK(status.message().find("no memory on the GPU for ") != std::string::npos);
    CHECK(status.message().find(": none is left") != std::string::npos);
  }
  TestQueue queue;
  CHECK(quark::run(Op::choose_qparams, in, out, spec_of("int8 block=0,1 method=mse"), queue).ok());
}

#else

TEST(simulated) { std::printf("     skipped: the kernels aren't built for tests/cpp/simt (QUARK_SIMT=OFF)\n"); }

#endif

}  // namespace

int main(int argc, char** argv) { return check::run_all(argc, argv); }
