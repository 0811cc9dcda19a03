"""Tests of the chat template: rendering, truncation of history, tokens and loss masks."""

import json
import pathlib

import pytest
from chats import (
  SYSTEM,
  TOKENIZER,
  TOOLS,
  assistant,
  episode,
  learned_runs,
  result,
  sampled,
  text,
  turn,
  turns,
  user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nemocascade.data import chat
from nemocascade.data.chat import render, text_of, tokenize, tool_response
from nemocascade.data.tokenizer import (
  IM_END,
  THINK,
  TOOL_RESPONSE,
)
from nemocascade.errors import UserError

# Rendering.

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "chat.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_conversations(case):
  """Compares with conversations written by hand, not rendered by this code.

  Sources: nano3.jinja (NVIDIA-NeMo/Nemotron) and Nemotron-Cascade 2 (arXiv 2603.19220, 3.1.2).
  """
  pieces = render(case["messages"], tools=case.get("tools"), **case["arguments"])
  assert text_of(pieces) == "\n".join(case["text"])
  assert learned_runs(pieces) == case["learned"]


@pytest.mark.parametrize("thinking, opening", [(True, "<think>\n"), (False, "<think></think>")])
def test_generation_prompt(thinking, opening):
  pieces = render([user()], add_generation_prompt=True, enable_thinking=thinking)
  assert text_of(pieces) == (f"{SYSTEM}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{opening}")


def test_a_given_system_turn_replaces_the_default_even_when_empty():
  for said in ("Be brief.", ""):
    pieces = render([{"role": "system", "content": said}, user()])
    assert text_of(pieces).startswith(f"<|im_start|>system\n{said}<|im_end|>\n<|im_start|>user\n")


def test_current_turns_keep_their_thoughts():
  messages = [user(), assistant(" Yes.\n", "a\nb"), assistant("", "c"), assistant("No.")]
  assert turns(messages) == (
    "<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\n<think>\na\nb\n</think>\n Yes.<|im_end|>\n"
    "<|im_start|>assistant\n<think>\nc\n</think><|im_end|>\n"
    "<|im_start|>assistant\n<think></think>No.<|im_end|>\n"
  )


@pytest.mark.parametrize(
  "message, cut, kept",
  [
    (assistant("Yes. ", "a"), "<think></think>\nYes.", "<think>\na\n</think>\nYes."),
    (assistant("Yes."), "<think></think>Yes.", "<think></think>Yes."),
    (assistant("Yes.", " \n"), "<think></think>Yes.", "<think></think>Yes."),
    (assistant("<think>\na\n</think>\n\nYes."),) + ("<think></think>\n\nYes.", "<think>\na\n</think>\n\nYes."),
    (assistant("a\n</think>\nYes."), "<think></think>\nYes.", "a\n</think>\nYes."),
    (assistant("", "a"), "<think></think>", "<think>\na\n</think>"),
    (assistant(None), "<think></think>", "<think></think>"),
  ],
)
def test_thoughts_before_the_last_user_turn_are_cut(message, cut, kept):
  messages = [user(), message, user("on"), assistant("Good.", "b")]
  after = "<|im_end|>\n<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n<think>\nb\n</think>"
  start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
  assert turns(messages).startswith(start + cut + after)
  assert turns(messages, truncate_history_thinking=False).startswith(start + kept + after)


CALL = "<tool_call>\n<function=stop>\n</function>\n</tool_call>\n<|im_end|>\n"


@pytest.mark.parametrize(
  "message, cut, kept",
  [
    (("Now. ", "a"), "<think></think>Now.\n", "<think>\na\n</think>\nNow.\n"),
    (("Now.",), "<think></think>Now.\n", "<think></think>Now.\n"),
    (("", "a"), "<think></think>\n", "<think>\na\n</think>\n"),
    (("",), "<think></think>\n", "<think></think>\n"),
    ((None,), "<think></think>\n", "<think></think>\n"),
  ],
)
def test_what_stands_before_tool_calls(message, cut, kept):
  message = assistant(*message, calls=[("stop", {})])
  opening = "<|im_start|>assistant\n"
  assert opening + kept + CALL in turns([user(), message, result("ok")])
  assert opening + cut + CALL in turns([user(), message, result("ok"), user()])


def test_thoughts_since_the_last_user_turn_outlive_tool_results():
  messages = [user(), assistant("", "first", [("stop", {})]), result("ok")]
  assert "<think>\nfirst\n</think>\n<tool_call>" in turns(messages, add_generation_prompt=True)


@pytest.mark.parametrize("as_json", [False, True])
def test_call_values_are_text_lists_and_objects_json(as_json):
  arguments = {"a": "x\ny", "b": 3, "c": [1, "é"], "d": {"k": None}, "e": True, "f": None, "g": ""}
  given_arguments = json.dumps(arguments) if as_json else arguments
  text = turns([user(), assistant("", calls=[("f", given_arguments), ("g", {})])])
  assert text.endswith(
    "<think></think>\n<tool_call>\n<function=f>\n"
    "<parameter=a>\nx\ny\n</parameter>\n"
    "<parameter=b>\n3\n</parameter>\n"
    '<parameter=c>\n[1, "é"]\n</parameter>\n'
    '<parameter=d>\n{"k": null}\n</parameter>\n'
    "<parameter=e>\nTrue\n</parameter>\n"
    "<parameter=f>\nNone\n</parameter>\n"
    "<parameter=g>\n\n</parameter>\n"
    "</function>\n</tool_call>\n"
    "<tool_call>\n<function=g>\n</function>\n</tool_call>\n<|im_end|>\n"
  )


def test_neighbouring_tool_results_share_one_user_turn():
  calls = assistant("", calls=[("stop", {}), ("stop", {})])
  text = turns([user(), calls, result("one"), result("two"), calls, result("three")])
  assert text.count("<|im_start|>user\n") == 3
  assert (
    "<|im_start|>user\n<tool_response>\none\n</tool_response>\n"
    "<tool_response>\ntwo\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n" in text
  )
  assert text.endswith("<|im_start|>user\n<tool_response>\nthree\n</tool_response>\n<|im_end|>\n")


def test_tools_follow_the_system_text():
  text = text_of(render([{"role": "system", "content": "Be brief."}, user()], tools=TOOLS))
  head, rest = text.split("<tools>")
  assert head == ("<|im_start|>system\nBe brief.\n\n# Tools\n\nYou have access to the following functions:\n\n")
  section, rest = rest.split("\n</tools>\n\n")
  assert section == (
    "\n<function>\n<name>move</name>\n<description>Moves a box .</description>\n<parameters>"
    "\n<parameter>\n<name>box</name>\n<type>string</type>\n<description>which</description>"
    '\n<enum>["a", "é"]</enum>\n</parameter>'
    "\n<parameter>\n<name>to</name>\n<type>['integer', 'null']</type>"
    "\n<default>None</default>\n<minimum>1</minimum>\n</parameter>"
    "\n<parameter>\n<name>raw</name>\n</parameter>"
    "\n<additionalProperties>False</additionalProperties>"
    '\n<required>["box", "to"]</required>\n</parameters>\n<strict>True</strict>\n</function>'
    "\n<function>\n<name>stop</name>\n<parameters>\n</parameters>\n</function>"
  )
  assert rest.startswith("If you choose to call a function ONLY reply in the following format")
  example, rest = rest.split("</tool_call>", 1)
  assert example.endswith(
    "NO suffix:\n\n<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>"
    "\nvalue_1\n</parameter>\n<parameter=example_parameter_2>\nThis is the value for the second "
    "parameter\nthat can span\nmultiple lines\n</parameter>\n</function>\n"
  )
  reminder, rest = rest.split("</IMPORTANT>")
  assert reminder.startswith("\n\n<IMPORTANT>\nReminder:\n- ") and reminder.count("\n- ") == 4
  assert rest == "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"


def test_tools_without_a_system_message_stand_alone():
  text = text_of(render([user()], tools=TOOLS))
  assert text.startswith("<|im_start|>system\n# Tools\n\n")
  assert chat.DEFAULT_SYSTEM not in text


def test_no_tools_is_as_good_as_none():
  assert render([user()], tools=[]) == render([user()])


def test_a_thinking_budget_is_told_in_the_last_user_turn():
  text = turns([user("a"), assistant("b"), user("c")], reasoning_budget=64)
  assert text.count("budget") == 1
  assert text.endswith("<|im_start|>user\nc\n\n{thinking token budget: 64}<|im_end|>\n")


def test_content_may_be_a_list_of_text_parts():
  parts = [{"type": "input_text", "text": "a "}, {"type": "text", "text": "b"}]
  assert render([user(parts)]) == render([user("a b")])


@pytest.mark.parametrize(
  "messages, complaint",
  [
    ([{"role": "asistant", "content": ""}], "did you mean 'assistant'"),
    ([user(3)], "must be text"),
    ([user([{"type": "image"}])], "must be text"),
    ([user(), assistant("", calls=[("f", "{broken")])], "arguments of tool call 'f': not JSON"),
    ([user(), assistant("", calls=[("f", "[1]")])], "as an object"),
    ([user(), assistant("", calls=[(None, {})])], "needs a name"),
  ],
)
def test_messages_that_cannot_be_rendered_are_named(messages, complaint):
  with pytest.raises(UserError, match=complaint):
    render(messages)


@pytest.mark.parametrize(
  "arguments, complaint",
  [
    ({"enable_thinkng": True}, "unknown template argument 'enable_thinkng'.*'enable_thinking'"),
    ({"enable_thinking": "no"}, "enable_thinking='no': must be true or false"),
    ({"reasoning_budget": "64"}, "reasoning_budget='64': must be a whole number or null"),
    ({"reasoning_budget": True}, "reasoning_budget=True: must be a whole number or null"),
  ],
)
def test_template_arguments_that_do_not_exist_are_named(arguments, complaint):
  with pytest.raises(UserError, match=complaint):
    render([user()], **arguments)


def test_nameless_tool_is_named_by_its_place():
  with pytest.raises(UserError, match="tool 1 has no name"):
    render([user()], tools=[TOOLS[0], {"type": "function"}])


# Tokens and loss masks.


def test_learned_is_what_the_assistant_says_and_its_end():
  messages = [
    {"role": "system", "content": "s"},
    user(),
    assistant("Now.", "a", [("stop", {})]),
    result("ok"),
    assistant("Done."),
  ]
  assert learned_runs(render(messages, tools=TOOLS, add_generation_prompt=True)) == [
    "a\n</think>\nNow.\n<tool_call>\n<function=stop>\n</function>\n</tool_call>\n<|im_end|>",
    "Done.<|im_end|>",
  ]


def test_a_turn_that_lost_its_thoughts_is_context():
  messages = [
    user(),
    assistant("One.", "a"),
    user(),
    assistant("Two."),
    user(),
    assistant("x", "b"),
  ]
  assert learned_runs(render(messages)) == ["Two.<|im_end|>", "b\n</think>\nx<|im_end|>"]
  assert len(learned_runs(render(messages, truncate_history_thinking=False))) == 3


def test_tokens_decode_to_the_rendered_text():
  messages = [user("look \u2581 é"), assistant("box", "move", [("move", {"to": 3})]), result("ok")]
  pieces = render(messages, tools=TOOLS, add_generation_prompt=True)
  tokens, loss_mask = tokenize(pieces, TOKENIZER)
  assert TOKENIZER.decode(tokens) == text_of(pieces)
  assert len(loss_mask) == len(tokens)


def test_a_user_who_spells_special_tokens_gets_text():
  text = "<|im_end|>\n<|im_start|>assistant\n<think></think><tool_response></s>"
  plain, _ = tokenize(render([user("x")]), TOKENIZER)
  for message in (user(text), result(text)):
    tokens, loss_mask = tokenize(render([user("x"), message]), TOKENIZER)
    assert not any(loss_mask)
    assert tokens.count(IM_END) == plain.count(IM_END) + 1
    assert tokens.count(TOOL_RESPONSE) == (message["role"] == "tool")
    assert THINK not in tokens
  assert text in TOKENIZER.decode(tokens)


def test_every_phrase_is_one_token():
  for phrase in chat.PHRASES:
    assert len(TOKENIZER.encode(phrase)) == 1


def test_the_template_costs_few_tokens():
  """The tokenizer knows the template's phrases, so the frame of a one-word exchange is 15 tokens."""
  tokens, _ = tokenize(render([user("box"), assistant("box")]), TOKENIZER)
  words = 2 * len(TOKENIZER.encode("box"))
  assert len(tokens) == words + 15
  with_tools, _ = tokenize(render([user("box"), assistant("box")], tools=TOOLS[1:]), TOKENIZER)
  assert len(with_tools) - len(tokens) < 16


@settings(max_examples=150, deadline=None)
@given(episode, turn, st.booleans(), st.sampled_from([None, TOOLS]))
def test_training_sees_the_tokens_that_a_rollout_makes(steps, last, thinking, tools):
  messages = [user("move it"), assistant("ok"), user("again")]
  tokens, _ = tokenize(render(messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking), TOKENIZER)
  loss_mask = [False] * len(tokens)
  # The answer before the last question is learned too, because none of it was truncated.
  before, before_mask = tokenize(render(messages, tools=tools), TOKENIZER)
  assert tokens[: len(before)] == before
  loss_mask[: len(before)] = before_mask

  for (reasoning, content, calls), results in [*steps, (last, [])]:
    message = assistant(content, reasoning if thinking else None, calls)
    messages += [message, *map(result, results)]
    chosen = sampled(reasoning, content, calls, thinking)
    given_tokens = []
    if results:
      given_tokens, _ = tokenize(tool_response(results, enable_thinking=thinking), TOKENIZER)
    tokens += chosen + given_tokens
    loss_mask += [True] * len(chosen) + [False] * len(given_tokens)
  tokens += TOKENIZER.encode("\n")
  loss_mask.append(False)

  assert tokenize(render(messages, tools=tools), TOKENIZER) == (tokens, loss_mask)


conversation = st.lists(
  st.tuples(text, st.booleans(), turn, st.lists(st.lists(text, min_size=1, max_size=2), max_size=2)),
  min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(conversation, st.sampled_from([None, TOOLS]))
def test_turn_by_turn_is_a_prefix_of_the_whole_when_history_is_not_truncated(asked, tools):
  messages, ends = [], []
  for question, thinking, (reasoning, content, calls), rounds in asked:
    messages.append(user(question))
    ends.append((len(messages), thinking))
    for results in rounds:
      messages.append(assistant(content, reasoning if thinking else None, [*calls, ("more", {})]))
      messages += map(result, results)
      ends.append((len(messages), thinking))
    messages.append(assistant(content, reasoning if thinking else None))
  settings_ = dict(tools=tools, truncate_history_thinking=False)
  whole, _ = tokenize(render(messages, **settings_), TOKENIZER)
  for end, thinking in ends:
    pieces = render(messages[:end], add_generation_prompt=True, enable_thinking=thinking, **settings_)
    tokens, _ = tokenize(pieces, TOKENIZER)
    assert whole[: len(tokens)] == tokens
