"""SFT on conversations of several questions: each turn is learned once, after exactly its prompt at inference."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemocascade.data import chat
from nemocascade.data.documents import to_documents
from nemocascade.data.tokenizer import train_sentencepiece

TOKENIZER = train_sentencepiece(
  ["the sum of 1 and 2 is 3 so look at it again"] * 20, vocab_size=600, phrases=chat.PHRASES
)
TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}]


def user(text):
  return {"role": "user", "content": text}


def said(content, thought=None, calls=0):
  message = {"role": "assistant", "content": content}
  if thought is not None:
    message["reasoning_content"] = thought
  if calls:
    message["tool_calls"] = [{"function": {"name": "add", "arguments": {"x": content or "1"}}}] * calls
  return message


def result(text):
  return {"role": "tool", "content": text}


def learned(documents):
  """Counts of (tokens before, learned tokens) over all runs of learned tokens."""
  runs = []
  for document in documents:
    mask_T = np.concatenate([[False], document.loss_mask_T, [False]]).astype(int)
    for start, stop in zip(np.flatnonzero(np.diff(mask_T) == 1), np.flatnonzero(np.diff(mask_T) == -1), strict=True):
      runs.append((tuple(document.tokens_T[:start].tolist()), tuple(document.tokens_T[start:stop].tolist())))
  return collections.Counter(runs)


def as_at_inference(messages, tools):
  """The same counts from inference: for each assistant turn, the template's prompt and the turn's tokens."""
  runs = []
  for i, message in enumerate(messages):
    if message["role"] == "assistant":
      thinks = bool((message.get("reasoning_content") or "").strip())
      pieces = chat.render(messages[:i], tools=tools, add_generation_prompt=True, enable_thinking=thinks)
      prompt, _ = chat.tokenize(pieces, TOKENIZER)
      tokens, _ = chat.tokenize(chat.render(messages[: i + 1], tools=tools), TOKENIZER)
      newline = len(chat.tokenize([chat.Piece("\n")], TOKENIZER)[0])  # The newline after <|im_end|> is never sampled.
      assert tokens[: len(prompt)] == prompt
      runs.append((tuple(prompt), tuple(tokens[len(prompt) : -newline])))
  return collections.Counter(runs)


def check(messages, tools=None):
  documents = to_documents({"messages": messages, "tools": tools}, TOKENIZER)
  assert learned(documents) == as_at_inference(messages, tools)
  return documents


@pytest.mark.parametrize(
  "messages, sequences",
  [
    # Three questions, each answered with thoughts: one sequence each.
    ([user("a"), said("1", "so"), user("b"), said("2", "so"), user("c"), said("3", "so")], 3),
    ([user("a"), said("1"), user("b"), said("2"), user("c"), said("3")], 1),
    ([user("a"), said("1"), user("b"), said("2", "so"), user("c"), said("3")], 2),
    ([user("a"), said("1", "so"), user("b"), said("2"), user("c"), said("3")], 2),
    ([user("a"), said("1"), user("b"), said("2"), user("c"), said("3", "so")], 1),
    # All turns of one question are in one sequence, with their thoughts.
    ([user("a"), said("", "so", 1), result("3"), said("1", "it"), user("b"), said("2", "so")], 2),
    # A turn without thoughts after a turn with thoughts is rendered differently once the next question has come.
    ([user("a"), said("x", "so", 2), result("3"), result("4"), said("1"), user("b"), said("2")], 2),
    ([user("a"), said("1", "so"), user("b")], 1),  # The last question has no answer.
    ([user("a"), said("1"), user("b")], 1),
    ([said("hi"), user("a"), said("1", "so"), user("b"), user("c"), said("2", "so")], 2),
    (
      [
        {"role": "system", "content": "s"},
        user("a"),
        said("1", "so"),
        {"role": "system", "content": "t"},
        user("b"),
        said("2"),
      ],
      2,
    ),
    ([user("a"), said("1", "  \n"), user("b"), said("2", "")], 1),  # Blank thoughts count as none.
    ([user("a"), said("1", "so"), user("a"), said("1", "so")], 2),
  ],
)
def test_a_question_whose_answer_is_cut_later_is_a_sequence_of_its_own(messages, sequences):
  assert len(check(messages)) == sequences


def test_the_second_question_is_learned_behind_the_first_answer_without_its_thoughts():
  first, second = check([user("a"), said("1", "so it is"), user("b"), said("2", "again")])
  text = lambda document, mask_T: TOKENIZER.decode(document.tokens_T[mask_T])
  assert text(first, first.loss_mask_T) == "so it is\n</think>\n1<|im_end|>"
  assert text(second, second.loss_mask_T) == "again\n</think>\n2<|im_end|>"
  assert "so it is" not in text(second, ~second.loss_mask_T) and "1<|im_end|>" in text(second, ~second.loss_mask_T)


def test_a_history_that_is_not_cut_is_one_sequence():
  messages = [user("a"), said("1", "so"), user("b"), said("2", "it")]
  ((pieces, context),) = chat.training_sequences(messages, truncate_history_thinking=False)
  assert context == 0 and pieces == chat.render(messages, truncate_history_thinking=False)


WORDS = st.sampled_from(["", "1", "the sum", " again ", "so\n\nlook", "it is 3\n"])


@st.composite
def conversations(draw):
  messages = []
  if draw(st.booleans()):
    messages.append({"role": "system", "content": draw(WORDS)})
  for _ in range(draw(st.integers(1, 5))):
    messages.append(user(draw(WORDS)))
    thought = st.one_of(st.none(), WORDS)
    for calls in draw(st.lists(st.integers(1, 2), max_size=2)):
      messages.append(said(draw(WORDS), draw(thought), calls))
      messages += [result(draw(WORDS)) for _ in range(calls)]
    if draw(st.integers(0, 4)):
      messages.append(said(draw(WORDS), draw(thought)))
    if not draw(st.integers(0, 5)):
      messages.append({"role": "system", "content": draw(WORDS)})
  return messages


@settings(deadline=None, max_examples=150)
@given(conversations(), st.sampled_from([None, TOOLS]))
def test_each_turn_of_any_conversation_is_learned_once_as_it_is_shown(messages, tools):
  if any(message["role"] == "assistant" for message in messages):
    check(messages, tools)
