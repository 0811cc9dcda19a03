"""The judge of the preference domain, from the checkpoint of a reward model."""

import numpy as np
from ml_collections import ConfigDict

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.model.reward import RewardModel
from nemocascade.runtime import loading
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.text import answer_rows
from nemocascade.verifiers.judge import BradleyTerryJudge


def load_judge(checkpoint: str, programs: Programs, tokenizer: Tokenizer, evaluation: ConfigDict) -> BradleyTerryJudge:
  """The Bradley-Terry judge with the parameters of a reward model's checkpoint.

  Args:
    evaluation: the config's section; answers are read in batches of `batch` rows of `prompt_tokens` tokens.

  Raises:
    UserError: it was trained with another tokenizer, or cannot be loaded.
  """
  loading.same_tokenizer("judge", checkpoint, tokenizer)
  params = loading.load(checkpoint, programs.reward_template)
  model = RewardModel(programs.config, programs.mesh)
  reward = programs.jitted(lambda params, *rows: model.apply({"params": params}, *rows))
  B, T = evaluation.batch, evaluation.prompt_tokens

  def read_rewards(prompts: list, answers: list[str]) -> np.ndarray:
    out = np.zeros(len(answers), np.float32)
    for start in range(0, len(answers), B):
      part = slice(start, min(start + B, len(answers)))
      rows = answer_rows(tokenizer, prompts[part], answers[part], B, T)
      out[part] = np.asarray(reward(params, *programs.put(rows)))[: part.stop - start]
    return out

  return BradleyTerryJudge(read_rewards)
