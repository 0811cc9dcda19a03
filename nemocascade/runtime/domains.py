"""Builds the domains of a config: `c.domains` is a section with an entry a domain, which says what it is composed of.

  c.domains.math = dict(rows="generated:math")
  c.domains.mine = dict(rows="prompts.jsonl", heldout="heldout.jsonl", verify="my_rewards.py:score")

docs/domains.md describes the fields.
"""

import dataclasses
import sys
from collections.abc import Container, Mapping

from ml_collections import ConfigDict

from nemocascade import own_code
from nemocascade.domains import own
from nemocascade.domains.agents import AGENTS, UNSUPPORTED
from nemocascade.domains.domain import Domain, Environment, Rows, Verify
from nemocascade.domains.registry import DOMAINS, ENVIRONMENTS, BuiltIn
from nemocascade.domains.row_files import FileRows, agent_of, check_apart, open_rows
from nemocascade.errors import UserError, nearest, unknown
from nemocascade.generated import registry as generated
from nemocascade.generated.generator import GeneratedRows, Generator
from nemocascade.verifiers.verdict import Row

TRIALS = 4  # Rows to train on, and held-out rows, that a user's own functions are tried on.


@dataclasses.dataclass(frozen=True)
class Entry:
  """The fields of one domain in a config, with their defaults."""

  name: str
  rows: str  # generated:NAME, or a path or glob of JSON lines.
  heldout: str = ""  # A path or glob; "" holds prompts out by their hash.
  verify: str = ""  # A built-in domain or FILE.py:FUNCTION; "" is the domain's name, or the generator's.
  environment: str = ""  # A built-in domain or FILE.py:CLASS; "" is that of the built-in verifier.
  thinking: bool | None = None
  max_turns: int | None = None
  min_pass_rate: float = 0.0
  max_pass_rate: float = 1.0
  limit_s: float = own.LIMIT_S

  @property
  def field(self) -> str:
    return f"domains.{self.name}"

  @property
  def generator(self) -> str:
    """The name of the generator of the rows; "" if they are in files."""
    return self.rows.removeprefix(generated.PREFIX) if self.rows.startswith(generated.PREFIX) else ""

  @property
  def judged_by(self) -> str:
    """The built-in domain or the FILE.py:FUNCTION that judges."""
    return self.verify or self.generator or self.name

  @property
  def built_in(self) -> BuiltIn | None:
    """The built-in domain that judges; None if a user's own function does."""
    return DOMAINS.get(self.judged_by)


def entries(c: ConfigDict) -> dict[str, Entry]:
  """The domains of a config by name: those named as built-in domains in the registry's order, then the others.

  A ConfigDict keeps no order of its own.

  Raises:
    UserError: an entry names a generator, a verifier or an environment that does not exist.
  """
  found = {}
  order = {name: place for place, name in enumerate(DOMAINS)}
  for name in sorted(c.domains, key=lambda name: (order.get(name, len(order)), name)):
    fields = c.domains[name]
    if not fields.get("rows"):
      raise UserError(f"domains.{name}.rows is missing: give {generated.PREFIX}NAME, or a file of JSON lines")
    entry = Entry(name, **fields)
    if entry.generator and entry.generator not in generated.GENERATORS:
      raise unknown(f"generator in {entry.field}.rows", entry.generator, generated.GENERATORS)
    if not own_code.is_own(entry.judged_by) and entry.judged_by not in DOMAINS:
      if entry.verify:
        raise unknown(f"{entry.field}.verify", entry.verify, [*DOMAINS, own_code.FORM])
      raise UserError(
        f"{entry.field}.verify is missing: {name!r} is no built-in domain; give {own_code.FORM}, or one of"
        f" {', '.join(DOMAINS)}"
      )
    if entry.environment and not own_code.is_own(entry.environment) and entry.environment not in ENVIRONMENTS:
      raise unknown(f"{entry.field}.environment", entry.environment, [*ENVIRONMENTS, own_code.FORM])
    if entry.min_pass_rate > entry.max_pass_rate:
      raise UserError(
        f"{entry.field}.min_pass_rate={entry.min_pass_rate}: must be at most max_pass_rate={entry.max_pass_rate}"
      )
    found[name] = entry
  return found


def check(c: ConfigDict) -> None:
  """Checks the entries without reading rows: names, tasks, and the user's own functions and classes.

  Raises:
    UserError: a domain cannot be built.
  """
  for entry in entries(c).values():
    _own_parts(entry)
  generators(c)


def generators(c: ConfigDict) -> dict[str, Generator]:
  """The generators of the config's domains by name, in the order of `entries`; `c.tasks` changes their fields.

  Raises:
    UserError: `c.tasks` names another generator, or a field that does not exist.
  """
  names = dict.fromkeys(entry.generator for entry in entries(c).values() if entry.generator)
  generated.check_tasks(c.tasks, names)
  return {name: generated.make(name, c.tasks) for name in names}


def that_need(c: ConfigDict, what: str, among: Container[str] | None = None) -> list[str]:
  """The domains that need the object `what`: "sandbox" or "judge".

  Args:
    among: names of the domains to look at; None looks at all.
  """
  found = []
  for name, entry in entries(c).items():
    needs = [*(entry.built_in.needs if entry.built_in else ())]
    needs += DOMAINS[entry.environment].needs if entry.environment in DOMAINS else ()
    if what in needs and (among is None or name in among):
      found.append(name)
  return found


def of_turns(c: ConfigDict, among: Container[str] | None = None) -> list[str]:
  """The domains whose episodes may have several turns; `among` as in `that_need`.

  It builds no environment. One that allows a single turn counts too, unless `max_turns` says so.
  """
  found = entries(c).items()
  has_tools = lambda entry: bool(entry.environment or (entry.built_in and entry.built_in.environment))
  return [name for name, e in found if (among is None or name in among) and has_tools(e) and e.max_turns != 1]


def build(c: ConfigDict, *, sandbox: object = None, names: Container[str] | None = None) -> dict[str, Domain]:
  """Builds the config's domains: indexes their files, and tries a user's own functions on some rows.

  Args:
    sandbox: runs untrusted code, for the domains that `that_need` it.
    names: of the domains to build; None builds all. The others' entries are only checked.

  Returns:
    name -> domain, in the order of `entries`. A domain that needs a judge has none yet; `with_judge` gives it one.

  Raises:
    UserError: a domain cannot be built; the message names its field, and the file and row where there is one.
  """
  check(c)
  generators_ = generators(c)
  wanted = {name: entry for name, entry in entries(c).items() if names is None or name in names}
  built = {name: _build(entry, generators_, sandbox) for name, entry in wanted.items()}
  _check_apart(wanted, built)
  return built


def _check_apart(found: Mapping[str, Entry], built: Mapping[str, Domain]) -> None:
  """Raises UserError if a domain is scored on a prompt that another one trains on. Generated rows are not compared."""
  files = {name: domain.rows for name, domain in built.items() if isinstance(domain.rows, FileRows)}
  for name, held in files.items():
    field = f"{found[name].field}.heldout" if found[name].heldout else f"{found[name].field}.rows, held out by the hash"
    for other, training in files.items():
      if other != name:
        check_apart(training.training, held.held, f"{found[other].field}.rows", field)


def with_judge(c: ConfigDict, domains: Mapping[str, Domain], judge: object) -> dict[str, Domain]:
  """The domains, of which those that need a judge have this one."""
  needing = {name: entry.built_in for name, entry in entries(c).items() if name in that_need(c, "judge")}
  return {
    name: dataclasses.replace(domain, verify=needing[name].make_verify(judge=judge)) if name in needing else domain
    for name, domain in domains.items()
  }


def _build(entry: Entry, generators_: Mapping[str, Generator], sandbox: object) -> Domain:
  verify, environment = _own_parts(entry)
  built_in = entry.built_in
  if verify is None:
    assert built_in is not None
    verify = built_in.make_verify(sandbox=sandbox)
  if environment is None and entry.environment:
    environment = DOMAINS[entry.environment].make_environment(sandbox=sandbox)
  elif environment is None and built_in and built_in.environment:
    environment = built_in.make_environment(sandbox=sandbox)
  thinking = built_in.thinking if entry.thinking is None and built_in else entry.thinking is not False
  rows: Rows = GeneratedRows(generators_[entry.generator], entry.name) if entry.generator else _file_rows(entry)
  # A user's own function may not allow for threads, and only in the main thread can it be ended at its limit.
  beside = built_in is not None and built_in.beside
  domain = Domain(entry.name, rows, verify, environment, thinking, entry.max_turns, beside)
  _try_own_parts(entry, domain)
  return domain


def _own_parts(entry: Entry) -> tuple[Verify | None, Environment | None]:
  """The user's own verifier and environment, each None if the entry names a built-in one."""
  verify, environment = None, None
  if own_code.is_own(entry.judged_by):
    verify = own.load_reward(entry.judged_by, field=f"{entry.field}.verify", limit_s=entry.limit_s)
  if own_code.is_own(entry.environment):
    field = f"{entry.field}.environment"
    environment = own.load_environment(entry.environment, field=field, limit_s=entry.limit_s)
  return verify, environment


def _try_own_parts(entry: Entry, domain: Domain) -> None:
  """Tries a user's own functions on rows from all over the domain's rows, those held out too."""
  own_reward, own_environment = own_code.is_own(entry.judged_by), own_code.is_own(entry.environment)
  if not own_reward and not own_environment:
    return
  rows = domain.rows
  if isinstance(rows, FileRows):
    trials = rows.spread(TRIALS)
  else:
    trials = [(rows.train(0, i), entry.rows) for i in range(TRIALS)]
    trials += [(row, entry.rows) for row in rows.heldout(0, 0, TRIALS)]
  for row, place in trials:
    if own_environment:
      own.try_environment(domain, row, entry.environment, field=f"{entry.field}.environment", place=place)
    if own_reward:
      own.try_reward(domain, row, entry.judged_by, field=f"{entry.field}.verify", place=place)


def _file_rows(entry: Entry) -> FileRows:
  rows = open_rows(
    entry.name, entry.rows, entry.heldout, field=entry.field,
    left_out=lambda row: _of_another(entry, row) or _outside(entry, row),
    left_out_of_heldout=lambda row: _of_another(entry, row),
  )  # fmt: skip
  for field, summary in (
    (f"{entry.field}.rows", rows.training.summary()),
    (f"{entry.field}.heldout", rows.held.summary()),
  ):
    if summary and (field.endswith("rows") or entry.heldout):
      print(f"{field}: left out {summary}", file=sys.stderr)
  return rows


def _of_another(entry: Entry, row: Row) -> str:
  """Why the entry's verifier does not judge the row; "" if it does. A user's own function judges every row."""
  if entry.built_in is None:
    return ""
  agent = agent_of(row)
  if agent is not None and agent != entry.name and AGENTS.get(agent) != entry.judged_by:
    if agent in UNSUPPORTED:
      return f"of agent {agent!r}: {UNSUPPORTED[agent]}"
    if agent in AGENTS:
      return f"of agent {agent!r}, which {AGENTS[agent]!r} judges"
    near = nearest(agent, AGENTS)
    return f"of the unknown agent {agent!r}" + (f" (did you mean {near!r}?)" if near else "")
  try:
    return entry.built_in.why_not(row)
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    return f"that lack a field ({type(error).__name__}: {error})"


def _outside(entry: Entry, row: Row) -> str:
  """Says whether the row's pass_rate is outside the entry's bounds.

  Raises:
    UserError: there are bounds, and the row has no pass_rate.
  """
  if (entry.min_pass_rate, entry.max_pass_rate) == (0.0, 1.0):
    return ""
  rate = row.get("pass_rate")
  if not isinstance(rate, int | float) or isinstance(rate, bool):
    raise UserError(
      f"pass_rate is {'missing' if rate is None else repr(rate)}: {entry.field}.min_pass_rate and max_pass_rate need it"
      " in every row; python -m experiments.profile writes it"
    )
  if entry.min_pass_rate <= rate <= entry.max_pass_rate:
    return ""
  return f"with a pass_rate outside {entry.min_pass_rate:g} to {entry.max_pass_rate:g}"
