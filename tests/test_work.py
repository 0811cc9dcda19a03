"""Operations of traced programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from nemocascade.kernels.attention import attention
from nemocascade.kernels.routed_matmul import routed_matmul
from nemocascade.mesh import make_mesh
from nemocascade.runtime.work import program_flops


def flops(fn, *shapes, **how):
  return program_flops(jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)), **how)


def f32(*shape):
  return shape, jnp.float32


def test_products_in_loops_and_gradients_are_counted():
  step = lambda x, w: jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])
  assert flops(step, f32(3, 4), f32(5, 4, 4)) == 5 * 2 * 3 * 4 * 4
  assert flops(jax.grad(step, argnums=(0, 1)), f32(3, 4), f32(5, 4, 4)) == 3 * 5 * 2 * 3 * 4 * 4
  batched = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
  assert flops(batched, f32(2, 3, 4), f32(2, 4, 5)) == 2 * 2 * 3 * 4 * 5


def test_of_platforms_the_named_one_counts_and_of_branches_the_largest():
  once, twice = (lambda x: x @ x), (lambda x: x @ x @ x)
  either = lambda x: jax.lax.platform_dependent(x, cpu=twice, tpu=once, default=twice)
  assert [flops(either, f32(4, 4), platform=name) for name in ("tpu", "cpu", "cuda")] == [128, 256, 256]
  assert flops(lambda x: jax.lax.cond(x[0, 0] > 0, once, twice, x), f32(4, 4)) == 256


def test_a_routed_product_counts_its_rows_once():
  sizes = (5,), jnp.int32
  assert flops(routed_matmul, f32(64, 16), f32(5, 16, 8), sizes) == 2 * 64 * 16 * 8


@pytest.mark.parametrize("document, blocks", [(128, 4), (256, 4 + 2), (384, 4 + 3), (4096, 4 + 6)])
def test_attention_counts_the_blocks_that_its_documents_meet(document, blocks):
  """512 tokens are four blocks of 128; documents of 384 leave the last block alone."""
  ids, q, k = ((1, 512), jnp.int32), f32(1, 512, 1, 2, 8), f32(1, 512, 1, 8)
  assert flops(attention, q, k, k, ids, document=document) == 2 * 2 * blocks * 128**2 * 8 * 2


def test_attention_counts_the_parts_that_it_computes_on_the_diagonal():
  """Documents of 2,048 tokens are two blocks, of which parts of 128 keys leave out the queries before them."""
  ids, q, k = ((1, 16_384), jnp.int32), f32(1, 16_384, 1, 2, 8), f32(1, 16_384, 1, 8)
  pairs = 8 * (1024**2 + 2 * sum(128 * (1024 - start) for start in range(0, 1024, 128)))
  assert flops(attention, q, k, k, ids, document=2_048) == 2 * 2 * pairs * 8 * 2


def test_a_gradient_inside_a_checkpoint_counts_the_kernels_of_attention():
  """Forward, again in the backward pass, and 3 + 4 products of the gradients, for the diagonal blocks of 128."""
  ids, q, k = ((1, 512), jnp.int32), f32(1, 512, 1, 2, 8), f32(1, 512, 1, 8)
  loss = jax.checkpoint(lambda q, k, v, ids: jnp.sum(attention(q, k, v, ids)))
  gradients = jax.grad(loss, argnums=(0, 1, 2))
  assert flops(gradients, q, k, k, ids, document=128) == 2 * (2 + 2 + 3 + 4) * 4 * 128**2 * 8 * 2


def test_work_inside_shard_map_counts_on_all_its_devices():
  mesh = make_mesh(data=4, expert=2)
  spec = jax.sharding.PartitionSpec(("data", "expert"))
  own = jax.shard_map(lambda x: x @ jnp.ones((4, 4)), mesh=mesh, in_specs=spec, out_specs=spec)
  assert flops(own, f32(16, 4)) == 2 * 16 * 4 * 4
