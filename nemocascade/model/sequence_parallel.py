"""Rows split by tokens over the mesh axis `expert`: each device holds a run of consecutive tokens of a row.

A run needs little of the others: the convolution the last inputs of the run before, the SSD scan its last state,
attention the keys and values of all earlier runs. The same devices hold the experts. Runs keep the order of the
tokens. Other orders balance causal attention better, but states would have to be composed in the tokens' order.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemocascade import mesh as mesh_lib
from nemocascade.config import ModelConfig
from nemocascade.errors import UserError
from nemocascade.kernels import attention as attention_kernel
from nemocascade.kernels import causal_conv as conv_kernel
from nemocascade.kernels import ssd as ssd_kernel
from nemocascade.segments import document_mean, segment_starts

AXIS = "expert"  # The mesh axis that splits rows by tokens.


def check_rows(what: str, count: int, config: ModelConfig, mesh: Mesh) -> None:
  """Raises UserError unless `count` rows divide over the devices, so that no device repeats rows of another."""
  data = mesh.shape["data"]
  if not config.sequence_parallel:
    mesh_lib.check_rows(what, count, mesh)
  elif count % data:
    raise UserError(
      f"{what} is {count} rows over mesh.data={data} groups of devices: give a multiple of {data}, or a smaller mesh.data"
    )


@dataclasses.dataclass(frozen=True)
class Layout:
  """How arrays of B rows lie on a mesh.

  Attributes:
    mesh: None for one device.
    rows: mesh axes that shard the rows if they are split by tokens, () or ("data",).
    split: whether rows are split by tokens. Otherwise each device has whole rows.
  """

  mesh: Mesh | None
  rows: tuple[str, ...] = ()
  split: bool = False

  @property
  def runs(self) -> int:
    """Devices that share a row."""
    return self._there.shape[AXIS] if self.split else 1

  @property
  def _there(self) -> Mesh:
    assert self.mesh is not None  # Rows that are split lie on a mesh.
    return self.mesh

  def length(self, T: int, config: ModelConfig) -> int:
    """Tokens to which rows of T tokens are padded: equal runs, none shorter than the convolution's past."""
    return T if not self.split else self.runs * max(-(-T // self.runs), config.conv_kernel - 1)

  def constrain(self, x_BTD):
    """Shards rows; for use inside a jitted program."""
    if not self.split:
      return mesh_lib.constrain_rows(x_BTD, self.mesh)
    return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(self._there, self._spec("T")))

  def _spec(self, kind: str) -> PartitionSpec:
    rows = self.rows or None
    specs = {"T": PartitionSpec(rows, AXIS), "B": PartitionSpec(rows), "TD": PartitionSpec((*self.rows, AXIS))}
    return specs.get(kind, PartitionSpec())

  def _on_runs(self, fn: Callable, inputs: Sequence[str], outputs: str | tuple[str, ...]) -> Callable:
    """Wraps fn, which each device applies to its run.

    Args:
      inputs, outputs: of each array, "T": it has the tokens of rows [B, T, ...]. "B": rows only [B, ...]. "TD":
        the tokens of all rows [B * T, ...]. "": it is the same on all devices.
    """
    out = self._spec(outputs) if isinstance(outputs, str) else tuple(map(self._spec, outputs))
    # check_vma=False, as in mesh.on_own_rows.
    return jax.shard_map(fn, mesh=self._there, in_specs=tuple(map(self._spec, inputs)), out_specs=out, check_vma=False)

  def on_own(self, fn: Callable, *, shared: Sequence[int] = ()) -> Callable:
    """Wraps fn, so that each device applies it to the tokens that it holds.

    Args:
      fn: takes and returns arrays [B, T, ...]; it treats each token alone, or uses the methods of this class.
      shared: positions of the arguments that are the same on all devices.
    """
    if not self.split:
      return mesh_lib.on_own_rows(fn, self.mesh, shared=shared)
    return lambda *args: self._on_runs(fn, ["" if i in shared else "T" for i in range(len(args))], "T")(*args)

  # [B, T, ...] to tokens [B * T, ...] and back. The order of the tokens is any, so that none is moved.

  def tokens(self, x_BT):
    flat = lambda x_BT: x_BT.reshape(-1, *x_BT.shape[2:])
    return self._on_runs(flat, ["T"], "TD")(x_BT) if self.split else flat(x_BT)

  def of_tokens(self, x_TD, B: int):
    """The inverse of `tokens`."""
    if not self.split:
      return x_TD.reshape(B, -1, *x_TD.shape[1:])
    here = B // math.prod(self._there.shape[axis] for axis in self.rows)
    return self._on_runs(lambda x_TD: x_TD.reshape(here, -1, *x_TD.shape[1:]), ["TD"], "T")(x_TD)

  # What crosses the borders of runs.

  def shift(self, x_BTD, first_B1D=None):
    """Moves every entry to the next token; the first one becomes first_B1D, or 0."""
    if not self.split:
      first_B1D = jnp.zeros_like(x_BTD[:, :1]) if first_B1D is None else first_B1D
      return jnp.concatenate([first_B1D, x_BTD[:, :-1]], axis=1)

    def of_run(x_BTD, first_B1D):
      before_B1D = self._from_left(x_BTD[:, -1:], first_B1D)
      return jnp.concatenate([before_B1D, x_BTD[:, :-1]], axis=1)

    return self._on_runs(of_run, ["T", "B"], "T")(x_BTD, first_B1D)

  def take(self, x_BTC, place_BW):
    """x_BTC at the places [B, W] of each row; those below 0 are read as 0."""

    def at(x_BTC, place_BW):
      here_BW1 = ((place_BW >= 0) & (place_BW < x_BTC.shape[1]))[..., None]
      taken = jnp.take_along_axis(x_BTC, jnp.clip(place_BW, 0, x_BTC.shape[1] - 1)[..., None], axis=1)
      return jnp.where(here_BW1, taken, 0)

    if not self.split:
      return at(x_BTC, place_BW)

    def of_run(x_BTC, place_BW):
      found = at(x_BTC, place_BW - jax.lax.axis_index(AXIS) * x_BTC.shape[1])
      return jax.lax.psum(found.astype(jnp.float32), AXIS).astype(x_BTC.dtype)

    return self._on_runs(of_run, ["T", "B"], "B")(x_BTC, place_BW)

  def causal_conv(self, x_BTC, weight_WC, bias_C, segment_ids_BT, before_BWC=None):
    """kernels.causal_conv of rows; each run but the first continues the last inputs of the run before it."""
    past = weight_WC.shape[0] - 1
    if not self.split or not past:
      return conv_kernel.causal_conv(x_BTC, weight_WC, bias_C, segment_ids_BT, before_BWC)

    def of_run(x_BTC, weight_WC, bias_C, ids_BT, before_BWC):
      ids_BW = self._from_left(ids_BT[:, -past:], ids_BT[:, :1] if before_BWC is not None else None)
      own_BW1 = (ids_BW == ids_BT[:, :1])[..., None]
      before_BWC = jnp.where(own_BW1, self._from_left(x_BTC[:, -past:], before_BWC), 0)
      return conv_kernel.causal_conv(x_BTC, weight_WC, bias_C, ids_BT, before_BWC)

    return self._on_runs(of_run, ["T", "", "", "T", "B"], "T")(x_BTC, weight_WC, bias_C, segment_ids_BT, before_BWC)

  def ssd(self, x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT, *, chunk: int, initial_state=None):
    """kernels.ssd of rows: (y_BTMP, state_BMPN after the row's last token), fp32.

    What a run does to a state is one decay a head and one state (ssd_summary). They are composed over the devices
    in a parallel prefix scan; then each run starts from the state before it.
    """
    if not self.split:
      return ssd_kernel.ssd(
        x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT, chunk=chunk, initial_state=initial_state
      )

    def of_run(x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, ids_BT, first_BMPN):
      edge_B1 = None if first_BMPN is None else ids_BT[:, :1]
      starts_BT = segment_starts(ids_BT, self._from_left(ids_BT[:, -1:], edge_B1, fill=-1)) & (ids_BT > 0)
      added_BMPN, decay_BM = ssd_kernel.ssd_summary(x_BTMP, log_decay_BTM, b_BTUN, ids_BT, starts_BT)
      before_BMPN = self._states_before(added_BMPN, decay_BM, first_BMPN)
      before_BMPN = jnp.where(starts_BT[:, :1, None, None], 0.0, before_BMPN)
      y_BTMP, state_BMPN = ssd_kernel.ssd(
        x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, ids_BT, chunk=chunk, initial_state=before_BMPN
      )
      is_last = jax.lax.axis_index(AXIS) == self.runs - 1
      return y_BTMP, jax.lax.psum(jnp.where(is_last, state_BMPN, 0.0), AXIS)

    args = x_BTMP, log_decay_BTM, b_BTUN, c_BTUN, segment_ids_BT, initial_state
    return self._on_runs(of_run, ["T"] * 5 + ["B"], ("T", "B"))(*args)

  def attention(self, q_BTKRH, k_BTKH, v_BTKH, segment_ids_BT, *cache, **how):
    """kernels.attention of rows; `cache`, if given, is (k_BKSH, v_BKSH, length_B) of attention.cached.

    Each run gathers the keys and values of the row. Blocks of other documents are skipped as on one device.
    """

    def whole(q, k, v, ids_BT, *cache):
      before = attention_kernel.cached(*cache, ids_BT) if cache else None
      return attention_kernel.attention(q, k, v, ids_BT, before=before, **how)

    def of_run(q, k, v, ids_BT, *cache):
      k_BKSH, v_BKSH = (jnp.swapaxes(_earlier(_gathered(a), a.shape[1]), 1, 2) for a in (k, v))
      ids_BS = jax.lax.all_gather(ids_BT, AXIS, axis=1, tiled=True)
      before = k_BKSH, v_BKSH, _earlier(ids_BS, ids_BT.shape[1], fill=-1)
      if cache:
        both = zip(attention_kernel.cached(*cache, ids_BS), before, (2, 2, 1), strict=True)
        before = tuple(jnp.concatenate([of_cache, of_row], axis) for of_cache, of_row, axis in both)
      return attention_kernel.attention(q, k, v, ids_BT, before=before, **how)

    args = q_BTKRH, k_BTKH, v_BTKH, segment_ids_BT, *cache
    if not self.split:  # Each device attends within its own rows; loops over blocks are not split by XLA.
      return mesh_lib.on_own_rows(whole, self.mesh)(*args)
    return self._on_runs(of_run, ["T"] * 4 + ["B"] * len(cache), "T")(*args)

  # For use by functions that `on_own` wraps.

  def document_mean(self, x_BT, mask_BT, segment_ids_BT):
    """segments.document_mean of x [B, T, ...]; a document may lie in several runs. It has no gradient."""
    x_BT = jax.lax.stop_gradient(x_BT)
    if not self.split:
      return document_mean(x_BT, mask_BT, segment_ids_BT)
    sums_BT, number_BT = _sums_by_document(x_BT, mask_BT, segment_ids_BT)
    # Only the first and the last document of a run may lie in other runs too.
    ends_B2 = jnp.stack([jnp.zeros_like(number_BT[:, -1]), number_BT[:, -1]], axis=1)
    wide = lambda a_B2: a_B2.reshape(a_B2.shape + (1,) * (sums_BT.ndim - 2))
    counts_B2 = (ends_B2 > 0).at[:, 0].set(True)  # A document that is both counts once.
    of_ends = jnp.where(wide(counts_B2), jnp.take_along_axis(sums_BT, wide(ends_B2), axis=1), 0.0)
    ids_B2 = segment_ids_BT[:, jnp.array([0, -1])]
    all_ids, all_sums = (jax.lax.all_gather(a, AXIS, axis=1, tiled=True) for a in (ids_B2, of_ends))
    same_B2S = (ids_B2[:, :, None] == all_ids[:, None]).astype(of_ends.dtype)
    totals_B2 = jnp.sum(same_B2S.reshape(*same_B2S.shape, *[1] * (of_ends.ndim - 2)) * all_sums[:, None], axis=2)
    sums_BT = jax.vmap(lambda sums_T, ends_2, totals_2: sums_T.at[ends_2].set(totals_2))(sums_BT, ends_B2, totals_B2)
    mean_BT = sums_BT[..., :-1] / jnp.maximum(sums_BT[..., -1:], 1.0)
    return jnp.take_along_axis(mean_BT, wide(number_BT), axis=1)

  # Inside a run.

  def _from_left(self, x_BW, first_BW=None, *, fill=0):
    """x of the run before; the first run gets first_BW, or `fill`."""
    from_left_BW = jax.lax.ppermute(x_BW, AXIS, [(i, i + 1) for i in range(self.runs - 1)])
    is_first = jax.lax.axis_index(AXIS) == 0
    return jnp.where(is_first, fill if first_BW is None else first_BW, from_left_BW)

  def _states_before(self, added_BMPN, decay_BM, first_BMPN):
    """The state before each run: an exclusive prefix scan over the devices, in fp32, of state -> decay * state + added.

    Each of its 1 + log2(devices) rounds moves one state a device.
    """
    state_BMPN, decay_BM = self._from_left(added_BMPN, first_BMPN), self._from_left(decay_BM)
    far = 1
    while far < self.runs:
      ways = [(i, i + far) for i in range(self.runs - far)]  # The others receive 0.
      before_BMPN, before_BM = (jax.lax.ppermute(a, AXIS, ways) for a in (state_BMPN, decay_BM))
      state_BMPN += decay_BM[..., None, None] * before_BMPN
      decay_BM, far = decay_BM * before_BM, 2 * far
    return state_BMPN


def layout(config: ModelConfig, mesh: Mesh | None, B: int) -> Layout:
  """How B rows lie on the mesh: split by tokens if the config says so and whole rows would not fill the devices."""
  if mesh is None or not config.sequence_parallel or mesh.shape[AXIS] == 1 or B % mesh.size == 0:
    return Layout(mesh)
  cut = mesh.shape["data"] > 1 and B % mesh.shape["data"] == 0
  return Layout(mesh, ("data",) if cut else (), split=True)


def _sums_by_document(x_BT, mask_BT, segment_ids_BT):
  """(fp32 [B, T, ..., C + 1]: sums of x and counts by the number of the document in the run, number_BT)."""
  number_BT = jnp.cumsum(segment_starts(segment_ids_BT), axis=1, dtype=jnp.int32) - 1
  mask = mask_BT.reshape(mask_BT.shape + (1,) * (x_BT.ndim - 2))
  counted = jnp.concatenate([x_BT.astype(jnp.float32), jnp.ones((*x_BT.shape[:-1], 1))], axis=-1)
  sums = jax.vmap(lambda x_T, number_T: jax.ops.segment_sum(x_T, number_T, num_segments=len(x_T)))
  return sums(jnp.where(mask, counted, 0.0), number_BT), number_BT


@jax.custom_vjp
def _gathered(x_BT):
  """The runs of all devices, joined. Gradients are summed over the devices in fp32."""
  return jax.lax.all_gather(x_BT, AXIS, axis=1, tiled=True)


def _scattered(_, d_BT):
  return (jax.lax.psum_scatter(d_BT.astype(jnp.float32), AXIS, scatter_dimension=1, tiled=True).astype(d_BT.dtype),)


_gathered.defvjp(lambda x_BT: (_gathered(x_BT), None), _scattered)


def _earlier(x_BS, here: int, fill: int = 0):
  """The tokens of rows before this run of `here` tokens, right-aligned: [B, S - here, ...] with `fill` in front."""
  rest = x_BS.shape[1] - here
  x_BS = jnp.pad(x_BS, [(0, 0), (rest, 0)] + [(0, 0)] * (x_BS.ndim - 2), constant_values=fill)
  return jax.lax.dynamic_slice_in_dim(x_BS, jax.lax.axis_index(AXIS) * here, rest, axis=1)
