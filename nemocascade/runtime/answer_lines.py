"""Lines of samples.jsonl and answers.jsonl: prompt, completion and verdict."""

from collections.abc import Sequence
from typing import Any

from nemocascade.domains.rows import prompt_messages
from nemocascade.rollout.exchange import merge
from nemocascade.rollout.rewards import Verdicts
from nemocascade.rollout.samples import Samples
from nemocascade.runtime.hosts import exchange


def answer_lines(samples: Samples, verdicts: Verdicts, places: Sequence[int], what: str) -> list[dict[str, Any]]:
  """A line for the first completion of each prompt at `places`.

  A line has the last message of the user and the whole completion, with calls and their results. The processes
  exchange these completions: all of them call it.

  Args:
    what: names the texts if a process waits for them in vain.
  """
  if not places:
    return []
  own = ([q, one.text] for q in places if (one := samples.completions[q][0]) is not None)
  text, lines = dict(merge(own, exchange, what)), []
  for q in places:
    said = [message["content"] for message in prompt_messages(samples.rows[q]) if message["role"] == "user"]
    verdict = verdicts[q][0]
    lines.append(
      {
        "domain": samples.domains[q],
        "prompt": said[-1] if said else "",
        "completion": text[q],
        "verdict": verdict.reward,
        "reason": verdict.reason,
        "masked": verdict.masked,
      }
    )
  return lines
