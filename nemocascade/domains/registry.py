"""The built-in verifiers and environments by name. A domain's file is imported only when it is used."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any

from nemocascade.domains.domain import Environment, Verify
from nemocascade.verifiers.verdict import Row


@dataclasses.dataclass(frozen=True)
class BuiltIn:
  """A built-in domain: the file nemocascade/domains/FILE.py, and functions of it that make its parts.

  Attributes:
    needs: objects that the functions take: "sandbox" runs untrusted code, "judge" compares answers in pairs.
    environment: the function that makes the environment; "" if the domain has none.
    thinking: whether completions have thoughts, unless a config says otherwise.
    beside: whether a completion may be judged alone, see Domain; not where all processes run the judge together.
    unsupported: the function that says of a row why it can never be judged here, "" if it can; "" judges all rows.
  """

  file: str
  needs: tuple[str, ...] = ()
  verify: str = "make_verify"
  environment: str = ""
  thinking: bool = True
  beside: bool = True
  unsupported: str = ""

  def why_not(self, row: Row) -> str:
    """Why no completion of the row can be judged here; "" if they can."""
    return getattr(self._module(), self.unsupported)(row) if self.unsupported else ""

  def make_verify(self, **offered: object) -> Verify:
    return self._make(self.verify, offered)

  def make_environment(self, **offered: object) -> Environment:
    return self._make(self.environment, offered)

  def _make(self, function: str, offered: dict[str, object]) -> Any:
    """Calls the function with those of the offered objects that the domain needs."""
    return getattr(self._module(), function)(**{need: offered.get(need) for need in self.needs})

  def _module(self) -> ModuleType:
    return importlib.import_module(f"nemocascade.domains.{self.file}")


DOMAINS: dict[str, BuiltIn] = {
  "instruction": BuiltIn("instruction", unsupported="unsupported"),
  "math": BuiltIn("math", unsupported="unsupported"),
  "stem": BuiltIn("stem", unsupported="unsupported"),
  "structured": BuiltIn("structured", unsupported="unsupported"),
  "tools": BuiltIn("tools", environment="make_environment", unsupported="unsupported"),
  "preference": BuiltIn("preference", ("judge",), beside=False),
  "long_context": BuiltIn("long_context"),
  "code": BuiltIn("code", ("sandbox",), unsupported="unsupported"),
  "swe": BuiltIn("swe", ("sandbox",), unsupported="unsupported"),
  "swe_agentic": BuiltIn(
    "swe", ("sandbox",), "make_agentic_verify", "make_environment", thinking=False, unsupported="unsupported"
  ),
  "next_action": BuiltIn("next_action", unsupported="unsupported"),
}
ENVIRONMENTS = tuple(name for name, domain in DOMAINS.items() if domain.environment)
