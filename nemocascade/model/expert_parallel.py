"""The routed MLP over a mesh: rows are sent to the devices that hold their experts, results are sent back."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from nemocascade.errors import UserError, unknown
from nemocascade.kernels.routed_matmul import routed_matmul, routed_mlp
from nemocascade.mesh import BATCH

FORMS = ("auto", "exchange", "gather")
# With at most this many tokens in an expert group (the devices that share one set of experts), every
# device processes all of them: reading the experts then costs more than the wasted products.
GATHER_TOKENS = 128
# Most rows of the receive buffer. It has room for the worst case, in which all tokens go to one device.
# Larger batches are processed in pieces, so that no row is dropped whatever the router chooses.
BUFFER_ROWS = 1 << 18


def sharded_routed_mlp(
  mesh: Mesh | None, x_TD, up_EDF, down_EFD, expert_TX, weight_TX, *, whole=False, form="auto",
  buffer_rows=BUFFER_ROWS,
):  # fmt: skip
  """kernels.routed_matmul.routed_mlp with tokens sharded over all devices and experts over `expert`.

  Without a mesh, or on a single device, it calls that function. T is any number (padded to a multiple
  of the devices). Experts may also be sharded over `data` (fully sharded); they are gathered here.

  Args:
    whole: whether no expert is sharded over `data`.
    form: "exchange" sends rows to the devices of their experts, "gather" sends all tokens of an expert
      group to each of its devices, "auto" chooses by the number of tokens (GATHER_TOKENS).
    buffer_rows: most rows of the receive buffer.

  Returns:
    [T, D] of x's dtype, and the number of choices that an expert processed, int32, counted on the
    devices that received them.

  Raises:
    UserError: the mesh's `expert` does not divide E, or the form is unknown.
  """
  if form not in FORMS:
    raise unknown("form of the sharded routed MLP", form, FORMS)
  product = _product_form(mesh)
  if mesh is None or mesh.size == 1:
    return routed_mlp(x_TD, up_EDF, down_EFD, expert_TX, weight_TX, form=product)
  (T, D), E, X = x_TD.shape, up_EDF.shape[0], expert_TX.shape[1]
  data, group = mesh.shape["data"], mesh.shape["expert"]
  check_experts(E, mesh.shape["expert"])
  here = -(-T // mesh.size)  # Tokens per device.
  if form == "auto":
    form = "gather" if group == 1 or here * group <= GATHER_TOKENS else "exchange"
  pieces = -(-here * group * min(X, E // group) // buffer_rows) if form == "exchange" else 1
  cut = "data" if D % data == 0 and not whole else None
  tokens = PartitionSpec(BATCH, None)

  def local(x_TD, up_EDF, down_EFD, expert_TX, weight_TX):
    up_EDF, down_EFD = _whole_experts(up_EDF, down_EFD, sharded=cut is not None)
    if form == "gather":
      y_TD, rows = _gather(x_TD, up_EDF, down_EFD, expert_TX, weight_TX, product)
      return y_TD, rows[None]
    native = mesh.devices.flat[0].platform != "cpu"
    part = functools.partial(_exchange, up_EDF, down_EFD, native=native, group=group, product=product)
    if pieces == 1:
      y_TD, rows = part((x_TD, expert_TX, weight_TX))
      return y_TD, rows[None]
    split = lambda a: _padded(a, pieces).reshape(pieces, -1, a.shape[1])
    xs = tuple(map(split, (x_TD, expert_TX, weight_TX)))
    y_PTD, rows_P = jax.lax.map(jax.checkpoint(part), xs)
    return y_PTD.reshape(-1, D)[:here], jnp.sum(rows_P)[None]

  y_TD, rows = jax.shard_map(
    local, mesh=mesh,
    in_specs=(tokens, PartitionSpec("expert", cut, None), PartitionSpec("expert", None, cut), tokens, tokens),
    out_specs=(tokens, PartitionSpec(BATCH)),
  )(_padded(x_TD, mesh.size), up_EDF, down_EFD, _padded(expert_TX, mesh.size), _padded(weight_TX, mesh.size))  # fmt: skip
  padding = -(-here // pieces) * pieces * mesh.size - T  # Padding chose expert 0 and was counted.
  return y_TD[:T], jnp.sum(rows) - padding * X


def check_experts(E: int, group: int) -> None:
  """Raises UserError if a group of devices, the size of the mesh's axis `expert`, does not divide the E experts."""
  if E % group:
    raise UserError(f"mesh.expert={group} does not divide model.n_routed_experts={E}: give a divisor of {E}")


def _product_form(mesh: Mesh | None) -> str | None:
  """The form of the routed matmul for the mesh's devices, which may be of another machine (when compiling)."""
  if mesh is None:
    return None
  platform = mesh.devices.flat[0].platform
  return platform if platform in ("tpu", "gpu") else "blocked"


def _padded(a, parts: int):
  """Pads the first axis of a matrix with zeros to a multiple of `parts`. Padded tokens have weight 0."""
  return jnp.pad(a, ((0, -a.shape[0] % parts), (0, 0)))


def _whole_experts(up_EDF, down_EFD, *, sharded: bool):
  """The device's experts (in shard_map), gathered over `data` if their axis D is sharded there."""
  if sharded:
    up_EDF = jax.lax.all_gather(up_EDF, "data", axis=1, tiled=True)
    return up_EDF, jax.lax.all_gather(down_EFD, "data", axis=2, tiled=True)
  # With this cast their gradients are summed over `data`.
  return tuple(jax.lax.pcast(w, "data", to="varying") for w in (up_EDF, down_EFD))


def _varying(a):
  """Types a value as varying over devices (in shard_map), though it is equal on all of them."""
  return jax.lax.pcast(a, BATCH, to="varying")


def _gather(x_TD, up_EDF, down_EFD, expert_TX, weight_TX, product):
  """Every device gets all tokens of its expert group and applies its own experts; the results are summed."""
  x_TD, expert_TX, weight_TX = (
    jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_TD, expert_TX, weight_TX)
  )
  E = up_EDF.shape[0]
  expert_TX -= jax.lax.axis_index("expert") * E  # Experts of other devices fall outside 0 .. E - 1.
  y_TD, rows = routed_mlp(x_TD, up_EDF, down_EFD, expert_TX, weight_TX, form=product)
  return jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True), rows


def _exchange(up_EDF, down_EFD, xs, *, native: bool, group: int, product: str):
  """Sorts rows by expert, sends them to the experts' devices, applies the experts, sends the results back."""
  x_TD, expert_TX, weight_TX = xs
  (T, D), X, E = x_TD.shape, expert_TX.shape[1], up_EDF.shape[0]
  N, R = T * X, group * T * min(X, E)
  me = jax.lax.axis_index("expert")
  # Choices without an expert are sorted last and not sent.
  expert_TX = jnp.where((expert_TX >= 0) & (expert_TX < group * E), expert_TX, group * E)
  # lax.sort instead of argsort, whose result is typed as replicated.
  expert_N, order_N = jax.lax.sort((expert_TX.reshape(N), _varying(jnp.arange(N, dtype=jnp.int32))), num_keys=1)
  sizes_E = jnp.sum(expert_N[None] == jnp.arange(group * E)[:, None], axis=1, dtype=jnp.int32)
  # size_SRE[s, r, e]: rows that device s sends to expert e of device r.
  size_SRE = jax.lax.all_gather(sizes_E.reshape(group, E), "expert")
  there, back = plans(jnp.sum(size_SRE, axis=2), me)
  send = functools.partial(ragged_all_to_all, native=native)

  x_RD = send(x_TD[order_N // X], _varying(jnp.zeros((R, D), x_TD.dtype)), there)
  # Rows arrive ordered by sender, then by expert: sort them by expert.
  mine_SE = size_SRE[:, me]
  end = jnp.cumsum(mine_SE.reshape(-1))
  run_R = jnp.searchsorted(end, jnp.arange(R), side="right")  # group * E if nothing arrived.
  expert_R = jnp.where(run_R < group * E, run_R % E, E).astype(jnp.int32)
  iota_R = _varying(jnp.arange(R, dtype=jnp.int32))
  expert_R, sorted_R = jax.lax.sort((expert_R, iota_R), num_keys=1)
  _, unsorted_R = jax.lax.sort((sorted_R, iota_R), num_keys=1)
  by_expert = functools.partial(routed_matmul, group_sizes_E=jnp.sum(mine_SE, axis=0), form=product)
  h_RF = jnp.square(jax.nn.relu(by_expert(x_RD[sorted_R], up_EDF)))
  y_RD = by_expert(h_RF, down_EFD)
  y_ND = send(y_RD[unsorted_R], _varying(jnp.zeros((N, D), x_TD.dtype)), back)
  y_ND *= weight_TX.reshape(N)[order_N][:, None]
  rows = jnp.sum(expert_R < E, dtype=jnp.int32)
  return jnp.zeros_like(x_TD).at[order_N // X].add(y_ND), rows


def plans(size_SR, me):
  """The arguments of ragged_all_to_all on device `me`, for sending rows and for sending them back.

  Args:
    size_SR: int32, number of rows that device s sends to device r; a sender's rows are ordered by receiver.

  Returns:
    Two tuples (input_offsets, send_sizes, output_offsets, recv_sizes), each [devices].
  """
  from_SR = jnp.cumsum(size_SR, axis=1) - size_SR  # Offset in sender s of the rows for r.
  to_SR = jnp.cumsum(size_SR, axis=0) - size_SR  # Offset in receiver r of the rows from s.
  there = from_SR[me], size_SR[me], to_SR[me], size_SR[:, me]
  back = to_SR[:, me], size_SR[:, me], from_SR[:, me], size_SR[me]
  return there, back


def ragged_all_to_all(x_ND, out_RD, plan, *, native: bool):
  """jax.lax.ragged_all_to_all over `expert`; if not `native`, the same result by all_gather, for CPUs.

  Rows of out_RD at which nothing arrives keep their value.
  """
  if native:
    return jax.lax.ragged_all_to_all(x_ND, out_RD, *plan, axis_name="expert")
  input_offsets, send_sizes, output_offsets, _ = plan
  x_SND = jax.lax.all_gather(x_ND, "expert")
  me, place_R = jax.lax.axis_index("expert"), jnp.arange(out_RD.shape[0])
  begin_S, size_S, first_S = (
    jax.lax.all_gather(a, "expert")[:, me] for a in (input_offsets, send_sizes, output_offsets)
  )
  offset_SR = place_R[None] - first_S[:, None]
  there_SR = (offset_SR >= 0) & (offset_SR < size_S[:, None])
  sender_R = jnp.argmax(there_SR, axis=0)
  row_R = begin_S[sender_R] + jnp.take_along_axis(offset_SR, sender_R[None], axis=0)[0]
  row_R = jnp.clip(row_R, 0, x_ND.shape[0] - 1)
  return jnp.where(jnp.any(there_SR, axis=0)[:, None], x_SND[sender_R, row_R], out_RD)
