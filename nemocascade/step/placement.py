"""Where documents lie in packed rows: planned on the host from their lengths, applied by each device to its own.

Documents are the entries [q, g] of arrays [Q, G, T, ...] that are sharded by `mesh.rows(mesh, Q)`. A document goes
to a packed row of a device that holds it, so that no token moves to another device. Devices that hold the same
documents divide them. Every process makes the same plan, because lengths are the same in all of them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from nemocascade.data import packing
from nemocascade.mesh import rows, whole
from nemocascade.types import Array

# name -> [Q, G, T, ...] or [Q * G, T, ...]; "segment_ids" is 1 on tokens, 0 on padding.
Documents = dict[str, jax.Array]


class Places(struct.PyTreeNode):
  """Which tokens of its documents each device puts where in its packed rows.

  All arrays are int32 [C, N]: C devices in the mesh's order, and the N documents that a device holds.
  """

  row_CN: Array  # A row of the device; its number of rows for documents that it leaves out.
  start_CN: Array  # The place in the row of the first token that is put there.
  first_CN: Array  # That token's place in the document.
  length_CN: Array  # Number of tokens.
  segment_CN: Array  # The number of the document in its row: 1, 2, ...


def holders(mesh: Mesh, Q: int) -> dict[range, list[int]]:
  """The shards of Q groups: their range -> the devices that hold it, numbered in the mesh's order."""
  index_of, found = rows(mesh, Q).devices_indices_map((Q,)), {}
  for c, device in enumerate(mesh.devices.flat):
    found.setdefault(range(Q)[index_of[device][0]], []).append(c)
  return found


def plan_rows(
  mesh: Mesh, length_QG: np.ndarray, kept_QG: np.ndarray, *, B: int, T: int, pieces: int = 1
) -> Places:  # fmt: skip
  """Packs the documents in `kept_QG` into B rows of T tokens, none of them cut.

  Rows are filled in the order in which a step that processes them in `pieces` reads them. So the empty rows fall
  into the last pieces, which the step skips if they have no document.

  Args:
    length_QG: tokens of each document.
    kept_QG: bool, the documents to pack.

  Raises:
    ValueError: B / pieces is no multiple of the devices, or the documents of a device do not fit in its rows.
  """
  own = _own_rows(mesh, B, pieces)

  def deal(i: int, devices: int) -> tuple[int, int, int]:
    piece, i = divmod(i, devices * own // pieces)
    if piece >= pieces:
      raise ValueError(f"the documents of {devices} devices need more than their {devices * own} rows of {T} tokens")
    return 0, i % devices, i // devices * pieces + piece

  (places,) = _places(mesh, length_QG, own, list(_packed(mesh, length_QG, kept_QG, T, deal)), batches=1)
  return places


def plan_batches(mesh: Mesh, length_QG: np.ndarray, kept_QG: np.ndarray, *, B: int, T: int) -> list[Places]:
  """Packs the documents in `kept_QG` into as many batches of B rows of T tokens as they need.

  Raises:
    ValueError: B is no multiple of the devices.
  """
  own = _own_rows(mesh, B, 1)

  def deal(i: int, devices: int) -> tuple[int, int, int]:
    return i // devices // own, i % devices, i // devices % own

  placed = list(_packed(mesh, length_QG, kept_QG, T, deal))
  return _places(mesh, length_QG, own, placed, batches=1 + max((entry[0] for entry in placed), default=-1))


def plan_prompts(
  mesh: Mesh, length_QG: np.ndarray, kept_QG: np.ndarray, prompt_Q: np.ndarray
) -> tuple[Places, Places]:  # fmt: skip
  """Splits documents after their prompts: places of the completions in Q x G rows, and of the prompts in Q rows.

  All rows keep their order. A prompt is taken from the first document of its group that is kept.

  Args:
    length_QG, kept_QG: as in plan_rows; other documents become padding.
    prompt_Q: tokens of each prompt.

  Raises:
    ValueError: Q is no multiple of the devices.
  """
  Q, G = length_QG.shape
  own = _own_rows(mesh, Q, 1)
  row_QG = np.arange(Q * G).reshape(Q, G) % (own * G)
  first_QG = kept_QG & (np.cumsum(kept_QG, axis=1) == 1)
  prompt_QG = np.broadcast_to(prompt_Q[:, None], (Q, G))
  table = lambda *fields: Places(
    *(np.broadcast_to(a, (Q, G)).reshape(mesh.size, own * G).astype(np.int32) for a in fields)
  )
  return (
    table(np.where(kept_QG, row_QG, own * G), 0, prompt_QG, length_QG - prompt_QG, 1),
    table(np.where(first_QG, row_QG // G, own), 0, 0, prompt_QG, 1),
  )


def _own_rows(mesh: Mesh, B: int, pieces: int) -> int:
  """The rows of B that each device has."""
  if B % (mesh.size * pieces):
    raise ValueError(f"{B} rows in {pieces} pieces do not divide over {mesh.size} devices")
  return B // mesh.size


def _packed(mesh: Mesh, length_QG, kept_QG, T: int, deal: Callable) -> Iterator[tuple[int, ...]]:
  """Yields (batch, device, document of the device, row, start, length, segment) of each document.

  Args:
    deal: (a filled row's number among those of devices with the same documents, number of these devices) ->
      (batch, which of the devices, its row).
  """
  for groups, devices in holders(mesh, len(length_QG)).items():
    length_N = length_QG[groups.start : groups.stop].ravel()
    kept = np.flatnonzero(kept_QG[groups.start : groups.stop])
    for i, row_of in enumerate(packing.pack(length_N[kept], capacity=T)):
      batch, member, row = deal(i, len(devices))
      start = 0
      for segment, n in enumerate(kept[row_of], start=1):
        yield batch, devices[member], n, row, start, length_N[n], segment
        start += length_N[n]


def _places(mesh: Mesh, length_QG, own: int, placed: list[tuple[int, ...]], batches: int) -> list[Places]:
  """The places of each batch; `own` is a device's rows, `placed` the result of `_packed`."""
  Q, G = length_QG.shape
  N = G * max(map(len, holders(mesh, Q)))
  row, start, length, segment = np.zeros((4, batches, mesh.size, N), np.int32)
  row += own
  if placed:
    batch, device, n, *fields = np.transpose(placed)
    for table, field in zip((row, start, length, segment), fields, strict=True):
      table[batch, device, n] = field
  first_CN = np.zeros((mesh.size, N), np.int32)
  return [Places(row[i], start[i], first_CN, length[i], segment[i]) for i in range(batches)]


def _targets(places: Places, T_document: int, own: int, T: int) -> jax.Array:
  """[N, T_document] of one device: the place of each token in its packed rows [own * T]; own * T if it has none."""
  row_N1, start_N1, first_N1, length_N1 = (
    a_1N.reshape(-1, 1) for a_1N in (places.row_CN, places.start_CN, places.first_CN, places.length_CN)
  )
  t_NT = jnp.arange(T_document)[None] - first_N1
  here_NT = (row_N1 < own) & (t_NT >= 0) & (t_NT < length_N1)
  return jnp.where(here_NT, row_N1 * T + start_N1 + t_NT, own * T)


@functools.partial(jax.jit, static_argnames=("mesh", "Q", "B", "T"))
def pack(documents: Documents, places: Places, *, mesh: Mesh, Q: int, B: int, T: int) -> dict[str, jax.Array]:
  """The packed rows, name -> [B, T, ...], sharded by `mesh.rows(mesh, B)`; all values are copied unchanged.

  Only "segment_ids" are new. Tokens that no document fills are 0.
  """
  leading = documents["segment_ids"].ndim - 1
  documents = {name: a.reshape(Q, -1, *a.shape[leading:]) for name, a in documents.items()}

  def own(documents, places):
    N, T_document = (shape := documents["segment_ids"].shape)[0] * shape[1], shape[2]
    target_NT = _targets(places, T_document, B // mesh.size, T)
    from_ = jnp.full((B // mesh.size * T,), N * T_document, jnp.int32)
    from_ = from_.at[target_NT].set(jnp.arange(N * T_document).reshape(N, T_document), mode="drop")

    def copied(a, skipped):  # `skipped` leading dimensions of `a` are tokens of documents.
      a = a.reshape(-1, *a.shape[skipped:])
      return jnp.take(a, from_, axis=0, mode="fill", fill_value=0).reshape(-1, T, *a.shape[1:])

    packed = {name: copied(a, 3) for name, a in documents.items()}
    segment_NT = jnp.broadcast_to(places.segment_CN.reshape(N, 1), (N, T_document))
    return packed | {"segment_ids": copied(segment_NT, 2)}

  specs = rows(mesh, Q).spec, rows(mesh, mesh.size).spec
  return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=rows(mesh, B).spec, check_vma=False)(documents, places)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames="into")
def unpack(packed: Any, places: Places, into: Any, *, mesh: Mesh) -> Any:
  """Adds the values of packed rows to those of their documents, which is the inverse of `pack` if these are 0.

  Args:
    packed: a tree of arrays [B, T, ...].
    into: a matching tree of arrays [Q, G, T', ...]. They are donated.
  """
  Q = jax.tree.leaves(into)[0].shape[0]
  held = rows(mesh, Q).spec
  # Devices that hold the same documents each have the values of some; the sum gives all to each.
  others = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in jax.tree.leaves(tuple(held)))

  def own(packed, places, into):
    def back(values, into):
      own, T = values.shape[:2]
      target_NT = _targets(places, into.shape[2], own, T)
      flat = values.reshape(own * T, *values.shape[2:])
      found = jnp.take(flat, target_NT, axis=0, mode="fill", fill_value=0)
      return into + (jax.lax.psum(found, others) if others else found).reshape(into.shape)

    return jax.tree.map(back, packed, into)

  cut = rows(mesh, mesh.size).spec
  return jax.shard_map(own, mesh=mesh, in_specs=(cut, cut, held), out_specs=held, check_vma=False)(packed, places, into)


@functools.partial(jax.jit, static_argnames=("mesh",))
def measure(segment_ids_QGT, loss_mask_QGT, valid_QG, *, mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of each document, on every device: int32 length_QG; number of learned tokens; place of the first one, else 0."""
  learned_QGT = loss_mask_QGT & valid_QG[..., None]
  found = (
    jnp.sum(segment_ids_QGT > 0, axis=-1, dtype=jnp.int32),
    jnp.sum(learned_QGT, axis=-1, dtype=jnp.int32),
    jnp.argmax(learned_QGT, axis=-1).astype(jnp.int32),
  )
  return jax.lax.with_sharding_constraint(found, whole(mesh))
