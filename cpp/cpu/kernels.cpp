// The CPU kernels. Compiled once per level with QUARK_LEVEL naming it; the flags differ, the source doesn't.
#include <type_traits>

#include "../loops.h"
#include "../operands.h"
#include "../reduce.h"
#include "../search.h"
#include "levels.h"

namespace quark::QUARK_LEVEL {
namespace {

/// out = body(x, other, s, z) of one tile after another. In and Out: Data or Codes.
template <class Body, class In, class Out>
class Elementwise {
 public:
  Elementwise(const In& x, const Data* other, const Operands& operands, const TensorView& shape, const Out& out,
              const QuantSpec& spec)
      : x_(x),
        other_(other),
        scales_(operands.scales(), shape.shape, spec),
        random_(operands['k'], shape.shape, spec),
        out_(out),
        grid_(make_grid(spec, shape.dtype)),
        loop_(tile_loop_for<Body>(spec, shape.dtype, scales_.has_zero_points())),
        ordinary_(loop_of_ordinary(spec, grid_, x.dtype(), out.dtype())),
        stream_(is_streamed(x.bytes(), out.bytes())) {
    if constexpr (std::is_same_v<Out, Data>) limit_ = limit_of(out.view.dtype, spec);
    if constexpr (std::is_same_v<In, Codes>) {
      largest_ = x.largest();
    } else {
      largest_ = largest_of(grid_);
    }
  }

  void run(const Tiling& tiling, Executor& executor) const {
    for_each_tile(executor, tiling, [this](int64_t begin, int64_t count) {
      RawTile x;
      alignas(64) float s[kTile], z[kTile];
      tile(begin, count, x_.load_raw(begin, count, x), scales_.load(begin, count, s, z));
    });
  }

  /// A tile whose elements, in their own dtype, and scales are at hand.
  QUARK_INLINE void tile(int64_t begin, int64_t count, const void* raw, const TileScales& scales) const {
    alignas(64) uint32_t words[Random::kBuffer];
    const uint32_t* random = random_.load(begin, count, words);
    if (ordinary_ && are_ordinary(scales, count, largest_, limit_)) {
      RawTile buffer;
      void* to = out_.target_raw(begin, buffer, stream_);
      ordinary_(raw, random, to, count, scales, grid_, stream_ && to != buffer.bytes);
      return out_.store_raw(begin, count, to, stream_);
    }
    alignas(64) float x[kTile], y[kTile], others[kTile];
    if constexpr (std::is_same_v<In, Data>) x_.prefetch(begin, count);
    const float* values = x_.floats(raw, count, x);
    const float* second = other_ ? other_->load(begin, count, others) : values;
    float* to = out_.target(begin, y, stream_);
    loop_(values, second, random, to, count, scales, limit_, grid_);
    out_.store(begin, count, to, stream_);
  }

 private:
  static OrdinaryLoop loop_of_ordinary([[maybe_unused]] const QuantSpec& spec, [[maybe_unused]] const Grid& g,
                                       [[maybe_unused]] DType x, [[maybe_unused]] DType out) {
    if constexpr (std::is_same_v<Body, FakeQuantizeBody>)
      return ordinary_loop_for<FakeQuantizeOrdinary>(spec, g, x, out);
    if constexpr (std::is_same_v<Body, QuantizeBody> && std::is_same_v<Out, Codes>)
      return ordinary_loop_for<QuantizeOrdinary>(spec, g, x, out);
    if constexpr (std::is_same_v<Body, DequantizeBody>) return dequantize_loop_for(spec, g, x, out);
    return nullptr;
  }

  const In& x_;
  const Data* other_;
  Scales scales_;
  Random random_;
  const Out& out_;
  Grid grid_;
  TileLoop loop_;
  OrdinaryLoop ordinary_;
  bool stream_;
  float largest_;                       ///< magnitude of a code's number
  float limit_ = float_of(kMaxFinite);  ///< where results saturate
};

/// q = R(x / s) + z as codes.
Status quantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const Operands operands(Op::quantize, in, out, spec);
  const TensorView& x = *operands['x'];
  const Data values(x);
  const Codes codes(*operands['q'], spec, last_length(x));
  const QuantSpec own = code_spec(spec);
  Elementwise<QuantizeBody, Data, Codes>(values, nullptr, operands, x, codes, own)
      .run(Tiling(x.elements(), last_length(x), spec), executor);
  return {};
}

/// y = R(x / s), the numbers that the codes stand for.
Status quantize_values(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const Operands operands(Op::quantize_values, in, {}, spec);
  const TensorView& x = *operands['x'];
  const Data values(x), result(out[0]);
  Elementwise<QuantizeBody, Data, Data>(values, nullptr, operands, x, result, spec)
      .run(Tiling(x.elements(), 0, spec), executor);
  return {};
}

/// x = (q - z) * s.
Status dequantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const Operands operands(Op::dequantize, in, out, spec);
  const TensorView& x = *operands['x'];
  const Codes codes(*operands['q'], spec, last_length(x));
  const Data result(x);
  Elementwise<DequantizeBody, Codes, Data>(codes, nullptr, operands, x, result, spec)
      .run(Tiling(x.elements(), last_length(x), spec), executor);
  return {};
}

/// y = dequantize(quantize(x)), without the codes.
Status fake_quantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const Operands operands(Op::fake_quantize, in, {}, spec);
  const TensorView& x = *operands['x'];
  const Data values(x), result(out[0]);
  Elementwise<FakeQuantizeBody, Data, Data>(values, nullptr, operands, x, result, spec)
      .run(Tiling(x.elements(), 0, spec), executor);
  return {};
}

/// dx = dy where x didn't saturate, else 0.
Status fake_quantize_backward(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const Operands operands(Op::fake_quantize_backward, in, {}, spec);
  const TensorView& x = *operands['x'];
  const Data values(x), grad(in[1]), result(out[0]);
  Elementwise<FakeQuantizeBackwardBody, Data, Data>(values, &grad, operands, x, result, spec)
      .run(Tiling(x.elements(), 0, spec), executor);
  return {};
}

Status out_of_memory(const char* what) { return {ErrorKind::memory, what}; }

/// Writes the scales that `out` has room for: s and p and z, given g.
Status choose(const TensorView& x, const ScaleTensors& out, const QuantSpec& spec, Executor& executor) {
  if (spec.method != Method::extremes) {
    if (SearchScales::run(x, out, spec, executor)) return {};
    return out_of_memory("out of memory for a copy of a group");
  }
  if (const GroupRuns runs(x, spec); runs.found) {
    choose_runs(x, runs, out, spec, executor, [](int64_t, int64_t, const void*, const TileScales&) {});
    return {};
  }
  if (!choose_scales(x, out, spec, executor)) return out_of_memory("out of memory for the groups' extremes");
  if (out.pair_bits) choose_pairs(x, out, spec, executor);
  return {};
}

Status choose_qparams(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const Operands operands(Op::choose_qparams, in, out, spec);
  return choose(in[0], operands.scales(), spec, executor);
}

Status extremes(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  if (find_extremes(in[0], out[0], spec, executor)) return {};
  return out_of_memory("out of memory for the groups' extremes");
}

/// The scale of the whole tensor, for a spec whose block scales are relative to one.
Status choose_tensor_scale(const TensorView& x, const TensorView& scale, const QuantSpec& spec, Executor& executor) {
  QuantSpec whole = spec;
  whole.scale_format = ScaleFormat::global;
  for (int64_t& b : whole.block) b = 0;
  return choose(x, {&scale}, whole, executor);
}

/// Scales from the extremes of x, then what they are for. The operands are those of the dynamic operator.
template <class Body, class Out>
Status choose_then(const Operands& operands, const Out& out, const QuantSpec& spec, const QuantSpec& own,
                   const Tiling& tiling, Executor& executor) {
  const TensorView& x = *operands['x'];
  const ScaleTensors scales = operands.scales();
  if (scales.tensor_scale)
    if (Status status = choose_tensor_scale(x, *scales.tensor_scale, spec, executor); !status.ok()) return status;
  const Data values(x);
  const Elementwise<Body, Data, Out> apply(values, nullptr, operands, x, out, own);
  if (const GroupRuns runs(x, spec); runs.found) {
    choose_runs(x, runs, scales, spec, executor,
                [&](int64_t begin, int64_t count, const void* raw, const TileScales& tile_scales) {
                  apply.tile(begin, count, raw, tile_scales);
                });
    return {};
  }
  if (Status status = choose(x, scales, spec, executor); !status.ok()) return status;
  apply.run(tiling, executor);
  return {};
}

Status quantize_dynamic(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const Operands operands(Op::quantize_dynamic, in, out, spec);
  const TensorView& x = *operands['x'];
  return choose_then<QuantizeBody>(operands, Codes(*operands['q'], spec, last_length(x)), spec, code_spec(spec),
                                   Tiling(x.elements(), last_length(x), spec), executor);
}

Status fake_quantize_dynamic(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const Operands operands(Op::fake_quantize_dynamic, in, out, spec);
  return choose_then<FakeQuantizeBody>(operands, Data(out[0]), spec, spec, Tiling(in[0].elements(), 0, spec), executor);
}

/// ds = sum over the group of dx * (q - z), in float64 and in the fixed tree.
Status dequantize_backward(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& grad = in[0];
  struct Task {
    const QuantSpec& spec;
    const TensorView& shape;
    Data grad;
    Codes codes;
    const TensorView* zero;
    Data zero_points, result;
  } task{spec,
         grad,
         Data(grad),
         Codes(in[1], spec, last_length(grad)),
         in.size() > 2 ? &in[2] : nullptr,
         Data(in.size() > 2 ? in[2] : out[0]),
         Data(out[0])};
  const int64_t scales = out[0].elements();
  executor.run(
      scales, scales == 0 ? 1 : grad.elements() / scales,
      [](void* context, int64_t first, int64_t last) {
        const Task& t = *static_cast<const Task*>(context);
        alignas(64) float grads[kTile], codes[kTile], zero;
        for (int64_t index = first; index < last; ++index) {
          const float z = t.zero ? *t.zero_points.load(t.zero->elements() == 1 ? 0 : index, 1, &zero) : 0.0f;
          TreeSum sum;
          for_each_run_of_scale(index, t.shape.shape, t.spec, [&](int64_t begin, int64_t n) {
            // Packed codes are read from a byte's start, so from a little earlier.
            for (int64_t at = begin; at < begin + n;) {
              const int64_t skip = t.codes.lead(at), count = min(kTile - skip, begin + n - at);
              const float* q = t.codes.load(at - skip, count + skip, codes) + skip;
              const float* g = t.grad.load(at, count, grads);
              for (int64_t i = 0; i < count; ++i) sum.add(double(g[i]) * (double(q[i]) - double(z)));
              at += count;
            }
          });
          const auto total = float(sum.finish());
          const float value = is_nan(total) ? float_of(kNaN) : total;
          t.result.store(index, 1, &value);
        }
      },
      &task);
  return {};
}

/// The value of a tensor of one element. It may be subnormal, so it is a double from here on.
double number(const TensorView& t) {
  const FloatEnvironment environment;
  float value;
  return double(*Data(t).load(0, 1, &value));
}

/// dx = g inside the range, else 0; ds = n * sum(g * slope) over each group (numerics.h, slope_of).
Status learn(Tensors in, Tensors out, const TensorView& scale, double factor, const QuantSpec& spec,
             Executor& executor) {
  const TensorView* zero = in.size() > 4 ? &in[4] : nullptr;
  if (LearnScales::run(in[0], in[1], scale, zero, out[0], out[1], factor, spec, executor)) return {};
  return out_of_memory("out of memory for the partial sums");
}

Status lsq_backward(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  return learn(in, out, in[2], number(in[3]), spec, executor);
}

/// What TQT's tensors say, and the spec with the range that follows.
struct Threshold {
  QuantSpec spec;
  Learned learned;

  Threshold(const TensorView& t, const TensorView& n, const QuantSpec& given) : spec(given) {
    const double threshold = number(t), domain = number(n);
    const FloatEnvironment environment;
    learned = learned_of_threshold(float(threshold), float(domain));
    spec.quant_min = learned.lo;
    spec.quant_max = learned.hi;
  }

  /// The scale as a 0-d tensor, for as long as this object stays where it is.
  TensorView view() {
    TensorView v;
    v.data = &learned.scale;
    return v;
  }
};

/// y = fake_quantize(x) with the scale that a threshold gives.
Status tqt_quantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  Threshold threshold(in[1], in[2], spec);
  const TensorView operands[] = {in[0], threshold.view(), in[in.size() - 1]};
  return fake_quantize(Tensors(operands, in.size() - 1), out, threshold.spec, executor);
}

/// dt = s * ln 2 * sum(g * slope).
Status tqt_backward(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  Threshold threshold(in[2], in[3], spec);
  return learn(in, out, threshold.view(), threshold.learned.factor, threshold.spec, executor);
}

/// Every element of `from` into `to`: Data or Codes.
template <class From, class To>
void move(const From& from, const To& to, const Tiling& tiling, Executor& executor) {
  for_each_tile(executor, tiling, [&](int64_t begin, int64_t count) {
    alignas(64) float buffer[kTile];
    to.store(begin, count, from.load(begin, count, buffer));
  });
}

/// The same numbers in another dtype.
Status convert(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  move(Data(in[0]), Data(out[0]), Tiling(in[0].elements(), 0, spec), executor);
  return {};
}

/// Codes one a byte to a bit stream per row of the last axis. Bits above the width are dropped.
Status pack(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const int64_t row = last_length(in[0]);
  move(Data(in[0]), Codes(out[0], spec, row), Tiling(in[0].elements(), row, spec), executor);
  return {};
}

/// A bit stream per row of the last axis to codes one a byte.
Status unpack(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const int64_t row = last_length(out[0]);
  move(Codes(in[0], spec, row), Data(out[0]), Tiling(out[0].elements(), row, spec), executor);
  return {};
}

}  // namespace

const Kernel kernels[kOpCount] = {
#define QUARK_OP(name, ins, outs) name,
#include "../ops.inc"
#undef QUARK_OP
};

}  // namespace quark::QUARK_LEVEL
