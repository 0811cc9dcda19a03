"""Held-out rows of every domain, a model's scores on them, and its answers to the first of them."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nemocascade.domains.domain import Domain
from nemocascade.domains.rows import prompt_messages
from nemocascade.errors import UserError
from nemocascade.evaluate import suites
from nemocascade.report.metrics import progress
from nemocascade.rollout import episode, rewards
from nemocascade.runtime.answer_lines import answer_lines
from nemocascade.runtime.hosts import exchange
from nemocascade.runtime.parts import Parts
from nemocascade.state_files import whole
from nemocascade.types import Params
from nemocascade.verifiers.verdict import Row

SHOWN = 4  # Prompts of each domain whose answers a score carries.


@dataclasses.dataclass(frozen=True)
class Heldout:
  """What a model is scored on. Every scoring uses the same prompts and random numbers.

  Attributes:
    rows: domain -> its held-out rows.
    settings: the config's section `evaluation`.
    seed: of the sampling.
  """

  rows: Mapping[str, list[Row]]
  settings: ConfigDict
  seed: int

  def evaluate(
    self, parts: Parts, params: Params, *, temperature: float, completions: int = 1
  ) -> dict[str, suites.DomainScore]:
    """Domain -> DomainScore. Domains of `long_domains` get longer prompts and smaller batches."""
    e, key = self.settings, jax.random.key(self.seed)
    params = parts.programs.sampling_weights(params)
    scores: dict[str, suites.DomainScore] = {}
    answers: dict[str, list[dict]] = {name: [] for name in self.rows}
    bar = progress(sum(map(len, self.rows.values())), initial=0, desc="evaluate", unit="prompt", passing=True)
    for long in (False, True):
      rows = {name: r for name, r in self.rows.items() if (name in e.long_domains) == long}
      P, T = (e.long_prompt_tokens, e.long_total_tokens) if long else (e.prompt_tokens, e.total_tokens)
      batch = (e.long_batch if long else e.batch) // completions

      def collect(rows, index, count, P=P, T=T):
        return episode.collect(
          parts.programs.engine(P, T), params, jax.random.fold_in(key, index), rows, parts.domains,
          tokenizer=parts.text.tokenizer, G=completions, temperature=temperature, judged=count,
          exchange=exchange,
        )  # fmt: skip

      def judge(samples, count):
        verdicts = rewards.judge(samples, parts.domains, prompts=count, exchange=exchange)
        room = {name: SHOWN - len(of) for name, of in answers.items()}
        for line in answer_lines(samples, verdicts, _first(samples.domains[:count], room), "texts of answers"):
          answers[line["domain"]].append(line)
        bar.update(count)
        return verdicts

      scores |= suites.evaluate(rows, collect, judge, batch=batch)
    bar.close()
    return {name: dataclasses.replace(scores[name], answers=tuple(answers[name])) for name in self.rows}


def _first(domains: Sequence[str], room: Mapping[str, int]) -> list[int]:
  """Places of the first `room` prompts of each domain; `domains` has the domain of each place."""
  places = {name: [q for q, domain in enumerate(domains) if domain == name][: room[name]] for name in set(domains)}
  return sorted(q for of in places.values() for q in of)


def write_answers(path: Path, steps: int, scores: Mapping[str, suites.DomainScore]) -> None:
  """Writes the answers of the scores after `steps` steps, one line each, in the form of samples.jsonl."""
  lines = [json.dumps({"step": steps} | line) for score in scores.values() for line in score.answers]
  with whole(path) as partial:
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def draw_heldout(c: ConfigDict, domains: Mapping[str, Domain], tokenizer) -> Heldout:
  """`c.evaluation.prompts` held-out rows of each domain, or all that its files have; all prompts of a domain differ.

  Raises:
    UserError: a domain has too few prompts.
  """
  rows = {name: _rows_of(c, domain, name, tokenizer) for name, domain in domains.items()}
  return Heldout(rows, c.evaluation, c.seed)


def _rows_of(c: ConfigDict, domain: Domain, name: str, tokenizer) -> list[Row]:
  """A domain's held-out rows. Leaves out prompts that are too long, and reports them on stderr."""
  e = c.evaluation
  field = "long_prompt_tokens" if name in e.long_domains else "prompt_tokens"
  fits: dict[str, Row] = {}
  too_long: dict[str, int] = {}  # Prompt's text -> number of its tokens.
  start = 0
  while len(fits) < e.prompts:
    rows = domain.rows.heldout(c.seed, start, e.prompts)
    for row in rows:
      text = json.dumps(prompt_messages(row))
      if text in fits or text in too_long or len(fits) == e.prompts:
        continue
      tokens = len(episode.prompt_of(row, domain, tokenizer))
      if tokens <= e[field]:
        fits[text] = row
      else:
        too_long[text] = tokens
    start += e.prompts
    if not rows and fits:  # A file has fewer prompts than evaluation.prompts: all of them are scored.
      break
    if not rows or start > 100 * e.prompts or len(too_long) > 10 * e.prompts:
      others = f" of at most evaluation.{field}={e[field]} tokens, and {len(too_long)} longer" if too_long else ""
      raise UserError(
        f"domain {name!r} has only {len(fits)} held-out prompts{others}: lower evaluation.prompts"
        f"{f', or raise evaluation.{field}' if too_long else ''}"
      )
  if too_long and jax.process_index() == 0:
    print(
      f"domain {name!r}: left out {len(too_long)} held-out prompts of more than"
      f" evaluation.{field}={e[field]} tokens; the longest has {max(too_long.values())}",
      file=sys.stderr,
    )  # fmt: skip
  return list(fits.values())
