"""Checks that the fields of a config fit together, before anything is built."""

from ml_collections import ConfigDict

from nemocascade.domains.registry import DOMAINS
from nemocascade.errors import UserError, unknown
from nemocascade.field_check import check as check_fields
from nemocascade.runtime import exact, validation
from nemocascade.runtime.domains import that_need
from nemocascade.runtime.objective import needs, taught, topk
from nemocascade.runtime.own_functions import check_functions
from nemocascade.step.balance import RouterBalance
from nemocascade.step.rows import rows_needed


def check_rl(c: ConfigDict) -> None:
  """Raises UserError if an RL stage cannot run. Nothing is compiled."""
  check_fields(c, "rl")
  check_functions(c)
  validation.check(c)
  for name in c.teachers:
    if name not in c.domains:
      raise unknown("domain in teachers", name, c.domains)
  if not sum(c.mixture.values()):
    raise UserError("mixture: all shares are 0, so there are no prompts; give one above 0")
  for name in c.mixture:
    if name not in c.domains:
      raise unknown("domain in mixture", name, c.domains)
    if taught(c) and name not in c.teachers:
      raise UserError(
        f"{' and '.join(taught(c))}: domain {name!r} of the mixture has no teacher; there are {sorted(c.teachers)}"
      )
  _check_packing(c)
  exact.check(c)
  if needs(c).groups and c.rollout.completions < 2:
    raise UserError(
      f"rollout.completions=1 under advantage={c.advantage!r}: a group of one teaches nothing; give at least 2"
    )
  if c.reward == "pairwise" and c.dynamic_filtering:
    raise UserError(
      "dynamic_filtering=True under reward='pairwise': it reads verdicts, which pairs have none of; give False"
    )
  if RouterBalance(**c.router_balance).has_loss and c.packing.shared_prompts:
    raise UserError(
      f"packing.shared_prompts with router_balance.weight={c.router_balance.weight}: the loss is of whole"
      " documents; balance by the bias, or repeat the prompts"
    )
  if c.rollout.lag and c.updates > 1:
    raise UserError(
      f"rollout.lag={c.rollout.lag} with updates={c.updates}: a lag is counted in updates; give updates=1"
    )
  if c.rollout.parked and not c.rollout.slots:
    raise UserError(
      f"rollout.parked={c.rollout.parked} with rollout.slots=0: every completion has a slot; give rollout.slots, or"
      " rollout.parked=0"
    )
  if c.rollout.top_p < 1 and c.correction == "none":
    raise UserError(
      f"rollout.top_p={c.rollout.top_p} with correction='none': tokens of the nucleus would weigh up to"
      f" 1 / {c.rollout.top_p} times too much; give correction tis, icepop or sequence_mask, or top_p=1"
    )
  for name in ("record_experts", "replay", "replay_teachers"):
    if c.rollout[name] and "E" not in c.model.hybrid_override_pattern:
      raise UserError(
        f"rollout.{name}=True: model.hybrid_override_pattern={c.model.hybrid_override_pattern!r} has no block E that routes"
      )
  if c.advantage == "none" and not (c.distillation_weight or c.kl_weight or c.entropy_weight):
    raise UserError("advantage='none' with no other term in the loss teaches nothing: give distillation_weight")
  if c.distillation_weight and (k := topk(c)) and k > c.model.vocab_size:
    raise UserError(f"options.{c.distillation}.k={k}: must be at most model.vocab_size={c.model.vocab_size}")


def _check_packing(c: ConfigDict) -> None:
  r, p = c.rollout, c.packing
  check_lengths("rollout", r.prompt_tokens, r.total_tokens)
  samples = r.prompts * r.completions
  if p.shared_prompts:
    if p.rows != samples or r.completions % p.pieces:
      raise UserError(
        f"packing.rows={p.rows}: with shared_prompts it must be rollout.prompts x rollout.completions={samples},"
        f" and packing.pieces={p.pieces} must divide the {r.completions} completions"
      )
    if p.row_tokens < r.total_tokens - r.prompt_tokens:
      raise UserError(
        f"packing.row_tokens={p.row_tokens}: with shared_prompts it must hold what follows a prompt,"
        f" rollout.total_tokens - rollout.prompt_tokens={r.total_tokens - r.prompt_tokens}"
      )
    return
  if p.row_tokens < r.total_tokens:
    raise UserError(
      f"packing.row_tokens={p.row_tokens}: must be at least rollout.total_tokens={r.total_tokens}; of such rows"
      f" packing.rows={-(-samples // p.pieces) * p.pieces} hold a step's {samples} completions"
    )
  needed = rows_needed(samples, r.total_tokens, p.row_tokens)
  if p.rows < needed or p.rows % p.pieces:
    raise UserError(
      f"packing.rows={p.rows}: must be a multiple of packing.pieces={p.pieces} and at least {needed},"
      f" to hold {samples} completions of {r.total_tokens} tokens in rows of {p.row_tokens}"
    )


def judged(c: ConfigDict, shared: ConfigDict) -> str:
  """The setting that makes an RL stage need a judge, for messages; "" if it needs none.

  Args:
    shared: the config that has `domains`; inside a cascade the stage's own has none.
  """
  needing = that_need(shared, "judge", c.mixture)
  return "reward='pairwise'" if c.reward == "pairwise" else f"mixture.{needing[0]}" if needing else ""


def check_evaluation(c: ConfigDict, name: str, completions: int) -> None:
  """Checks the evaluation's domains and lengths, and `completions` per prompt, the value of the field or flag `name`.

  Raises:
    UserError: a domain does not exist, a prompt leaves no room for an answer, or the completions of one prompt exceed a batch.
  """
  e = c.evaluation
  for long in e.long_domains:  # A built-in domain may be named where the run does not have it.
    if long not in c.domains and long not in DOMAINS:
      raise unknown("domain in evaluation.long_domains", long, c.domains)
  check_lengths("evaluation", e.prompt_tokens, e.total_tokens)
  check_lengths("evaluation", e.long_prompt_tokens, e.long_total_tokens, "long_")
  most = "long_batch" if e.long_domains and e.long_batch < e.batch else "batch"
  if completions > e[most]:
    raise UserError(f"{name}={completions}: must be at most evaluation.{most}={e[most]}")


def check_lengths(section: str, prompt_tokens: int, total_tokens: int, prefix: str = "") -> None:
  """Raises UserError if a prompt of the greatest length leaves no token for an answer."""
  if prompt_tokens >= total_tokens:
    raise UserError(
      f"{section}.{prefix}prompt_tokens={prompt_tokens}: must be below {section}.{prefix}total_tokens={total_tokens}"
    )
