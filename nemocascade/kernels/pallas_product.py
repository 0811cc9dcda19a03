"""Helpers shared by the Pallas kernels: the memory they may use, the type of a result, the default `finish` of a product."""

import jax

VMEM = 56 << 20  # Bytes that a TPU kernel may use: v5p, v5e, v6e and v7x have at least 64 MiB.


def like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
  """The type of a result that inside shard_map varies over the same mesh axes as x."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def as_it_is(y):
  """The default `finish` of a product: returns y unchanged."""
  return y
