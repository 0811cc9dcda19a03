"""Checkpoints as teachers: those that a config names, or the best of each domain; a probe verifies every load."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from nemocascade.domains.rows import prompt_messages
from nemocascade.errors import UserError, unknown
from nemocascade.evaluate.statistics import paired_interval
from nemocascade.runtime import loading
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.swap import HostParams
from nemocascade.store.record import differences
from nemocascade.types import Params, ScoreFn
from nemocascade.verifiers.verdict import Row

# A teacher's name in a config: the cascade's best checkpoint so far for the domain, by `best_checkpoints`.
# Nemotron-Cascade 2 takes its MOPD teachers from its own stages too (arXiv 2603.19220, section 4.4).
BEST = "best"
PROBE_ROWS, PROBE_TOKENS = 4, 16
# dtype of products -> the largest mean |difference|, in nats a token, between a probe's log-probabilities at
# registration and now. Meshes split sums differently. For hybrids of 5 and 21 blocks on 1 x 1, 2 x 4 and 8 x 1
# devices the difference was at most 1e-6 in fp32, and 0.002 to 0.09 in bf16. In bf16 single tokens that chose
# other experts differed by up to 1.9, so the mean is used. Other weights differed by 0.4 to 2 in both dtypes.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2}
# If the mean entropy is at least this fraction of ln V, the logits are almost uniform: the weights are lost.
UNIFORM = 0.995


@dataclasses.dataclass(frozen=True)
class Probe:
  """A model's log-probabilities of some tokens when it was registered. dataclasses.asdict makes it JSON."""

  tokens: tuple[tuple[int, ...], ...]  # [B, T]; a row is one document without padding.
  logprobs: tuple[tuple[float, ...], ...]  # [B, T], nats.
  entropy: float  # Nats; the mean over all tokens but the first of each row.


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A checkpoint that teaches a domain. Only its parameters are loaded."""

  domain: str
  checkpoint: str
  score: float  # Held-out score at temperature 1.
  stage: str
  probe: Probe | None = None
  tokenizer: str = ""  # The tokenizer's fingerprint; "" if unknown.


def best_checkpoints(stages: Sequence[dict]) -> dict[str, Teacher]:
  """Domain -> the earliest finished stage that is as good as the best one, as far as the held-out prompts can tell.

  Of the stages with scores of the domain (and, where a stage names the domains that it teaches, this one among them) the
  one with the highest mean is compared with each earlier one, prompt by prompt. The teacher is the first stage for which
  the 95% interval of the mean difference includes 0. The highest of several noisy means is too high by selection, and
  changes with the noise; the earliest of equals has been trained least on other domains, and stays the teacher when a
  later stage is as good by luck. (The highest lower end of an interval would choose like the highest mean: all
  intervals are of the same prompts, and so about equally wide.)

  Args:
    stages: entries of cascade.json, in the order of the cascade.
  """
  best: dict[str, Teacher] = {}
  done = [entry for entry in stages if entry["status"] == "done"]
  for domain in dict.fromkeys(domain for entry in done for domain in entry.get("scores_after", {})):
    able = [e for e in done if domain in e.get("scores_after", {}) and domain in e.get("teaches", (domain,))]
    if able:
      top = max(able, key=lambda entry: entry["scores_after"][domain])
      equal = (e for e in able if e is top or paired_interval(differences(top, e, domain))[0] <= 0)
      best[domain] = of_stage(next(equal), domain)
  return best


def of_stage(entry: dict, domain: str) -> Teacher:
  """A finished stage as the teacher of a domain; `entry` is the stage's entry of cascade.json."""
  probe = Probe(**entry["probe"]) if "probe" in entry else None
  return Teacher(domain, entry["checkpoint"], entry["scores_after"][domain], entry["name"], probe)


def take_probe(score_fn: ScoreFn, params: Params, tokens_BT) -> Probe:
  """The probe of these parameters on tokens_BT (int [B, T], no padding, T at least 2)."""
  tokens_BT = np.asarray(tokens_BT, np.int32)
  scores = jax.device_get(score_fn(params, tokens_BT, np.ones_like(tokens_BT), None))
  return Probe(
    tokens=tuple(map(tuple, tokens_BT.tolist())),
    logprobs=tuple(map(tuple, np.asarray(scores.logprobs_BT, np.float64).tolist())),
    entropy=float(np.mean(scores.entropy_BT[:, 1:])),
  )


def check_probe(
  score_fn: ScoreFn, params: Params, probe: Probe, *, vocab_size: int, name: str, dtype: str = "float32"
) -> None:
  """Raises UserError unless the parameters give the probe's log-probabilities within TOLERANCES[dtype].

  Args:
    name: of the teacher, for the message.
    dtype: of the model's products; a key of TOLERANCES.
  """
  now = take_probe(score_fn, params, probe.tokens)
  # The first token of a document has no log-probability.
  error, most = np.mean(np.abs(np.subtract(now.logprobs, probe.logprobs))[:, 1:]), TOLERANCES[dtype]
  if not error <= most:  # True for NaN as well.
    raise UserError(
      f"teacher {name}: its probe's log-probabilities moved by {error:.2g} since it was registered"
      f" (at most {most} in {dtype}): the checkpoint or the model's code has changed; train the teacher anew"
    )
  check_entropy(now, vocab_size=vocab_size, name=name)


def check_entropy(now: Probe, *, vocab_size: int, name: str) -> None:
  """Raises UserError if the probe's distribution is nearly uniform or not finite: the weights are lost."""
  if not now.entropy < UNIFORM * math.log(vocab_size) or not np.isfinite(now.logprobs).all():
    raise UserError(
      f"teacher {name}: mean entropy {now.entropy:.2f} of at most ln {vocab_size} ="
      f" {math.log(vocab_size):.2f} nats: it guesses uniformly; give a trained checkpoint"
    )


class Teachers:
  """The teachers of all domains, which take turns on the devices. The others wait in the host's memory (swap.py).

  At most `keep` checkpoints are in the host's memory; others are read again when they are needed.
  """

  def __init__(
    self,
    load: Callable[[str], Params],
    score_fn: ScoreFn,
    *,
    vocab_size: int,
    tokenizer: str = "",
    keep: int = 1,
    tokens_BT=None,
    dtype: str = "float32",
  ):
    """Starts without teachers; `register` adds them.

    Args:
      load: checkpoint -> params, on the devices.
      score_fn: a jitted ScoreFn.
      tokenizer: fingerprint of the student's tokenizer.
      keep: the most checkpoints in the host's memory at a time.
      tokens_BT: tokens for the probe of a teacher that was registered without one, taken at its first load.
      dtype: of the model's products; it selects the tolerance of probes.
    """
    if keep < 1:
      raise UserError(f"teachers in memory, {keep}: must be at least 1")
    self._load, self._score_fn = load, score_fn
    self._vocab_size, self._tokenizer, self._dtype = vocab_size, tokenizer, dtype
    self._teachers: dict[str, Teacher] = {}
    self._tokens_BT, self._probes = tokens_BT, {}  # Checkpoint -> probe.
    self._keep, self._held = keep, {}  # Checkpoint -> HostParams, in the order of loading.
    self._here: tuple[str, Params] | None = None  # The checkpoint that is on the devices, and its parameters there.
    self.loads = 0

  def register(self, teacher: Teacher) -> None:
    """Makes this the teacher of its domain, in place of an earlier one.

    Raises:
      UserError: its tokenizer is not the student's.
    """
    if teacher.tokenizer and self._tokenizer and teacher.tokenizer != self._tokenizer:
      raise UserError(
        f"teacher of {teacher.domain!r}, {teacher.checkpoint}: its tokenizer {teacher.tokenizer[:12]} is"
        f" not the student's {self._tokenizer[:12]}: log-probabilities of tokens can't be compared"
      )
    self._teachers[teacher.domain] = teacher

  def of(self, domain: str) -> Teacher:
    """The domain's teacher. Raises UserError if it has none."""
    if domain not in self._teachers:
      raise unknown("domain with a teacher", domain, self._teachers)
    return self._teachers[domain]

  def checkpoints(self) -> dict[str, str]:
    """Each teacher's checkpoint -> one domain that it teaches, sorted by checkpoint."""
    return dict(sorted((teacher.checkpoint, domain) for domain, teacher in self._teachers.items()))

  def by_domain(self) -> dict[str, str]:
    """Domain -> its teacher's checkpoint."""
    return {domain: teacher.checkpoint for domain, teacher in self._teachers.items()}

  def by_checkpoint(self, domains: Iterable[str]) -> dict[str, list[int]]:
    """Checkpoint -> indices of the `domains` that it teaches.

    Checkpoints in memory come first, so that visiting them in order loads every other one once.
    """
    places: dict[str, list[int]] = {}
    for i, domain in enumerate(domains):
      places.setdefault(self.of(domain).checkpoint, []).append(i)
    return dict(sorted(places.items(), key=lambda item: (item[0] not in self._held, item[0])))

  def params(self, domain: str) -> Params:
    """The parameters of the domain's teacher, on the devices; those of another teacher leave them.

    If they must be loaded, the oldest others are dropped from the host's memory before.

    Raises:
      UserError: the domain has no teacher, or the loaded parameters fail the probe.
    """
    teacher = self.of(domain)
    if self._here is None or self._here[0] != teacher.checkpoint:
      self.leave()
      self._here = teacher.checkpoint, self._bring(teacher)
    return self._here[1]

  def leave(self) -> None:
    """Removes the teacher that is on the devices from them; it still waits in the host's memory."""
    self._here = None

  def _bring(self, teacher: Teacher) -> Params:
    if teacher.checkpoint in self._held:
      return self._held[teacher.checkpoint].put()
    while len(self._held) >= self._keep:
      del self._held[next(iter(self._held))]
    params = self._load(teacher.checkpoint)
    self.loads += 1
    self._check(teacher, params)
    self._held[teacher.checkpoint] = HostParams.of(params)
    return params

  def check(self) -> None:
    """Loads and probes every checkpoint once, so that a bad one is found before training."""
    for places in self.by_checkpoint(domains := list(self._teachers)).values():
      self.params(domains[places[0]])
    self.leave()

  def _check(self, teacher: Teacher, params: Params) -> None:
    how = dict(vocab_size=self._vocab_size, name=f"of {teacher.domain!r}, {teacher.checkpoint}")
    probe = teacher.probe or self._probes.get(teacher.checkpoint)
    if probe is not None:
      check_probe(self._score_fn, params, probe, dtype=self._dtype, **how)
    elif self._tokens_BT is not None:
      probe = take_probe(self._score_fn, params, self._tokens_BT)
      check_entropy(probe, **how)
      self._probes[teacher.checkpoint] = probe


def find(c: ConfigDict, stages: Sequence[dict] = ()) -> list[Teacher]:
  """The teachers of `c.teachers`; each value is "best", the name of a finished stage, or a checkpoint.

  Args:
    stages: entries of cascade.json that may teach, in the order of the cascade.

  Raises:
    UserError: no such stage or checkpoint exists, or no finished stage has a score for a "best".
  """
  best = best_checkpoints(stages) if BEST in c.teachers.values() else {}
  found = []
  for domain, name in c.teachers.items():
    stage = next((s for s in stages if s["name"] == name and s["status"] == "done"), None)
    if name == BEST and domain in best:
      found.append(best[domain])
    elif name == BEST:
      raise UserError(
        f"teachers.{domain}='best': no finished stage of a cascade has a score for it here;"
        f" give --config.teachers.{domain}=CKPT"
      )
    elif stage is not None:
      found.append(of_stage(stage, domain))
    elif loading.is_checkpoint(name):
      tokenizer = loading.find(name).tokenizer
      fingerprint = tokenizer.fingerprint if tokenizer else ""
      found.append(Teacher(domain, name, float("nan"), "", tokenizer=fingerprint))
    else:
      raise unknown(f"teachers.{domain}", name, [BEST, *(s["name"] for s in stages)])
  return found


def gather(
  programs: Programs, tokenizer, teachers: Sequence[Teacher], keep: int, rows: Mapping[str, Sequence[Row]]
) -> Teachers:
  """A registry that loads and probes the teachers. Checks each teacher once before it returns.

  Args:
    tokenizer: the student's.
    keep: most teacher checkpoints in memory.
    rows: domain -> its held-out rows, which teachers without a probe are probed with.
  """
  registry = Teachers(
    lambda checkpoint: loading.load(checkpoint, programs.template), programs.score,
    vocab_size=programs.config.vocab_size, tokenizer=tokenizer.fingerprint, keep=keep,
    tokens_BT=probe_tokens(tokenizer, rows) if teachers else None, dtype=programs.config.dtype,
  )  # fmt: skip
  for teacher in teachers:
    registry.register(teacher)
  registry.check()
  return registry


def probe_tokens(tokenizer, rows: Mapping[str, Sequence[Row]]) -> list[list[int]]:
  """The first tokens of the first held-out prompt of up to PROBE_ROWS domains, equally many of each.

  If no prompt has two tokens, they are the first ids of the vocabulary.
  """
  first = [of_domain[0] for of_domain in rows.values()][:PROBE_ROWS]
  texts = ["\n".join(str(m.get("content")) for m in prompt_messages(row)) for row in first]
  # The first token of a row has no log-probability, so a prompt of one token tells nothing.
  tokens = [found for text in texts if len(found := tokenizer.encode(text)[:PROBE_TOKENS]) > 1]
  tokens = tokens or [list(range(PROBE_TOKENS))]
  shortest = min(map(len, tokens))
  return [row[:shortest] for row in tokens]
