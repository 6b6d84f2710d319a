"""One of two processes that train together: RANK PORT DEVICES. Run by test_processes_jax.py."""

from __future__ import annotations

import os
import sys
from typing import Any

rank, port, devices = (int(a) for a in sys.argv[1:])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import quark_jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
assert jax.process_count() == 2
assert len(jax.devices()) == 2 * devices

rng = np.random.default_rng(0)
x, y, w = (rng.standard_normal(shape, dtype=np.float32) for shape in ((32, 16), (32, 8), (8, 16)))
start = {"w": w, "s": np.full(8, 0.2, np.float32), "t": np.float32(0.1)}


def loss(parameters: Any, x: Any, y: Any) -> Any:
    """Weights of learned scales, activations of a dynamic scale (random rounding) and a learned one."""
    weights = quark_jax.lsq_quantize(parameters["w"], parameters["s"], quant_min=-8, quant_max=7, axis=0)
    spec = quark_jax.QuantSpec("int8", rounding="stochastic")
    inputs = quark_jax.fake_quantize(x, spec, seed=3)
    inputs = quark_jax.lsq_quantize(inputs, parameters["t"], quant_min=-128, quant_max=127)
    return jnp.mean((inputs @ weights.T - y) ** 2)


def step(parameters: Any, x: Any, y: Any) -> Any:
    value, gradients = jax.value_and_grad(loss)(parameters, x, y)
    return value, gradients, jax.tree.map(lambda a, g: a - 0.1 * g, parameters, gradients)


mesh = jax.make_mesh((2 * devices,), ("data",), axis_types=(AxisType.Auto,))
everywhere, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def on_mesh(a: Any, sharding: Any) -> Any:
    a = np.asarray(a)
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


placed = jax.tree.map(lambda a: on_mesh(a, everywhere), start), on_mesh(x, cut), on_mesh(y, cut)
compiled = jax.jit(step, out_shardings=everywhere).lower(*placed).compile()
text = compiled.as_text()
assert "all-gather(" not in text
assert "all-reduce" in text
got = compiled(*placed)
want = jax.jit(step)(start, x, y)
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a.addressable_shards[0].data), np.asarray(b)
    assert np.any(b)
    assert np.allclose(a, b, rtol=1e-5, atol=1e-6), (a, b)
print("same step", float(got[0]), len(jax.devices()))
