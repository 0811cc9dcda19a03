"""rollout.exact: the program that verifies drafts, how it and the step are compiled, and what it cannot be used with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.rollout.exact import draw
from nemocascade.step.sft import sum_over_parts
from nemocascade.types import ScoreFn

# XLA on the CPU keeps bf16 values in fp32 inside a fusion, and contracts a product and a sum to one operation. Which
# operations it fuses depends on the rest of the program, so that a forward pass alone and the one of a gradient differ.
CPU_OPTIONS = {"xla_allow_excess_precision": False, "xla_cpu_max_isa": "AVX"}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
  """Options of jax.jit with which equal expressions have equal bits in different programs."""
  return CPU_OPTIONS if mesh.devices.flat[0].platform == "cpu" else {}


def verifier(score_fn: ScoreFn, pieces: int) -> Callable:
  """The verify_fn of an ExactEngine. It scores rows in as many pieces as the step, so that products have its shapes."""

  def verify(params, tokens_BT, segment_ids_BT, wanted_BT, experts_BTY, key, row_id_B, options):
    rows = dict(tokens=tokens_BT, segment_ids=segment_ids_BT, wanted=wanted_BT, row_id=row_id_B, options=options)
    rows |= {} if experts_BTY is None else {"experts": experts_BTY}
    temperature = jnp.max(jnp.where(options.temperature <= 0, 1.0, options.temperature))

    def part(piece):
      T = piece["tokens"].shape[1]

      def drawn(x_BTD, head_DV, wanted_BT, on_own):
        """Draws from the states that the score function hands a DistanceFn. Beyond T they are padding."""
        del on_own
        return draw(x_BTD[:, :T], head_DV, wanted_BT[:, :T], key, piece["row_id"], piece["options"])

      read = (piece[name] for name in ("tokens", "segment_ids", "wanted"))
      recorded = {"experts": piece["experts"]} if "experts" in piece else {}
      scores = score_fn(params, *read, drawn, temperature=temperature, **recorded)
      assert scores.distance_BT is not None  # `drawn` computes it.
      return (), (scores.logprobs_BT, *scores.distance_BT)

    _, found = sum_over_parts(part, rows, pieces)
    return tuple(a.swapaxes(0, 1).reshape(tokens_BT.shape) for a in found)

  return verify


def check(c: ConfigDict) -> None:
  """Raises UserError if rollout.exact does not fit the other fields of an RL stage."""
  r, p = c.rollout, c.packing
  if not r.exact:
    return
  if jax.process_count() > 1:
    raise UserError(f"rollout.exact=True in {jax.process_count()} processes: it works in one")
  samples = r.prompts * r.completions
  for name, value in (("replay", False), ("replay_teachers", False), ("slots", 0), ("lag", 0)):
    if r[name] != value:
      raise UserError(f"rollout.{name}={r[name]} with rollout.exact=True: give rollout.{name}={value}")
  if p.shared_prompts:
    raise UserError("packing.shared_prompts=True with rollout.exact=True: a sample is a whole row; give False")
  if p.rows != samples or p.row_tokens != r.total_tokens:
    raise UserError(
      f"packing.rows={p.rows} and packing.row_tokens={p.row_tokens} with rollout.exact=True: each sample has a row of its"
      f" own; give rollout.prompts x rollout.completions={samples} and rollout.total_tokens={r.total_tokens}"
    )
