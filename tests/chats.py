"""Messages, tools, a tokenizer and random turns for the tests of the chat template."""

from hypothesis import strategies as st

from nemocascade.data import chat
from nemocascade.data.chat import render, text_of
from nemocascade.data.tokenizer import (
  IM_END,
  THINK_END,
  TOOL_CALL,
  TOOL_CALL_END,
  train_sentencepiece,
)

SYSTEM = (
  "<|im_start|>system\nYou are a helpful and harmless assistant.\n\nYou are not allowed to use any tools.<|im_end|>\n"
)
TOOLS = [
  {
    "type": "function",
    "name": "move",
    "description": " Moves a box . ",
    "parameters": {
      "type": "object",
      "properties": {
        "box": {"type": "string", "description": "which", "enum": ["a", "é"]},
        "to": {"type": ["integer", "null"], "default": None, "minimum": 1},
        "raw": {},
      },
      "required": ["box", "to"],
      "additionalProperties": False,
    },
    "strict": True,
  },
  {"type": "function", "function": {"name": "stop"}},
]
TOKENIZER = train_sentencepiece(
  ["move the box to 3 and look at it", "user system assistant think value"] * 20,
  vocab_size=700,
  phrases=chat.PHRASES,
)


def user(text="hi"):
  return {"role": "user", "content": text}


def assistant(content, reasoning=None, calls=()):
  message = {"role": "assistant", "content": content}
  if reasoning is not None:
    message["reasoning_content"] = reasoning
  if calls:
    message["tool_calls"] = [
      {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
    ]
  return message


def result(text):
  return {"role": "tool", "content": text}


def turns(messages, **settings):
  """The rendered text after the default system turn."""
  text = text_of(render(messages, **settings))
  assert text.startswith(SYSTEM)
  return text.removeprefix(SYSTEM)


def learned_runs(pieces):
  """Text of each run of learned pieces."""
  runs, before = [], False
  for piece in pieces:
    if piece.learned:
      runs = [*runs[:-1], runs[-1] + piece.text] if before else [*runs, piece.text]
    before = piece.learned
  return runs


def sampled(reasoning, content, calls, thinking):
  """Tokens of a turn put together by hand, as a policy would sample them."""
  rest = f"{content}\n" if calls else content
  tokens = []
  if thinking:
    tokens = [*TOKENIZER.encode(f"{reasoning}\n"), THINK_END]
    rest = "\n" + rest if content else rest
  tokens += TOKENIZER.encode(rest)
  for name, arguments in calls:
    filled = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    inside = f"\n<function={name}>\n{filled}</function>\n"
    tokens += [TOOL_CALL, *TOKENIZER.encode(inside), TOOL_CALL_END, *TOKENIZER.encode("\n")]
  return [*tokens, IM_END]


text = st.text(alphabet=st.sampled_from(" \nabé▁<>/=3") | st.characters(codec="utf-8"), max_size=8)
spoken = text.map(str.rstrip).filter(lambda s: not chat._THINK_TAG.search(s))
name = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
value = text.filter(lambda s: "</parameter>" not in s)
call = st.tuples(name, st.dictionaries(name, value, max_size=2))
turn = st.tuples(text.filter(str.strip), spoken, st.lists(call, max_size=2))
episode = st.lists(st.tuples(turn, st.lists(text, min_size=1, max_size=2)), max_size=3)
