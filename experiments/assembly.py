"""What there is in a run: tokenizer, model, domains, judge and the jitted programs over them."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments import loading
from experiments.processes import first_alone
from nemocascade import evaluate
from nemocascade import mesh as mesh_lib
from nemocascade.checkpoint import load_params
from nemocascade.config import ModelConfig
from nemocascade.data import chat
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from nemocascade.domains import domain as domain_lib
from nemocascade.domains import registry
from nemocascade.domains.judge import BradleyTerryJudge
from nemocascade.domains.sandbox import Sandbox
from nemocascade.errors import UserError
from nemocascade.metrics import write_json
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
    # Only domains run code: a model alone is of use where a sandbox is not to be had.
    self.sandbox = Sandbox(mode=c.sandbox.mode, workers=c.sandbox.workers) if c.domains else None
    self.domains = registry.build(c.domains, tasks=c.tasks, sandbox=self.sandbox)
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

  def score_fn(self, params, tokens_BT, segment_ids_BT, wanted_BT=None, distance=None, after=None):
    return self._apply(self.model, params, "score", tokens_BT, segment_ids_BT, wanted_BT, distance, after)

  def balanced_score_fn(self, params, tokens_BT, segment_ids_BT, wanted_BT=None, distance=None):
    """score_fn with the routers' balance loss."""
    model = Hybrid(dataclasses.replace(self.model_config, router_loss=True), self.mesh)
    return self._apply(model, params, "score", tokens_BT, segment_ids_BT, wanted_BT, distance)

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

    first_alone(write)

  # Text.

  def _tokenizer(self) -> Tokenizer:
    """The config's; else the work directory's, trained on the domains' own text at the first run."""
    if self.c.tokenizer.path:
      return load_tokenizer(self.c.tokenizer.path)
    path = self.workdir / "tokenizer" / "tokenizer.model"
    first_alone(lambda: path.exists() or self._train_tokenizer(path))
    return load_tokenizer(path)

  def _train_tokenizer(self, path: Path) -> None:
    texts, phrases = [], list(chat.PHRASES)
    for domain in self.domains.values():
      phrases += [phrase for phrase in domain.phrases if phrase not in phrases]
      count = self.c.tokenizer.conversations
      for example in domain_lib.demonstrations(domain, self.c.seed, 0, count):
        pieces = chat.render(
          example["messages"], tools=example["tools"] or None, enable_thinking=example["thinking"]
        )
        texts += [piece.text for piece in pieces if not piece.special]
    path.parent.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(texts, vocab_size=self.c.tokenizer.vocab_size, phrases=tuple(phrases)).save(path)

  # Judge of the preference domain.

  def use_judge_from(self, checkpoint: str) -> None:
    """The same, from a reward model's checkpoint."""
    self.use_judge(load_params(checkpoint, self.reward_template))

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
    rows = {}
    for name, domain in self.domains.items():
      seen: dict[str, dict] = {}
      start = 0
      while len(seen) < self.c.evaluation.prompts:
        for row in domain_lib.rows(domain, "heldout", self.c.seed, start, self.c.evaluation.prompts):
          seen.setdefault(json.dumps(domain_lib.prompt_messages(row)), row)
        start += self.c.evaluation.prompts
        if start > 100 * self.c.evaluation.prompts:
          raise UserError(
            f"domain {name!r} has only {len(seen)} held-out prompts: lower evaluation.prompts"
          )
      rows[name] = list(seen.values())[: self.c.evaluation.prompts]
    return rows

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


def check_completions(c: ConfigDict, name: str, completions: int) -> None:
  """Raises UserError where evaluation can't take so many completions of a prompt; `name` is what was set."""
  if not 1 <= completions <= c.evaluation.long_batch:
    raise UserError(f"{name}={completions}: allowed: 1 to {c.evaluation.long_batch}")


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


def claim(c: ConfigDict, workdir: Path) -> None:
  """Makes the work directory this config's, or refuses one that belongs to another.

  Raises:
    UserError: config.json there differs; the message names the first differing field.
  """
  path = Path(workdir) / "config.json"
  fields = json.loads(c.to_json_best_effort())
  first_alone(lambda: path.exists() or write_json(path, {"config": fields, "versions": versions()}))
  try:
    before = json.loads(path.read_text())["config"]
  except (json.JSONDecodeError, KeyError) as error:
    raise UserError(f"{path} is damaged ({error}): choose another --workdir, or remove it") from error
  if difference := _difference(before, fields):
    name, there, here = difference
    raise UserError(
      f"--workdir {workdir} belongs to another config: {name} is {there!r} there and {here!r} here;"
      " choose another --workdir"
    )


def _difference(there, here, name: str = "config"):
  """The first (field, there, here) in which two JSON values differ, or None."""
  if isinstance(there, dict) and isinstance(here, dict):
    for key in sorted(there.keys() | here.keys()):
      if key not in there or key not in here:
        return f"{name}.{key}", there.get(key, "absent"), here.get(key, "absent")
      if found := _difference(there[key], here[key], f"{name}.{key}"):
        return found
    return None
  return None if there == here else (name, there, here)


def versions() -> dict[str, str]:
  """Of the packages that numbers depend on, and of this code where git knows it."""
  import subprocess
  from importlib.metadata import version

  found = {name: version(name) for name in ("jax", "flax", "optax", "numpy", "sentencepiece")}
  if shutil.which("git"):
    git = subprocess.run(
      ["git", "describe", "--always", "--dirty"],
      cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if git.returncode == 0:
      found["nemocascade"] = git.stdout.strip()
  return found
