"""Long contexts: many short documents and a question that one of them answers."""

from __future__ import annotations

import dataclasses

import numpy as np

from nemocascade.domains.rows import make_prompt
from nemocascade.generated import generator
from nemocascade.verifiers.boxed import box
from nemocascade.verifiers.verdict import Message, Row

# There is only one step of thought, so its error rate must be high for demonstrations of mixed
# quality.
STYLE = generator.Style("found", "seems", sloppy_rate=0.6, error_rate=0.85)
DOCUMENTS = 24  # Per prompt. Prompts are then about ten times as long as in the other domains.
# Documents in a short demonstration, least and most. Most demonstrations are short, which makes the
# skill cheap to learn.
TEACHING_DOCUMENTS = (3, 7)
TEACHING_FULL_SHARE = 0.08  # Share of demonstrations with all DOCUMENTS.

NAMES = (
  "Abby", "Adam", "Alan", "Alma", "Amos", "Beth", "Carl", "Cora", "Dale", "Dora", "Earl", "Edna",
  "Elsa", "Emil", "Enid", "Eric", "Faye", "Finn", "Fred", "Gail", "Gina", "Glen", "Gwen", "Hank",
  "Hope", "Hugo", "Iris", "Ivan", "Jane", "Jill", "John", "Josh",
)  # fmt: skip
THINGS = ("tea", "salt", "rope", "wool", "ink", "glue")
COLORS = ("red", "green", "black", "white")
INSTRUCTION = "Which box is for"


@dataclasses.dataclass
class LongContext(generator.Generator):
  """The thought quotes the document that answers; a thought that errs quotes the last document.

  The number asked for is two tokens after the name, within the width of one convolution. So a model
  with one attention layer can look it up.
  """

  name: str = "long_context"
  style: generator.Style = STYLE
  phrases: tuple[str, ...] = (
    f"{INSTRUCTION} ", "found ", "seems ", " has box ", " with ", " near the ",
    " door.", "\\boxed{",
  )  # fmt: skip
  documents: int = DOCUMENTS  # In a prompt of RL and evaluation; at most len(NAMES) = 32.
  teaching_documents: tuple[int, int] = TEACHING_DOCUMENTS  # Least and most, both included.
  teaching_full_share: float = TEACHING_FULL_SHARE  # Share of demonstrations with `documents` documents.

  def make_row(self, rng: np.random.Generator, *, documents: int | None = None) -> Row:
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: documents or self.documents]]
    drawn = rng.integers((10, len(THINGS), len(COLORS)), size=(len(names), 3)).tolist()
    numbers = [number for number, _, _ in drawn]
    texts = [
      f"{name} has box {number} with {THINGS[thing]} near the {COLORS[color]} door."
      for name, (number, thing, color) in zip(names, drawn, strict=True)
    ]
    asked = int(rng.integers(len(names)))
    question = f"{INSTRUCTION} {names[asked]}?"
    return make_prompt(
      self.name, "\n".join([*texts, question]),
      question=question, expected_answer=str(numbers[asked]), documents=texts, asked=asked,
    )  # fmt: skip

  def make_teaching_row(self, rng: np.random.Generator) -> Row:
    if rng.random() < self.teaching_full_share:
      return self.make_row(rng)
    least, most = self.teaching_documents
    return self.make_row(rng, documents=int(rng.integers(least, most + 1)))

  def demonstrate(self, row: Row, rng: np.random.Generator, *, thinking: bool) -> list[Message]:
    marker, errs = self.style.draw(rng)
    texts = row["documents"]
    others = [text for text in texts if _box(text) != row["expected_answer"]]
    text = others[-1] if errs and others else texts[row["asked"]]
    # The box's content is not asked for, so the quote leaves it out.
    thoughts = [f"{marker} {text.partition(' with')[0]}"] if thinking else None
    return [generator.assistant(box(_box(text)), thoughts=thoughts)]


def _box(text: str) -> str:
  return text.partition(" has box ")[2].partition(" ")[0]
