"""What the Pallas forms of a product have in common: a result's type, its sums' precision, how it ends."""

import jax
import jax.numpy as jnp


def like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
  """A result that inside a shard_map differs over the devices as x does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def precision(dtype) -> jax.lax.Precision | None:
  """fp32 is multiplied as fp32; bf16 products are exact as they are."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def as_it_is(y):
  """The end of a product to which nothing else is done."""
  return y
