"""Seeded rows and demonstrations are the same in every release: checkpoints of the tiny scale depend on them."""

import hashlib
import json

import pytest

from nemocascade.generated import generator, registry
from nemocascade.generated.preference import preference_pairs

# Generator -> the start of the SHA-256 of its rows, demonstrations and phrases.
DIGESTS = {
  "instruction": "cddf5fd2b97b5a46",
  "math": "4a341da43dcdb640",
  "stem": "74049910a26007a3",
  "structured": "8ea737062e8dfc66",
  "tools": "94be1b3aa88f20c4",
  "preference": "a203d35abb12c19e",
  "long_context": "d00fd1577d091952",
  "code": "801e207d2131457d",
  "swe": "1808225064e526b7",
  "swe_agentic": "21304dda0ab3ba2a",
}
PAIRS = "b88bfdb407646217"


def digest(value) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def made(name):
  made_by = registry.make(name)
  return {
    "train": generator.rows(made_by, "train", 0, 3, 20),
    "heldout": generator.rows(made_by, "heldout", 1, 0, 20),
    "teaching": generator.rows(made_by, "train", 0, 0, 20, teaching=True),
    "demonstrations": list(generator.demonstrations(made_by, 5, 0, 30, non_thinking_share=0.3)),
    "phrases": list(made_by.phrases),
  }


@pytest.mark.parametrize("name", registry.GENERATORS)
def test_rows_demonstrations_and_phrases_are_those_of_every_release(name):
  assert digest(made(name)) == DIGESTS[name]


def test_preference_pairs_are_those_of_every_release():
  assert digest(preference_pairs(1, 30)) == PAIRS
