"""Domains of generated rows, composed as a run composes them."""

from ml_collections import ConfigDict

from nemocascade.domains.domain import Domain
from nemocascade.runtime import domains


def config(tasks=None, **entries) -> ConfigDict:
  """A config of domains alone: name -> the fields of its entry."""
  return ConfigDict({"domains": entries, "tasks": tasks or {}})


def compose(name: str, *, judge=None, sandbox=None, tasks=None) -> Domain:
  """The built-in domain of this name on rows of the generator of the same name."""
  c = config(tasks, **{name: {"rows": f"generated:{name}"}})
  found = domains.build(c, sandbox=sandbox)
  return (domains.with_judge(c, found, judge) if judge else found)[name]
