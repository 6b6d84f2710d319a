// The CPU kernels. Compiled once per level with QUARK_LEVEL naming it; the flags differ, the source doesn't.
#include <type_traits>

#include "../loops.h"
#include "../reduce.h"
#include "levels.h"

namespace quark::QUARK_LEVEL {
namespace {

/// Buffers of one tile.
struct alignas(64) Buffers {
  float x[kTile], y[kTile], s[kTile], z[kTile];
};

/// The operands in the order of the op's row; zero points are absent where the span is that much shorter.
const TensorView* zero_point(Tensors tensors, size_t at) { return tensors.size() > at ? &tensors[at] : nullptr; }

int64_t last_length(const TensorView& t) { return t.rank > 0 ? t.shape[t.rank - 1] : 1; }

/// out = body(x, other, s, z), tile by tile. In and Out: Data or Codes. `data` is the dtype of the numbers.
template <class Body, class In, class Out>
void elementwise(const In& x, const Data* other, const Scales& scales, const Out& out, DType data, const Tiling& tiling,
                 const QuantSpec& spec, Executor& executor) {
  const TileLoop loop = tile_loop_for<Body>(spec, data, scales.has_zero_points());
  const Grid grid = make_grid(spec, data);
  float limit = 0.0f;
  if constexpr (std::is_same_v<Out, Data>) limit = limit_of(out.view.dtype, spec);
  for_each_tile(executor, tiling, [&](int64_t begin, int64_t count) {
    Buffers buffers;
    alignas(64) float others[kTile];
    const float* values = x.load(begin, count, buffers.x);
    const float* second = other ? other->load(begin, count, others) : values;
    float* y = out.target(begin, buffers.y);
    loop(values, second, y, count, scales.load(begin, count, buffers.s, buffers.z), limit, grid);
    out.store(begin, count, y);
  });
}

/// q = R(x / s) + z as codes.
Status quantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = in[0];
  const int64_t row = last_length(x);
  QuantSpec codes = spec;
  codes.ieee = codes.ieee && spec.format.specials != Specials::none;  // a format without NaN has no code for it
  elementwise<QuantizeBody>(Data(x), nullptr, Scales(in[1], zero_point(in, 2), x.shape, spec), Codes(out[0], spec, row),
                            x.dtype, Tiling(x.elements(), row, spec), codes, executor);
  return {};
}

/// y = R(x / s), the numbers that the codes stand for.
Status quantize_values(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = in[0];
  elementwise<QuantizeBody>(Data(x), nullptr, Scales(in[1], nullptr, x.shape, spec), Data(out[0]), x.dtype,
                            Tiling(x.elements(), 0, spec), spec, executor);
  return {};
}

/// x = (q - z) * s.
Status dequantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = out[0];
  const int64_t row = last_length(x);
  elementwise<DequantizeBody>(Codes(in[0], spec, row), nullptr, Scales(in[1], zero_point(in, 2), x.shape, spec),
                              Data(x), x.dtype, Tiling(x.elements(), row, spec), spec, executor);
  return {};
}

/// `count` indices of `axis`, from `first`.
TensorView slice(TensorView t, int axis, int64_t first, int64_t count) {
  t.data = static_cast<char*>(t.data) + first * t.strides[axis] * bytes_of(t.dtype);
  t.shape[axis] = count;
  return t;
}

/// y = R(x / t) * t, t being s, or half of it for some pairs of neighbours. An odd element at the end of an axis is a
/// pair by itself.
void fake_quantize_pairs(const TensorView& x, const TensorView& scale, const TensorView& out, const QuantSpec& spec,
                         Executor& executor) {
  const int axis = spec.block_axis();
  const int64_t n = x.shape[axis], even = n - n % 2;
  if (even > 0) {
    const TensorView from = slice(x, axis, 0, even), to = slice(out, axis, 0, even);
    // Elements 1, 0, 3, 2, ... of the axis.
    TensorView swapped = from;
    Walk partners;
    for (int d = 0; d < x.rank; ++d) {
      if (d != axis) {
        partners.push(from.shape[d], from.strides[d], 1);
        continue;
      }
      swapped = slice(from, axis, 1, even);
      partners.push(even / 2, 2 * from.strides[d], 1);
      partners.push(2, -from.strides[d], 1);
    }
    const Data other(swapped, partners);
    elementwise<FakeQuantizeBody>(Data(from), &other, Scales(scale, nullptr, from.shape, spec), Data(to), x.dtype,
                                  Tiling(from.elements(), 0, spec), spec, executor);
  }
  if (n > even) {
    const TensorView from = slice(x, axis, even, 1), to = slice(out, axis, even, 1);
    const TensorView last = slice(scale, axis, even / spec.block[axis], 1);
    elementwise<FakeQuantizeBody>(Data(from), nullptr, Scales(last, nullptr, from.shape, spec), Data(to), x.dtype,
                                  Tiling(from.elements(), 0, spec), spec, executor);
  }
}

/// y = dequantize(quantize(x)), without the codes.
Status fake_quantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = in[0];
  if (spec.scale_format == ScaleFormat::microexponents) {
    fake_quantize_pairs(x, in[1], out[0], spec, executor);
    return {};
  }
  elementwise<FakeQuantizeBody>(Data(x), nullptr, Scales(in[1], zero_point(in, 2), x.shape, spec), Data(out[0]),
                                x.dtype, Tiling(x.elements(), 0, spec), spec, executor);
  return {};
}

/// dx = dy where x didn't saturate, else 0.
Status fake_quantize_backward(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = in[0];
  const Data grad(in[1]);
  elementwise<FakeQuantizeBackwardBody>(Data(x), &grad, Scales(in[2], zero_point(in, 3), x.shape, spec), Data(out[0]),
                                        x.dtype, Tiling(x.elements(), 0, spec), spec, executor);
  return {};
}

/// s (and z) from the extremes of each group of x.
Status choose_qparams(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  if (choose_scales(in[0], out[0], zero_point(out, 1), spec, executor)) return {};
  return {ErrorKind::memory, "choose_qparams: out of memory for the partial extremes"};
}

/// choose_qparams, then a kernel that takes the scales as inputs. They are outputs of the whole.
Status choose_then(Kernel kernel, Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  if (Status status = choose_qparams(in, out.subspan(1), spec, executor); !status.ok()) return status;
  const TensorView operands[] = {in[0], out[1], out[out.size() - 1]};
  return kernel(Tensors(operands, out.size()), out.first(1), spec, executor);
}

Status quantize_dynamic(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  return choose_then(quantize, in, out, spec, executor);
}

Status fake_quantize_dynamic(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  return choose_then(fake_quantize, in, out, spec, executor);
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
         zero_point(in, 2),
         Data(in.size() > 2 ? in[2] : out[0]),
         Data(out[0])};
  const int64_t scales = out[0].elements();
  executor.run(
      scales, scales == 0 ? 1 : grad.elements() / scales,
      [](void* context, int64_t first, int64_t last) {
        const Task& t = *static_cast<const Task*>(context);
        Buffers buffers;
        for (int64_t index = first; index < last; ++index) {
          const float z = t.zero ? *t.zero_points.load(t.zero->elements() == 1 ? 0 : index, 1, buffers.z) : 0.0f;
          TreeSum sum;
          for_each_run_of_scale(index, t.shape.shape, t.spec, [&](int64_t begin, int64_t n) {
            // Packed codes are read from a byte's start, so from a little earlier.
            for (int64_t at = begin; at < begin + n;) {
              const int64_t skip = t.codes.lead(at), count = min(kTile - skip, begin + n - at);
              const float* q = t.codes.load(at - skip, count + skip, buffers.y) + skip;
              const float* g = t.grad.load(at, count, buffers.x);
              for (int64_t i = 0; i < count; ++i) sum.add(double(g[i]) * (double(q[i]) - double(z)));
              at += count;
            }
          });
          const float total = float(sum.finish());
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
  if (LearnScales::run(in[0], in[1], scale, zero_point(in, 4), out[0], out[1], factor, spec, executor)) return {};
  return {ErrorKind::memory, "out of memory for the partial sums"};
}

Status lsq_backward(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  return learn(in, out, in[2], number(in[3]), spec, executor);
}

/// TQT's numbers: the range [-domain, domain - 1] and the scale 2^ceil(t) / domain.
struct Threshold {
  QuantSpec spec;
  float scale;
  double factor;  ///< of the threshold's gradient: s * ln 2

  Threshold(const TensorView& t, const TensorView& n, const QuantSpec& given) : spec(given) {
    constexpr double kLn2 = 0.69314718055994530942;
    const double threshold = number(t), domain = number(n);
    const FloatEnvironment environment;
    spec.quant_min = float(-domain);
    spec.quant_max = float(domain - 1.0);
    scale = threshold_scale(float(threshold), float(domain));
    factor = double(scale) * kLn2;
  }

  /// The scale as a 0-d tensor, for as long as this object stays where it is.
  TensorView view() {
    TensorView v;
    v.data = &scale;
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
  return learn(in, out, threshold.view(), threshold.factor, threshold.spec, executor);
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
