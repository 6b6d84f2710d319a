// The CPU kernels. Compiled once per level with QUARK_LEVEL naming it; the flags differ, the source doesn't.
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

/// out = body(x, grad, s, z), tile by tile. In and Out: Data or Codes.
template <class Body, class In, class Out>
void elementwise(const In& x, const Data* grad, const Scales& scales, const Out& out, float limit, const Tiling& tiling,
                 const QuantSpec& spec, Executor& executor) {
  const TileLoop loop = tile_loop_for<Body>(spec, scales.has_zero_points());
  const Grid grid = make_grid(spec);
  for_each_tile(executor, tiling, [&](int64_t begin, int64_t count) {
    Buffers buffers;
    alignas(64) float gradients[kTile];
    const float* values = x.load(begin, count, buffers.x);
    const float* g = grad ? grad->load(begin, count, gradients) : values;
    float* y = out.target(begin, buffers.y);
    loop(values, g, y, count, scales.load(begin, count, buffers.s, buffers.z), limit, grid);
    out.store(begin, count, y);
  });
}

/// q = R(x / s) + z as codes.
Status quantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = in[0];
  const int64_t row = last_length(x);
  elementwise<QuantizeBody>(Data(x), nullptr, Scales(in[1], zero_point(in, 2), x.shape, spec), Codes(out[0], spec, row),
                            0.0f, Tiling(x.elements(), row, spec), spec, executor);
  return {};
}

/// x = (q - z) * s.
Status dequantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = out[0];
  const int64_t row = last_length(x);
  elementwise<DequantizeBody>(Codes(in[0], spec, row), nullptr, Scales(in[1], zero_point(in, 2), x.shape, spec),
                              Data(x), limit_of(x.dtype), Tiling(x.elements(), row, spec), spec, executor);
  return {};
}

/// y = dequantize(quantize(x)), without the codes.
Status fake_quantize(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = in[0];
  elementwise<FakeQuantizeBody>(Data(x), nullptr, Scales(in[1], zero_point(in, 2), x.shape, spec), Data(out[0]),
                                limit_of(out[0].dtype), Tiling(x.elements(), 0, spec), spec, executor);
  return {};
}

/// dx = dy where x didn't saturate, else 0.
Status fake_quantize_backward(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const TensorView& x = in[0];
  const Data grad(in[1]);
  elementwise<FakeQuantizeBackwardBody>(Data(x), &grad, Scales(in[2], zero_point(in, 3), x.shape, spec), Data(out[0]),
                                        0.0f, Tiling(x.elements(), 0, spec), spec, executor);
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

/// Every element of `from` into `to`; one of them is Data, the other Codes.
template <class From, class To>
void move_codes(const From& from, const To& to, const Tiling& tiling, Executor& executor) {
  for_each_tile(executor, tiling, [&](int64_t begin, int64_t count) {
    alignas(64) float buffer[kTile];
    to.store(begin, count, from.load(begin, count, buffer));
  });
}

/// Codes one a byte to a bit stream per row of the last axis. Bits above the width are dropped.
Status pack(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const int64_t row = last_length(in[0]);
  move_codes(Data(in[0]), Codes(out[0], spec, row), Tiling(in[0].elements(), row, spec), executor);
  return {};
}

/// A bit stream per row of the last axis to codes one a byte.
Status unpack(Tensors in, Tensors out, const QuantSpec& spec, Executor& executor) {
  const int64_t row = last_length(out[0]);
  move_codes(Codes(in[0], spec, row), Data(out[0]), Tiling(out[0].elements(), row, spec), executor);
  return {};
}

}  // namespace

const Kernel kernels[kOpCount] = {
#define QUARK_OP(name, ins, outs) name,
#include "../ops.inc"
#undef QUARK_OP
};

}  // namespace quark::QUARK_LEVEL
