"""Times what a host does with a completion as long as those of 30B-A3B: parsing its tokens, and its verdict.

One completion at a time, so the seconds are those of one core. The thoughts are the source text of Python's standard
library, on which the tokenizer is trained too. The peer is decoding the tokens to text, which any verifier needs.
"""

import json
import time
from collections.abc import Callable, Iterator

import numpy as np

from experiments.bench import loader
from nemocascade.data import chat
from nemocascade.data.tokenizer import IM_END, THINK_END
from nemocascade.domains.registry import DOMAINS
from nemocascade.verifiers.verdict import Completion, Row

THOUGHT_TOKENS = 45_056  # An IF-RL completion of configs/nano_30b has so many at its limit.
ANSWER_WORDS = 600
REPEATS = 5  # The best of them counts.
WORDS = ("the", "river", "crosses", "a", "valley", "where", "old", "mills", "still", "turn")


def rows() -> dict[str, tuple[Row, str]]:
  """Domain -> a row like the released ones, and an answer that it accepts."""
  prose = " ".join(WORDS[i % len(WORDS)] for i in range(ANSWER_WORDS))
  paragraphs = "\n\n".join([prose[: len(prose) // 2].strip(), prose[len(prose) // 2 :].strip() + " contest"])
  names = [f"field_{i}" for i in range(20)]
  schema = {
    "type": "object", "required": names, "additionalProperties": False,
    "properties": {name: {"type": "array", "items": {"type": "string"}} for name in names},
  }  # fmt: skip
  instructions = {"last_word:last_word_answer": {"last_word": "contest"}, "keywords:existence": {"keywords": ["mills"]}}
  return {
    "instruction": (
      {"instruction_id_list": list(instructions), "kwargs": list(instructions.values())}, paragraphs
    ),
    "math": ({"expected_answer": r"\frac{3\sqrt{2}}{4}"}, prose + r" \boxed{\frac{3}{2\sqrt{2}}}"),
    "stem": (
      {"options": [{letter: f"option {letter}"} for letter in "ABCDEFGHIJ"], "expected_answer": "B"},
      prose + r" \boxed{B}",
    ),
    "structured": (
      {"schema_str": json.dumps(schema), "schema_type": "json"}, json.dumps({name: prose.split()[:30] for name in names})
    ),
  }  # fmt: skip


def cases() -> Iterator[dict]:
  """Yields a line for each domain."""
  text = loader.corpus()
  tokenizer = loader.train(text)
  thoughts = tokenizer.encode(text[: 6 * THOUGHT_TOKENS])[:THOUGHT_TOKENS]
  for name, (row, answer) in rows().items():
    tokens = [*thoughts, THINK_END, *tokenizer.encode("\n" + answer), IM_END]
    verify = DOMAINS[name].make_verify()

    def ours(tokens=tokens, verify=verify, row=row, name=name) -> None:
      turn = chat.parse(tokens, tokenizer, thinking=True)
      (verdict,) = verify([row], [Completion((turn,), None)])
      if not verdict.success:
        raise RuntimeError(f"{name}: the accepted answer got {verdict}")

    ours()  # Starts the process that grades.
    seconds, peer = _best(ours), _best(lambda tokens=tokens: tokenizer.decode(tokens))
    yield dict(
      case=name, ours=seconds, peer=peer, peer_name="decoding the tokens alone", unit="s a completion", ratio=peer / seconds
    )  # fmt: skip


def _best(act: Callable[[], object]) -> float:
  seconds = []
  for _ in range(REPEATS):
    began = time.perf_counter()
    act()
    seconds.append(time.perf_counter() - began)
  return float(np.min(seconds))
