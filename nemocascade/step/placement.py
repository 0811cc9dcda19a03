"""Where documents lie in packed rows: planned on the host from their lengths, applied by each device to its own.

Documents are the entries [q, g] of arrays [Q, G, T, ...] that are sharded by `mesh.rows(mesh, Q)`. A document goes
to a packed row of a device that holds it, so that no token moves to another device. Devices that hold the same
documents divide them; only where devices share a row do they send each other their parts of it. Every process makes
the same plan, because lengths are the same in all of them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

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


@functools.cache
def holders(mesh: Mesh, count: int) -> dict[range, list[int]]:
  """The shards of `count` rows: their range -> the devices that hold it, numbered in the mesh's order."""
  index_of = rows(mesh, count).devices_indices_map((count,))
  found: dict[range, list[int]] = {}
  for c, device in enumerate(mesh.devices.flat):
    found.setdefault(range(count)[index_of[device][0]], []).append(c)
  return found


@functools.cache
def parts(mesh: Mesh, Q: int, B: int) -> dict[tuple[range, ...], list[list[int]]]:
  """Which rows can take which groups: shards of Q groups -> the shards of B rows on the same devices, as devices.

  On a device that has groups and rows of its own, that is one shard each.
  """
  found: dict[tuple[range, ...], list[list[int]]] = {}
  for devices in holders(mesh, B).values():
    groups = tuple(part for part, holding in holders(mesh, Q).items() if not set(holding).isdisjoint(devices))
    found.setdefault(groups, []).append(devices)
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
    ValueError: `pieces` does not divide B, or the documents of a device do not fit in its rows.
  """
  own = _own_rows(mesh, B, pieces)

  def deal(i: int, shards: int) -> tuple[int, int, int]:
    piece, i = divmod(i, shards * own // pieces)
    if piece >= pieces:
      raise ValueError(f"the documents of a device need more than its {shards * own} rows of {T} tokens")
    return 0, i % shards, i // shards * pieces + piece

  placed = list(_packed(mesh, length_QG, kept_QG, B // pieces, T, deal))
  (places,) = _places(mesh, length_QG, own, placed, batches=1)
  return places


def plan_batches(mesh: Mesh, length_QG: np.ndarray, kept_QG: np.ndarray, *, B: int, T: int) -> list[Places]:
  """Packs the documents in `kept_QG` into as many batches of B rows of T tokens as they need."""
  own = _own_rows(mesh, B, 1)

  def deal(i: int, shards: int) -> tuple[int, int, int]:
    return i // shards // own, i % shards, i // shards % own

  placed = list(_packed(mesh, length_QG, kept_QG, B, T, deal))
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
  if Q % mesh.size:
    raise ValueError(f"{Q} prompts do not divide over {mesh.size} devices")
  own = Q // mesh.size
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
  """The rows of B that a device has. Those of each piece are sharded by `mesh.rows`."""
  if B % pieces:
    raise ValueError(f"{B} rows do not divide into {pieces} pieces")
  return B // len(holders(mesh, B // pieces))


def _packed(mesh: Mesh, length_QG, kept_QG, B: int, T: int, deal: Callable) -> Iterator[tuple[int, ...]]:
  """Yields (batch, device, document of the device, row, start, length, segment) of each document.

  Args:
    B: rows that are sharded together.
    deal: (a filled row's number among those of a part, number of the part's shards of rows) -> (batch, which of the
      shards, its row).
  """
  Q, G = length_QG.shape
  for groups, shards in parts(mesh, Q, B).items():
    documents = np.concatenate([np.arange(part.start * G, part.stop * G) for part in groups])
    kept = documents[kept_QG.ravel()[documents]]
    for i, row_of in enumerate(packing.pack(length_QG.ravel()[kept], capacity=T)):
      batch, shard, row = deal(i, len(shards))
      start = 0
      for segment, n in enumerate(kept[row_of], start=1):
        part = next(part for part in groups if n // G in part)
        device = next(c for c in shards[shard] if c in holders(mesh, Q)[part])
        length = length_QG.ravel()[n]
        yield batch, device, n - part.start * G, row, start, length, segment
        start += length


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


def _absent(mesh: Mesh, spec: PartitionSpec) -> tuple[str, ...]:
  """The mesh axes along which devices hold the same of an array with this spec."""
  return tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in jax.tree.leaves(tuple(spec)))


def _sum(a: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The sum over devices, of which all but one have zeros."""
  if not axes:
    return a
  return jax.lax.psum(a.astype(jnp.int32), axes).astype(bool) if a.dtype == bool else jax.lax.psum(a, axes)


@functools.partial(jax.jit, static_argnames=("mesh", "Q", "B", "T", "pieces"))
def pack(
  documents: Documents, places: Places, *, mesh: Mesh, Q: int, B: int, T: int, pieces: int = 1
) -> dict[str, jax.Array]:  # fmt: skip
  """The packed rows, name -> [B, T, ...], sharded by `mesh.rows(mesh, B // pieces)`; all values are copied unchanged.

  Only "segment_ids" are new. Tokens that no document fills are 0.
  """
  leading = documents["segment_ids"].ndim - 1
  documents = {name: a.reshape(Q, -1, *a.shape[leading:]) for name, a in documents.items()}
  held, of_rows, own = rows(mesh, Q).spec, rows(mesh, B // pieces).spec, _own_rows(mesh, B, pieces)

  def of_device(documents, places):
    N, T_document = (shape := documents["segment_ids"].shape)[0] * shape[1], shape[2]
    target_NT = _targets(places, T_document, own, T)
    from_ = jnp.full((own * T,), N * T_document, jnp.int32)
    from_ = from_.at[target_NT].set(jnp.arange(N * T_document).reshape(N, T_document), mode="drop")

    def copied(a, skipped):  # `skipped` leading dimensions of `a` are tokens of documents.
      a = a.reshape(-1, *a.shape[skipped:])
      a = jnp.take(a, from_, axis=0, mode="fill", fill_value=0).reshape(-1, T, *a.shape[1:])
      return _sum(a, _absent(mesh, of_rows))

    packed = {name: copied(a, 3) for name, a in documents.items()}
    segment_NT = jnp.broadcast_to(places.segment_CN.reshape(N, 1), (N, T_document))
    return packed | {"segment_ids": copied(segment_NT, 2)}

  specs = held, rows(mesh, mesh.size).spec
  return jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=of_rows, check_vma=False)(documents, places)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames="into")
def unpack(packed: Any, places: Places, into: Any, *, mesh: Mesh) -> Any:
  """Adds the values of packed rows to those of their documents, which is the inverse of `pack` if these are 0.

  Args:
    packed: a tree of arrays [B, T, ...].
    into: a matching tree of arrays [Q, G, T', ...]. They are donated.
  """
  held, of_rows = (rows(mesh, jax.tree.leaves(tree)[0].shape[0]).spec for tree in (into, packed))

  def of_device(packed, places, into):
    def back(values, into):
      own, T = values.shape[:2]
      target_NT = _targets(places, into.shape[2], own, T)
      flat = values.reshape(own * T, *values.shape[2:])
      found = jnp.take(flat, target_NT, axis=0, mode="fill", fill_value=0)
      # Of devices that hold the same documents, each has the values of some.
      return into + _sum(found, _absent(mesh, held)).reshape(into.shape)

    return jax.tree.map(back, packed, into)

  specs = of_rows, rows(mesh, mesh.size).spec, held
  return jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=held, check_vma=False)(packed, places, into)


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
