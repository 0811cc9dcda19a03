"""Tests of a stage's training prompts: shares hold at every step, and each long prompt is skipped once."""

import json

import numpy as np
import pytest

from nemocascade.domains.domain import Domain
from nemocascade.domains.rows import make_prompt
from nemocascade.errors import UserError
from nemocascade.generated.generator import GeneratedRows, Generator
from nemocascade.runtime.mixture import TRIES, Mixture, next_domain


class Numbered(Generator):
  """Prompts that are random numbers; those picked by `long` are long."""

  def __init__(self, name, long=lambda n: False):
    self.name, self._long = name, long

  def make_row(self, rng):
    n = int(rng.integers(1 << 30))
    return make_prompt(self.name, f"{n} " + "x" * 500 * self._long(n))


def numbered(name, long=lambda n: False):
  return Domain(name, GeneratedRows(Numbered(name, long), name), None, thinking=False)


def mixture(shares, state=None, long=lambda n: False, limit=100):
  return Mixture(
    {name: numbered(name, long) for name in shares}, shares, seed=0, tokenizer=None, limit=limit, state=state or {}
  )


@pytest.fixture(autouse=True)
def tokens(monkeypatch):
  """One token per character, so that lengths need no tokenizer."""
  monkeypatch.setattr(
    "nemocascade.runtime.mixture.prompt_of",
    lambda row, domain, tokenizer: [1] * len(row["responses_create_params"]["input"][0]["content"]),
  )


def counts(rows, names):
  found = [row["agent_ref"]["name"] for row in rows]
  return {name: found.count(name) for name in names}


SHARES = [
  {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0},
  {"a": 0.55, "b": 0.3, "c": 0.15},
  {"a": 0.3, "b": 0.3, "c": 0.15, "d": 0.15, "e": 0.1, "f": 0.25},
  {"a": 1e-3, "b": 1.0},
  {"a": 0.0, "b": 7.0, "c": 3.0},
  {"a": 1.0},
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("prompts", [1, 2, 7])
def test_each_domain_has_its_share_of_any_number_of_prompts_to_within_one(shares, prompts):
  m, given, total = mixture(shares), dict.fromkeys(shares, 0), sum(shares.values())
  for step in range(50):
    rows, _, _ = m.draw(prompts)
    assert len(rows) == prompts
    for name, n in counts(rows, shares).items():
      given[name] += n
      assert abs(given[name] - shares[name] / total * prompts * (step + 1)) < 1
  if len(set(shares.values())) == 1 and prompts * 50 % len(shares) == 0:
    assert set(given.values()) == {prompts * 50 // len(shares)}


def test_random_shares_hold_too():
  rng = np.random.default_rng(0)
  for _ in range(30):
    shares = {str(i): float(x) for i, x in enumerate(rng.dirichlet(np.ones(rng.integers(2, 11)) * 0.5))}
    given = dict.fromkeys(shares, 0)
    for n in range(1, 300):
      given[next_domain(shares, given)] += 1
      assert all(abs(given[name] - share * n) < 1 for name, share in shares.items())


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_a_mixture_that_goes_on_from_its_state_draws_what_the_uninterrupted_one_draws(cut):
  long = lambda n: n % 3 == 0  # noqa: E731
  shares = SHARES[2]
  whole = mixture(shares, long=long)
  drawn = [whole.draw(5) for _ in range(12)]
  m = mixture(shares, long=long)
  for _ in range(cut):
    m.draw(5)
  m = mixture(shares, json.loads(json.dumps(m.get_state())), long=long)
  assert [m.draw(5) for _ in range(12 - cut)] == drawn[cut:]


def test_what_is_too_long_is_counted_once_and_the_next_row_takes_its_place():
  shares = {"a": 1.0, "b": 1.0}
  long = lambda n: n % 4 == 0  # noqa: E731
  all_rows, _, none = mixture(shares, long=long, limit=1000).draw(80)
  assert none == 0
  m = mixture(shares, long=long)
  fits = [row for row in all_rows if row["agent_ref"]["name"] == "a"]
  number = lambda row: int(row["responses_create_params"]["input"][0]["content"].split()[0])  # noqa: E731
  expected = [number(row) for row in fits if number(row) % 4]
  found, too_long = [], 0
  for _ in range(10):
    rows, prompts, left_out = m.draw(4)
    assert counts(rows, shares) == {"a": 2, "b": 2}  # Skipped prompts do not count towards the shares.
    assert all(len(p) <= 100 for p in prompts)
    too_long += left_out
    found += [number(row) for row in rows if row["agent_ref"]["name"] == "a"]
  assert found == expected[: len(found)]
  frontier = m.get_state()["frontier"]
  assert too_long == sum(frontier.values()) - 40 > 0


def test_a_domain_without_a_prompt_that_fits_is_named_before_the_first_step():
  with pytest.raises(
    UserError, match=rf"prompt_tokens=100: the prompts of domain 'a' have 50\d to 51\d tokens \({TRIES} tried"
  ):
    mixture({"a": 1.0, "b": 1.0}, long=lambda n: True).check()


def test_rows_that_have_changed_since_the_checkpoint_are_named():
  state = mixture({"a": 1.0, "b": 1.0}).get_state()
  mixture({"a": 1.0, "b": 1.0}, state)
  with pytest.raises(UserError, match="domains.b.rows: the files have changed"):
    mixture({"a": 1.0, "b": 1.0}, state | {"rows": {"a": "", "b": "0123"}})


def test_a_domain_without_a_share_is_never_drawn_nor_looked_at():
  domains = {"a": numbered("a"), "b": numbered("b", lambda n: True)}
  m = Mixture(domains, {"a": 1.0, "b": 0.0}, seed=0, tokenizer=None, limit=100, state={})
  m.check()
  assert counts(m.draw(9)[0], "ab") == {"a": 9, "b": 0}
