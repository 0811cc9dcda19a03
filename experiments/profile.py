"""Profiles the difficulty of training prompts: samples completions of each, and keeps those worth training on.

  python -m experiments.profile --config=my_rl.py --checkpoint=runs/sft/sft/latest \\
    --completions=16 --workdir=runs/profile

The config is that of an RL stage. Of every domain of its mixture whose rows are in files, all training prompts are
sampled with the stage's lengths and temperature. WORKDIR/NAME.jsonl gets the rows to train on, WORKDIR/NAME.dropped.jsonl
the others, both with the fields pass_rate, pass_rate_total and pass_rate_passed: the share of completions that solve
the prompt, of how many with a verdict. WORKDIR/NAME.heldout.jsonl gets the held-out rows as they are. By default prompts that all completions solve are dropped, and nine in ten of
those that none solves (Nemotron-Cascade 2, arXiv 2603.19220, section 4.8). Run the same command again to go on.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade.domains.domain import Domain
from nemocascade.domains.row_files import FileRows
from nemocascade.domains.rows import make_rng
from nemocascade.errors import UserError
from nemocascade.evaluate import difficulty
from nemocascade.evaluate.difficulty import FATES, Difficulty
from nemocascade.field_check import check
from nemocascade.fields import number, text, whole
from nemocascade.mesh import make_mesh
from nemocascade.report.metrics import progress
from nemocascade.rollout import episode, rewards
from nemocascade.runtime import domains, parts
from nemocascade.runtime.checks import check_lengths
from nemocascade.runtime.launch import launch
from nemocascade.runtime.sharing import own
from nemocascade.runtime.start import trained_parts
from nemocascade.state_files import whole as whole_file
from nemocascade.types import Params

SHARE = dict(low=0, high=1)


def run(
  c: ConfigDict, workdir: Path, checkpoint: str, judge: str = "", completions: int = 16, solved: float = 1.0,
  keep_solved: float = 0.0, keep_unsolved: float = 0.1,
) -> dict[str, dict[str, int]]:  # fmt: skip
  """Prints a table and writes the rows. Returns domain -> {fate: prompts}, for the fates of FATES."""
  check(c, "rl")
  check_lengths("rollout", c.rollout.prompt_tokens, c.rollout.total_tokens)
  p, params = _load(c, checkpoint, judge)
  names = [name for name in p.domains if c.mixture.get(name) and isinstance(p.domains[name].rows, FileRows)]
  if not names:
    raise UserError(
      f"mixture={tuple(c.mixture)}: no domain of it has its rows in files; generated rows have no end to profile"
    )
  own(workdir)
  print(f"{'domain':14} " + " ".join(f"{fate:>9}" for fate in FATES) + "  pass_rate")
  counts = {}
  for name in names:
    settings = {"checkpoint": checkpoint, "completions": completions, "solved": solved, "seed": c.seed}
    settings |= {"rows": p.domains[name].rows.fingerprint, "rollout": c.rollout.to_dict()}
    found = _measured(c, p, params, name, completions, solved, _Progress(workdir / f"{name}.measured.jsonl", settings))
    keep = functools.partial(difficulty.fate, keep_solved=keep_solved, keep_unsolved=keep_unsolved)
    counts[name], mean = _write(c.seed, p.domains[name], workdir, found, keep)
    print(f"{name:14} " + " ".join(f"{counts[name][fate]:9}" for fate in FATES) + f"  {mean:9.3f}")
  return counts


def _load(c: ConfigDict, checkpoint: str, judge: str) -> tuple[parts.Parts, Params]:
  """The run's parts and the checkpoint's weights for sampling. Raises UserError if they do not fit together."""
  p, params = trained_parts(c, checkpoint, judge, make_mesh(**c.mesh))
  if not judge and (needing := domains.that_need(c, "judge", c.mixture)):
    raise UserError(f"--judge='': mixture.{needing[0]} needs a judge; give a checkpoint of experiments.reward_model")
  return p, p.programs.sampling_weights(params)


class _Progress:
  """The difficulties measured so far, one line a prompt after a line with the settings."""

  def __init__(self, path: Path, settings: dict):
    self.path, self.found = path, []
    if path.exists():
      first, *lines = path.read_bytes().split(b"\n")[:-1] or [b"{}"]  # What follows the last newline was cut off.
      if json.loads(first) != settings:
        raise UserError(f"{path}: was measured with other settings or rows; choose another --workdir, or remove it")
      self.found = [Difficulty(*json.loads(line)) for line in lines]
    else:
      path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
      lines = [json.dumps(settings), *(json.dumps(dataclasses.astuple(one)) for one in self.found)]
      partial.write_text("".join(f"{line}\n" for line in lines))

  def add(self, found: list[Difficulty]) -> None:
    self.found += found
    with self.path.open("a") as file:
      file.write("".join(f"{json.dumps(dataclasses.astuple(one))}\n" for one in found))


def _measured(
  c: ConfigDict, p: parts.Parts, params: Params, name: str, completions: int, solved: float, done: _Progress
) -> dict[int, Difficulty]:
  """Index of a training row -> its difficulty; prompts that are too long are left out."""
  r, domain, key = c.rollout, p.domains[name], jax.random.key(c.seed)
  source, tokenizer = domain.rows, p.text.tokenizer
  fits = [
    i for i in range(len(source.training))
    if len(episode.prompt_of(source.in_file_order(i), domain, tokenizer)) <= r.prompt_tokens
  ]  # fmt: skip

  class Rows:
    """The rows that fit, each read when it is asked for."""

    def __len__(self):
      return len(fits)

    def __getitem__(self, place):
      return source.in_file_order(fits[place])

  def collect(rows, index, count):
    return episode.collect(
      p.programs.engine(r.prompt_tokens, r.total_tokens), params, jax.random.fold_in(key, index), rows, p.domains,
      tokenizer=tokenizer, G=completions, temperature=np.float32(r.temperature), top_p=r.top_p,
      slots=r.slots, calls_s=r.calls_s, episode_s=r.episode_s,
      judged=count, verdict_s=r.verdict_s,
    )  # fmt: skip

  def judge(samples, count):
    return rewards.judge(samples, p.domains, prompts=count)

  bar = progress(len(fits), initial=len(done.found), desc=name)
  for found in difficulty.measure(
    Rows(), collect, judge, start=len(done.found), batch=r.prompts, solved=solved
  ):  # fmt: skip
    done.add(found)
    bar.update(len(found))
  bar.close()
  return dict(zip(fits, done.found, strict=True))


def _write(
  seed: int, domain: Domain, workdir: Path, found: dict[int, Difficulty], keep
) -> tuple[dict[str, int], float]:
  """Writes the kept, the dropped and the held-out rows; returns ({fate: prompts}, the mean pass_rate of those with a verdict)."""
  counts = dict.fromkeys(FATES, 0)
  index = domain.rows.training
  with (
    whole_file(workdir / f"{domain.name}.jsonl") as kept_path,
    whole_file(workdir / f"{domain.name}.dropped.jsonl") as dropped_path,
    kept_path.open("w") as kept,
    dropped_path.open("w") as dropped,
  ):
    for i in range(len(index)):
      fields, fate = {}, "too long"
      if i in found:
        fate = keep(found[i], make_rng(seed, "profile", index.digest_N[i].tobytes().hex()).random())
        fields = found[i].fields if found[i].judged else {}
      counts[fate] += 1
      (kept if fate == "kept" else dropped).write(json.dumps(index.read(i) | fields, ensure_ascii=False) + "\n")
  with whole_file(workdir / f"{domain.name}.heldout.jsonl") as path, path.open("w") as file:
    for i in range(len(domain.rows.held)):
      file.write(json.dumps(domain.rows.held.read(i), ensure_ascii=False) + "\n")
  rates = [one.fields["pass_rate"] for one in found.values() if one.judged]
  return counts, float(np.mean(rates)) if rates else 0.0


if __name__ == "__main__":
  launch(
    run,
    checkpoint=(text("The checkpoint directory that completes the prompts, or hf:DIR.", empty=False), ""),
    judge=(text("The reward model's checkpoint, for domains judged by preference."), ""),
    completions=(whole("Completions of each prompt."), 16),
    solved=(number("The least reward of a completion that solves its prompt."), 1.0),
    keep_solved=(number("Share kept of the prompts that all completions solve.", **SHARE), 0.0),
    keep_unsolved=(number("Share kept of the prompts that no completion solves.", **SHARE), 0.1),
  )
