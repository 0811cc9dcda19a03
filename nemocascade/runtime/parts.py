"""The parts of a run that its stages share, built once from its config."""

import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from nemocascade.config import ModelConfig
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.domains.domain import Domain
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh
from nemocascade.runtime import domains as domains_lib
from nemocascade.runtime import loading, room
from nemocascade.runtime.judge import load_judge
from nemocascade.runtime.newest import newest
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.text import Text, text_of
from nemocascade.runtime.watching import Watching
from nemocascade.sandbox.sandbox import Sandbox
from nemocascade.types import Params
from nemocascade.verifiers.judge import Judge


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """Model, tokenizer, domains and judge of a run; none of them changes while a stage trains.

  Attributes:
    judge: compares answers; None until there is a reward model.
    watching: how the user watches the run.
  """

  programs: Programs
  text: Text
  domains: Mapping[str, Domain]
  judge: Judge | None = None
  watching: Watching = Watching()


def build(
  c: ConfigDict,
  workdir: Path,
  tokenizer: Tokenizer | None = None,
  mesh: Mesh | None = None,
  domains: Container[str] | None = None,
) -> Parts:
  """Builds the parts from a config. Nothing is written.

  Args:
    workdir: where the run is written; its tokenizer is used if it has one.
    tokenizer: used instead of the config's.
    mesh: used instead of the config's mesh over this machine's devices.
    domains: names of the domains that the run draws prompts from; only these are built. None builds all.

  Raises:
    UserError: the parts do not fit together, or programs cannot be confined.
  """
  programs = Programs(ModelConfig.from_fields(c.model.to_dict()), mesh or make_mesh(**c.mesh))
  room.check(c, programs)
  built = build_domains(c, domains)
  text = Text(tokenizer) if tokenizer else text_of(c, workdir, built)
  if text.tokenizer and text.tokenizer.vocab_size > programs.config.vocab_size:
    raise UserError(
      f"model.vocab_size={programs.config.vocab_size} is smaller than the tokenizer's"
      f" {text.tokenizer.vocab_size}: raise it, or lower tokenizer.vocab_size"
    )
  return Parts(programs, text, built)


def build_domains(c: ConfigDict, names: Container[str] | None = None) -> dict[str, Domain]:
  """The config's domains, or those of them in `names`. All entries are checked, but only these read files.

  The sandbox is started only if one of them runs code, so that others work on any machine.
  """
  running = domains_lib.that_need(c, "sandbox", names)
  try:
    sandbox = Sandbox(workers=c.sandbox.workers) if running else None
  except UserError as error:
    raise UserError(f"domains={','.join(running)}: {error}") from error
  return domains_lib.build(c, sandbox=sandbox, names=names)


def with_judge(c: ConfigDict, parts: Parts, checkpoint: str) -> Parts:
  """The parts with a reward model as the judge; domains that need a judge are given it.

  Raises:
    UserError: the reward model was trained with another tokenizer, or cannot be loaded.
  """
  judge = load_judge(checkpoint, parts.programs, parts.text.tokenizer, c.evaluation)
  return dataclasses.replace(parts, domains=domains_lib.with_judge(c, parts.domains, judge), judge=judge)


def from_checkpoint(checkpoint: str, mesh: Mesh | None = None) -> tuple[Programs, Tokenizer | None, Params]:
  """(programs, tokenizer, parameters) of a checkpoint; the tokenizer is None if it has none.

  Args:
    checkpoint: `STAGE/checkpoints/STEP`, `STAGE/latest` or `hf:DIR`.
    mesh: by default one device.

  Raises:
    UserError: it cannot be loaded, or the mesh's `expert` does not divide its experts.
  """
  found = loading.find(newest(checkpoint))
  programs = Programs(found.config, mesh or make_mesh(data=1, expert=1))
  return programs, found.tokenizer, found.load(programs.template)
