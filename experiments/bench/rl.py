"""Times a whole RL step against TRL's GRPOTrainer, with equal weights, prompts, reward, sizes and machine.

A step is rollout, verdict, advantage and update. Each side runs its own training loop: ours is
experiments.rl, theirs is in trl. They take turns, step by step. Both sample every completion to its
full length, because the weights are built so that no special token is drawn. The comparison runs twice: in
bf16 with fp32 weights, as in the recipe, and in fp32.
"""

import functools
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from ml_collections import ConfigDict
from tokenizers import AddedToken, models, pre_tokenizers

from configs import recipe
from configs.tiny import rl as tiny_rl
from experiments import convert, rl
from nemocascade.config import ModelConfig
from nemocascade.data import chat
from nemocascade.data.tokenizer import SPECIAL_NAMES, HuggingFaceTokenizer, Tokenizer
from nemocascade.domains.domain import Domain, one_by_one
from nemocascade.domains.rows import make_prompt, prompt_messages
from nemocascade.errors import UserError
from nemocascade.generated.generator import GeneratedRows, Generator
from nemocascade.mesh import make_mesh
from nemocascade.report.metrics import read_lines
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.start import save_model_files
from nemocascade.runtime.text import Text
from nemocascade.store.checkpoint import Store
from nemocascade.types import Params, TrainState
from nemocascade.verifiers.verdict import Verdict

MODEL = dict(  # 11.9M parameters.
  vocab_size=1024, hidden_size=256, hybrid_override_pattern="MEMEM*EMEME", num_attention_heads=8,
  num_key_value_heads=2, head_dim=32, mamba_num_heads=8, mamba_head_dim=64, ssm_state_size=64,
  n_groups=2, chunk_size=64, n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=192,
  moe_shared_expert_intermediate_size=384, time_step_limit=(0.001, math.inf),  # transformers' clamp of dt.
)  # fmt: skip
PROMPTS, COMPLETIONS, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 16, 64
STEPS = 6  # The first compiles and is reported separately; the best of the others is compared.
SCORED = 4  # Rows whose log-probabilities are compared before anything is timed.
DTYPES = {"bfloat16": 0.25, "float32": 1e-3}  # Product dtype -> allowed log-prob. difference, nats.
PHASES = ("rollout", "verdict", "advantage", "update")
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"


class Initials(Generator):
  """Asks for words with a given initial. The reward is the share of such words in the completion."""

  name = "initials"

  def make_row(self, rng):
    letter, word = str(rng.choice(list(CONSONANTS))), str(rng.choice(words(200)))
    row = make_prompt(self.name, f"words with {letter} not like {word}", letter=letter)
    row["responses_create_params"]["input"].insert(0, {"role": "system", "content": ""})
    return row


def judge(row, completion):
  return Verdict(share(completion.content, row["letter"]), row["letter"])


INITIALS = Domain(Initials.name, GeneratedRows(Initials(), Initials.name), one_by_one(judge), thinking=False)


def share(text: str, letter: str) -> float:
  """The share of a text's words that begin with the letter; 0 for an empty text."""
  found = text.split()
  return sum(word.startswith(letter) for word in found) / max(len(found), 1)


@functools.cache
def words(count: int) -> tuple[str, ...]:
  """`count` made-up words of four letters, whose initials cycle through the consonants."""
  rest = itertools.product(VOWELS, CONSONANTS, VOWELS)
  return tuple("".join((first, *others)) for others in rest for first in CONSONANTS)[:count]


def make_tokenizer(size: int) -> HuggingFaceTokenizer:
  """A tokenizer of `size` tokens with one token per word, none for spaces. A prompt of `Initials` has 16."""
  known = [*SPECIAL_NAMES, "system", "user", "assistant", "words", "with", "not", "like", *CONSONANTS]
  known += words(size - len(known))
  tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_NAMES])
  return HuggingFaceTokenizer(tokenizer.to_str().encode())


def config(**model) -> ConfigDict:
  """The run's config, for GRPO as both sides compute it: on-policy, one update, token mean, no KL.

  Args:
    **model: changed fields of MODEL.
  """
  c = tiny_rl.fields()
  c.update(recipe.guards())
  c.seed, c.steps = 0, STEPS
  c.model = ConfigDict(MODEL | model)
  c.domains, c.mixture = {INITIALS.name: {"rows": f"generated:{INITIALS.name}"}}, {INITIALS.name: 1.0}
  c.rollout.update(
    prompts=PROMPTS, completions=COMPLETIONS, prompt_tokens=PROMPT_TOKENS,
    total_tokens=PROMPT_TOKENS + NEW_TOKENS,
  )  # fmt: skip
  c.packing.update(rows=PROMPTS * COMPLETIONS, row_tokens=NEW_TOKENS, pieces=1, shared_prompts=True)
  c.dynamic_filtering, c.overlong = False, "keep"
  c.optimizer.update(peak_lr=1e-5, warmup_steps=0, frozen=())
  c.save_every = c.samples_every = STEPS + 1
  return c


def make_parts(c: ConfigDict) -> Parts:
  """The parts of an RL run whose only domain is `INITIALS`, which no config names."""
  programs = Programs(ModelConfig.from_fields(c.model.to_dict()), make_mesh(data=1, expert=1))
  return Parts(programs, Text(make_tokenizer(c.model.vocab_size)), {INITIALS.name: INITIALS})


def endless_params(programs: Programs, seed: int) -> Params:
  """Fresh parameters under which no special token is drawn.

  No block writes to the first number of a hidden state, so it stays 1, and the head gives special tokens a
  large negative weight on it. Embeddings are scaled to a standard deviation of 1: at the usual 1/50, tokens
  would hardly differ, and all would choose the same experts.
  """
  writes = ("out_proj", "o_proj", "down_proj", "shared_down_proj")

  def change(path, leaf):
    name = path[-1].key
    if name == "embedding":
      return (leaf / jnp.std(leaf)).at[:, 0].set(1.0)
    if name == "lm_head":
      return leaf.at[0, : len(SPECIAL_NAMES)].set(-100.0)
    return leaf.at[..., 0].set(0.0) if name in writes else leaf

  return jax.tree_util.tree_map_with_path(change, programs.fresh_params(jax.random.key(seed)))


def save(c: ConfigDict, tokenizer: Tokenizer, params: Params, stage_dir: Path) -> str:
  """Writes a checkpoint in the layout of a stage, with these parameters; returns its path."""
  save_model_files(c, stage_dir, tokenizer)
  store = Store(stage_dir / "checkpoints")
  store.save(1, TrainState(jnp.zeros((), jnp.int32), params, {}), {})
  return str(store.path_of(1))


def run_ours(c: ConfigDict, p: Parts, start: str, stage_dir: Path, between=lambda: None):
  """Runs our side. Returns (seconds of each step, {phase: seconds} of each step).

  `between` is called after each step, outside the measured time.
  """
  seconds, mark = [], time.perf_counter()

  def watch(*_) -> bool:
    nonlocal mark
    seconds.append(time.perf_counter() - mark)
    between()
    mark = time.perf_counter()
    return False

  rl.run(c, stage_dir, p, start, watch=watch)
  lines = read_lines(stage_dir / "metrics.jsonl")
  for line in lines:
    if line["rollout/tokens"] != c.rollout.total_tokens - c.rollout.prompt_tokens:
      raise RuntimeError(f"a completion of ours stopped early: {line['rollout/tokens']} tokens on average")
  return seconds, [{phase: line[f"time/{phase}"] for phase in PHASES} for line in lines]


def prompts(c: ConfigDict, p: Parts) -> tuple[list[str], list[list[int]], list[str]]:
  """(texts, tokens, letters) of all prompts of the run, in the order in which our side draws them."""
  rows = [INITIALS.rows.train(c.seed, number) for number in range(c.steps * c.rollout.prompts)]
  pieces = [chat.render(prompt_messages(row), enable_thinking=False, add_generation_prompt=True) for row in rows]
  tokens = [chat.tokenize(prompt, p.text.tokenizer)[0] for prompt in pieces]
  return [chat.text_of(prompt) for prompt in pieces], tokens, [row["letter"] for row in rows]


def cases() -> Iterator[dict]:
  """Yields a line for the step and for each phase; ratio is TRL's seconds over ours."""
  try:
    from experiments.bench import trl
  except ImportError as error:
    raise UserError(
      f"bench rl compares with TRL, which is not installed ({error}): pip install -e '.[bench]'"
    ) from error
  for dtype in DTYPES:
    for line in of_dtype(dtype, trl):
      yield line | dict(case=f"{line['case']}_{dtype}")


def of_dtype(dtype: str, trl) -> Iterator[dict]:
  """The lines of the comparison with products in one dtype."""
  with tempfile.TemporaryDirectory() as place:
    root = Path(place)
    c = config(dtype=dtype)
    p = make_parts(c)
    params = endless_params(p.programs, c.seed)
    start = save(c, p.text.tokenizer, params, root / "start")
    convert.run(start, f"hf:{root / 'hf'}")
    texts, tokens, letters = prompts(c, p)
    with trl.Trainer(root / "hf", c, texts, letters, share) as theirs:
      gap = _compare(p.programs, params, theirs, c, tokens)
      seconds, phases = run_ours(c, p, start, root / "rl", theirs.step)
    ours, peer = _best(seconds, phases), _best(theirs.seconds, theirs.phases)
    print(f"{dtype}: log-probabilities of the same tokens differ by at most {gap:.1e} nats; {theirs.description}")
    print(f"{'seconds':12} {'ours':>8} {'TRL':>8}")
    for case in ours:
      print(f"{case:12} {ours[case]:8.3f} {peer[case]:8.3f}")
    print(f"{'first step':12} {seconds[0]:8.3f} {theirs.seconds[0]:8.3f}")
    print(
      f"{'each':12} {' '.join(f'{s:.2f}' for s in seconds[1:])}; {' '.join(f'{s:.2f}' for s in theirs.seconds[1:])}"
    )
    for case in ours:
      yield dict(
        case=case, ours=ours[case], peer=peer[case], peer_name=trl.NAME, unit="s",
        ratio=peer[case] / ours[case],
      )  # fmt: skip


def _best(seconds: list[float], phases: list[dict]) -> dict[str, float]:
  """{"step" or phase: seconds} of the fastest step after the first."""
  best = min(range(1, len(seconds)), key=seconds.__getitem__)
  return {"step": seconds[best]} | {phase: phases[best][phase] for phase in PHASES}


def _compare(programs: Programs, params: Params, theirs, c: ConfigDict, tokens: list[list[int]]) -> float:
  """The largest difference, in nats, of the log-probabilities that both sides give the same tokens.

  Raises:
    RuntimeError: it exceeds the tolerance of DTYPES, or the sides tokenize a prompt differently.
  """
  if (said := theirs.prompt_tokens()) != tokens:
    raise RuntimeError(f"the two sides read a prompt differently: {said[0]} and {tokens[0]}")
  rng, new = np.random.default_rng(0), c.rollout.total_tokens - c.rollout.prompt_tokens
  given_BP = np.array(tokens[:SCORED], np.int32)
  drawn_BN = rng.integers(len(SPECIAL_NAMES), c.model.vocab_size, (len(given_BP), new), np.int32)
  row_BT = np.concatenate([given_BP, drawn_BN], axis=1)
  ours_BT = np.asarray(programs.score(params, row_BT, np.ones_like(row_BT)).logprobs_BT)
  gap = float(np.abs(ours_BT[:, -new:] - theirs.logprobs(row_BT, new)).max())
  if gap > DTYPES[c.model.dtype]:
    raise RuntimeError(f"log-probabilities of the same tokens differ by {gap:.1e} nats")
  return gap
