// Every operator on a GPU. Compiled as CUDA, as HIP, and as C++ for the machine of tests/cpp/simt; QUARK_LEVEL is the
// platform's namespace.
#include <optional>

#include "elements.h"
#include "gpu.h"
#include "groups.h"
#include "vectors.h"

namespace quark::QUARK_LEVEL {
namespace {

/// The kernels of one call, one after another on its stream. After an error nothing more is enqueued.
class Call {
 public:
  explicit Call(Queue& queue) : queue_(queue), on_device_(queue.device()) { keep(on_device_.status()); }

  const Status& status() const { return status_; }

  /// A kernel with at least so many threads.
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t threads, const std::type_identity_t<Arguments>& arguments) {
    const int64_t blocks = threads / kThreads + (threads % kThreads != 0);
    if (status_.ok() && blocks > 0)
      keep(quark::QUARK_LEVEL::launch(kernel, blocks, kThreads, queue_.stream(), arguments));
  }

  /// Zeros.
  void clear(void* to, int64_t bytes) {
    if (status_.ok() && bytes > 0) keep(quark::QUARK_LEVEL::clear(to, bytes, queue_.stream()));
  }

  /// Memory for `n` of T until the call is done; nullptr after an error.
  template <class T>
  T* scratch(int64_t n) {
    if (!status_.ok()) return nullptr;
    void* memory = queue_.scratch(n * int64_t(sizeof(T)) + 1);
    if (!memory)
      keep({ErrorKind::memory, "no memory on the GPU for " + std::to_string(n * int64_t(sizeof(T))) +
                                   " bytes that the kernels need meanwhile" +
                                   (queue_.why().empty() ? "" : ": " + queue_.why())});
    return static_cast<T*>(memory);
  }

 private:
  void keep(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  Queue& queue_;
  OnDevice on_device_;
  Status status_;
};

/// A view of memory of the device.
TensorView view_of(float* one) {
  TensorView v;
  v.data = one;
  return v;
}

// ---- elements -----------------------------------------------------------------------------------------------------

/// Where an operator's numbers are: codes where the spec says so.
struct Place {
  const TensorView& tensor;
  bool is_code;

  Numbers numbers(const QuantSpec& spec, const TensorView& shape, Paths& paths) const {
    return is_code ? Numbers(tensor, spec, last_length(shape), paths) : Numbers(tensor, paths);
  }
};

/// Whether the elements of a tensor follow one another, from a boundary of 16 bytes on.
bool is_for_vectors(const TensorView& t) {
  const Walk w = walk_of(t);
  const bool is_whole = w.rank == 0 || (w.rank == 1 && w.stride[0] == 1);
  return is_whole && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

/// Whether a vector's elements have one scale, by the walk of the scales.
bool is_shared_by_vectors(const Walk& w) {
  return w.rank == 0 || (w.stride[w.rank - 1] == 0 && w.size[w.rank - 1] % kVector == 0);
}

using VectorKernel = void (*)(VectorArguments);

/// each_vector or each_row for a spec and what numbers are stored as; null where there is none.
template <class Body, bool kRows, bool kIsFixed, Rounding R, class T>
VectorKernel vector_kernel_of() {
  if constexpr (kRows) return &each_row<Body, kIsFixed, R, T>;
  return &each_vector<Body, kIsFixed, R, T>;
}
template <class Body, bool kRows, bool kIsFixed, Rounding R>
VectorKernel vector_kernel(DType numbers) {
  switch (numbers) {
    case DType::float32: return vector_kernel_of<Body, kRows, kIsFixed, R, Stored<float>>();
    case DType::float16: return vector_kernel_of<Body, kRows, kIsFixed, R, Float16Bits>();
    case DType::bfloat16: return vector_kernel_of<Body, kRows, kIsFixed, R, BFloat16Bits>();
    default: return nullptr;
  }
}
template <class Body, bool kRows>
VectorKernel vector_kernel(const QuantSpec& spec, DType numbers) {
  const Format& f = spec.format;
  if constexpr (!Body::kReadsCodes) {
    const bool is_narrow = spec.narrow && numbers != DType::float32;
    const bool is_finite_only = spec.shares_exponent() && spec.ieee;
    if (spec.reciprocal || spec.shifted || is_narrow || is_finite_only) return nullptr;
    if (spec.rounding == Rounding::stochastic) {
      constexpr Rounding kRandom = Rounding::stochastic;
      if (f.is_integer()) return vector_kernel<Body, kRows, true, kRandom>(numbers);
      if (Body::kWritesCodes && f.is_fixed_point()) return nullptr;
      return vector_kernel<Body, kRows, false, kRandom>(numbers);
    }
    if (spec.rounding != Rounding::half_even) return nullptr;
  }
  if (f.is_fixed_point()) return vector_kernel<Body, kRows, true, Rounding::half_even>(numbers);
  return vector_kernel<Body, kRows, false, Rounding::half_even>(numbers);
}

/// The body of vectors for a body of elements; void where there is none.
template <class Body>
struct VectorsOf {
  using Type = void;
};
template <>
struct VectorsOf<FakeQuantizeBody> {
  using Type = FakeQuantizeVectors;
};
template <>
struct VectorsOf<QuantizeBody> {
  using Type = QuantizeVectors;
};
template <>
struct VectorsOf<DequantizeBody> {
  using Type = DequantizeVectors;
};

/// A call of out = Body(x, other, s, z), or the same with scales that are chosen on the way.
template <class Body>
class Elements {
 public:
  /// `shape` is the logical array, `own` the spec that says how to compute.
  Elements(Call& call, const Place& x, const Place& out, const TensorView& shape, const ScaleTensors& scales,
           const QuantSpec& spec, const QuantSpec& own, const TensorView* key = nullptr,
           const TensorView* other = nullptr, const Learned* learned = nullptr)
      : call_(call), x_(x), out_(out), shape_(shape), scales_(scales), spec_(spec), own_(own) {
    Paths& paths = paths_;
    const Numbers from = x.numbers(spec, shape, paths), to = out.numbers(spec, shape, paths);
    const Array second = other ? Array(*other, paths) : Array();
    const ScaleArrays by(scales, shape.shape, spec, paths);
    const RandomKey random(key, shape.shape, spec, paths);
    arguments_.emplace(ElementArguments{shape.elements(), 0, from, to, second, by, random, make_grid(own, shape.dtype),
                                        out.is_code ? float_of(kMaxFinite) : limit_of(out.tensor.dtype, own),
                                        order_of<Body>(own, shape.dtype, by.has_zero), learned, paths});
  }

  /// With the scales that there are.
  void run() {
    if (const VectorKernel kernel = vector_kernel<false>()) {
      arguments_->first = arguments_->elements / kVector * kVector;
      VectorArguments vectors = vector_arguments();
      vectors.has_own_scales =
          !is_shared_by_vectors(scale_walk(*scales_.scale, shape_.shape, spec_)) ||
          (scales_.zero_point && !is_shared_by_vectors(scale_walk(*scales_.zero_point, shape_.shape, spec_)));
      call_.launch(kernel, threads_for(arguments_->first), vectors);
    }
    call_.launch(&each_element<Body>, threads_for_elements(*arguments_), *arguments_);
  }

  /// Chooses the scales from x on the way. False, and nothing is enqueued, where it can't.
  bool run_dynamic() {
    if (spec_.method != Method::extremes) return false;
    // Groups must be of one length, of whole vectors, and fit 32 threads, or else a block.
    constexpr int64_t kMostOfLanes = 32 * kVector, kMostOfBlock = 1 << 16;
    const Groups groups(shape_, spec_);
    const int64_t elements = arguments_->elements;
    if (!groups.are_alike) return false;
    const int64_t group = elements / groups.count;
    const bool is_for_lanes = group <= kMostOfLanes && (group & (group - 1)) == 0;
    const bool is_for_block = group > kMostOfLanes && group <= kMostOfBlock;
    if (!groups.are_runs || group % kVector != 0 || !(is_for_lanes || is_for_block)) return false;
    const VectorKernel kernel = is_for_block ? vector_kernel<true>() : vector_kernel<false>();
    if (!kernel) return false;
    arguments_->first = elements;
    VectorArguments vectors = vector_arguments();
    vectors.lanes = is_for_block ? 0 : int(group / kVector);
    vectors.row = group;
    call_.launch(kernel, is_for_block ? groups.count * kThreads : threads_for(elements), vectors);
    return true;
  }

 private:
  using Vectors = typename VectorsOf<Body>::Type;

  const TensorView& numbers() const { return x_.is_code ? out_.tensor : x_.tensor; }

  /// each_vector or each_row for the call; null where there is none.
  template <bool kRows>
  VectorKernel vector_kernel() const {
    if constexpr (std::is_void_v<Vectors>) {
      return nullptr;
    } else {
      const TensorView* codes = x_.is_code ? &x_.tensor : out_.is_code ? &out_.tensor : nullptr;
      if (own_.format.is_cast() || own_.is_shard || scales_.pair_bits) return nullptr;
      if (!is_for_vectors(x_.tensor) || !is_for_vectors(out_.tensor)) return nullptr;
      if (!codes && (x_.tensor.dtype != out_.tensor.dtype || Vectors::kWritesCodes)) return nullptr;
      if (codes && bytes_of(codes->dtype) != 1) return nullptr;
      if (codes && own_.packed && own_.format.bits < 8 && (own_.format.bits != 4 || last_length(shape_) % 2 != 0))
        return nullptr;
      return quark::QUARK_LEVEL::vector_kernel<Vectors, kRows>(own_, numbers().dtype);
    }
  }

  VectorArguments vector_arguments() const {
    const ElementArguments& e = *arguments_;
    const CodeForm& form = x_.is_code ? e.x.form : e.out.form;
    const uint32_t bits = form.is_packed ? form.bits : 8u;
    const float largest = form.is_fixed_point ? form.largest_of(bits) : e.grid.hi;
    return {e,
            false,
            0,
            0,
            key_of(spec_),
            ScaleRuler(spec_, make_grid(spec_, shape_.dtype), scales_.tensor_scale),
            ScaleWriter(scales_),
            bits,
            largest};
  }

  int64_t threads_for(int64_t elements) const {
    const int64_t at_once =
        kVector * (bytes_of(numbers().dtype) == 4 ? kVectorsPerThread<float> : kVectorsPerThread<uint16_t>);
    return (elements + at_once - 1) / at_once;
  }

  Call& call_;
  const Place &x_, &out_;
  const TensorView& shape_;
  const ScaleTensors& scales_;
  const QuantSpec &spec_, &own_;
  Paths paths_;
  std::optional<ElementArguments> arguments_;
};

template <class Body>
void each(Call& call, const Place& x, const Place& out, const TensorView& shape, const ScaleTensors& scales,
          const QuantSpec& spec, const QuantSpec& own, const TensorView* key = nullptr,
          const TensorView* other = nullptr, const Learned* learned = nullptr) {
  Elements<Body>(call, x, out, shape, scales, spec, own, key, other, learned).run();
}

void copy(Call& call, const Place& x, const Place& out, const TensorView& shape, const QuantSpec& spec) {
  Paths paths;
  const Numbers from = x.numbers(spec, shape, paths), to = out.numbers(spec, shape, paths);
  TensorView none;
  const ScaleArrays by({&none}, none.shape, QuantSpec(), paths);
  const ElementArguments arguments{
      shape.elements(), 0,    from,    to,      Array(), by, RandomKey(nullptr, nullptr, spec, paths),
      Grid(),           0.0f, Order(), nullptr, paths};
  call.launch(&each_element<CopyBody>, threads_for_elements(arguments), arguments);
}

Status quantize(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Operands operands(Op::quantize, in, out, spec);
  const TensorView& x = *operands['x'];
  Call call(queue);
  each<QuantizeBody>(call, {x, false}, {*operands['q'], true}, x, operands.scales(), spec, code_spec(spec),
                     operands['k']);
  return call.status();
}

Status quantize_values(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Operands operands(Op::quantize_values, in, {}, spec);
  const TensorView& x = *operands['x'];
  Call call(queue);
  each<QuantizeBody>(call, {x, false}, {out[0], false}, x, operands.scales(), spec, spec);
  return call.status();
}

Status dequantize(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Operands operands(Op::dequantize, in, out, spec);
  const TensorView& x = *operands['x'];
  Call call(queue);
  each<DequantizeBody>(call, {*operands['q'], true}, {x, false}, x, operands.scales(), spec, spec);
  return call.status();
}

Status fake_quantize(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Operands operands(Op::fake_quantize, in, {}, spec);
  const TensorView& x = *operands['x'];
  Call call(queue);
  each<FakeQuantizeBody>(call, {x, false}, {out[0], false}, x, operands.scales(), spec, spec, operands['k']);
  return call.status();
}

Status fake_quantize_backward(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Operands operands(Op::fake_quantize_backward, in, {}, spec);
  const TensorView& x = *operands['x'];
  Call call(queue);
  each<FakeQuantizeBackwardBody>(call, {x, false}, {out[0], false}, x, operands.scales(), spec, spec, operands['k'],
                                 &in[1]);
  return call.status();
}

/// The same numbers in another dtype.
Status convert(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  Call call(queue);
  copy(call, {in[0], false}, {out[0], false}, in[0], spec);
  return call.status();
}

Status pack(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  Call call(queue);
  copy(call, {in[0], false}, {out[0], true}, in[0], spec);
  return call.status();
}

Status unpack(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  Call call(queue);
  copy(call, {in[0], true}, {out[0], false}, out[0], spec);
  return call.status();
}

// ---- scales -------------------------------------------------------------------------------------------------------

/// Raises low and high, whose entries are `step` apart and 0, to the keys of every group.
void raise_extremes(Call& call, const TensorView& x, const QuantSpec& spec, KeyKind key, uint32_t* low, uint32_t* high,
                    int64_t step) {
  Paths paths;
  const Array values(x, paths);
  const Path groups = paths.add(group_walk(x, spec));
  const int64_t elements = x.elements();
  call.launch(&find_extremes, (elements + kKeysPerThread - 1) / kKeysPerThread,
              {elements, values, groups, key, make_grid(spec, x.dtype), low, high, step, paths});
}

Status extremes(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  Call call(queue);
  auto* ends = static_cast<uint32_t*>(out[0].data);
  call.clear(ends, out[0].elements() * 4);
  raise_extremes(call, in[0], spec, KeyKind::bounds, ends + 1, ends, 2);
  const int64_t groups = out[0].elements() / 2;
  call.launch(&finish_extremes, groups, {groups, ends});
  return call.status();
}

/// Scales of the extremes, percentiles of a group, or that part of the extremes which gives the least squared error.
class Scales {
 public:
  Scales(Call& call, const TensorView& x, const ScaleTensors& out, const QuantSpec& spec)
      : call_(call),
        x_(x),
        out_(out),
        spec_(spec),
        groups_(x, spec),
        grid_(make_grid(spec, x.dtype)),
        scale_of_(spec, grid_, out.tensor_scale) {}

  void choose() {
    const int64_t n = groups_.count;
    if (n == 0) return;
    low_ = call_.scratch<uint32_t>(2 * n);
    if (!low_) return;
    high_ = low_ + n;
    call_.clear(low_, 2 * n * 4);
    raise_extremes(call_, x_, spec_, key_of(spec_), low_, high_, 1);
    if (spec_.method == Method::mse && !spec_.format.is_cast()) return by_error();
    if (spec_.method == Method::percentile && !spec_.format.is_cast()) by_percentile();
    call_.launch(&finish_scales, n, {n, low_, high_, scale_of_, ScaleWriter(out_)});
  }

 private:
  void by_percentile() {
    const int64_t n = groups_.count;
    auto* counts = call_.scratch<uint64_t>(2 * n);
    auto* found = call_.scratch<uint32_t>(2 * n);
    if (!found) return;
    call_.clear(counts, 2 * n * 8);
    call_.clear(found, 2 * n * 4);
    Paths paths;
    const Array values(x_, paths);
    SearchArguments arguments{groups_,         values, low_,       high_, found,
                              found + n,       counts, counts + n, 0,     spec_.percentile / 100.0,
                              spec_.symmetric, paths};
    for (int bit = 30; bit >= 0; --bit) {
      arguments.bit = 1u << bit;
      call_.launch(&count_keys, team_threads(groups_), arguments);
      call_.launch(&decide_bit, n, arguments);
    }
    call_.launch(&take_percentiles, n, arguments);
  }

  void by_error();

  Call& call_;
  const TensorView& x_;
  const ScaleTensors& out_;
  const QuantSpec& spec_;
  Groups groups_;
  Grid grid_;
  ScaleRuler scale_of_;
  uint32_t *low_ = nullptr, *high_ = nullptr;
};

/// Sums of chunks until there is one for each scale. Room for all of them is at `sums`, as sums_room says.
const double* fold(Call& call, double* sums, int64_t scales, int64_t chunks) {
  while (chunks > 1) {
    const int64_t next = (chunks + kChunk - 1) / kChunk;
    double* to = sums + scales * chunks;
    call.launch(&fold_sums, scales * next * kTeam, {scales, chunks, next, sums, to});
    sums = to;
    chunks = next;
  }
  return sums;
}
int64_t sums_room(int64_t scales, int64_t chunks) {
  int64_t room = scales * chunks;
  while (chunks > 1) room += scales * (chunks = (chunks + kChunk - 1) / kChunk);
  return room;
}

void Scales::by_error() {
  const int64_t n = groups_.count;
  auto* sums = call_.scratch<double>(sums_room(n, groups_.chunks));
  auto* least = call_.scratch<double>(n);
  if (!least) return;
  Paths paths;
  const Array values(x_, paths);
  const Order order = order_of<FakeQuantizeBody>(spec_, x_.dtype, out_.zero_point != nullptr);
  ErrorArguments arguments{groups_,           values, low_, high_, 1.0f, scale_of_,
                           ScaleWriter(out_), order,  sums, least, true, paths};
  for (int i = 0; i < kShares; ++i) {
    arguments.share = share_of(i);
    arguments.is_first = i == 0;
    arguments.sums = sums;
    call_.launch(&error_chunks, team_threads(groups_), arguments);
    arguments.sums = const_cast<double*>(fold(call_, sums, n, groups_.chunks));
    call_.launch(&compare_errors, n, arguments);
  }
}

/// Writes the scales that `out` has room for: s and p and z, given g.
void choose(Call& call, const TensorView& x, const ScaleTensors& out, const QuantSpec& spec) {
  Scales(call, x, out, spec).choose();
  if (!out.pair_bits) return;
  const TensorView& bits = *out.pair_bits;
  const int axis = spec.block_axis();
  int64_t inner = 1;
  for (int d = axis + 1; d < x.rank; ++d) inner *= x.shape[d];
  Paths paths;
  const Array values(x, paths);
  const ScaleArrays scales({out.scale}, x.shape, spec, paths);
  call.launch(&choose_pairs, bits.elements(),
              {bits.elements(), values, scales, x.shape[axis], bits.shape[axis], inner, make_grid(spec, x.dtype),
               static_cast<uint8_t*>(bits.data), paths});
}

Status choose_qparams(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Operands operands(Op::choose_qparams, in, out, spec);
  Call call(queue);
  choose(call, in[0], operands.scales(), spec);
  return call.status();
}

/// Scales from the extremes of x, that of the whole tensor first, where block scales are relative to one; then what
/// they are for.
template <class Body>
void choose_then(Call& call, const TensorView& x, const Place& out, const ScaleTensors& scales, const QuantSpec& spec,
                 const QuantSpec& own, const TensorView* key) {
  if (scales.tensor_scale) {
    QuantSpec whole = spec;
    whole.scale_format = ScaleFormat::global;
    for (int64_t& b : whole.block) b = 0;
    choose(call, x, {scales.tensor_scale}, whole);
  }
  const Place from{x, false};
  Elements<Body> elements(call, from, out, x, scales, spec, own, key);
  if (elements.run_dynamic()) return;
  choose(call, x, scales, spec);
  elements.run();
}

Status quantize_dynamic(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Operands operands(Op::quantize_dynamic, in, out, spec);
  const TensorView& x = *operands['x'];
  Call call(queue);
  choose_then<QuantizeBody>(call, x, {*operands['q'], true}, operands.scales(), spec, code_spec(spec), operands['k']);
  return call.status();
}

Status fake_quantize_dynamic(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const Operands operands(Op::fake_quantize_dynamic, in, out, spec);
  const TensorView& x = in[0];
  Call call(queue);
  choose_then<FakeQuantizeBody>(call, x, {out[0], false}, operands.scales(), spec, spec, operands['k']);
  return call.status();
}

// ---- gradients of scales ------------------------------------------------------------------------------------------

/// Totals of the sums of chunks, times the factor, in the scale's dtype.
void finish(Call& call, double* sums, const Groups& groups, const Learned* learned, const TensorView& out) {
  const double* totals = fold(call, sums, groups.count, groups.chunks);
  Paths paths;
  const Array to(out, paths);
  call.launch(&finish_sums, groups.count, {groups.count, totals, learned, to, paths});
}

Status dequantize_backward(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  const TensorView& grad = in[0];
  const Groups groups(grad, spec);
  Call call(queue);
  Paths paths;
  const Array grads(grad, paths);
  const Numbers codes(in[1], spec, last_length(grad), paths);
  TensorView none;
  const ScaleArrays scales({&none, nullptr, nullptr, in.size() > 2 ? &in[2] : nullptr}, grad.shape, spec, paths);
  auto* sums = call.scratch<double>(sums_room(groups.count, groups.chunks));
  if (!sums) return call.status();
  call.launch(&dequantize_chunks, team_threads(groups), {groups, grads, codes, scales, sums, paths});
  finish(call, sums, groups, nullptr, out[0]);
  return call.status();
}

/// The numbers of a learned scale's call, in scratch memory: `n` is LSQ's factor, or the domain of a threshold.
Learned* learned_of(Call& call, const TensorView& n, const TensorView* threshold, const QuantSpec& spec) {
  const Grid grid = make_grid(spec);
  Paths paths;
  const Array number(n, paths), t = threshold ? Array(*threshold, paths) : Array();
  auto* learned = call.scratch<Learned>(1);
  call.launch(&read_learned, 1, {t, number, grid.lo, grid.hi, learned, paths});
  return learned;
}

/// learn_vectors; null where it doesn't serve.
void (*learn_kernel(Tensors in, Tensors out, const Groups& groups, const QuantSpec& spec))(LearnArguments) {
  const DType dtype = in[0].dtype;
  const bool is_near = spec.rounding == Rounding::half_even && !spec.shifted;
  const bool has_fours = groups.are_runs && groups.are_alike && in[0].elements() / groups.count % kOwnLanes == 0;
  if (!is_near || !has_fours || in[1].dtype != dtype || out[0].dtype != dtype) return nullptr;
  if (!is_for_vectors(in[0]) || !is_for_vectors(in[1]) || !is_for_vectors(out[0])) return nullptr;
  switch (dtype) {
    case DType::float32: return &learn_vectors<Stored<float>>;
    case DType::float16: return &learn_vectors<Float16Bits>;
    case DType::bfloat16: return &learn_vectors<BFloat16Bits>;
    default: return nullptr;
  }
}

void learn(Call& call, Tensors in, Tensors out, const TensorView& scale, const Learned* learned,
           const QuantSpec& spec) {
  const TensorView& x = in[0];
  const Groups groups(x, spec);
  if (groups.count == 0) return;
  Paths paths;
  const Array values(x, paths), grad(in[1], paths), dx(out[0], paths);
  const ScaleArrays scales({&scale, nullptr, nullptr, in.size() > 4 ? &in[4] : nullptr}, x.shape, spec, paths);
  auto* sums = call.scratch<double>(sums_room(groups.count, groups.chunks));
  if (!sums) return;
  const auto kernel = learn_kernel(in, out, groups, spec);
  call.launch(kernel ? kernel : &learn_chunks, team_threads(groups),
              {groups, values, grad, dx, scales, slope_order_of(spec), make_grid(spec), learned, sums, paths});
  finish(call, sums, groups, learned, out[1]);
}

Status lsq_backward(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  Call call(queue);
  learn(call, in, out, in[2], learned_of(call, in[3], nullptr, spec), spec);
  return call.status();
}

Status tqt_quantize(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  Call call(queue);
  Learned* learned = learned_of(call, in[2], &in[1], spec);
  if (!learned) return call.status();
  const TensorView scale = view_of(&learned->scale);
  const ScaleTensors scales{&scale, nullptr, nullptr, in.size() > 3 ? &in[3] : nullptr};
  each<FakeQuantizeBody>(call, {in[0], false}, {out[0], false}, in[0], scales, spec, spec, nullptr, nullptr, learned);
  return call.status();
}

Status tqt_backward(Tensors in, Tensors out, const QuantSpec& spec, Queue& queue) {
  Call call(queue);
  Learned* learned = learned_of(call, in[3], &in[2], spec);
  if (learned) learn(call, in, out, view_of(&learned->scale), learned, spec);
  return call.status();
}

constexpr GpuKernel kKernels[kOpCount] = {
#define QUARK_OP(name, ins, outs) name,
#include "../ops.inc"
#undef QUARK_OP
};

}  // namespace

// A constant with addresses of functions of the host, which HIP's compiler would look for on the device.
#if !defined(__HIP_DEVICE_COMPILE__)
extern const GpuPlatform platform;
const GpuPlatform platform{kPlatformName, kPlatformDevice, kKernels, &check_device};
#endif

}  // namespace quark::QUARK_LEVEL
