"""The cascade's checkpoints as teachers: the best for each domain, probed after every load."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from nemocascade.errors import UserError, unknown
from nemocascade.types import Params, ScoreFn

# Nats between a probe's log-probabilities then and now, the mean over its tokens, by the dtype of products.
# A mesh cuts sums elsewhere than one device does. Hybrids of 5 and 21 blocks on 1 x 1, 2 x 4 and 8 x 1 devices
# differed by at most 1e-6 in fp32 and by 0.002 to 0.09 in bf16, where single tokens that chose other experts
# were up to 1.9 off: so it is the mean. Other weights were 0.4 to 2 off in either.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2}
UNIFORM = 0.995  # Of ln V: from this mean entropy on all logits are alike, so its weights are lost.


@dataclasses.dataclass(frozen=True)
class Probe:
  """What a model said of some tokens when it was registered; JSON by dataclasses.asdict."""

  tokens: tuple[tuple[int, ...], ...]  # [B, T], one whole document a row.
  logprobs: tuple[tuple[float, ...], ...]
  entropy: float  # Mean over the tokens that have something before them.


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A checkpoint that teaches a domain; parameters alone are ever loaded of it."""

  domain: str
  checkpoint: str
  score: float  # Held out, temperature 1.
  stage: str
  probe: Probe | None = None
  tokenizer: str = ""  # Fingerprint; "" where it is not known.


def best_checkpoints(stages: list[dict]) -> dict[str, Teacher]:
  """Each domain's best finished stage by held-out score at temperature 1; the first of equals."""
  best: dict[str, Teacher] = {}
  for entry in stages:
    if entry["status"] != "done":
      continue
    for domain, score in entry.get("scores_after", {}).items():
      if domain not in best or score > best[domain].score:
        best[domain] = of_stage(entry, domain)
  return best


def of_stage(entry: dict, domain: str) -> Teacher:
  """A finished stage of a cascade's record as the teacher of a domain."""
  probe = Probe(**entry["probe"]) if "probe" in entry else None
  return Teacher(domain, entry["checkpoint"], entry["scores_after"][domain], entry["name"], probe)


def take_probe(score_fn: ScoreFn, params: Params, tokens_BT) -> Probe:
  """What these parameters say of the tokens (int [B, T], no padding); T at least 2."""
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
  """Raises UserError unless the parameters say what they said when the probe was taken.

  `dtype`: of the model's products; one of TOLERANCES.
  """
  now = take_probe(score_fn, params, probe.tokens)
  # The first token of a document has no log-probability.
  error, most = np.mean(np.abs(np.subtract(now.logprobs, probe.logprobs))[:, 1:]), TOLERANCES[dtype]
  if not error <= most:  # Also where it is NaN.
    raise UserError(
      f"teacher {name}: its probe's log-probabilities moved by {error:.2g} since it was registered"
      f" (at most {most} in {dtype}): the checkpoint or the model's code has changed; train the teacher anew"
    )
  check_entropy(now, vocab_size=vocab_size, name=name)


def check_entropy(now: Probe, *, vocab_size: int, name: str) -> None:
  """Raises UserError where the probe is that of a model whose weights are lost."""
  if not now.entropy < UNIFORM * math.log(vocab_size) or not np.isfinite(now.logprobs).all():
    raise UserError(
      f"teacher {name}: mean entropy {now.entropy:.2f} of at most ln {vocab_size} ="
      f" {math.log(vocab_size):.2f} nats: it guesses uniformly; give a trained checkpoint"
    )


class Teachers:
  """A teacher a domain, with the parameters of at most `keep` checkpoints in memory at a time."""

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
    """Knows no teacher yet.

    Args:
      load: checkpoint -> params.
      score_fn: jitted.
      tokenizer: the student's fingerprint.
      keep: checkpoints that may be in memory together.
      tokens_BT: what a teacher that came without a probe is probed on when it is first loaded.
      dtype: of the model's products, which says how nearly a probe must agree.
    """
    if keep < 1:
      raise UserError(f"teachers in memory, {keep}: must be at least 1")
    self._load, self._score_fn = load, score_fn
    self._vocab_size, self._tokenizer, self._dtype = vocab_size, tokenizer, dtype
    self._teachers: dict[str, Teacher] = {}
    self._tokens_BT, self._probes = tokens_BT, {}  # Checkpoint -> probe.
    self._keep, self._held = keep, {}  # Checkpoint -> params, the longest held first.
    self.loads = 0

  def register(self, teacher: Teacher) -> None:
    """The teacher of its domain from here on.

    Raises:
      UserError: it reads tokens of another tokenizer than the student.
    """
    if teacher.tokenizer and self._tokenizer and teacher.tokenizer != self._tokenizer:
      raise UserError(
        f"teacher of {teacher.domain!r}, {teacher.checkpoint}: its tokenizer {teacher.tokenizer[:12]} is"
        f" not the student's {self._tokenizer[:12]}: log-probabilities of tokens can't be compared"
      )
    self._teachers[teacher.domain] = teacher

  def of(self, domain: str) -> Teacher:
    """The domain's teacher; UserError if it has none."""
    if domain not in self._teachers:
      raise unknown("domain with a teacher", domain, self._teachers)
    return self._teachers[domain]

  def checkpoints(self) -> dict[str, str]:
    """Checkpoint -> a domain it teaches, of all, in an order that depends on nothing else."""
    return dict(sorted((teacher.checkpoint, domain) for domain, teacher in self._teachers.items()))

  def by_checkpoint(self, domains: Iterable[str]) -> dict[str, list[int]]:
    """Checkpoint -> places in `domains` it teaches: visited in this order, each loads once."""
    places: dict[str, list[int]] = {}
    for i, domain in enumerate(domains):
      places.setdefault(self.of(domain).checkpoint, []).append(i)
    return dict(sorted(places.items(), key=lambda item: (item[0] not in self._held, item[0])))

  def params(self, domain: str) -> Params:
    """The teacher's parameters, probed if they had to be loaded; others are let go before."""
    teacher = self.of(domain)
    if teacher.checkpoint not in self._held:
      while len(self._held) >= self._keep:
        del self._held[next(iter(self._held))]
      params = self._load(teacher.checkpoint)
      self.loads += 1
      self._check(teacher, params)
      self._held[teacher.checkpoint] = params
    return self._held[teacher.checkpoint]

  def check(self) -> None:
    """Loads and probes every checkpoint once, so that a bad one is found before a batch needs it."""
    for places in self.by_checkpoint(domains := list(self._teachers)).values():
      self.params(domains[places[0]])

  def _check(self, teacher: Teacher, params: Params) -> None:
    how = dict(vocab_size=self._vocab_size, name=f"of {teacher.domain!r}, {teacher.checkpoint}")
    probe = teacher.probe or self._probes.get(teacher.checkpoint)
    if probe is not None:
      check_probe(self._score_fn, params, probe, dtype=self._dtype, **how)
    elif self._tokens_BT is not None:
      probe = take_probe(self._score_fn, params, self._tokens_BT)
      check_entropy(probe, **how)
      self._probes[teacher.checkpoint] = probe
