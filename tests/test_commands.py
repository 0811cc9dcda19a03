"""Tests of `score` and `generate`: the output for a row depends only on that row."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_checkpoint
from in_process import run_command
from refusals import assert_refused

from experiments import generate, score
from nemocascade.data import chat
from nemocascade.errors import UserError
from nemocascade.report.metrics import CompileCounter
from nemocascade.runtime import json_rows
from nemocascade.runtime.parts import from_checkpoint

pytestmark = pytest.mark.usefixtures("compiled_fast")

ROOT = Path(__file__).parent.parent
TOKENIZER = tiny_checkpoint.TOKENIZER


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.make(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
  return from_checkpoint(checkpoint)


def write(path, lines):
  path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
  return str(path)


def read(path):
  return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def logits(loaded):
  """Function tokens -> logits [T, V] by the full forward pass; padding gives all lengths one program."""
  programs, _, params = loaded
  apply = jax.jit(lambda *row: programs.model.apply({"params": params}, *row, method="logits"))

  def logits_of(tokens):
    tokens_BT, segment_ids_BT = np.zeros((2, 1, 128), np.int32)
    tokens_BT[0, : len(tokens)], segment_ids_BT[0, : len(tokens)] = tokens, 1
    return np.asarray(apply(tokens_BT, segment_ids_BT), np.float64)[0, : len(tokens)]

  return logits_of


def logprobs_by_hand(logits, tokens):
  """[T, V] in fp64: entry t is the distribution of the token after tokens[: t + 1]."""
  logits_TV = logits(tokens)
  return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


# Few shapes are compiled: three or four rows of up to 32 tokens, and one row of up to 64.
NEW = 8
TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
LONG = [int(i) for i in np.random.default_rng(0).integers(18, 600, 70)]
PROMPTS = [LONG[:n] for n in (3, 5, 9)]


def test_score_is_the_forward_pass_of_each_row_alone(checkpoint, logits, tmp_path, capsys):
  lines = [{"tokens": LONG, "id": 7}, {"messages": TALK}, {"tokens": [5]}, {"tokens": LONG[:33]}]
  out = str(tmp_path / "new" / "out.jsonl")
  score.run(str(Path(checkpoint).parent.parent / "latest"), write(tmp_path / "in.jsonl", [*lines, "\n"]), out)
  scored = read(out)
  assert f"{out}: 4 rows, {sum(len(row['tokens']) for row in scored)} tokens in " in capsys.readouterr().out
  talk = chat.tokenize(chat.render(TALK), TOKENIZER)[0]
  assert [row.get("id") for row in scored] == [7, None, None, None]
  assert [row["tokens"] for row in scored] == [LONG, talk, [5], LONG[:33]]
  assert scored[1]["messages"] == TALK
  for row in scored:
    tokens = row["tokens"]
    expected = logprobs_by_hand(logits, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
    assert row["logprobs"][0] is None and len(row["logprobs"]) == len(tokens)
    np.testing.assert_allclose(np.array(row["logprobs"][1:], float), expected, atol=1e-4)


def test_many_lengths_are_few_programs(loaded):
  programs, _, params = loaded
  documents = [LONG[: 1 + n % 64] for n in range(200)]
  with CompileCounter() as compiled:
    score.score(programs, params, documents)
  assert compiled.count <= 4  # Two buckets, and at most two small programs besides.
  with CompileCounter() as compiled:
    score.score(programs, params, [tokens[::-1] for tokens in documents[::-1]])
  assert compiled.count == 0


def test_greedy_completions_are_the_likeliest_tokens(loaded, logits):
  programs, tokenizer, params = loaded
  lines = [{"tokens": LONG[:40], "id": 1}, {"messages": TALK[:1]}, *({"tokens": p} for p in PROMPTS[:2])]
  done = generate.generate(programs, tokenizer, params, lines, temperature=0.0, max_new_tokens=NEW, thinking=False)
  assert done[0]["id"] == 1 and done[1]["messages"] == TALK[:1]
  pieces = chat.render(TALK[:1], add_generation_prompt=True, enable_thinking=False)
  prompts = [LONG[:40], chat.tokenize(pieces, TOKENIZER)[0], *PROMPTS[:2]]
  for prompt, row in zip(prompts, done, strict=True):
    logprobs_TV = logprobs_by_hand(logits, prompt + row["tokens"])[len(prompt) - 1 : -1]
    assert row["tokens"] == logprobs_TV.argmax(-1).tolist()
    np.testing.assert_allclose(row["logprobs"], logprobs_TV.max(-1), atol=1e-4)
    stopped = row["tokens"][-1] in (2, 11)
    assert row["finish_reason"] == ("stop" if stopped else "length")
    assert stopped or len(row["tokens"]) == NEW
    assert row["text"] == TOKENIZER.decode(row["tokens"][:-1] if stopped else row["tokens"])


def test_a_completion_depends_on_its_number_and_the_seed_alone(loaded):
  programs, tokenizer, params = loaded
  sample = lambda prompts, seed=0: generate.complete(
    programs, tokenizer, params, prompts, max_new_tokens=NEW, seed=seed
  )
  done = sample(PROMPTS)
  assert sample([*PROMPTS, LONG[:20], LONG[:40]])[:3] == done
  assert sample(PROMPTS, seed=1) != done
  assert done[0] != sample(PROMPTS[::-1])[2]  # The same prompt at another position gets another sample.


def test_top_p_keeps_to_the_nucleus(loaded):
  programs, tokenizer, params = loaded
  settings = dict(max_new_tokens=NEW, seed=3)
  greedy = generate.complete(programs, tokenizer, params, PROMPTS, temperature=0.0, **settings)
  narrow = generate.complete(programs, tokenizer, params, PROMPTS, temperature=1.0, top_p=1e-6, **settings)
  assert narrow[0]["tokens"] == greedy[0]["tokens"]
  np.testing.assert_allclose(narrow[0]["logprobs"], 0.0, atol=1e-6)


def test_a_row_may_set_the_template_for_itself():
  ask = lambda **own: json_rows.tokens_of(
    [(1, {"messages": TALK[:1], **own})], TOKENIZER, path="rows", vocab_size=640,
    add_generation_prompt=True, enable_thinking=True,
  )[0]  # fmt: skip
  assert TOKENIZER.decode(ask()).endswith("<think>\n")
  own = {"chat_template_kwargs": {"enable_thinking": False}}
  assert TOKENIZER.decode(ask(**own)).endswith("<think></think>")


BAD = [
  ("{\n", "line 1: not JSON"),
  ("[1]\n", "line 2: must be an object"),
  ({"text": "x"}, "line 3: has neither 'tokens' nor 'messages', only \\['text'\\]"),
]
WRONG = [
  ({"tokens": []}, "line 1: tokens must be a list of at least one id"),
  ({"tokens": [1, 640]}, "line 2: token 640: must be a whole number from 0 to 639"),
  ({"tokens": [1, True]}, "line 3: token True"),
  ({"messages": "hi"}, "line 4: messages must be a list"),
  ({"messages": [{"role": "usr"}]}, "line 5: unknown role of message 0 'usr': did you mean 'user'"),
  ({"messages": [3]}, "line 6: message 0: must be an object"),
  (
    {"messages": [], "chat_template_kwargs": {"enable_thinkin": False}},
    "line 7: unknown template argument 'enable_thinkin': did you mean 'enable_thinking'",
  ),
]


@pytest.mark.parametrize("cases", [BAD, WRONG])
@pytest.mark.parametrize("command", ["score", "generate"])
def test_all_bad_rows_are_named_before_anything_is_compiled(checkpoint, tmp_path, monkeypatch, cases, command):
  for name in ("score", "engine"):
    monkeypatch.setattr(f"nemocascade.runtime.programs.Programs.{name}", None, raising=False)
  path, out = write(tmp_path / "in.jsonl", [row for row, _ in cases]), tmp_path / "out.jsonl"
  with pytest.raises(UserError, match=r".*; ".join(why for _, why in cases)):
    if command == "score":
      score.run(checkpoint, path, str(out))
    else:
      generate.run(checkpoint, path, str(out), 1.0, 1.0, 8, 0, True)
  assert not out.exists()


def test_without_a_tokenizer_tokens_work_and_messages_are_refused(loaded):
  programs, _, params = loaded
  one = json_rows.tokens_of([(1, {"tokens": [5, 6]})], None, path="rows", vocab_size=640)
  assert one == [[5, 6]]
  with pytest.raises(UserError, match="line 4: has messages, but the checkpoint has no tokenizer"):
    json_rows.tokens_of([(4, {"messages": TALK})], None, path="rows", vocab_size=640)
  assert generate.complete(programs, None, params, PROMPTS, max_new_tokens=NEW)[0]["text"] is None


@pytest.mark.parametrize(
  "command, flags, complaint",
  [
    ("score", [], "--output="),
    ("score", ["--output=o"], "--input is missing"),
    ("score", ["--output=o", "--input=none.jsonl"], "none.jsonl: No such file"),
    ("score", [f"--output={__file__}", f"--input={__file__}"], "is the file of --input"),
    ("generate", ["--output=/dev/full", "--input=x"], "--output='/dev/full': give the file to write"),
    ("generate", ["--output=o", "--input=x", "--temperature=-1"], "--temperature=-1.0"),
    (
      "generate",
      ["--output=o", "--input=x", "--temperature=1e-30"],
      "--temperature=1e-30: must be a number of at least 0.01",
    ),
    ("generate", ["--output=o", "--input=x", "--top_p=0"], "--top_p=0.0"),
    ("generate", ["--output=o", "--input=x", "--max_new_tokens=0"], "--max_new_tokens=0"),
    ("generate", ["--output=o", "--input=x", "--temprature=0"], "temperature"),
  ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(command, flags, complaint):
  assert_refused(run_command(command, *flags), complaint)


def test_generate_from_the_command_line(checkpoint, tmp_path):
  path, out = write(tmp_path / "in.jsonl", [{"messages": TALK[:1], "id": 1}]), tmp_path / "out.jsonl"
  done = subprocess.run(
    [sys.executable, "-m", "experiments.generate", f"--checkpoint={Path(checkpoint).parent}/latest", f"--input={path}",
     f"--output={out}", "--temperature=0", "--top_p=0.9", "--max_new_tokens=4", "--thinking=false", "--seed=1"],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (row,) = read(out)
  assert f"{out}: 1 row, {len(row['tokens'])} tokens in " in done.stdout
  assert set(row) == {"messages", "id", "tokens", "logprobs", "text", "finish_reason"}
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
