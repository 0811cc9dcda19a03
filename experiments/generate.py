"""Batch generation: reads prompts and writes completions, one JSON line each.

  python -m experiments.generate --checkpoint=runs/tiny/sft/latest \\
    --input=prompts.jsonl --output=out.jsonl --temperature=0 --max_new_tokens=64

An input row is {"messages": [...], "tools": [...]} or {"tokens": [...]}; other keys are copied to the output.
An output row adds {"tokens", "logprobs", "text", "finish_reason": "stop" | "length"}: the new tokens, the
log-probability with which each was drawn, and their text without the stop token (null if the checkpoint has
no tokenizer). If the model's logits are not finite, the completion ends there, with finish_reason "error".

--mesh=data:1,expert:8 shares a model that is too large for one device among several. With --distributed these may be
devices of several processes; the first one writes the output.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.fields import COLDEST, HOTTEST, flag, number, text, whole
from nemocascade.mesh import make_mesh, mesh_sizes, read_own
from nemocascade.rollout.exchange import merge
from nemocascade.rollout.sampling import Options
from nemocascade.runtime import json_rows as rows_lib
from nemocascade.runtime.hosts import exchange, first_alone
from nemocascade.runtime.launch import MESH, launch
from nemocascade.runtime.parts import from_checkpoint
from nemocascade.runtime.programs import Programs
from nemocascade.types import Params

SLOTS = 64  # Most prompts decoded together.
BATCH = 256  # Most prompts prefilled together; a finished one makes room for the next of them.
MOST_TOKENS = 1 << 20  # Most tokens of one answer: four times the longest context of the recipe.
TEMPERATURE = number("0 is greedy.", low=COLDEST, high=HOTTEST, also=(0.0,))
TOP_P = number("Tokens are drawn from the likeliest that together reach this.", above=0, high=1)


def run(
  checkpoint: str, input: str, output: str, temperature: float, top_p: float, max_new_tokens: int,
  seed: int, thinking: bool, mesh: str = "data:1",
) -> None:  # fmt: skip
  began = rows_lib.instant()
  first_alone(lambda: rows_lib.check_output(output, input), "check of the output")
  rows = rows_lib.read_rows(input)
  programs, tokenizer, params = from_checkpoint(checkpoint, make_mesh(**mesh_sizes(mesh)))
  prompts = rows_lib.tokens_of(
    rows, tokenizer, path=input, vocab_size=programs.config.vocab_size,
    add_generation_prompt=True, enable_thinking=thinking,
  )  # fmt: skip
  completions = complete(
    programs, tokenizer, params, prompts, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
  )
  lines = [row | completion for (_, row), completion in zip(rows, completions, strict=True)]
  first_alone(lambda: rows_lib.write_rows(output, lines, began), "output")


def generate(
  programs: Programs,
  tokenizer: Tokenizer | None,
  params: Params,
  rows: Sequence[dict],
  *,
  thinking: bool = True,
  **sampling: Any,
) -> list[dict]:
  """The rows, in order, each merged with its completion; `sampling` goes to `complete`."""
  prompts = rows_lib.tokens_of(
    list(enumerate(rows, start=1)), tokenizer, path="rows",
    vocab_size=programs.config.vocab_size, add_generation_prompt=True, enable_thinking=thinking,
  )  # fmt: skip
  completions = complete(programs, tokenizer, params, prompts, **sampling)
  return [row | completion for row, completion in zip(rows, completions, strict=True)]


def complete(
  programs: Programs,
  tokenizer: Tokenizer | None,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  temperature: float = 1.0,
  top_p: float = 1.0,
  max_new_tokens: int = 64,
  seed: int = 0,
) -> list[dict]:
  """Samples one completion of each prompt. Prompts of similar lengths are decoded together.

  A completion depends on the seed and the prompt's index, not on the other prompts of its batch.

  Returns:
    {"tokens", "logprobs", "text", "finish_reason"} of each prompt, in order; see the module.
  """
  of_length = defaultdict(list)
  for i, prompt in enumerate(prompts):
    of_length[rows_lib.bucket(len(prompt))].append(i)
  params = programs.sampling_weights(params)
  completions: list[dict] = [{} for _ in prompts]
  key, options = jax.random.key(seed), Options(temperature, top_p=top_p)
  for P, numbers in sorted(of_length.items()):
    engine = programs.engine(P, P + max_new_tokens)
    B = min(BATCH, 1 << (len(numbers) - 1).bit_length())
    B += -B % programs.mesh.size  # Rows are split over the devices.
    for part in rows_lib.batches(numbers, B, desc=f"generate after {P}"):
      filled = part + [part[-1]] * (B - len(part))
      d = engine.start(params, [prompts[i] for i in filled], 1, options=options, slots=SLOTS)
      limit_B = np.array([len(prompts[i]) + max_new_tokens for i in filled], np.int32)
      d = d.replace(row_id_B=np.array(filled, np.int32), limit_B=limit_B)
      d = engine.decode(params, d, key)
      drawn_BT = d.behaviour_logprobs_BT if d.drawn_logprobs_BT is None else d.drawn_logprobs_BT
      arrays = map(read_own, (d.known_B, d.failed_B, d.tokens_BT, drawn_BT))
      (own, known_B), (_, failed_B), (_, tokens_BT), (_, drawn_BT) = arrays
      found = []
      for place, b in enumerate(own[own < len(part)]):
        new = slice(len(prompts[part[b]]), known_B[place])
        found.append([part[b], tokens_BT[place, new].tolist(), drawn_BT[place, new].tolist(), bool(failed_B[place])])
      for i, tokens, logprobs, failed in merge(found, exchange, "completions"):
        stopped = not failed and tokens[-1] in engine.stop_ids
        said = tokens[:-1] if stopped else tokens
        completions[i] = {
          "tokens": tokens,
          "logprobs": logprobs,
          "text": None if tokenizer is None else tokenizer.decode(said),
          "finish_reason": "error" if failed else "stop" if stopped else "length",
        }
  return completions


if __name__ == "__main__":
  launch(
    run,
    config=False,
    several=True,
    checkpoint=(text("STAGE/checkpoints/STEP, STAGE/latest, a converted checkpoint, or hf:DIR."), ""),
    input=(text("Prompts, JSON lines."), ""),
    output=(text("Completions, JSON lines."), ""),
    temperature=(TEMPERATURE, 1.0),
    top_p=(TOP_P, 1.0),
    max_new_tokens=(whole("Tokens of a completion at most.", high=MOST_TOKENS), 64),
    seed=(whole("Seed of the sampling.", 0), 0),
    thinking=(flag("Whether the assistant starts with thoughts."), True),
    mesh=(MESH, "data:1"),
  )
