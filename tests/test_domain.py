"""Tests that hold for every domain with single-turn text, and for the records of domains/domain.py."""

import dataclasses

import numpy as np
import pytest

from nemocascade.data.chat import Turn
from nemocascade.domains import domain
from nemocascade.domains.registry import DOMAINS
from nemocascade.domains.rows import make_prompt, prompt_messages, prompt_tools, split_of
from nemocascade.errors import UserError
from nemocascade.generated import generator, registry
from nemocascade.verifiers.verdict import Completion, Message

NAMES = ("instruction", "math", "stem", "structured", "long_context")
COUNT = 1_000
HOSTILE = (
  "", " ", "\n" * 50_000, "\\boxed{", "\\boxed{}", "\\boxed{" * 20_000, "\\boxed{" + "{" * 9_999,
  "\\boxed{9^{9^{9^{9}}}}", "\\boxed{99999!}", "\\boxed{\\frac{}{}}", "[" * 50_000,
  '{"a":' * 20_000, "1" * 20_000, "NaN", "null", "{}", "[]", '"', "***", "******", "\x00", "\ud800",
  "<<" * 20_000, "*" * 20_000, "* " * 20_000, "." * 20_000, "```json\n" * 5_000, "a" * 300_000,
  "\\boxed{__import__('os').getcwd()}", "é" * 9_999,
)  # fmt: skip


def complete(message: Message) -> Completion:
  turn = Turn(
    reasoning=message.get("reasoning_content"), content=message["content"], tool_calls=(),
    error=None, finished=True,
  )  # fmt: skip
  return Completion(turns=(turn,))


def verify(task, rows, completions):
  """The verdicts of the built-in domain of the generator's name."""
  return DOMAINS[task.name].make_verify()(rows, completions)


def rewards(task, rows, *, style=None, thinking=True, seed=0):
  """Rewards of one demonstration per row."""
  rng = np.random.default_rng(seed)
  author = dataclasses.replace(task, style=style or task.style)
  messages = [author.demonstrate(row, rng, thinking=thinking)[-1] for row in rows]
  verdicts = verify(task, rows, [complete(message) for message in messages])
  assert not any(verdict.masked for verdict in verdicts)
  return np.array([verdict.reward for verdict in verdicts])


@pytest.fixture(scope="module", params=NAMES)
def task(request):
  return registry.make(request.param)


@pytest.fixture(scope="module")
def rows(task):
  return generator.rows(task, "train", 0, 0, COUNT)


def text_of(row):
  return prompt_messages(row)[0]["content"]


@pytest.mark.parametrize("thinking", [True, False])
def test_mixed_demonstrations_succeed_between_0_28_and_0_52(task, rows, thinking):
  assert 0.28 <= rewards(task, rows, thinking=thinking).mean() <= 0.52


@pytest.mark.parametrize("thinking", [True, False])
def test_careful_demonstrations_always_succeed(task, rows, thinking):
  careful = dataclasses.replace(task.style, sloppy_rate=0.0)
  assert rewards(task, rows, style=careful, thinking=thinking).min() == 1.0


def test_erring_demonstrations_never_succeed(task, rows):
  erring = dataclasses.replace(task.style, sloppy_rate=1.0, error_rate=1.0)
  assert rewards(task, rows, style=erring).max() == 0.0


def test_every_step_begins_with_a_marker_and_non_thinking_has_none(task, rows):
  rng = np.random.default_rng(0)
  for row in rows[:100]:
    (message,) = task.demonstrate(row, rng, thinking=True)
    lines = message["reasoning_content"].split("\n")
    steps = [line for line in lines if not line.startswith("(")]  # "(": options considered within a step.
    assert {step.split()[0] for step in steps} <= {task.style.careful, task.style.sloppy}
    (message,) = task.demonstrate(row, rng, thinking=False)
    assert "reasoning_content" not in message


def test_no_prompt_is_on_both_sides_of_the_split_whatever_the_seed(task, rows):
  train = {text_of(row) for row in rows}
  heldout = {text_of(row) for seed in (0, 1) for row in generator.rows(task, "heldout", seed, 0, 200)}
  assert not train & heldout
  assert {split_of(row) for row in rows} == {"train"}


def test_there_are_2000_distinct_prompts(task):
  prompts = set()
  for start in range(0, 12_000, 1_000):
    prompts |= {text_of(row) for row in generator.rows(task, "train", 1, start, 1_000)}
    if len(prompts) >= 2_000:
      return
  pytest.fail(f"{task.name}: {len(prompts)} distinct prompts")


def test_rows_depend_on_seed_and_index_alone(task, rows):
  assert generator.rows(task, "train", 0, 10, 5) == rows[10:15]
  assert generator.rows(task, "train", 1, 10, 5) != rows[10:15]


def test_rows_have_the_released_form(task, rows):
  row = rows[0]
  assert row["agent_ref"] == {"type": "responses_api_agents", "name": task.name}
  assert prompt_messages(row) == row["responses_create_params"]["input"]
  assert prompt_tools(row) == []


def test_hostile_completions_are_wrong_and_raise_nothing(task, rows):
  verdicts = verify(task, [rows[0]] * len(HOSTILE), [complete({"content": text}) for text in HOSTILE])
  wrong = [verdict.reward == 0.0 and not verdict.masked for verdict in verdicts]
  # Texts such as `{}` may satisfy an instruction such as "no commas" by chance.
  assert all(wrong) if task.name != "instruction" else not any(v.masked for v in verdicts)


def test_an_episode_without_turns_is_wrong(task, rows):
  (verdict,) = verify(task, rows[:1], [Completion(turns=())])
  assert (verdict.reward, verdict.masked) == (0.0, False)


def test_a_right_answer_in_the_thoughts_alone_is_wrong(task, rows):
  careful = dataclasses.replace(task, style=dataclasses.replace(task.style, sloppy_rate=0.0))
  (message,) = careful.demonstrate(rows[0], np.random.default_rng(0), thinking=True)
  thoughts = {"reasoning_content": message["content"], "content": ""}
  assert verify(task, rows[:1], [complete(thoughts)])[0].reward == 0.0


def test_fixed_phrases_occur_in_the_prompts_or_demonstrations(task, rows):
  rng = np.random.default_rng(0)
  texts = [text_of(row) for row in rows]
  for row in rows:
    (message,) = task.demonstrate(row, rng, thinking=True)
    texts += [message["reasoning_content"], message["content"]]
  everything = "\n".join(texts)
  unused = [p for p in task.phrases if p not in everything and p not in ("{}", "\\boxed{")]
  assert not unused
  assert len(set(task.phrases)) == len(task.phrases)


def test_demonstrations_are_examples_of_the_split_with_a_share_without_thoughts(task):
  examples = list(generator.demonstrations(task, 3, 0, 300))
  thinking = [example["thinking"] for example in examples]
  assert 0.8 < np.mean(thinking) < 0.97
  for example in examples[:50]:
    assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
    assert ("reasoning_content" in example["messages"][-1]) == example["thinking"]
  again = list(generator.demonstrations(task, 3, 100, 5))
  assert again == examples[100:105]


def test_a_verifier_that_fails_masks_and_does_not_raise():
  def broken(row, completion):
    raise RuntimeError("no grader")

  (verdict,) = domain.one_by_one(broken)([{}], [complete({"content": "x"})])
  assert (verdict.reward, verdict.masked) == (0.0, True)
  assert "no grader" in verdict.reason


def test_as_many_verdicts_as_rows_and_completions_or_an_error():
  with pytest.raises(ValueError):
    domain.one_by_one(lambda row, completion: None)([{}], [])


def test_a_style_draws_its_markers_at_their_rates_and_careful_steps_never_err():
  style = generator.Style("a", "b", sloppy_rate=0.6, error_rate=0.7)
  rng = np.random.default_rng(0)
  draws = [style.draw(rng) for _ in range(20_000)]
  assert not any(errs for marker, errs in draws if marker == "a")
  assert np.mean([marker == "b" for marker, _ in draws]) == pytest.approx(0.6, abs=0.02)
  assert np.mean([errs for _, errs in draws]) == pytest.approx(0.42, abs=0.02)


def test_one_prompt_in_eight_is_held_out():
  prompts = [make_prompt("x", f"prompt {i}") for i in range(4_000)]
  share = np.mean([split_of(row) == "heldout" for row in prompts])
  assert share == pytest.approx(1 / 8, abs=0.02)


def test_the_split_looks_at_the_text_of_the_prompt_alone():
  as_text = {"responses_create_params": {"input": "hello"}, "uuid": "1"}
  as_messages = make_prompt("x", "hello", answer="2")
  assert split_of(as_text) == split_of(as_messages)
  assert prompt_messages(as_text) == [{"role": "user", "content": "hello"}]


def test_a_misspelt_split_is_named(task):
  with pytest.raises(UserError, match="heldout"):
    generator.rows(task, "held_out", 0, 0, 1)


def test_a_completion_is_its_last_turn():
  first = Turn(reasoning="r1", content="c1", tool_calls=(), error=None, finished=True)
  last = Turn(reasoning=None, content="c2", tool_calls=(), error=None, finished=False)
  completion = Completion(turns=(first, last))
  assert (completion.content, completion.reasoning, completion.finished) == ("c2", None, False)
  assert completion.text == "<think>\nr1\n</think>\nc1c2"
