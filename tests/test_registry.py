"""The registries of built-in domains and of generators, and no two generators share a marker word."""

import subprocess
import sys

import pytest
from composed import compose, config

from configs.tiny import if_rl
from nemocascade.domains import agents, registry
from nemocascade.errors import UserError
from nemocascade.generated import registry as generated
from nemocascade.runtime import domains
from nemocascade.runtime.checks import check_evaluation


def test_the_registries_name_the_ten_domains_and_that_without_a_generator():
  assert set(generated.GENERATORS) == {
    "instruction", "math", "stem", "structured", "tools", "preference", "long_context", "code",
    "swe", "swe_agentic",
  }  # fmt: skip
  assert set(registry.DOMAINS) == {*generated.GENERATORS, "next_action"}
  assert set(agents.AGENTS.values()) == set(registry.DOMAINS) and not set(agents.AGENTS) & set(agents.UNSUPPORTED)


@pytest.mark.parametrize("name", generated.GENERATORS)
def test_a_domain_is_composed_under_its_name(name):
  domain = compose(name)
  row = domain.rows.train(0, 0)
  assert domain.name == name == row["agent_ref"]["name"]
  assert (domain.turns > 1) == (domain.environment is not None) == (name in registry.ENVIRONMENTS)
  assert domain.thinking == (name != "swe_agentic")
  assert domain.rows.heldout(0, 3, 2) == domain.rows.heldout(0, 0, 5)[3:]


def test_a_misspelt_generator_is_answered_with_the_nearest():
  with pytest.raises(UserError, match="generator in domains.b.rows 'maths': did you mean 'math'"):
    domains.build(config(a={"rows": "generated:math"}, b={"rows": "generated:maths"}))


def test_a_generator_differs_in_what_tasks_says_of_it_and_no_other_does():
  usual, changed = (
    {name: generated.make(name, t) for name in ("math", "stem")}
    for t in (None, {"math": {"sloppy_rate": 0.1, "terms": (2, 5)}})
  )
  assert (changed["math"].style.sloppy_rate, changed["math"].terms) == (0.1, (2, 5))
  assert changed["math"].style.error_rate == usual["math"].style.error_rate
  assert changed["stem"] == usual["stem"] and generated.make("math") == usual["math"]


@pytest.mark.parametrize(
  "tasks, words",
  [
    ({"maths": {}}, "domain in tasks 'maths'.*did you mean 'math'"),
    ({"stem": {}}, "domain in tasks 'stem'.*math"),
    ({"math": {"largest": 9}}, "field of tasks.math 'largest'.*largest_total"),
  ],
)
def test_an_unknown_task_or_field_is_refused(tasks, words):
  c = config(tasks, mine={"rows": "generated:math"})
  for make in (domains.check, domains.build):
    with pytest.raises(UserError, match=words):
      make(c)


def test_a_domain_may_have_another_name_than_its_generator():
  mine = domains.build(config(mine={"rows": "generated:math", "thinking": False}))["mine"]
  row, usual = mine.rows.train(0, 5), compose("math").rows.train(0, 5)
  assert row["agent_ref"]["name"] == "mine" and not mine.thinking
  assert row | {"agent_ref": usual["agent_ref"]} == usual


def test_no_two_generators_share_a_marker():
  styles = [generated.make(name).style for name in generated.GENERATORS]
  markers = [word.strip() for style in styles for word in (style.careful, style.sloppy)]
  assert len(set(markers)) == len(markers), sorted(markers)


def test_a_domain_and_a_generator_are_imported_only_when_they_are_used():
  code = (
    "import sys; from composed import compose; compose('stem');"
    "print([m for m in sys.modules if m.startswith(('nemocascade.domains.', 'nemocascade.generated.'))])"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="tests")
  assert "domains.stem" in result.stdout and "generated.stem" in result.stdout
  assert "structured" not in result.stdout


def test_a_verifier_is_given_what_it_needs_and_no_more(monkeypatch):
  class Module:
    @staticmethod
    def make_verify(*, judge):
      return judge

  monkeypatch.setattr(registry.importlib, "import_module", lambda name: Module)
  assert registry.DOMAINS["preference"].make_verify(judge="a judge", sandbox="a sandbox") == "a judge"


def test_a_misspelt_domain_of_the_evaluation_is_named():
  c = if_rl.get_config("smoke")
  check_evaluation(c, "--completions", 1)
  c.evaluation.long_domains = ("long_contxt",)
  with pytest.raises(UserError, match="domain in evaluation.long_domains 'long_contxt': did you mean 'long_context'"):
    check_evaluation(c, "--completions", 1)


def test_the_domains_that_run_code_need_a_sandbox():
  c = config(
    math={"rows": "generated:math"}, code={"rows": "generated:code"}, swe={"rows": "generated:swe"},
    liked={"rows": "generated:preference"}, mine={"rows": "generated:math", "environment": "swe_agentic"},
  )  # fmt: skip
  assert domains.that_need(c, "sandbox") == ["code", "swe", "mine"]
  assert domains.that_need(c, "judge") == ["liked"]
  assert domains.that_need(c, "sandbox", {"swe": 1.0, "math": 1.0}) == ["swe"]
