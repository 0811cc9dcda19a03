"""Whether the arrays of a run can fit into the memory of this machine, from their sizes alone.

Only what every run holds is counted, so a run that is allowed may still need more than there is.
"""

import os
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from nemocascade.errors import UserError
from nemocascade.mesh import device_bytes
from nemocascade.runtime.programs import Programs

COPIES = 3  # Training holds the parameters, their gradients and at least one moment, all of one size.
SAMPLED, PACKED = 12, 9  # Bytes of a token: id, segment and log-probability; id, segment and whether it is learned.


def check(c: ConfigDict, programs: Programs) -> None:
  """Raises UserError if the model, or the rows of a step or of an evaluation, are larger than the memory.

  Args:
    c: a config of any kind.
  """
  leaves = jax.tree_util.tree_leaves_with_path(programs.template)
  path, largest = max(leaves, key=lambda leaf: leaf[1].size)
  needed, room, of = COPIES * device_bytes(programs.template), _device_room(), "a device here"
  if jax.default_backend() == "cpu":
    needed, room, of = needed * jax.local_device_count(), _host_room(), "this machine"
  if needed > room:
    shape = " x ".join(map(str, largest.shape))
    raise UserError(
      f"model: training it takes at least {_gb(needed)}, {of} has {_gb(room)}; must be smaller: the largest of its"
      f" arrays, {jax.tree_util.keystr(path, simple=True, separator='/')}, is {shape}"
    )
  for what, size in _rows(c):
    if size // jax.process_count() > _host_room():
      raise UserError(
        f"{what}: these rows take at least {_gb(size)} of memory, this machine has {_gb(_host_room())}; must be smaller"
      )


def _rows(c: ConfigDict) -> Iterator[tuple[str, int]]:
  """(fields and their values, bytes) of the rows that a run makes at a time."""

  def product(size: int, section: ConfigDict, prefix: str, *names: str) -> tuple[str, int]:
    for name in names:
      size *= section[name]
    return prefix + " x ".join(f"{name}={section[name]}" for name in names), size

  for prefix, stage in [("", c), *((f"stages.{n}.", s) for n, s in c.get("stages", {}).items())]:
    if stage.get("kind") == "sft":
      yield product(PACKED, stage, prefix, "rows", "row_tokens")
    if stage.get("kind") == "reward_model":
      yield product(2 * PACKED, stage, prefix, "pairs", "row_tokens")
    if stage.get("kind") == "rl":
      yield product(PACKED, stage.packing, f"{prefix}packing.", "rows", "row_tokens")
      yield product(SAMPLED, stage.rollout, f"{prefix}rollout.", "prompts", "completions", "total_tokens")
  for long in ("", "long_") if c.evaluation.long_domains else ("",):
    yield product(SAMPLED, c.evaluation, "evaluation.", f"{long}batch", f"{long}total_tokens")


def _host_room() -> int:
  """Bytes of this machine's memory."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_room() -> float:
  """Bytes of the memory of a device; infinite if it does not tell."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit", float("inf"))


def _gb(size: float) -> str:
  return f"{size / 1e9:,.0f} GB"
