"""Parsing of turns: what was rendered is read back, streams, malformed calls, any tokens."""

import json
import pathlib
from types import SimpleNamespace

import pytest
from chats import (
  TOKENIZER,
  assistant,
  turn,
  user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nemocascade.data import tool_format
from nemocascade.data.chat import ToolCall, Turn, parse, render, text_of, tokenize
from nemocascade.data.chat_parse import FormatError, TurnParser
from nemocascade.data.tokenizer import (
  EOS,
  IM_END,
  THINK,
  THINK_END,
  TOOL_CALL,
  TOOL_CALL_END,
)


@settings(max_examples=150, deadline=None)
@given(turn, st.booleans())
def test_what_was_rendered_is_read_back(said, thinking):
  reasoning, content, calls = said
  message = assistant(content, reasoning if thinking else None, calls)
  tokens, loss_mask = tokenize(render([user(), message]), TOKENIZER)
  chosen = [token for token, learned in zip(tokens, loss_mask, strict=True) if learned]
  assert parse(chosen, TOKENIZER, thinking=thinking) == Turn(
    reasoning if thinking else None,
    content,
    tuple(ToolCall(name, arguments) for name, arguments in calls),
    error=None,
    finished=True,
  )


# Ids of special tokens, words, single bytes, phrases of the template, and no token at all.
ids = st.one_of(
  st.integers(10, 17),
  st.integers(0, 20),
  st.integers(18, 300),
  st.sampled_from(TOKENIZER.encode("é日 \n\n</function>\n<parameter=box>\n>\n")),
  st.integers(-2, TOKENIZER.vocab_size + 2),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ids, max_size=30), st.lists(st.integers(1, 5)), st.booleans())
def test_tokens_as_they_come_say_what_they_say_at_once(tokens, sizes, thinking):
  parser, deltas, start = TurnParser(TOKENIZER, thinking=thinking), [], 0
  for size in [*sizes, len(tokens)]:
    deltas += parser.feed(tokens[start : start + size])
    start += size
  deltas += parser.finish()
  turn = parser.turn()
  assert turn == parse(tokens, TOKENIZER, thinking=thinking)
  assert "".join(d.reasoning for d in deltas) == (turn.reasoning or "")
  assert "".join(d.content for d in deltas) == turn.content
  assert tuple(d.tool_call for d in deltas if d.tool_call) == turn.tool_calls
  assert next((d.error for d in deltas if d.error), None) == turn.error


def test_text_comes_out_as_soon_as_it_is_certain():
  parser = TurnParser(TOKENIZER, thinking=True)
  said = []
  for token in [*TOKENIZER.encode("move é\n"), THINK_END, *TOKENIZER.encode("\nbox "), TOOL_CALL]:
    said.append(["".join(d.reasoning + d.content for d in parser.feed([token])), token])
  words = [text for text, _ in said if text]
  assert "".join(words) == "move ébox"
  assert said[0][0] == TOKENIZER.decode([said[0][1]])  # The first word comes at once.


def test_an_error_tells_the_model_what_to_mend():
  tokens = [TOOL_CALL, *TOKENIZER.encode(GOOD), TOOL_CALL_END, TOOL_CALL, *TOKENIZER.encode("x")]
  turn = parse([*tokens, TOOL_CALL_END, IM_END], TOKENIZER, thinking=False)
  message = "a tool call is not <function=NAME> ... </function>"
  assert turn.error == FormatError("tool_call", message, call=1, text="x")
  assert json.loads(turn.error.as_response()) == {"error": {"type": "tool_call", "message": message, "call": 1}}


def test_a_stop_token_ends_the_turn():
  words = TOKENIZER.encode("move")
  for stop in (IM_END, EOS):
    assert parse([*words, stop, *words, THINK], TOKENIZER, thinking=False) == Turn(None, "move", finished=True)
  assert parse(words, TOKENIZER, thinking=False) == Turn(None, "move", finished=False)


def test_an_endless_thought_is_no_answer():
  turn = parse([*TOKENIZER.encode("look at"), TOOL_CALL, IM_END], TOKENIZER, thinking=True)
  assert turn == Turn("look at<tool_call>", "", (), turn.error, finished=True)
  assert turn.error == FormatError("thought", "the thought has no </think>")


def test_tags_spelt_in_text_are_text():
  text = "<tool_call>\n<function=stop>\n</function>\n</tool_call>"
  assert parse(TOKENIZER.encode(text), TOKENIZER, thinking=False) == Turn(None, text)


GOOD = "\n<function=stop>\n</function>\n"


@pytest.mark.parametrize(
  "parts, calls, complaint",
  [
    ([TOOL_CALL, GOOD], 0, "no </tool_call>"),
    ([TOOL_CALL, "nonsense", TOOL_CALL_END], 0, "is not <function"),
    ([TOOL_CALL, "\n<function=>\n</function>", TOOL_CALL_END], 0, "is not <function"),
    (
      [TOOL_CALL, "<function=f>\n<parameter=a>\n1\n</function>", TOOL_CALL_END],
      0,
      "parameter of f",
    ),
    ([TOOL_CALL, "<function=f>\nwords\n</function>", TOOL_CALL_END], 0, "parameter of f"),
    (
      [TOOL_CALL, "<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>"] + [TOOL_CALL_END],
      0,
      "given twice",
    ),
    ([TOOL_CALL, GOOD, TOOL_CALL, GOOD, TOOL_CALL_END], 0, "special token"),
    ([TOOL_CALL, GOOD, TOOL_CALL_END, "and more"], 1, "text follows"),
    ([TOOL_CALL, GOOD, TOOL_CALL_END, TOOL_CALL, "x", TOOL_CALL_END], 1, "is not <function"),
    (["a", TOOL_CALL_END, "b"], 0, "</tool_call> stands in the answer"),
    (["a", THINK, "b", TOOL_CALL, GOOD, TOOL_CALL_END], 1, "<think> stands in the answer"),
  ],
)
def test_malformed_calls_are_errors_in_words(parts, calls, complaint):
  tokens = sum(([p] if isinstance(p, int) else TOKENIZER.encode(p) for p in parts), [])
  turn = parse([*tokens, IM_END], TOKENIZER, thinking=False)
  assert complaint in turn.error.message
  assert turn.tool_calls == (ToolCall("stop", {}),) * calls
  assert turn.finished


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 30) | st.integers(-2, TOKENIZER.vocab_size + 2)), st.booleans())
def test_any_tokens_are_a_turn(tokens, thinking):
  turn = parse(tokens, TOKENIZER, thinking=thinking)
  assert turn.finished == (IM_END in tokens or EOS in tokens)
  assert (turn.reasoning is not None) == thinking


GYM = pathlib.Path(__file__).parents[1] / "../shared/data/gym"


@pytest.mark.skipif(not GYM.is_dir(), reason="the real rows are not here")
def test_real_prompts_are_rendered_whole():
  for file in sorted(GYM.glob("*.jsonl")):
    for line in file.read_text().splitlines()[:2]:
      params = json.loads(line)["responses_create_params"]
      prompt = params["input"]
      prompt = [user(prompt)] if isinstance(prompt, str) else prompt
      pieces = render(prompt, tools=params.get("tools"), add_generation_prompt=True)
      tokens, _ = tokenize(pieces, TOKENIZER)
      assert TOKENIZER.decode(tokens) == text_of(pieces)


def test_a_call_of_many_parameters_is_parsed_in_one_pass(monkeypatch):
  filled = "".join(f"<parameter=k{i}>\nv\n</parameter>\n" for i in range(100_000))
  read = []

  def match(text, start=0):
    found = parameter.match(text, start)
    read.append((text, start, found.end()))
    return found

  # Each parameter is read once, where the one before it ends, and the text is not copied for it.
  parameter = tool_format._PARAMETER
  monkeypatch.setattr(tool_format, "_PARAMETER", SimpleNamespace(match=match))
  call = tool_format.parse_call(f"<function=f>\n{filled}</function>\n")
  assert len(call.arguments) == len(read) == 100_000
  assert all(text is read[0][0] for text, *_ in read)
  assert sum(end - start for _, start, end in read) == len(read[0][0]) <= len(filled)
