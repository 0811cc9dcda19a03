"""Scores given tokens: reads rows, and writes them with the log-probability of each token.

  python -m experiments.score --checkpoint=runs/tiny/sft/latest \\
    --input=rows.jsonl --output=out.jsonl

An input row is {"tokens": [...]} or {"messages": [...], "tools": [...]}; other keys are copied to the output.
An output row adds "logprobs": [null, float, ...]. Entry t is log p(token t | the tokens before it). Rows of
messages get their "tokens" too.

--mesh=data:1,expert:8 shares a model that is too large for one device among several. With --distributed these may be
devices of several processes; the first one writes the output.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from nemocascade.fields import text
from nemocascade.mesh import make_mesh, mesh_sizes
from nemocascade.runtime import json_rows as rows_lib
from nemocascade.runtime.hosts import first_alone
from nemocascade.runtime.launch import MESH, launch
from nemocascade.runtime.parts import from_checkpoint
from nemocascade.runtime.programs import Programs
from nemocascade.types import Params

TOKENS = 1 << 14  # Tokens of a batch, padding included.


def run(checkpoint: str, input: str, output: str, mesh: str = "data:1") -> None:
  began = rows_lib.instant()
  first_alone(lambda: rows_lib.check_output(output, input), "check of the output")
  rows = rows_lib.read_rows(input)
  programs, tokenizer, params = from_checkpoint(checkpoint, make_mesh(**mesh_sizes(mesh)))
  documents = rows_lib.tokens_of(rows, tokenizer, path=input, vocab_size=programs.config.vocab_size)
  scored = zip(rows, documents, score(programs, params, documents), strict=True)
  lines = [row | {"tokens": tokens, "logprobs": logprobs} for (_, row), tokens, logprobs in scored]
  first_alone(lambda: rows_lib.write_rows(output, lines, began), "output")


def score(programs: Programs, params: Params, documents: Sequence[Sequence[int]]) -> list[list[float | None]]:
  """[None, log p of each later token] of each document, in order. Similar lengths are batched together."""
  of_length = defaultdict(list)
  for i, tokens in enumerate(documents):
    of_length[rows_lib.bucket(len(tokens))].append(i)
  scores: list[list[float | None]] = [[] for _ in documents]
  for T, numbers in sorted(of_length.items()):
    B = min(max(1, TOKENS // T), rows_lib.bucket(len(numbers)))
    B += -B % programs.mesh.size  # Rows are split over the devices.
    for part in rows_lib.batches(numbers, B, desc=f"score, {T} tokens"):
      tokens_BT, segment_ids_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
      for b, i in enumerate(part):
        tokens_BT[b, : len(documents[i])], segment_ids_BT[b, : len(documents[i])] = documents[i], 1
      logprobs_BT = np.asarray(programs.score(params, *programs.put((tokens_BT, segment_ids_BT))).logprobs_BT)
      for b, i in enumerate(part):
        scores[i] = [None, *logprobs_BT[b, 1 : len(documents[i])].tolist()]
  return scores


if __name__ == "__main__":
  launch(
    run,
    config=False,
    several=True,
    checkpoint=(text("STAGE/checkpoints/STEP, STAGE/latest, a converted checkpoint, or hf:DIR."), ""),
    input=(text("Rows, JSON lines."), ""),
    output=(text("Rows with their log-probabilities, JSON lines."), ""),
    mesh=(MESH, "data:1"),
  )
