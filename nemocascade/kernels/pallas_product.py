"""What the Pallas forms of a product have in common: a result's type, how it ends."""

import jax


def like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
  """A result that inside a shard_map differs over the devices as x does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def as_it_is(y):
  """The end of a product to which nothing else is done."""
  return y
