"""On an NVIDIA GPU the compiled kernels equal the definition in value and gradients."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)) or shutil.which("nvidia-smi") is None,
    reason="needs an NVIDIA GPU: pip install -e '.[cuda]' on a machine that has one",
  ),
]

# Run in a separate process, because all other tests use CPUs only.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from nemocascade.kernels.routed_matmul import routed_matmul, routed_mlp
jax.config.update("jax_default_matmul_precision", "highest")  # Of the definition: fp32 would be TF32.

def same(got, expected, tolerance):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1.0), np.abs(a - b).max()

how = dict(interpret=True, form="gpu") if sys.argv[1] == "interpret" else {}
N, D, F, E = (int(n) for n in sys.argv[2:])
for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)):
  keys = jax.random.split(jax.random.key(0), 5)
  x, w, dy = (jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, [(N, D), (E, D, F), (N, F)]))
  for sizes in ([N // E] * E, [N - 3] + [0] * (E - 2) + [1], [7] * E):
    sizes = jnp.array(sizes, jnp.int32)
    def both(form, x, w, dy):
      y, back = jax.vjp(lambda x, w: routed_matmul(x, w, sizes, **form), x, w)
      return y, back(dy)
    definition = both(dict(form="blocked"), x.astype(jnp.float32), w.astype(jnp.float32), dy.astype(jnp.float32))
    same(jax.jit(lambda *a: both(how, *a))(x, w, dy), definition, tolerance)
  down = jax.random.normal(keys[3], (E, F, D)).astype(dtype) / F**0.5
  expert = jax.random.randint(keys[4], (N, 1), 0, E)
  weight = jnp.ones((N, 1), dtype)
  mlp = lambda form, *a: routed_mlp(*a[:3], expert, a[3], **form)[0].astype(jnp.float32)
  of = lambda form: jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(mlp(form, *a))), argnums=(0, 1, 2, 3)))
  args = x, w / D**0.5, down, weight
  same(of(how)(*args)[1], of(dict(form="definition"))(*(a.astype(jnp.float32) for a in args))[1], 4 * tolerance)
print("the same")
"""


@pytest.mark.parametrize("shape", ["1000 136 200 5", "4096 2688 1856 8"], ids=["ragged", "nano"])
def test_compiled_kernels_are_the_definition(shape):
  environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  command = [sys.executable, "-c", PROGRAM, "compiled", *shape.split()]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0 and done.stdout.strip() == "the same", done.stderr[-2000:]
