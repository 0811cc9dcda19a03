"""The domains by name. A domain's file is imported only when the domain is built."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping

from nemocascade import errors
from nemocascade.domains.domain import Domain, Style


@dataclasses.dataclass(frozen=True)
class _Factory:
  """Builds a domain, and passes it only those of the offered objects (`needs`) that it takes."""

  file: str
  needs: tuple[str, ...] = ()
  make: str = "make_domain"

  def __call__(self, **offered: object) -> Domain:
    module = importlib.import_module(f"nemocascade.domains.{self.file}")
    return getattr(module, self.make)(**{need: offered.get(need) for need in self.needs})


DOMAINS: dict[str, _Factory] = {
  "instruction": _Factory("instruction"),
  "math": _Factory("math"),
  "stem": _Factory("stem"),
  "structured": _Factory("structured"),
  "tools": _Factory("tools"),
  "preference": _Factory("preference", ("judge",)),
  "long_context": _Factory("long_context"),
  "code": _Factory("code", ("sandbox",)),
  "swe": _Factory("swe", ("sandbox",)),
  "swe_agentic": _Factory("swe", ("sandbox",), make="make_agentic_domain"),
}


def that_need(what: str, names: Iterable[str]) -> list[str]:
  """Those of the named domains that take the object `what` ("sandbox" or "judge")."""
  return [name for name in names if name in DOMAINS and what in DOMAINS[name].needs]


def build(names: Iterable[str], *, tasks: Mapping[str, Mapping] | None = None, **offered: object) -> dict[str, Domain]:
  """Builds the named domains.

  Args:
    tasks: domain name -> {field: value} that replaces fields of its Style or of the domain itself.
    offered: `sandbox` runs untrusted code, `judge` compares answers in pairs.

  Returns:
    name -> domain.

  Raises:
    UserError: unknown domain or field.
  """
  names, tasks = list(names), tasks or {}
  for name in names:  # All are checked before any is built.
    if name not in DOMAINS:
      raise errors.unknown("domain", name, DOMAINS)
  for name in tasks:
    if name not in names:
      raise errors.unknown("domain in tasks", name, names)
  domains = {name: DOMAINS[name](**offered) for name in names}
  for name, fields in tasks.items():
    _change(domains[name], f"tasks.{name}", fields)
  return domains


def _change(domain: Domain, where: str, fields: Mapping) -> None:
  of_style = [field.name for field in dataclasses.fields(Style)]
  own = [f.name for f in dataclasses.fields(domain)] if dataclasses.is_dataclass(domain) else []
  for field, value in fields.items():
    if field in of_style:
      domain.style = dataclasses.replace(domain.style, **{field: value})
    elif field in own:
      setattr(domain, field, value)
    else:
      raise errors.unknown(f"field of {where}", field, [*of_style, *own])
