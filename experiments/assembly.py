"""What there is in a run: tokenizer, model, domains, judge and the jitted programs over them."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments import loading
from experiments.processes import first_alone
from nemocascade import checksums, evaluate
from nemocascade import mesh as mesh_lib
from nemocascade.config import ModelConfig
from nemocascade.data import chat
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from nemocascade.domains import domain as domain_lib
from nemocascade.domains import registry
from nemocascade.domains.judge import BradleyTerryJudge
from nemocascade.domains.sandbox import Sandbox
from nemocascade.errors import UserError
from nemocascade.model.expert_parallel import check_experts
from nemocascade.model.hybrid import (
  Hybrid,
  add_to_router_bias,
  init_params,
  logical_axes,
  repeat_state,
)
from nemocascade.model.reward import RewardModel, init_reward_params, reward_axes
from nemocascade.rollout import episode, score
from nemocascade.rollout.engine import Engine
from nemocascade.state_files import write_json
from nemocascade.step.balance import RouterBalance
from nemocascade.types import Params


class Assembly:
  """Built once from a config; holds no training state.

  Attributes: c, workdir, mesh, tokenizer, model_config, model, domains, score_fn (pure); score, states,
  likeliest and head (jitted; see Hybrid); programs (jitted ones of the stages, by what they depend on).
  """

  def __init__(
    self, c: ConfigDict, workdir: Path, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None
  ):
    """`mesh`: in the place of the config's own over the devices that are here."""
    self.c, self.workdir = c, Path(workdir)
    self.model_config = ModelConfig.from_fields(c.model.to_dict())
    self.mesh = mesh or mesh_lib.make_mesh(**c.mesh)
    if "E" in self.model_config.hybrid_override_pattern:
      check_experts(self.model_config.n_routed_experts, self.mesh)
    self.sandbox = self._sandbox()
    self.domains = registry.build(c.domains, tasks=c.tasks, sandbox=self.sandbox)
    self._new_tokenizer = False  # Whether it is trained here and has not been written.
    # None where there are no domains either: such a model is given tokens.
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

  def score_fn(
    self, params, tokens_BT, segment_ids_BT, wanted_BT=None, distance=None, after=None, temperature=1.0
  ):
    rows = tokens_BT, segment_ids_BT, wanted_BT
    return self._apply(self.model, params, "score", *rows, distance, after, temperature)

  def balanced_score_fn(
    self, params, tokens_BT, segment_ids_BT, wanted_BT=None, distance=None, temperature=1.0
  ):
    """score_fn with the routers' balance loss."""
    model = Hybrid(dataclasses.replace(self.model_config, router_loss=True), self.mesh)
    rows = tokens_BT, segment_ids_BT, wanted_BT
    return self._apply(model, params, "score", *rows, distance, None, temperature)

  def take_in_fn(self, params, prompts):
    return self._apply(self.model, params, "take_in", prompts)

  def _apply(self, model: Hybrid, params, method: str, *args):
    if self.mesh.size > 1:  # Gradients then lie as the parameters do, also where they are summed.
      places = jax.tree.map(lambda p: p.sharding, self.template)
      params = jax.lax.with_sharding_constraint(params, places)
    return model.apply({"params": params}, *args, method=method)

  def score_fn_under(self, balance: RouterBalance):
    """The score function of a training step: nothing of the balance loss is computed where it is not paid."""
    return self.balanced_score_fn if balance.has_loss else self.score_fn

  def add_to_bias(self, params, change_LE):
    """params with the change added to the routers' biases."""
    return add_to_router_bias(self.model_config, params, change_LE)

  def fresh_params(self, key: jax.Array):
    return init_params(self.model_config, key)

  @functools.cached_property
  def template(self) -> Params:
    """Shapes, dtypes and places of the parameters."""
    return self._placed(init_params, logical_axes)

  @functools.cached_property
  def reward_template(self) -> Params:
    """The same of a reward model's."""
    return self._placed(init_reward_params, reward_axes)

  def _placed(self, init, axes) -> Params:
    shapes = jax.eval_shape(functools.partial(init, self.model_config), jax.random.key(0))
    return mesh_lib.placed(shapes, mesh_lib.shardings(axes(self.model_config), self.mesh, shapes))

  def put(self, tree):
    """Rows that every process has whole, onto the mesh."""
    return mesh_lib.put_rows(tree, self.mesh)

  def save_model_files(self, stage_dir: Path) -> None:
    """What a checkpoint needs beside its arrays, so that it can be used from anywhere."""

    def write():
      write_json(stage_dir / "model" / "config.json", self.c.model.to_dict())
      self.tokenizer.save(stage_dir / "model")
      checksums.write(stage_dir / "model")

    first_alone(write)

  # Text.

  def _tokenizer(self) -> Tokenizer:
    """The config's; else the work directory's, or one trained on the domains' own text that is not written yet."""
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
    """Writes a tokenizer that was trained here; all processes then read that one."""
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
        pieces = chat.render(
          example["messages"], tools=example["tools"] or None, enable_thinking=example["thinking"]
        )
        texts += [piece.text for piece in pieces if not piece.special]
    return train_sentencepiece(texts, vocab_size=self.c.tokenizer.vocab_size, phrases=tuple(phrases))

  # Judge of the preference domain.

  def use_judge_from(self, checkpoint: str) -> None:
    """The same, from a reward model's checkpoint; UserError where it reads tokens of another tokenizer."""
    loading.same_tokenizer("judge", checkpoint, self.tokenizer)
    self.use_judge(loading.load(checkpoint, self.reward_template))

  def use_judge(self, params) -> None:
    """Rebuilds the domains with the Bradley-Terry judge of these parameters."""
    model = RewardModel(self.model_config, self.mesh)
    reward = jax.jit(
      lambda params, *rows: model.apply({"params": params}, *rows),
      out_shardings=mesh_lib.whole(self.mesh),
    )
    rows, T = self.c.evaluation.batch, self.c.evaluation.prompt_tokens

    def rewards(prompts: list, answers: list[str]) -> np.ndarray:
      out = np.zeros(len(answers), np.float32)
      for start in range(0, len(answers), rows):
        read = self.answer_rows(
          prompts[start : start + rows], answers[start : start + rows], rows, T
        )
        n = len(answers[start : start + rows])
        out[start : start + n] = np.asarray(reward(params, *self.put(read)))[:n]
      return out

    self.judge = BradleyTerryJudge(rewards)
    self.domains = registry.build(self.c.domains, tasks=self.c.tasks, sandbox=self.sandbox, judge=self.judge)

  def _sandbox(self) -> Sandbox | None:
    """None where no domain runs code: such a model is of use where no program can be confined too."""
    running = registry.that_need("sandbox", self.c.domains)
    try:
      return Sandbox(workers=self.c.sandbox.workers) if running else None
    except UserError as error:
      raise UserError(f"domains={','.join(running)}: {error}") from error

  def answer_rows(self, prompts: list, answers: list[str], B: int, T: int):
    """Prompts with final answers as [B, T] tokens and segment ids; cut at T, unused rows padded.

    The judge reads the answer without its thoughts (paper.md 4.3).
    """
    tokens_BT, segment_ids_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    segment_ids_BT[:, 0] = 1  # A row without a token has no last token.
    for b, (messages, answer) in enumerate(zip(prompts, answers, strict=True)):
      pieces = chat.render(
        [*messages, {"role": "assistant", "content": answer}], enable_thinking=False
      )
      tokens = chat.tokenize(pieces, self.tokenizer)[0][:T]
      tokens_BT[b, : len(tokens)], segment_ids_BT[b, : len(tokens)] = tokens, 1
    return tokens_BT, segment_ids_BT

  # Rollouts.

  def engine(self, prompt_tokens: int, total_tokens: int) -> Engine:
    """Prefill and decoding for prompts of at most `prompt_tokens`; one for each pair of sizes."""
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
    """Samples of completions of the rows; see rollout.episode.collect."""
    return episode.collect(
      self.engine(prompt_tokens, total_tokens), params, key, rows, self.domains,
      tokenizer=self.tokenizer, G=completions, **how,
    )  # fmt: skip

  # Held-out scores.

  @functools.cached_property
  def heldout(self) -> dict[str, list]:
    """The held-out rows of each domain, all prompts different."""
    return {name: self._heldout(name) for name in self.domains}

  def _heldout(self, name: str) -> list:
    """A domain's; prompts that are too long for its evaluation are left out, and said on stderr."""
    e, domain = self.c.evaluation, self.domains[name]
    field = "long_prompt_tokens" if name in e.long_domains else "prompt_tokens"
    fits: dict[str, dict] = {}
    too_long: dict[str, int] = {}  # Text -> tokens.
    start = 0
    while len(fits) < e.prompts:
      for row in domain_lib.rows(domain, "heldout", self.c.seed, start, e.prompts):
        text = json.dumps(domain_lib.prompt_messages(row))
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
    """DomainScore of every domain; the same prompts and random numbers at every call."""
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

      scores |= evaluate.evaluate(
        rows, collect, functools.partial(score.judge, domains=self.domains), batch=batch
      )
    return {name: scores[name] for name in self.domains}


def judged(c: ConfigDict) -> str:
  """The choice of an RL stage that needs a judge, as it stands in its config; "" where none does."""
  return "reward='pairwise'" if c.reward == "pairwise" else "mixture.preference" if "preference" in c.mixture else ""


def check_evaluation(c: ConfigDict, name: str, completions: int) -> None:
  """Raises UserError where evaluation can't take such lengths, or so many completions, set as `name`, of a prompt."""
  e = c.evaluation
  check_lengths("evaluation", e.prompt_tokens, e.total_tokens)
  check_lengths("evaluation", e.long_prompt_tokens, e.long_total_tokens, "long_")
  most = "long_batch" if e.long_domains and e.long_batch < e.batch else "batch"
  if completions > e[most]:
    raise UserError(f"{name}={completions}: must be at most evaluation.{most}={e[most]}")


def check_lengths(section: str, prompt_tokens: int, total_tokens: int, prefix: str = "") -> None:
  """Raises UserError where a prompt of the greatest length leaves no token for an answer."""
  if prompt_tokens >= total_tokens:
    raise UserError(
      f"{section}.{prefix}prompt_tokens={prompt_tokens}: must be below {section}.{prefix}total_tokens={total_tokens}"
    )


def model_alone() -> ConfigDict:
  """The config of a command that only runs a model; `from_checkpoint` adds the model's own."""
  return ConfigDict({"domains": (), "tasks": {}, "mesh": {"data": 1, "expert": 1}})


def from_checkpoint(c: ConfigDict, workdir: Path, checkpoint: str) -> tuple[Assembly, Params]:
  """The assembly and parameters of a checkpoint of ours or an `hf:DIR`, with the model and tokenizer it names."""
  found = loading.find(checkpoint)
  if found.tokenizer is None and c.domains:
    raise UserError(f"--checkpoint={checkpoint}: has no tokenizer (tokenizer.json or tokenizer.model)")
  c = ConfigDict(c)
  c.model = ConfigDict(dataclasses.asdict(found.config))
  a = Assembly(c, workdir, found.tokenizer)
  return a, found.load(a.template)
