"""Replaces values of an array at indices."""

import jax
import jax.numpy as jnp


def put(array, index, new):
  """array.at[index].set(new), where an index that does not exist is ignored. `new` has the array's dtype.

  XLA on the CPU scatters 16-bit floats in fp32: it converts the whole array to fp32 and back, which for a cache costs
  far more than what is written. So their bits are written as integers.
  """
  if array.dtype != jnp.bfloat16 and array.dtype != jnp.float16:
    return array.at[index].set(new, mode="drop")
  bits = lambda a: jax.lax.bitcast_convert_type(a, jnp.uint16)
  return jax.lax.bitcast_convert_type(bits(array).at[index].set(bits(new), mode="drop"), array.dtype)
