"""The judge of the preference domain, from the checkpoint of a reward model; and groups compared in pairs."""

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.domains.rows import prompt_messages
from nemocascade.errors import UserError
from nemocascade.mesh import own_rows, put_own
from nemocascade.rollout import rewards
from nemocascade.rollout.exchange import merge
from nemocascade.rollout.samples import Samples
from nemocascade.runtime import loading
from nemocascade.runtime.hosts import exchange
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.swap import HostParams
from nemocascade.runtime.text import answer_rows
from nemocascade.verifiers.judge import BradleyTerryJudge, Judge, answer_of, batch_rewards
from nemocascade.verifiers.verdict import Verdict, no_verdict


def load_judge(checkpoint: str, programs: Programs, tokenizer: Tokenizer, evaluation: ConfigDict) -> BradleyTerryJudge:
  """The Bradley-Terry judge with the parameters of a reward model's checkpoint.

  In several processes all of them ask it at the same time, each about its own answers or none: the model runs over
  the whole mesh, and each process fills the rows of its own devices.

  Args:
    evaluation: the config's section; answers are read in batches of `batch` rows of `prompt_tokens` tokens, or a few
      more, so that the devices divide them.

  Raises:
    UserError: it was trained with another tokenizer, or cannot be loaded.
  """
  loading.same_tokenizer("judge", checkpoint, tokenizer)
  waiting = HostParams.of(loading.load(checkpoint, programs.reward_template))
  B, T = evaluation.batch + -evaluation.batch % programs.mesh.size, evaluation.prompt_tokens
  own = own_rows(programs.mesh, B)

  def read_rewards(prompts: list, answers: list[str]) -> np.ndarray:
    out, params = np.zeros(len(answers), np.float32), waiting.put()
    make = lambda start: answer_rows(
      tokenizer, prompts[start : start + len(own)], answers[start : start + len(own)], len(own), T
    )
    batches, failed = [], ""
    try:
      batches = [make(start) for start in range(0, len(answers), len(own))]
    except Exception as error:  # noqa: BLE001  Raised below in all processes, which otherwise would go different ways.
      failed = f"{type(error).__name__}: {error}"
    counts, whys = zip(*exchange([len(batches), failed], "batches of the judge"), strict=True)
    if any(whys):
      raise ValueError(next(filter(None, whys)))
    batches += [make(len(answers))] * (max(counts) - len(batches))  # Rows without answers.
    for i, rows in enumerate(batches):
      found_B = np.asarray(programs.reward(params, *put_own(rows, programs.mesh, B)))
      part = out[i * len(own) : (i + 1) * len(own)]
      part[:] = found_B[own][: len(part)]
    return out

  return BradleyTerryJudge(read_rewards)


def compared(judge: Judge, tokenizer: Tokenizer, samples: Samples) -> rewards.Verdicts:
  """Verdicts of a judge that compares the answers of each group in pairs, with length control.

  See Nemotron-Cascade 2 (arXiv 2603.19220, section 4.5) and NeMo-Gym's `genrm_compare`. The processes exchange
  their answers, and each compares every n-th group. If the judge fails, all samples of these groups are masked.
  """
  count = lambda text: len(tokenizer.encode(text or ""))  # noqa: E731
  own = (
    [q, g, answer_of(c), count(c.reasoning), count(c.content)]
    for q, group in enumerate(samples.completions)
    for g, c in enumerate(group)
    if c is not None
  )
  of = {(q, g): fields for q, g, *fields in merge(own, exchange, "answers to compare")}
  Q, G = samples.limit_QG.shape
  some = range(jax.process_index(), Q, jax.process_count())
  answers_QG, think_QG, answer_QG = ([[of[q, g][i] for g in range(G)] for q in some] for i in range(3))
  prompts = [prompt_messages(samples.rows[q]) for q in some]
  try:
    rewards_QG = batch_rewards(judge, prompts, answers_QG, think_tokens_QG=think_QG, answer_tokens_QG=answer_QG)
    found = [[Verdict(float(reward), "compared in pairs") for reward in group] for group in rewards_QG]
  except UserError:
    raise
  except Exception as error:  # noqa: BLE001  A failure of the judge leaves all samples without a verdict.
    found = [[no_verdict("error", f"judge failed: {type(error).__name__}: {error}")] * G for _ in some]
  items = (
    rewards.to_item(q, g, verdict) for q, group in zip(some, found, strict=True) for g, verdict in enumerate(group)
  )
  return rewards.from_items(merge(items, exchange, "rewards of compared groups"), (Q, G))
