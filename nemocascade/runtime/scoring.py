"""Scores samples by teachers and reference, in packed rows. Tokens and results stay on the devices of the samples."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nemocascade.mesh import rows
from nemocascade.rollout.samples import Samples
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.teachers import Teachers
from nemocascade.step import placement
from nemocascade.types import Params

# Rows that a teacher or reference scores at a time; at least one per device. A constant number, so that one
# compiled program serves any part of a batch.
SCORED_ROWS = 64

# (tokens_BT, segment_ids_BT, wanted_BT) -> arrays [B, T, ...], sharded by rows.
Program = Callable[..., Sequence[jax.Array]]


def scored_rows(programs: Programs) -> int:
  """Rows that a teacher or reference scores at a time: a multiple of the devices."""
  return -(-SCORED_ROWS // programs.mesh.size) * programs.mesh.size


def over_rows(
  programs: Programs, program: Program, samples: Samples, q: Sequence[int], into: Sequence[jax.Array] | None = None,
  *, replay: bool = False,
) -> Sequence[jax.Array]:  # fmt: skip
  """Applies `program` to the samples of the prompts `q`, packed into batches of `scored_rows` rows.

  The host plans the packing of each device from lengths alone. No token moves to another device.

  Args:
    q: indices of prompts.
    into: the result for other prompts, to which this one is added; it is donated.
    replay: whether `program` gets the sampler's experts as one more argument.

  Returns:
    Each array of the program as [Q, G, T, ...], sharded like the samples' prompts; 0 for prompts not in q.
  """
  mesh, (Q, G, T), B = programs.mesh, samples.tokens_QGT.shape, scored_rows(programs)
  names = ("tokens", "segment_ids", "mask", *["experts"] * replay)
  read = samples.tokens_QGT, samples.segment_ids_QGT, samples.loss_mask_QGT, *[samples.experts_QGTY] * replay
  arrays = programs.put(read)
  documents, kept_QG = dict(zip(names, arrays, strict=True)), np.zeros((Q, G), bool)
  kept_QG[q] = True
  for places in placement.plan_batches(mesh, samples.length_QG, kept_QG, B=B, T=T):
    places = programs.put(places)
    packed = placement.pack(documents, places, mesh=mesh, Q=Q, B=B, T=T)
    found = tuple(program(*(packed[name] for name in names)))
    into = _zeros(programs, found, (Q, G)) if into is None else into
    into = placement.unpack(found, places, into, mesh=mesh)
  assert into is not None  # Every sample has tokens.
  return into


def _zeros(programs: Programs, found: Sequence[jax.Array], QG: tuple[int, int]) -> tuple[jax.Array, ...]:
  """Zeros [Q, G, T, ...] for results [B, T, ...], each device with those of its prompts."""
  shapes = tuple(jax.ShapeDtypeStruct((*QG, *a.shape[1:]), a.dtype) for a in found)
  make = lambda: tuple(jnp.zeros(s.shape, s.dtype) for s in shapes)  # noqa: E731
  return programs.once(("zeros", shapes), lambda: jax.jit(make, out_shardings=rows(programs.mesh, QG[0])))()


def score_rows(
  programs: Programs, params: Params, samples: Samples, temperature, q: Sequence[int] | None = None, *,
  replay: bool = False,
) -> jax.Array:  # fmt: skip
  """fp32 logprobs_QGT of the sampled tokens of the prompts `q` (all of them by default); 0 on other tokens."""
  program = lambda *rows: (programs.logprobs(params, *rows[:3], temperature, *rows[3:]),)  # noqa: E731
  return over_rows(programs, program, samples, range(len(samples.tokens_QGT)) if q is None else q, replay=replay)[0]


def by_teachers(
  programs: Programs, teachers: Teachers, samples: Samples, program: Callable, *, replay: bool = False
) -> Sequence[jax.Array]:  # fmt: skip
  """Applies `program` to all samples, each prompt with the parameters of its domain's teacher.

  The teachers take turns on the devices: each checkpoint once, and afterwards none is left there.

  Args:
    program: (params, tokens_BT, segment_ids_BT, wanted_BT[, experts_BTY]) -> tuple of arrays [B, T, ...].
    replay: whether `program` gets the sampler's experts.

  Returns:
    Each array as [Q, G, T, ...].
  """
  out = None
  for q in teachers.by_checkpoint(samples.domains).values():
    params = teachers.params(samples.domains[q[0]])
    out = over_rows(programs, lambda *rows, params=params: program(params, *rows), samples, q, out, replay=replay)
    jax.block_until_ready(out)  # Otherwise the next teacher comes to the devices while this one is still needed.
    del params
    teachers.leave()
  assert out is not None  # There is at least one prompt.
  return out
