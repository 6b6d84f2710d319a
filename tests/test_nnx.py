"""quark_jax.nnx: the same states and outputs as quark_torch.nn, bit for bit, and what belongs to Flax."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
torch = pytest.importorskip("torch")

import jax.numpy as jnp

import quark_jax as qj
import quark_torch.nn
from quark_jax.nnx import (
    FakeQuantize,
    LSQFakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    QuantizedLinear,
    TQTFakeQuantize,
)
from quark_kernels import PRESETS, QuantSpec, interop
from test_nn import LSQ, SHAPE, SPECS, WRONG, batch, same

import quark_jax.nnx  # isort: skip


def array(x: np.ndarray) -> Any:
    return jnp.asarray(x)


def call(module: Any, x: Any) -> Any:
    return module(x)


CALLS = {"eager": call, "jit": nnx.jit(call)}


def leaves(module: Any) -> dict[str, np.ndarray]:
    """The state's arrays, named as in torch's state_dict."""
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(module))}


def expect_same_state(module: Any, twin: Any) -> None:
    ours, theirs = leaves(module), twin.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert same(theirs[name], ours[name].view(np.int8) if ours[name].itemsize == 1 else ours[name]), name


# ---- the same as torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observer", "how"),
    [("MinMaxObserver", "jit"), ("MovingAverageMinMaxObserver", "jit"), ("MinMaxObserver", "eager")],
)
@pytest.mark.parametrize("name", SPECS)
def test_observers_as_in_torch(name: str, observer: str, how: str) -> None:
    spec, places = SPECS[name]
    module = FakeQuantize(spec, getattr(quark_jax.nnx, observer)(), **places)
    twin = quark_torch.nn.FakeQuantize(spec, getattr(quark_torch.nn, observer)(), **places)
    expect_same_state(module, twin)
    for seed in range(5):
        x = batch(seed)
        if seed in (0, 3):
            x[1, 2], x[4, 9] = np.nan, -np.inf
        if seed == 2:
            x[:, 5:] = 0
        assert same(twin(torch.from_numpy(x)), CALLS[how](module, array(x)))
        expect_same_state(module, twin)
    module.eval()
    twin.eval()
    x = batch(9) * 3
    assert same(twin(torch.from_numpy(x)), CALLS[how](module, array(x)))
    expect_same_state(module, twin)


def test_moving_averages_as_in_torch() -> None:
    """XLA would fuse the product with the sum, and give other bits, in about one of fifty."""
    module = FakeQuantize("int8", MovingAverageMinMaxObserver(0.01), axis=0)
    twin = quark_torch.nn.FakeQuantize("int8", quark_torch.nn.MovingAverageMinMaxObserver(0.01), axis=0)
    for seed in range(3):
        x = batch(seed, (5000, 3))
        CALLS["jit"](module, array(x))
        twin(torch.from_numpy(x))
        expect_same_state(module, twin)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_observed_as_in_torch(name: str) -> None:
    if PRESETS[name].element.is_cast or PRESETS[name].scale_format == "microexponents":
        with pytest.raises(ValueError, match="whose scale can't be given"):
            FakeQuantize(name, MinMaxObserver())
        return
    module = FakeQuantize(name, MinMaxObserver())
    twin = quark_torch.nn.FakeQuantize(name, quark_torch.nn.MinMaxObserver())
    for seed in range(2):
        x = batch(seed, (4, 40))
        assert same(twin(torch.from_numpy(x)), module(array(x)))
        expect_same_state(module, twin)


LEARNED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *(("LSQFakeQuantize", (spec,), keywords) for spec, keywords, _, _ in LSQ),
    ("LSQFakeQuantize", (4,), {"scale": 0.3, "grad_factor": 0.5}),
    *(("TQTFakeQuantize", (bits,), {"init": init}) for bits in (2, 4, 8, 16) for init in ("mean", "max")),
    ("TQTFakeQuantize", (4,), {}),
    ("TQTFakeQuantize", (4,), {"log_threshold": 0.25, "rounding": "floor"}),
]


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize(("name", "arguments", "keywords"), LEARNED, ids=str)
def test_learned_scales_as_in_torch(name: str, arguments: Any, keywords: dict[str, Any], how: str) -> None:
    if keywords.get("axis") is not None:
        keywords = {**keywords, "channels": SHAPE[keywords["axis"]]}
    module, twin = getattr(quark_jax.nnx, name)(*arguments, **keywords), getattr(quark_torch.nn, name)(
        *arguments, **keywords
    )  # fmt: skip
    expect_same_state(module, twin)

    def loss(module: Any, x: Any) -> Any:
        y = module(x)
        return (y * y).sum(), y

    gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    if how == "jit":
        gradients = nnx.jit(gradients)
    for seed in range(4):
        x = batch(seed) * (0 if seed == 0 else 1)  # the first starts nothing
        if seed == 1:
            x[1] = np.nan  # nor does a channel of this
        tensor = torch.from_numpy(x).requires_grad_()
        y = twin(tensor)
        twin.zero_grad()
        y.square().sum().backward()
        (_, z), (to_module, to_x) = gradients(module, array(x))
        assert same(y, z)
        assert same(tensor.grad, to_x)
        parameter = next(iter(twin.parameters()))
        assert same(parameter.grad, jax.tree.leaves(to_module)[0])
        expect_same_state(module, twin)
    assert same(twin.scale, module.scale[...] if name == "LSQFakeQuantize" else module.scale)
    q = qj.quantize(array(x), module.spec, scale=module.scale[...])
    assert same(y, q.dequantize())


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_tqt_mean_as_in_torch(bits: int, how: str) -> None:
    """Next to powers of two, of numbers of every size, and where nothing starts."""
    ends = [2.0**power * near for power in (-126, -125, -3, 5, 126) for near in (1 - 2**-24, 1, 1 + 2**-23)]
    small = np.full(1000, 2.0**-127, np.float32)  # numbers that XLA flushes, of a sum that it doesn't
    for x in (*(np.full(1, end / 2, np.float32) for end in ends), small, 0 * small, batch(1, (50, 40))):
        module, twin = TQTFakeQuantize(bits), quark_torch.nn.TQTFakeQuantize(bits)
        assert same(twin(torch.from_numpy(x)), CALLS[how](module, array(x)))
        expect_same_state(module, twin)


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("name", ["LSQFakeQuantize", "TQTFakeQuantize"])
def test_eval_keeps_nothing(name: str, how: str) -> None:
    module, twin = getattr(quark_jax.nnx, name)(4), getattr(quark_torch.nn, name)(4).eval()
    module.eval()
    x = batch(0)
    assert same(twin(torch.from_numpy(x)), CALLS[how](module, array(x)))
    expect_same_state(module, twin)
    assert not module.initialized[...]


# ---- Flax ------------------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> Any:
    return nnx.Sequential(
        FakeQuantize("uint8", MovingAverageMinMaxObserver(0.1), axis=-1),
        nnx.Linear(16, 8, rngs=nnx.Rngs(seed)),
        LSQFakeQuantize(4),
        jax.nn.relu,
        nnx.Linear(8, 3, rngs=nnx.Rngs(seed + 1)),
        TQTFakeQuantize(8),
    )


def test_modes() -> None:
    x = array(batch(0))
    module = FakeQuantize("int8", MinMaxObserver())
    module(x)
    scale = module.scale[...]
    module.eval()
    module(2 * x)
    assert module.scale[...] == scale
    module.enable_observer()
    module(2 * x)
    assert module.scale[...] == 2 * scale
    module.train()
    module.disable_observer()
    module(4 * x)
    assert module.scale[...] == 2 * scale
    module.disable_fake_quant()
    assert (module(x) == x).all()
    module.enable_fake_quant()
    assert not (module(x) == x).all()
    view = nnx.view(nnx.Sequential(module, LSQFakeQuantize(4)), use_running_average=True)
    assert view.layers[0].use_running_average
    assert view.layers[1].use_running_average


def test_kinds_of_state() -> None:
    model = network()
    parameters, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)[1:]
    names = {path[-1] for path, _ in nnx.to_flat_state(parameters)}
    assert names == {"kernel", "bias", "scale", "log_threshold"}
    names = {path[-1] for path, _ in nnx.to_flat_state(statistics)}
    assert names == {"min_val", "max_val", "scale", "zero_point", "initialized"}
    assert not nnx.to_flat_state(rest)


def test_states_go_round() -> None:
    """Through plain dictionaries of NumPy arrays, as a checkpoint's, into a module that has seen no data."""
    model, fresh, x = network(), network(5), array(batch(0))
    for _ in range(2):
        model(x)
    model.eval()
    y = model(x)
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, saved))
    nnx.update(fresh, state)
    fresh.eval()
    assert same(y, fresh(x))
    merged = nnx.merge(*nnx.split(model))
    assert same(y, merged(x))
    assert same(y, copy.deepcopy(model)(x))
    assert same(y, nnx.clone(model)(x))
    flat, structure = jax.tree.flatten(nnx.state(model))
    other = network(7)
    nnx.update(other, jax.tree.unflatten(structure, flat))
    other.eval()
    assert same(y, nnx.jit(call)(other, x))


def test_abstract_modules() -> None:
    abstract = nnx.eval_shape(network)
    assert abstract.layers[2].scale.shape == ()


def test_gradients_around_a_module() -> None:
    """A module that has started is a constant to jax.grad in eval mode, and a learned one in training mode too."""
    x = array(batch(0))
    module, learned = FakeQuantize("int4", MinMaxObserver()), LSQFakeQuantize(4)
    module(2 * x)
    learned(x)
    module.eval()
    gradient = jax.grad(lambda x: module(x).sum())(3 * x)
    expected = jax.grad(lambda x: qj.fake_quantize(x, "int4", scale=module.scale[...]).sum())(3 * x)
    assert same(gradient, expected)
    assert jax.grad(lambda x: learned(x).sum())(x).shape == x.shape
    assert same(module(x), jax.jit(lambda x: module(x))(x))


def test_vmap_over_a_frozen_module() -> None:
    module, x = FakeQuantize("int8", MinMaxObserver()), array(batch(0, (3, 4, 5)))
    module(x)
    module.eval()
    assert same(module(x), jax.vmap(module)(x))


@pytest.mark.parametrize("kind", ["lsq", "tqt", "observer"])
def test_training_reduces_the_loss(kind: str) -> None:
    optax = pytest.importorskip("optax")
    random = np.random.default_rng(0)
    x, target = random.standard_normal((256, 8)).astype(np.float32), random.standard_normal((8, 3)).astype(np.float32)
    y = x @ target

    class Rounded(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(nnx.initializers.lecun_normal()(jax.random.key(0), (8, 3)))
            kinds: dict[str, Any] = {
                "lsq": lambda: (LSQFakeQuantize(4), LSQFakeQuantize(4, axis=1, channels=3)),
                "tqt": lambda: (TQTFakeQuantize(4), TQTFakeQuantize(4)),
                "observer": lambda: (
                    FakeQuantize("int4", MovingAverageMinMaxObserver(0.1)),
                    FakeQuantize("int4", MinMaxObserver(), axis=1),
                ),
            }
            self.of_x, self.of_kernel = kinds[kind]()

        def __call__(self, x: Any) -> Any:
            return self.of_x(x) @ self.of_kernel(self.kernel[...])

    model = Rounded()
    optimizer = nnx.Optimizer(model, optax.adam(0.03), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses = []
    for i in range(80):
        losses.append(float(step(model, optimizer, x, y)))
        if i == 0:
            starts = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert losses[-1] < 0.15 * losses[0]
    for start, now in zip(starts, jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True):
        assert not np.array_equal(start, now)


# ---- serving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [None, True])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_quantized_linear(name: str, packed: bool | None) -> None:
    if packed and not (PRESETS[name].element.can_pack or name == "bfp16"):
        with pytest.raises(ValueError, match="packed is True"):
            QuantizedLinear(40, 6, name, packed=True)
        return
    linear, x = nnx.Linear(40, 6, rngs=nnx.Rngs(0)), array(batch(0, (3, 40)))
    twin = torch.nn.Linear(40, 6)
    with torch.no_grad():
        twin.weight.copy_(interop.to_torch(linear.kernel[...]).T)
    layer = QuantizedLinear.from_linear(linear, name, packed=packed)
    q = quark_torch.nn.QuantizedLinear.from_linear(twin, name, packed=packed).weight
    for part in q.ARRAYS:
        theirs, ours = getattr(q, part), getattr(layer.weight, part)
        assert (ours is None) == (theirs is None)
        assert ours is None or same(theirs, np.asarray(ours).view(np.int8) if ours.itemsize == 1 else ours)
    y = layer(x)
    assert same(y, x @ layer.weight.dequantize().T + linear.bias[...])
    fresh = QuantizedLinear(40, 6, name, packed=packed)
    nnx.update(fresh, nnx.state(layer))
    assert same(y, fresh(x))
    if packed is None:
        assert nnx.jit(call)(layer, x).shape == (3, 6)
    assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))} == {"bias"}


def test_quantized_linear_arguments() -> None:
    linear = nnx.Linear(12, 5, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer = QuantizedLinear.from_linear(linear, "int4", group_size=4, packed=True)
    assert layer.bias is None
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.scale.shape) == ((5, 12), jnp.bfloat16, (5, 3))
    x = jnp.ones((2, 3, 12), jnp.bfloat16)
    assert jax.grad(lambda x: layer(x).sum())(x).shape == x.shape
    stochastic = QuantSpec("int4", rounding="stochastic")
    rounded = QuantizedLinear.from_linear(linear, stochastic, seed=5)
    assert same(rounded.weight.qvalue, qj.quantize(linear.kernel[...].T, stochastic, seed=5).qvalue)
    with pytest.raises(TypeError, match="linear is a .*Conv; allowed: flax.nnx.Linear"):
        QuantizedLinear.from_linear(nnx.Conv(1, 1, 1, rngs=nnx.Rngs(0)), "int8")
    with pytest.raises(ValueError, match="in_features is -1"):
        QuantizedLinear(-1, 4, "int8")


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("of_bias", ["float32", "bfloat16"])
def test_quantized_linear_computes_in_the_dtype_of_x(dtype: str, of_bias: str, use_bias: bool) -> None:
    linear = nnx.Linear(12, 5, use_bias=use_bias, param_dtype=of_bias, rngs=nnx.Rngs(0))
    layer, x = QuantizedLinear.from_linear(linear, "int8"), array(batch(0, (2, 12))).astype(dtype)
    y, product = layer(x), x @ layer.weight.dequantize(x.dtype).T
    assert y.dtype == x.dtype
    assert same(y, product + layer.bias[...].astype(dtype) if use_bias else product)
    if use_bias:
        assert jax.tree.leaves(nnx.grad(lambda layer: layer(x).sum())(layer))[0].dtype == of_bias


def test_stochastic() -> None:
    spec, x = QuantSpec("int4", rounding="stochastic"), array(batch(0))
    module = FakeQuantize(spec, MinMaxObserver())
    assert same(module(x, seed=3), qj.fake_quantize(x, spec, seed=3))


# ---- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [message for _, _, message in WRONG])
def test_wrong_arguments_as_in_torch(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls, with this module's classes and arrays, and the same errors."""
    (wrong, error), = ((wrong, error) for wrong, error, text in WRONG if text == message)  # fmt: skip
    for name in quark_torch.nn.__all__:
        monkeypatch.setitem(wrong.__globals__, name, getattr(quark_jax.nnx, name))
    ones = lambda *shape, dtype=np.float32: jnp.ones(shape, dtype)  # noqa: E731
    numbers = type("torch", (), {"ones": staticmethod(ones), "int8": np.int8})
    monkeypatch.setitem(wrong.__globals__, "torch", numbers)
    with pytest.raises(error, match=message):
        wrong()


def test_groups_must_stay() -> None:
    module = FakeQuantize("int8", MinMaxObserver(), axis=1)
    module(jnp.ones((3, 4)))
    module(jnp.ones((0, 4)))
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\) and so scales of \(1, 5\).* before have \(1, 4\)"):
        nnx.jit(call)(module, jnp.ones((3, 5)))


@pytest.mark.parametrize("module", ["quark_jax", "quark_jax.nnx"])
def test_without_flax(module: str) -> None:
    code = f"import sys; sys.modules['flax'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if module == "quark_jax":
        assert done.returncode == 0, done.stderr
    else:
        assert (
            done.stderr.splitlines()[-1] == "ImportError: quark_jax.nnx needs flax: pip install 'quark-kernels[flax]'"
        )
