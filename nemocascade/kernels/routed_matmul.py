"""Routed matmul (each row times its expert's matrix), and the routed MLP made of two of them."""

import functools

import jax
import jax.numpy as jnp

from nemocascade.errors import UserError, unknown
from nemocascade.kernels import routed_matmul_blocked as blocked
from nemocascade.kernels import routed_matmul_gpu as gpu
from nemocascade.kernels import routed_matmul_tpu as tpu
from nemocascade.kernels import routed_mlp_padded as padded
from nemocascade.kernels import routed_mlp_sorted
from nemocascade.kernels.groups import group_bounds, row_experts
from nemocascade.kernels.product import einsum, product

FORMS = ("definition", "blocked", "tpu", "gpu")
Tile = tpu.Tile | gpu.Tile


def routed_matmul_ref(x_ND, w_EDF, expert_N):
  """The definition: y[n] = x[n] @ w[expert[n]]."""
  return einsum("ND,NDF->NF", x_ND, w_EDF[expert_N])


def routed_matmul(
  x_ND, w_EDF, group_sizes_E, *, offset=0, form: str | None = None, tile: Tile | None = None,
  block: int | None = None, interpret: bool = False,
):  # fmt: skip
  """routed_matmul_ref on rows sorted by expert; expert e has group_sizes[e] rows.

  Args:
    x_ND: [N, D], bf16 or fp32.
    w_EDF: x's dtype; the matrices of the local experts, offset .. offset + E - 1 of those in group_sizes.
    group_sizes_E: int32, the number of rows of each expert, for the experts of all shards if `offset`
      is used. Groups that reach beyond row N are cut there. Rows after the last group, and rows of
      experts that are not in w_EDF, give 0 and get no gradient.
    offset: the first local expert, an int or an int32 scalar.
    form: one of FORMS. By default the fastest on the platform: tpu on TPUs, gpu on NVIDIA GPUs,
      else blocked.
    tile: for the tpu or gpu form; by default chosen from the shapes.
    block: rows of a block in the blocked form; by default chosen from the shapes.
    interpret: whether to run the tpu and gpu forms in the Pallas interpreter, on any platform.

  Returns:
    [N, F] of x's dtype; bf16 is summed in fp32.

  Raises:
    UserError: unknown form, or shapes or dtypes that do not match.
  """
  _check_form(form)
  (N, D), (E, K, _), G = x_ND.shape, w_EDF.shape, group_sizes_E.shape[0]
  if D != K:
    raise UserError(f"routed matmul: rows have {D} columns, but the experts' matrices have {K} rows")
  if x_ND.dtype != w_EDF.dtype:
    raise UserError(f"routed matmul: rows are {x_ND.dtype}, but the experts are {w_EDF.dtype}: cast one")
  if G < E or (isinstance(offset, int) and not 0 <= offset <= G - E):
    raise UserError(
      f"routed matmul: experts {offset} .. {offset} + {E - 1} of {G} group sizes: offset must be 0 to {G - E}"
    )
  bounds = group_bounds(group_sizes_E, N, E, offset)
  return _matmul(x_ND, w_EDF, bounds, form, tile, block, interpret)


def _check_form(form: str | None) -> None:
  if form is not None and form not in FORMS:
    raise unknown("form of the routed matmul", form, FORMS)


def _defined_product(x_ND, w, bounds, transpose):
  expert_N, inside_N = row_experts(bounds, x_ND.shape[0])
  w_EDF = jnp.swapaxes(w, 1, 2) if transpose else w
  return jnp.where(inside_N[:, None], routed_matmul_ref(x_ND, w_EDF, expert_N), 0)


def _defined_weight_product(x_ND, dy_NF, bounds, dtype):
  """dw[e]: the sum of the outer products of x and dy over the rows of expert e."""
  E = bounds.shape[0] - 1
  expert_N, inside_N = row_experts(bounds, x_ND.shape[0])
  x_ND, dy_NF = (jnp.where(inside_N[:, None], a, 0).astype(jnp.float32) for a in (x_ND, dy_NF))
  outer_NDF = einsum("ND,NF->NDF", x_ND, dy_NF)
  return jax.ops.segment_sum(outer_NDF, expert_N, E).astype(dtype)


def _by_form(form, *args, **forms):
  """Calls the given form, by default that of the platform that the program is compiled for."""
  if form is not None:
    return forms[form](*args)
  return jax.lax.platform_dependent(*args, tpu=forms["tpu"], cuda=forms["gpu"], default=forms["blocked"])


def _product(x_ND, w, bounds, transpose, form, tile, block, interpret):
  return _by_form(
    form, x_ND, w, bounds,
    definition=functools.partial(_defined_product, transpose=transpose),
    blocked=functools.partial(blocked.product, transpose=transpose, block=block),
    tpu=functools.partial(tpu.product, tile=tile, transpose=transpose, interpret=interpret),
    gpu=functools.partial(gpu.product, tile=tile, transpose=transpose, interpret=interpret),
  )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _matmul(x_ND, w_EDF, bounds, form, tile, block, interpret):
  return _product(x_ND, w_EDF, bounds, False, form, tile, block, interpret)


def _forward(x_ND, w_EDF, bounds, *how):
  return _product(x_ND, w_EDF, bounds, False, *how), (x_ND, w_EDF, bounds)


def _backward(form, tile, block, interpret, saved, dy_NF):
  x_ND, w_EDF, bounds = saved
  dx_ND = _product(dy_NF, w_EDF, bounds, True, form, tile, block, interpret)
  dw_EDF = _by_form(
    form, x_ND, dy_NF, bounds,
    definition=functools.partial(_defined_weight_product, dtype=w_EDF.dtype),
    blocked=functools.partial(blocked.weight_product, dtype=w_EDF.dtype, block=block),
    tpu=functools.partial(tpu.weight_product, tile=tile, dtype=w_EDF.dtype, interpret=interpret),
    gpu=functools.partial(gpu.weight_product, tile=tile, dtype=w_EDF.dtype, interpret=interpret),
  )  # fmt: skip
  return dx_ND, dw_EDF, None


_matmul.defvjp(_forward, _backward)


def routed_mlp(
  x_TD, up_EDF, down_EFD, expert_TX, weight_TX, *, form: str | None = None,
  tile: Tile | None = None, block: int | None = None, interpret: bool = False,
):  # fmt: skip
  """sum_x weight[t, x] * down[e]( relu(up[e] x[t])^2 ) with e = expert[t, x]; drops no token at any load.

  Args:
    expert_TX: int32, the X experts that each token chose. Choices outside 0 .. E - 1 contribute 0.
    form, tile, block, interpret: as for routed_matmul.

  Returns:
    [T, D] of x's dtype, and the number of choices that an expert processed, int32. It is counted
    where rows are assigned to experts, so that a lost row is noticed.

  Raises:
    UserError: unknown form.
  """
  _check_form(form)
  return _by_form(
    form, x_TD, up_EDF, down_EFD, expert_TX, weight_TX,
    definition=_defined_mlp,
    blocked=functools.partial(_padded_mlp, block=block),
    tpu=functools.partial(_sorted_mlp, kernels=tpu, tile=tile, interpret=interpret),
    gpu=functools.partial(_sorted_mlp, kernels=gpu, tile=tile, interpret=interpret),
  )  # fmt: skip


def _sorted_rows(expert_TX, E: int):
  """(order_N: the choices t * X + x sorted by expert, then by token; bounds: row range of each expert)."""
  N = expert_TX.size
  # lax.sort instead of argsort: inside shard_map the result of argsort is typed as replicated.
  expert_N, order_N = jax.lax.sort((expert_TX.reshape(N), jnp.arange(N, dtype=jnp.int32)), num_keys=1)
  bounds = jnp.searchsorted(expert_N, jnp.arange(E + 1, dtype=expert_N.dtype), method="compare_all")
  return order_N, bounds.astype(jnp.int32)


def _sorted_mlp(x_TD, up_EDF, down_EFD, expert_TX, weight_TX, kernels, tile, interpret):
  T, X = expert_TX.shape
  order_N, bounds = _sorted_rows(expert_TX, up_EDF.shape[0])
  _, place_N = jax.lax.sort((order_N, jnp.arange(T * X, dtype=jnp.int32)), num_keys=1)
  y_TD = routed_mlp_sorted.mlp(
    x_TD, up_EDF, down_EFD, weight_TX.reshape(T * X)[order_N], order_N // X, place_N.reshape(T, X), bounds,
    kernels, tile, interpret,
  )  # fmt: skip
  return y_TD, bounds[-1] - bounds[0]


def _padded_mlp(x_TD, up_EDF, down_EFD, expert_TX, weight_TX, block):
  (T, X), E = expert_TX.shape, up_EDF.shape[0]
  C = padded.capacity(T * X, E)
  if C >= T or E <= 2 * X:  # Sorting would save few products or none.
    return _defined_mlp(x_TD, up_EDF, down_EFD, expert_TX, weight_TX)
  order_N, bounds = _sorted_rows(expert_TX, E)
  block = block or padded.excess_rows(C, T * X, E)
  return padded.mlp(x_TD, up_EDF, down_EFD, weight_TX, order_N, bounds, C, block)


def _defined_mlp(x_TD, up_EDF, down_EFD, expert_TX, weight_TX):
  """Applies every expert to every row; experts that the row did not choose have weight 0."""
  E = up_EDF.shape[0]
  chosen_ETX = expert_TX[None] == jnp.arange(E)[:, None, None]
  weight_ET = jnp.sum(jnp.where(chosen_ETX, weight_TX[None], 0), axis=2)
  # A product for each expert: for one product with all of them XLA would transpose the experts at every call.
  h_ETF = einsum("ETD,EDF->ETF", jnp.broadcast_to(x_TD[None], (E, *x_TD.shape)), up_EDF)
  h_ETF = jnp.square(jax.nn.relu(h_ETF)) * weight_ET[..., None].astype(h_ETF.dtype)
  return einsum("ETF,EFD->TD", h_ETF, down_EFD), jnp.sum(chosen_ETX, dtype=jnp.int32)


def dense_mlp(x_TD, up_DN, down_ND, expert_TX, weight_TX, E: int, F: int):
  """`routed_mlp` and the shared expert by two products with all experts together, for few rows on CPUs.

  It multiplies more than the rows need. But XLA on the CPU divides a plain product among the cores, and a batch of
  small ones not; and nothing is sorted or gathered.

  Args:
    up_DN, down_ND: x's dtype; the matrices of the E experts side by side, and after them those of the shared expert,
      which is as wide as one expert or several (model.sampling_weights.for_steps).
    expert_TX: int32, from 0 to E - 1.
    F: width of an expert.

  Returns:
    [T, D] of x's dtype, and the number of choices, int32.
  """
  T, N = x_TD.shape[0], up_DN.shape[1]
  chosen_TXE = expert_TX[..., None] == jnp.arange(E)[None, None]
  weight_TE = jnp.sum(jnp.where(chosen_TXE, weight_TX[..., None].astype(jnp.float32), 0), axis=1)
  a_TN = jnp.square(jax.nn.relu(product(x_TD, up_DN, 1, jnp.float32)))
  a_TEF = a_TN.reshape(T, N // F, F) * jnp.pad(weight_TE, ((0, 0), (0, N // F - E)), constant_values=1.0)[..., None]
  return product(a_TEF.reshape(T, N).astype(x_TD.dtype), down_ND), jnp.sum(chosen_TXE, dtype=jnp.int32)
