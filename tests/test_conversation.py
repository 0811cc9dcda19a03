"""Tests of a conversation: sampled tokens stay, history is truncated as the template says, few programs compile."""

import jax
import numpy as np
import pytest
from scripted import ENGINE, Scripted, T, spell
from tiny_checkpoint import TOKENIZER

from nemocascade.data import chat
from nemocascade.data.tokenizer import IM_END, THINK_END, TOOL_CALL, TOOL_CALL_END
from nemocascade.errors import UserError
from nemocascade.report.metrics import CompileCounter
from nemocascade.rollout.conversation import Conversation
from nemocascade.rollout.sampling import Options
from nemocascade.rollout.voice import Kept

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = spell(TOOL_CALL, "\n<function=f>\n</function>\n", TOOL_CALL_END, "\n", IM_END)


def say(conversation, question, *answer, stopped=lambda: False):
  """Asks the question, plays the scripted answer, and returns the deltas."""
  conversation.to_say.append(spell(*answer))
  conversation.ask(question)
  return list(conversation.answer(stopped))


def rendered(conversation, **settings):
  """Tokens that the template renders for this conversation, with the last turn closed."""
  fields = dict(tools=conversation.tools, enable_thinking=conversation.thinking) | settings
  return chat.tokenize(chat.render(conversation.messages, **fields), TOKENIZER)[0]


NEWLINE = TOKENIZER.encode("\n")


def test_answers_without_thoughts_are_added_to_and_never_taken_in_again():
  c = Scripted(thinking=False)
  for question in ("the cat", "12", "print(1)"):
    before = c.tokens
    say(c, question, "the mat", IM_END)
    assert c.tokens[: len(before)] == before
    assert c.tokens + NEWLINE == rendered(c)
  assert c.voice.prefills == 1 and c.turn.content == "the mat" and c.turn.finished


def test_sampled_tokens_are_never_encoded_again():
  """Sampled ids stay as they are, even if encoding their text would give other ids."""
  odd = [TOKENIZER.encode(letter)[0] for letter in "the"]
  assert TOKENIZER.encode("the") != odd
  c = Scripted(thinking=False)
  say(c, "a", *odd, " \n", IM_END)
  sampled = c.tokens[-len(odd) - 2 :]
  say(c, "b", "cat", IM_END)
  place = c.tokens.index(odd[0], len(c.tokens) - 60)
  assert odd + NEWLINE != sampled and c.tokens[place : place + len(odd)] == odd
  assert c.voice.prefills == 1


def test_a_next_question_cuts_thoughts_and_the_history_is_taken_in_anew():
  c = Scripted(thinking=True)
  say(c, "the cat", "12 and 7\n", THINK_END, "\nsat", IM_END)
  assert c.tokens + NEWLINE == rendered(c)
  say(c, "on", "7\n", THINK_END, "\nthe mat", IM_END)
  assert c.tokens + NEWLINE == rendered(c)
  assert c.voice.prefills == 2
  assert "12 and 7" not in TOKENIZER.decode(c.tokens)
  assert c.messages[1] == {"role": "assistant", "content": "sat", "reasoning_content": "12 and 7"}


def test_kept_thoughts_are_only_added_to():
  c = Scripted(thinking=True, truncate_history_thinking=False)
  say(c, "the cat", "12 and 7\n", THINK_END, "\nsat", IM_END)
  say(c, "on", "7\n", THINK_END, "\nthe mat", IM_END)
  assert c.voice.prefills == 1
  assert c.tokens + NEWLINE == rendered(c, truncate_history_thinking=False)


def test_thoughts_outlive_the_results_of_calls():
  c = Scripted(thinking=True, tools=TOOLS)
  say(c, "the cat", "12\n", THINK_END, "\n", *CALL)
  assert [call.name for call in c.turn.tool_calls] == ["f"]
  c.respond(["sat"])
  c.to_say.append(spell("7\n", THINK_END, "\nthe mat", IM_END))
  list(c.answer())
  assert c.voice.prefills == 1 and c.tokens + NEWLINE == rendered(c)
  assert [m["role"] for m in c.messages] == ["user", "assistant", "tool", "assistant"]


def test_other_tools_are_told_in_a_history_taken_in_anew():
  c = Scripted(thinking=False)
  say(c, "the cat", "sat", IM_END)
  c.offer(TOOLS)
  say(c, "on", "the mat", IM_END)
  assert c.voice.prefills == 2 and c.tokens + NEWLINE == rendered(c, tools=TOOLS)


@pytest.mark.parametrize("when", ["before the results", "after the results", "after the question"])
def test_other_tools_may_be_offered_at_any_time(when):
  c = Scripted(thinking=True, tools=TOOLS)
  others = [{"type": "function", "function": {"name": "g"}}, *TOOLS]
  if when == "after the question":
    c.ask("the cat")
    c.offer(others)
    c.to_say.append(spell("12\n", THINK_END, "\n", *CALL))
    list(c.answer())
  else:
    say(c, "the cat", "12\n", THINK_END, "\n", *CALL)
  for offered in (when == "before the results", when == "after the results"):
    if offered:
      c.offer(others)
    if not c.messages[-1]["role"] == "tool":
      c.respond(["sat"])
  c.to_say.append(spell("7\n", THINK_END, "\nthe mat", IM_END))
  list(c.answer())
  assert [m["role"] for m in c.messages] == ["user", "assistant", "tool", "assistant"]
  assert c.tokens + NEWLINE == rendered(c, tools=others) and "12" in TOKENIZER.decode(c.tokens)
  say(c, "on", "7\n", THINK_END, "\nthe mat", IM_END)  # A question removes the thoughts before it.
  assert c.tokens + NEWLINE == rendered(c, tools=others)


def test_thinking_may_change_between_questions():
  c = Scripted(thinking=False)
  say(c, "the cat", "sat", IM_END)
  c.thinking = True
  say(c, "on", "12\n", THINK_END, "\nthe mat", IM_END)
  assert c.voice.prefills == 1 and c.tokens + NEWLINE == rendered(c)


@pytest.mark.parametrize("thinking, owed", [(True, [THINK_END, IM_END]), (False, [IM_END])])
@pytest.mark.parametrize("why", ["stopped", "length"])
def test_an_answer_that_was_cut_off_is_closed_and_the_talk_goes_on(thinking, owed, why):
  c = Scripted(thinking=thinking, truncate_history_thinking=False, max_new_tokens=8)
  asked = []
  stopped = lambda: asked.append(1) or len(asked) > 1
  said = "the cat sat on the mat and thinks of 12 and 7"
  deltas = say(c, "the cat", said, **({"stopped": stopped} if why == "stopped" else {}))
  assert not c.turn.finished and (c.turn.reasoning if thinking else c.turn.content)
  shown = "".join(delta.reasoning + delta.content for delta in deltas)
  assert shown == (c.turn.reasoning if thinking else c.turn.content)
  before, new = c.tokens, 4 if why == "stopped" else 8
  say(c, "on", "7\n", *([THINK_END] if thinking else []), IM_END)
  assert c.tokens[: len(before) + len(owed)] == before + owed and c.voice.prefills == 1
  assert before[-new:] == spell(said)[:new]


def test_a_long_message_is_added_in_chunks():
  c = Scripted(thinking=False)
  say(c, "the cat", "sat", IM_END)
  before = c.tokens
  say(c, "x " * 2 * ENGINE.chunk, "the mat", IM_END)
  assert c.voice.prefills == 1 and c.tokens[: len(before)] == before
  assert c.turn.content == "the mat" and c.tokens + NEWLINE == rendered(c)


def test_what_does_not_fit_is_refused_and_changes_nothing():
  c = Scripted(thinking=False)
  say(c, "the cat", "sat", IM_END)
  tokens, messages = c.tokens, list(c.messages)
  for question in ("x " * T, "9" * (T - len(tokens) - 5)):
    with pytest.raises(UserError, match="there is room for 1024"):
      c.ask(question)
  assert (c.tokens, c.messages) == (tokens, messages)
  say(c, "on", "the mat", IM_END)
  assert c.tokens + NEWLINE == rendered(c)


def test_reset_forgets():
  c = Scripted(thinking=False)
  say(c, "the cat", "sat", IM_END)
  first = c.tokens
  c.reset()
  assert c.messages == [] and c.tokens == [] and c.turn is None
  say(c, "the cat", "sat", IM_END)
  assert c.tokens == first


def test_a_system_text_of_ones_own_is_told():
  c = Scripted(thinking=False, system="the mat")
  say(c, "the cat", "sat", IM_END)
  assert TOKENIZER.decode(c.tokens).startswith("<|im_start|>system\nthe mat<|im_end|>\n")


def test_streaming_samples_what_decoding_at_once_does():
  """Streaming in small steps samples the same tokens as decoding at once with the same key."""
  params = np.zeros(T, np.int32)
  c = Conversation(Kept(ENGINE, params, Options(30.0), seed=5), TOKENIZER, thinking=False, max_new_tokens=50)
  c.ask("the cat")
  prompt = c.tokens
  list(c.answer())
  d = ENGINE.start(params, [prompt], 1, options=Options(30.0))
  d = d.replace(limit_B=np.array([len(prompt) + 50], np.int32))
  d = ENGINE.decode(params, d, jax.random.key(5))
  assert c.tokens == np.asarray(d.tokens_BT)[0, : int(d.known_B[0])].tolist()
  assert len(set(c.tokens[len(prompt) :])) > 10


def test_few_programs_are_compiled():
  with CompileCounter() as compiled:
    c = Scripted(thinking=True, tools=[])
    say(c, "the cat", "12\n", THINK_END, "\nsat", IM_END)
    say(c, "on", "12\n", THINK_END, "\nsat", IM_END)
    say(c, "on", "12\n", THINK_END, "\nsat", IM_END)
  assert compiled.count <= 6
  with CompileCounter() as compiled:
    for question in ("the", "the cat", "sat", "on"):
      say(c, question, "12 and 7\n", THINK_END, "\nthe mat", IM_END)
    c.reset()
    say(c, "the cat", "12\n", THINK_END, "\nsat", IM_END)
  assert compiled.count <= 1  # At most one program, for the next width of prompts.
