"""Builds the parts of a run from its config: tokenizer, model, domains, judge and jitted programs."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nemocascade import mesh as mesh_lib
from nemocascade.config import ModelConfig
from nemocascade.data import chat
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from nemocascade.domains import domain as domain_lib
from nemocascade.domains import registry
from nemocascade.domains.rows import prompt_messages
from nemocascade.errors import UserError
from nemocascade.evaluate import suites
from nemocascade.model.expert_parallel import check_experts
from nemocascade.model.hybrid import (
  Hybrid,
  add_to_router_bias,
  init_params,
  logical_axes,
  repeat_state,
)
from nemocascade.model.reward import RewardModel, init_reward_params, reward_axes
from nemocascade.rollout import episode, rewards
from nemocascade.rollout.engine import Engine
from nemocascade.runtime import loading
from nemocascade.runtime.hosts import first_alone
from nemocascade.sandbox.sandbox import Sandbox
from nemocascade.state_files import write_json
from nemocascade.step.balance import RouterBalance
from nemocascade.store import checksums
from nemocascade.types import Params
from nemocascade.verifiers.judge import BradleyTerryJudge


class Assembly:
  """Built once from a config; holds no training state.

  Attributes:
    c, workdir, mesh, tokenizer, model_config, model, sandbox, domains: the parts; tokenizer and sandbox may be
      None.
    score, states, likeliest, head: jitted methods of Hybrid. `score_fn` is `score` before jit.
    programs: jitted programs of the stages, by the settings that they depend on.
  """

  def __init__(self, c: ConfigDict, workdir: Path, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None):
    """
    Args:
      c: the config of a run.
      workdir: where the run is written; nothing is written yet.
      tokenizer: used instead of the config's.
      mesh: used instead of the config's mesh over this machine's devices.

    Raises:
      UserError: the parts do not fit together, or programs cannot be confined.
    """
    self.c, self.workdir = c, Path(workdir)
    self.model_config = ModelConfig.from_fields(c.model.to_dict())
    self.mesh = mesh or mesh_lib.make_mesh(**c.mesh)
    if "E" in self.model_config.hybrid_override_pattern:
      check_experts(self.model_config.n_routed_experts, self.mesh)
    self.sandbox = self._sandbox()
    self.domains = registry.build(c.domains, tasks=c.tasks, sandbox=self.sandbox)
    self._new_tokenizer = False  # True while a tokenizer trained here is not yet on disk.
    # None without domains: the input of such a model is tokens.
    self.tokenizer = tokenizer or (self._tokenizer() if c.domains else None)
    if self.tokenizer and self.tokenizer.vocab_size > self.model_config.vocab_size:
      raise UserError(
        f"model.vocab_size={self.model_config.vocab_size} is smaller than the tokenizer's"
        f" {self.tokenizer.vocab_size}: raise it, or lower tokenizer.vocab_size"
      )
    self.model = Hybrid(self.model_config, self.mesh)
    self.score = self._jitted(self.score_fn)
    self.states = self._jitted(self._method("states"))
    self.likeliest = self._jitted(self._method("likeliest"), static_argnums=4)
    self.head = self._jitted(self._method("head"))
    self.programs: dict = {}
    self._engines: dict[tuple[int, int], Engine] = {}

  def _jitted(self, fn, **how):
    return jax.jit(fn, out_shardings=mesh_lib.whole(self.mesh), **how)

  def _method(self, name: str):
    return lambda params, *args: self.model.apply({"params": params}, *args, method=name)

  def score_fn(self, params, tokens_BT, segment_ids_BT, wanted_BT=None, distance=None, after=None, temperature=1.0):
    rows = tokens_BT, segment_ids_BT, wanted_BT
    return self._apply(self.model, params, "score", *rows, distance, after, temperature)

  def balanced_score_fn(self, params, tokens_BT, segment_ids_BT, wanted_BT=None, distance=None, temperature=1.0):
    """score_fn whose result also has the routers' balance loss."""
    model = Hybrid(dataclasses.replace(self.model_config, router_loss=True), self.mesh)
    rows = tokens_BT, segment_ids_BT, wanted_BT
    return self._apply(model, params, "score", *rows, distance, None, temperature)

  def take_in_fn(self, params, prompts):
    return self._apply(self.model, params, "take_in", prompts)

  def _apply(self, model: Hybrid, params, method: str, *args):
    if self.mesh.size > 1:  # Gives gradients and their sums the parameters' shardings.
      places = jax.tree.map(lambda p: p.sharding, self.template)
      params = jax.lax.with_sharding_constraint(params, places)
    return model.apply({"params": params}, *args, method=method)

  def score_fn_under(self, balance: RouterBalance):
    """The score function of a training step. It computes the balance loss only if `balance` uses it."""
    return self.balanced_score_fn if balance.has_loss else self.score_fn

  def add_to_bias(self, params, change_LE):
    """params with `change_LE` ([MoE blocks, experts]) added to the routers' biases."""
    return add_to_router_bias(self.model_config, params, change_LE)

  def fresh_params(self, key: jax.Array):
    return init_params(self.model_config, key)

  @functools.cached_property
  def template(self) -> Params:
    """Shapes, dtypes and shardings of the parameters."""
    return self._placed(init_params, logical_axes)

  @functools.cached_property
  def reward_template(self) -> Params:
    """Shapes, dtypes and shardings of a reward model's parameters."""
    return self._placed(init_reward_params, reward_axes)

  def _placed(self, init, axes) -> Params:
    shapes = jax.eval_shape(functools.partial(init, self.model_config), jax.random.key(0))
    return mesh_lib.placed(shapes, mesh_lib.shardings(axes(self.model_config), self.mesh, shapes))

  def put(self, tree):
    """Puts rows on the mesh. Every process must have all the rows."""
    return mesh_lib.put_rows(tree, self.mesh)

  def save_model_files(self, stage_dir: Path) -> None:
    """Writes the model's config and tokenizer, so that the stage's checkpoints can be used on their own."""

    def write():
      write_json(stage_dir / "model" / "config.json", self.c.model.to_dict())
      self.tokenizer.save(stage_dir / "model")
      checksums.write(stage_dir / "model")

    first_alone(write)

  # Text.

  def _tokenizer(self) -> Tokenizer:
    """The config's tokenizer; else the work directory's; else a new one, not yet written to disk."""
    if self.c.tokenizer.path:
      return load_tokenizer(self.c.tokenizer.path)
    if self._own_tokenizer.exists():
      return load_tokenizer(self._own_tokenizer)
    self._new_tokenizer = True
    return self._train_tokenizer()

  @property
  def _own_tokenizer(self) -> Path:
    return self.workdir / "tokenizer" / "tokenizer.model"

  def keep_tokenizer(self) -> None:
    """Writes a tokenizer that was trained here. All processes then read the written file."""
    if self._new_tokenizer:
      path = self._own_tokenizer
      first_alone(lambda: path.exists() or self.tokenizer.save(path))
      self.tokenizer, self._new_tokenizer = load_tokenizer(path), False

  def _train_tokenizer(self) -> Tokenizer:
    texts, phrases = [], list(chat.PHRASES)
    for domain in self.domains.values():
      phrases += [phrase for phrase in domain.phrases if phrase not in phrases]
      count = self.c.tokenizer.conversations
      for example in domain_lib.demonstrations(domain, self.c.seed, 0, count):
        pieces = chat.render(example["messages"], tools=example["tools"] or None, enable_thinking=example["thinking"])
        texts += [piece.text for piece in pieces if not piece.special]
    return train_sentencepiece(texts, vocab_size=self.c.tokenizer.vocab_size, phrases=tuple(phrases))

  # Judge of the preference domain.

  def use_judge_from(self, checkpoint: str) -> None:
    """`use_judge` with the parameters of a reward model's checkpoint.

    Raises:
      UserError: it was trained with another tokenizer, or cannot be loaded.
    """
    loading.same_tokenizer("judge", checkpoint, self.tokenizer)
    self.use_judge(loading.load(checkpoint, self.reward_template))

  def use_judge(self, params) -> None:
    """Rebuilds the domains with a Bradley-Terry judge that has these parameters."""
    model = RewardModel(self.model_config, self.mesh)
    reward = jax.jit(
      lambda params, *rows: model.apply({"params": params}, *rows),
      out_shardings=mesh_lib.whole(self.mesh),
    )
    rows, T = self.c.evaluation.batch, self.c.evaluation.prompt_tokens

    def read_rewards(prompts: list, answers: list[str]) -> np.ndarray:
      out = np.zeros(len(answers), np.float32)
      for start in range(0, len(answers), rows):
        read = self.answer_rows(prompts[start : start + rows], answers[start : start + rows], rows, T)
        n = len(answers[start : start + rows])
        out[start : start + n] = np.asarray(reward(params, *self.put(read)))[:n]
      return out

    self.judge = BradleyTerryJudge(read_rewards)
    self.domains = registry.build(self.c.domains, tasks=self.c.tasks, sandbox=self.sandbox, judge=self.judge)

  def _sandbox(self) -> Sandbox | None:
    """The sandbox, or None if no domain runs code, so that those domains work on any machine."""
    running = registry.that_need("sandbox", self.c.domains)
    try:
      return Sandbox(workers=self.c.sandbox.workers) if running else None
    except UserError as error:
      raise UserError(f"domains={','.join(running)}: {error}") from error

  def answer_rows(self, prompts: list, answers: list[str], B: int, T: int):
    """(tokens_BT, segment_ids_BT), int32, of prompts with final answers; cut at T, unused rows padded.

    The judge reads the answer without its thoughts (Nemotron-Cascade 1, arXiv 2512.13607, section 4).
    """
    tokens_BT, segment_ids_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    segment_ids_BT[:, 0] = 1  # The reward is read at a row's last token, so an empty row needs one.
    for b, (messages, answer) in enumerate(zip(prompts, answers, strict=True)):
      pieces = chat.render([*messages, {"role": "assistant", "content": answer}], enable_thinking=False)
      tokens = chat.tokenize(pieces, self.tokenizer)[0][:T]
      tokens_BT[b, : len(tokens)], segment_ids_BT[b, : len(tokens)] = tokens, 1
    return tokens_BT, segment_ids_BT

  # Rollouts.

  def engine(self, prompt_tokens: int, total_tokens: int) -> Engine:
    """The engine for prompts of at most `prompt_tokens` and rows of at most `total_tokens`; cached."""
    sizes = prompt_tokens, total_tokens
    if sizes not in self._engines:
      self._engines[sizes] = self._engine(*sizes)
    return self._engines[sizes]

  def _engine(self, prompt_tokens: int, total_tokens: int) -> Engine:
    def prefill(params, tokens_BP, length_B, capacity):
      return self.model.apply({"params": params}, tokens_BP, length_B, capacity, method="prefill")

    def step(params, state, tokens_B, active_B):
      return self.model.apply({"params": params}, state, tokens_B, active_B, method="step")

    return Engine(
      prefill, step, repeat_state, prompt_tokens=prompt_tokens, total_tokens=total_tokens,
      mesh=self.mesh, params_places=jax.tree.map(lambda p: p.sharding, self.template),
    )  # fmt: skip

  def collect(self, params, key, rows, *, prompt_tokens, total_tokens, completions=1, **how):
    """Samples `completions` completions of each row; see rollout.episode.collect."""
    return episode.collect(
      self.engine(prompt_tokens, total_tokens), params, key, rows, self.domains,
      tokenizer=self.tokenizer, G=completions, **how,
    )  # fmt: skip

  # Held-out scores.

  @functools.cached_property
  def heldout(self) -> dict[str, list]:
    """Domain -> its evaluation.prompts held-out rows; all prompts differ."""
    return {name: self._heldout(name) for name in self.domains}

  def _heldout(self, name: str) -> list:
    """A domain's held-out rows. Leaves out prompts that are too long, and reports them on stderr.

    Raises:
      UserError: the domain has too few prompts.
    """
    e, domain = self.c.evaluation, self.domains[name]
    field = "long_prompt_tokens" if name in e.long_domains else "prompt_tokens"
    fits: dict[str, dict] = {}
    too_long: dict[str, int] = {}  # Prompt's text -> number of its tokens.
    start = 0
    while len(fits) < e.prompts:
      for row in domain_lib.rows(domain, "heldout", self.c.seed, start, e.prompts):
        text = json.dumps(prompt_messages(row))
        if text in fits or text in too_long or len(fits) == e.prompts:
          continue
        tokens = len(episode.prompt_of(row, domain, self.tokenizer))
        if tokens <= e[field]:
          fits[text] = row
        else:
          too_long[text] = tokens
      start += e.prompts
      if start > 100 * e.prompts or len(too_long) > 10 * e.prompts:
        others = f" of at most evaluation.{field}={e[field]} tokens, and {len(too_long)} longer" if too_long else ""
        raise UserError(
          f"domain {name!r} has only {len(fits)} held-out prompts{others}: lower evaluation.prompts"
          f"{f', or raise evaluation.{field}' if too_long else ''}"
        )
    if too_long:
      print(
        f"domain {name!r}: left out {len(too_long)} held-out prompts of more than"
        f" evaluation.{field}={e[field]} tokens; the longest has {max(too_long.values())}",
        file=sys.stderr,
      )  # fmt: skip
    return list(fits.values())

  def evaluate(self, params, *, temperature: float, completions: int = 1) -> dict:
    """Domain -> DomainScore. Every call uses the same prompts and random numbers."""
    e, key = self.c.evaluation, jax.random.key(self.c.seed)
    scores = {}
    for long in (False, True):
      rows = {n: r for n, r in self.heldout.items() if (n in e.long_domains) == long}
      P, T = (e.long_prompt_tokens, e.long_total_tokens) if long else (e.prompt_tokens, e.total_tokens)
      batch = (e.long_batch if long else e.batch) // completions

      def collect(rows, index, P=P, T=T):
        return self.collect(
          params, jax.random.fold_in(key, index), rows, prompt_tokens=P, total_tokens=T,
          completions=completions, temperature=temperature,
        )  # fmt: skip

      scores |= suites.evaluate(rows, collect, functools.partial(rewards.judge, domains=self.domains), batch=batch)
    return {name: scores[name] for name in self.domains}


def judged(c: ConfigDict) -> str:
  """The setting that makes an RL stage need a judge, for messages; "" if it needs none."""
  return "reward='pairwise'" if c.reward == "pairwise" else "mixture.preference" if "preference" in c.mixture else ""


def check_evaluation(c: ConfigDict, name: str, completions: int) -> None:
  """Checks the evaluation's lengths, and `completions` per prompt, the value of the field or flag `name`.

  Raises:
    UserError: a prompt leaves no room for an answer, or the completions of one prompt exceed a batch.
  """
  e = c.evaluation
  check_lengths("evaluation", e.prompt_tokens, e.total_tokens)
  check_lengths("evaluation", e.long_prompt_tokens, e.long_total_tokens, "long_")
  most = "long_batch" if e.long_domains and e.long_batch < e.batch else "batch"
  if completions > e[most]:
    raise UserError(f"{name}={completions}: must be at most evaluation.{most}={e[most]}")


def check_lengths(section: str, prompt_tokens: int, total_tokens: int, prefix: str = "") -> None:
  """Raises UserError if a prompt of the greatest length leaves no token for an answer."""
  if prompt_tokens >= total_tokens:
    raise UserError(
      f"{section}.{prefix}prompt_tokens={prompt_tokens}: must be below {section}.{prefix}total_tokens={total_tokens}"
    )


def model_alone() -> ConfigDict:
  """The config of a command that only runs a model; `from_checkpoint` adds the field `model`."""
  return ConfigDict({"domains": (), "tasks": {}, "mesh": {"data": 1, "expert": 1}})


def from_checkpoint(c: ConfigDict, workdir: Path, checkpoint: str) -> tuple[Assembly, Params]:
  """(assembly, parameters) of a checkpoint of ours or an `hf:DIR`, with its model and tokenizer.

  Raises:
    UserError: it cannot be loaded, or it has no tokenizer and the config has domains.
  """
  found = loading.find(checkpoint)
  if found.tokenizer is None and c.domains:
    raise UserError(f"--checkpoint={checkpoint}: has no tokenizer (tokenizer.json or tokenizer.model)")
  c = ConfigDict(c)
  c.model = ConfigDict(dataclasses.asdict(found.config))
  a = Assembly(c, workdir, found.tokenizer)
  return a, found.load(a.template)
