"""Values are written into an array of any dtype as they are, and a cache of bf16 is not converted for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemocascade.kernels.scatter import put


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32))
def test_values_are_put_and_places_beyond_the_end_are_ignored(dtype):
  old_SD, new_ND = (jax.random.normal(jax.random.key(i), (n, 3)).astype(dtype) * 9 for i, n in ((0, 5), (1, 3)))
  index_N = jnp.array([4, 5, 1])  # 5 does not exist.
  expected_SD = np.array(old_SD)
  expected_SD[[4, 1]] = np.array(new_ND)[[0, 2]]
  np.testing.assert_array_equal(np.array(jax.jit(put)(old_SD, index_N, new_ND)), expected_SD)


def test_no_cache_of_bf16_is_converted_to_be_written():
  cache_BKSH, new_BKH = jnp.zeros((4, 2, 64, 8), jnp.bfloat16), jnp.ones((4, 2, 8), jnp.bfloat16)
  write = jax.jit(jax.vmap(lambda cache_KSH, new_KH, length: put(cache_KSH, (slice(None), length), new_KH)))
  program = write.lower(cache_BKSH, new_BKH, jnp.arange(4)).compile().as_text()
  assert "[4,2,64,8]" in program and "f32[4,2,64,8]" not in program
