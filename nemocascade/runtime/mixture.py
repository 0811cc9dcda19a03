"""Draws the training prompts of a stage: by the shares of its domains, without prompts that are too long."""

from collections.abc import Mapping
from typing import Any

from nemocascade.domains.domain import Domain
from nemocascade.errors import UserError
from nemocascade.rollout.episode import prompt_of
from nemocascade.verifiers.verdict import Row

TRIES = 200  # After this many too long prompts in a row, a domain counts as having none that fits.


def next_domain(shares: Mapping[str, float], given: Mapping[str, int]) -> str:
  """The domain of the next prompt, by Balinski and Young's quota method (1975).

  After any number of prompts, the count of each domain is its share of them, rounded up or down.

  Args:
    shares: domain -> share; they need not sum to 1.
    given: domain -> prompts drawn so far.
  """
  n, total = sum(given.get(name, 0) for name in shares) + 1, sum(shares.values())
  # A domain that already has its share of n prompts waits. 1e-9 covers rounding errors.
  due = [name for name in sorted(shares) if given.get(name, 0) < shares[name] / total * n - 1e-9]
  return max(due or sorted(shares), key=lambda name: shares[name] / (given.get(name, 0) + 1))


class Mixture:
  """Draws rows by shares. Its state is plain JSON; later draws depend on nothing else."""

  def __init__(
    self, domains: Mapping[str, Domain], shares: Mapping[str, float], *, seed: int, tokenizer, limit: int,
    state: Mapping[str, Any],
  ):  # fmt: skip
    """
    Args:
      limit: most tokens of a prompt, rollout.prompt_tokens.
      state: the result of `get_state`, to continue from, or empty.

    Raises:
      UserError: a domain's rows are not those that `state` was saved with.
    """
    self._domains, self._shares, self._seed = domains, dict(shares), seed
    self._tokenizer, self._limit = tokenizer, limit
    self._frontier = dict(state.get("frontier", {}))  # Domain -> index of its next row.
    self._given = dict(state.get("given", self._frontier))  # Domain -> rows drawn; skipped ones do not count.

    self._rows = {name: domains[name].rows.fingerprint for name, share in self._shares.items() if share > 0}
    for name, before in state.get("rows", {}).items():
      if self._rows.get(name, before) != before:
        raise UserError(
          f"domains.{name}.rows: the files have changed since the checkpoint, so the order of the prompts is another;"
          " restore them, or start in another --workdir"
        )

  def check(self) -> None:
    """Raises UserError if a domain of the mixture has no prompt that fits."""
    for name in self._rows:
      self._next(name)

  def get_state(self) -> dict[str, Any]:
    return {"frontier": dict(self._frontier), "given": dict(self._given), "rows": dict(self._rows)}

  def draw(self, count: int) -> tuple[list[Row], list[list[int]], int]:
    """Draws rows. A prompt that is too long is skipped for good, and the domain's next row replaces it.

    Returns:
      (`count` rows, grouped by domain; the tokens of each prompt; the number of skipped prompts)

    Raises:
      UserError: a domain has no prompt that fits.
    """
    names = []
    for _ in range(count):
      names.append(next_domain(self._shares, self._given))
      self._given[names[-1]] = self._given.get(names[-1], 0) + 1
    rows, prompts, too_long = [], [], 0
    for name in sorted(names, key=list(self._shares).index):
      row, tokens, number = self._next(name)
      too_long += number - self._frontier.get(name, 0)
      self._frontier[name] = number + 1
      rows.append(row)
      prompts.append(tokens)
    return rows, prompts, too_long

  def _next(self, name: str) -> tuple[Row, list[int], int]:
    """(row, tokens of its prompt, its index) of the domain's next row that fits."""
    domain, begin, lengths = self._domains[name], self._frontier.get(name, 0), []
    for number in range(begin, begin + TRIES):
      row = domain.rows.train(self._seed, number)
      if len(tokens := prompt_of(row, domain, self._tokenizer)) <= self._limit:
        return row, tokens, number
      lengths.append(len(tokens))
    raise UserError(
      f"rollout.prompt_tokens={self._limit}: the prompts of domain {name!r} have {min(lengths)} to {max(lengths)} tokens"
      f" ({TRIES} tried); give --config.rollout.prompt_tokens={max(lengths)} (in configs/tiny all other lengths follow)"
    )
