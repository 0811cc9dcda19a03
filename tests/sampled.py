"""Samples made by hand, with their arrays on one device."""

import numpy as np

from nemocascade.mesh import make_mesh, put_rows
from nemocascade.rollout.samples import Samples


def samples_of(
  completions, *, rows=None, domains=None, tokens_QGT=None, length_QG=None, mask_QGT=None, behaviour_QGT=None, limit=None,
  T=4,
) -> Samples:  # fmt: skip
  """Samples with these completions [Q][G].

  Args:
    tokens_QGT: [Q, G, T]; zeros by default.
    length_QG: tokens of each sample; all T by default.
    mask_QGT: tokens that the policy sampled; all by default.
    limit: tokens at which the sampler ends a completion; T by default.
  """
  Q, G = len(completions), len(completions[0])
  tokens_QGT = np.zeros((Q, G, T), np.int32) if tokens_QGT is None else tokens_QGT
  T = tokens_QGT.shape[2]
  length_QG = np.full((Q, G), T, np.int32) if length_QG is None else np.asarray(length_QG, np.int32)
  real_QGT = np.arange(T) < length_QG[..., None]
  mask_QGT = real_QGT if mask_QGT is None else mask_QGT
  behaviour_QGT = np.zeros((Q, G, T), np.float32) if behaviour_QGT is None else behaviour_QGT
  arrays = put_rows((tokens_QGT, real_QGT.astype(np.int32), mask_QGT, behaviour_QGT), make_mesh(1, 1))
  return Samples(
    list(range(Q)) if rows is None else rows,
    domains or ["echo"] * Q,
    *arrays,
    limit_QG=np.full((Q, G), limit or T, np.int32),
    length_QG=length_QG,
    sampled_QG=mask_QGT.sum(-1).astype(np.int32),
    finished_QG=np.array([[c.finished for c in group] for group in completions]),
    completions=completions,
  )
