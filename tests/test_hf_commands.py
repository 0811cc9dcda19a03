"""`score` and `generate` on a folder written by transformers agree with transformers on the same rows."""

import json

import numpy as np
import pytest
import tokenizer_json
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers_folders import random_model, save

from experiments import generate, score
from nemocascade.data import chat
from nemocascade.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_fast")

V, NEW = 318, 12  # Every id is a word of the tokenizer.
MESSAGES = [
  {"role": "system", "content": ""},
  {"role": "user", "content": "the cat sat on the <think> mat"},
]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "12 + 7", "reasoning_content": "is 19"}]
IDS = [int(i) for i in np.random.default_rng(0).integers(0, V, 45)]
ROWS = [{"tokens": IDS}, {"messages": MESSAGES}, {"tokens": IDS[:37]}, {"messages": ANSWERED}, {"tokens": IDS[:1]}]


@pytest.fixture(scope="module")
def peer():
  return random_model("ME*-", vocab_size=V)


@pytest.fixture(scope="module")
def words():
  return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json.make().decode()))


@pytest.fixture(scope="module")
def folder(peer, words, tmp_path_factory):
  path = save(peer, tmp_path_factory.mktemp("hf"))
  words.save_pretrained(path)
  return path


def command(run, checkpoint, tmp_path, rows, *settings):
  """Runs the command on the rows and returns its output lines."""
  given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  given.write_text("".join(json.dumps(row) + "\n" for row in rows))
  run(checkpoint, str(given), str(out), *settings)
  return [json.loads(line) for line in out.read_text().splitlines()]


def logprobs_of(peer, tokens):
  """Log-probabilities by transformers, [T, V] in fp64: entry t is the distribution of the token after t."""
  with torch.no_grad():
    logits_TV = peer(torch.tensor([tokens])).logits[0].double()
  return torch.log_softmax(logits_TV, -1).numpy()


def test_score_agrees_with_transformers(peer, words, folder, tmp_path):
  for row, scored in zip(ROWS, command(score.run, f"hf:{folder}", tmp_path, ROWS), strict=True):
    tokens = scored["tokens"]
    if "messages" in row:
      text = chat.text_of(chat.render(row["messages"]))
      asked = text.replace("<think> mat", "\0")  # This <think> is text of the user, not a special token.
      parts = [words(part, add_special_tokens=False).input_ids for part in asked.split("\0")]
      assert tokens[: len(parts[0])] == parts[0] and tokens[-len(parts[1]) :] == parts[1]
      assert words.decode(tokens) == text
    expected = logprobs_of(peer, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
    assert scored["logprobs"][0] is None
    np.testing.assert_allclose(np.array(scored["logprobs"][1:], float), expected, atol=1e-4)


def test_greedy_generation_agrees_with_transformers(peer, words, folder, tmp_path):
  rows = ROWS[:3]
  done = command(generate.run, f"hf:{folder}", tmp_path, rows, 0.0, 1.0, NEW, 0, True)
  for row, found in zip(rows, done, strict=True):
    prompt = row.get("tokens")
    if prompt is None:
      scored = command(score.run, f"hf:{folder}", tmp_path, [row])[0]["tokens"]
      prompt = scored + words("<|im_start|>assistant\n<think>\n").input_ids
    settings = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=[2, 11], pad_token_id=0)
    given = torch.tensor([prompt])  # Without a mask transformers would treat id 0 as padding.
    given = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    expected = peer.generate(**given, **settings)[0, len(prompt) :].tolist()
    assert found["tokens"] == expected
    stopped = expected[-1] in (2, 11)
    assert found["finish_reason"] == ("stop" if stopped else "length")
    assert found["text"] == words.decode(expected[:-1] if stopped else expected)
    logprobs_TV = logprobs_of(peer, prompt + expected)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(found["logprobs"], logprobs_TV[np.arange(len(expected)), expected], atol=1e-4)


def test_a_folder_without_a_tokenizer_takes_tokens_and_refuses_messages(peer, tmp_path):
  path = save(peer, tmp_path / "hf")
  (scored,) = command(score.run, f"hf:{path}", tmp_path, [{"tokens": IDS[:7]}])
  expected = logprobs_of(peer, IDS[:7])[np.arange(6), IDS[1:7]]
  np.testing.assert_allclose(scored["logprobs"][1:], expected, atol=1e-4)
  (done,) = command(generate.run, f"hf:{path}", tmp_path, [{"tokens": IDS[:7]}], 0.0, 1.0, 4, 0, True)
  assert done["text"] is None and done["tokens"]
  with pytest.raises(UserError, match=r"line 2: has messages, but the checkpoint has no tokenizer"):
    command(score.run, f"hf:{path}", tmp_path, [{"tokens": IDS[:7]}, {"messages": MESSAGES}])
