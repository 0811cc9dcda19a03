"""The registry builds domains by name, and no two domains share a marker word."""

import importlib.util
import subprocess
import sys

import pytest

from nemocascade.domains import registry
from nemocascade.errors import UserError

FILES = {"swe_agentic": "swe"}  # Domains whose file has another name.


def written(name):
  return importlib.util.find_spec(f"nemocascade.domains.{FILES.get(name, name)}") is not None


def test_the_registry_names_the_ten_domains():
  assert set(registry.DOMAINS) == {
    "instruction", "math", "stem", "structured", "tools", "preference", "long_context", "code",
    "swe", "swe_agentic",
  }  # fmt: skip


@pytest.mark.parametrize("name", registry.DOMAINS)
def test_a_domain_is_built_under_its_name(name):
  if not written(name):
    pytest.skip("not written yet")
  assert registry.build([name])[name].name == name


def test_a_misspelt_name_is_answered_with_the_nearest():
  with pytest.raises(UserError, match="did you mean 'math'"):
    registry.build(["stem", "maths"])


def test_a_domain_differs_in_what_tasks_says_of_it_and_no_other_does():
  usual, changed = (
    registry.build(["math", "stem"], tasks=t) for t in (None, {"math": {"sloppy_rate": 0.1, "terms": (2, 5)}})
  )
  assert (changed["math"].style.sloppy_rate, changed["math"].terms) == (0.1, (2, 5))
  assert changed["math"].style.error_rate == usual["math"].style.error_rate
  assert changed["stem"] == usual["stem"] and registry.build(["math"])["math"] == usual["math"]


@pytest.mark.parametrize(
  "tasks, words",
  [
    ({"maths": {}}, "domain in tasks 'maths'.*did you mean 'math'"),
    ({"stem": {}}, "domain in tasks 'stem'.*math"),
    ({"math": {"largest": 9}}, "field of tasks.math 'largest'.*largest_total"),
  ],
)
def test_an_unknown_task_or_field_is_refused(tasks, words):
  with pytest.raises(UserError, match=words):
    registry.build(["math"], tasks=tasks)


def test_no_two_domains_share_a_marker():
  domains = registry.build([name for name in registry.DOMAINS if written(name)])
  styles = [task.style for task in domains.values() if hasattr(task, "style")]
  markers = [word.strip() for style in styles for word in (style.careful, style.sloppy)]
  assert len(set(markers)) == len(markers), sorted(markers)


def test_a_domain_is_imported_only_when_it_is_built():
  code = (
    "import sys; from nemocascade.domains import registry; registry.build(['stem']);"
    "print([m for m in sys.modules if m.startswith('nemocascade.domains.')])"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert "stem" in result.stdout
  assert "structured" not in result.stdout


def test_a_factory_is_given_what_it_needs_and_no_more(monkeypatch):
  class Module:
    @staticmethod
    def make_domain(*, judge):
      return judge

  monkeypatch.setattr(registry.importlib, "import_module", lambda name: Module)
  assert registry.build(["preference"], judge="a judge", sandbox="a sandbox") == {"preference": "a judge"}


def test_the_domains_that_run_code_need_a_sandbox():
  assert registry.that_need("sandbox", ["math", "code", "swe", "nothing"]) == ["code", "swe"]
  assert registry.that_need("judge", registry.DOMAINS) == ["preference"]
