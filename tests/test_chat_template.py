"""The exported Jinja template renders in transformers what our renderer renders, and exports hold it."""

import json

import chats
import pytest
import tiny_checkpoint
import tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers_folders import random_model, save

from experiments import convert
from nemocascade.data import chat
from nemocascade.data.chat_template import FILE, jinja
from nemocascade.data.tokenizer import IM_END

TOOLS = [  # In the form that transformers expects.
  tool if "function" in tool else {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
  for tool in chats.TOOLS
]


@pytest.fixture(scope="module")
def words():
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json.make().decode()))
  tokenizer.chat_template = jinja()
  return tokenizer


def theirs(words, messages, **arguments) -> str:
  return words.apply_chat_template(messages, tokenize=False, **arguments)


text = st.text(alphabet=st.sampled_from(" \nabé<>/{}%'\"\\"), max_size=8) | st.sampled_from(
  ["", "<think>", "</think>x", "<think>\na\n</think>\n\nYes.", " <think>a", "{{ x }}", "a</think>b</think>c"]
)
name = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
value = text | st.integers(-9, 9) | st.booleans() | st.none() | st.lists(text, max_size=2) | st.dictionaries(name, text)
call = st.builds(
  lambda n, a: {"type": "function", "function": {"name": n, "arguments": a}}, name, st.dictionaries(name, value)
)
parts = st.lists(st.builds(lambda t: {"type": "text", "text": t}, text), max_size=2)
message = st.one_of(
  st.builds(lambda c: {"role": "user", "content": c}, text | parts),
  st.builds(lambda c: {"role": "tool", "content": c}, text),
  st.builds(lambda c: {"role": "system", "content": c}, text),
  st.builds(
    lambda c, r, t: {"role": "assistant", "content": c} | ({"reasoning_content": r} if r is not None else {})
    | ({"tool_calls": t} if t else {}),
    text | st.none(), text | st.none(), st.lists(call, max_size=2),
  ),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
  st.lists(message, min_size=1, max_size=6), st.sampled_from([None, TOOLS]), st.booleans(), st.booleans(), st.booleans(),
  st.sampled_from([None, 64]),
)  # fmt: skip
def test_transformers_renders_what_we_render(words, messages, tools, prompt, thinking, cut, budget):
  arguments = dict(
    tools=tools, add_generation_prompt=prompt, enable_thinking=thinking, truncate_history_thinking=cut,
    reasoning_budget=budget,
  )  # fmt: skip
  assert theirs(words, messages, **arguments) == chat.text_of(chat.render(messages, **arguments))


def test_without_arguments_the_defaults_are_the_same(words):
  messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>\na\n</think>\nyes"}]
  assert theirs(words, messages) == chat.text_of(chat.render(messages))


inner = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6) | text,
  lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3),
  max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=4), inner, max_size=3), st.booleans(), st.sampled_from([None, 2, (",", ":")]))
def test_arguments_as_json_text_are_rendered_as_the_object(words, arguments, ascii_, layout):
  """OpenAI's form has the arguments of a call as JSON text."""
  layout = {"separators": layout} if isinstance(layout, tuple) else {"indent": layout}
  said = json.dumps(arguments, ensure_ascii=ascii_, **layout)
  message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": said}}]}
  assert theirs(words, [message]) == chat.text_of(chat.render([message]))


def test_what_the_template_does_not_take_is_an_error(words):
  from jinja2 import TemplateError

  calls = lambda arguments: {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
  for message in (*map(calls, ("[1]", "x", '{"a": 1', '"a"', [1])), {"role": "asistant", "content": ""}):
    with pytest.raises(TemplateError, match="must be an object|unknown role"):
      theirs(words, [{"content": ""} | message])


def test_an_export_holds_the_template_and_transformers_finds_it(tmp_path):
  """From a folder without a template: ours goes out. From one with its own: that one goes out."""
  folder = save(random_model("M*E", vocab_size=448), tmp_path / "hf")
  (folder / "tokenizer.json").write_bytes(tokenizer_json.make())
  convert.run(f"hf:{folder}", str(tmp_path / "ours"))
  convert.run(str(tmp_path / "ours"), f"hf:{tmp_path / 'out'}")
  assert (tmp_path / "out" / FILE).read_text() == jinja()
  words = AutoTokenizer.from_pretrained(tmp_path / "out")
  messages = [{"role": "user", "content": "the cat"}]
  rendered = theirs(words, messages, add_generation_prompt=True)
  assert rendered == chat.text_of(chat.render(messages, add_generation_prompt=True))
  assert words.eos_token == "<|im_end|>"

  config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) | {"chat_template": "{{ 'own' }}"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  convert.run(f"hf:{folder}", str(tmp_path / "again"))
  convert.run(str(tmp_path / "again"), f"hf:{tmp_path / 'out2'}")
  assert not (tmp_path / "out2" / FILE).exists()
  assert theirs(AutoTokenizer.from_pretrained(tmp_path / "out2"), messages) == "own"


def test_an_export_of_a_trained_tokenizer_encodes_in_transformers_what_we_encode(tmp_path):
  """A run without init_from trains a SentencePiece model, and its checkpoints have no words of transformers' own."""
  checkpoint = tiny_checkpoint.make(tmp_path / "stage")
  convert.run(checkpoint, f"hf:{tmp_path / 'out'}")
  words = AutoTokenizer.from_pretrained(tmp_path / "out")
  assert (words.eos_token_id, words.pad_token_id, words.bos_token_id) == (IM_END, 0, 1)
  messages = [
    {"role": "user", "content": "the  cat\né 12"},
    {"role": "assistant", "content": "on", "reasoning_content": "of 7", "tool_calls": [
      {"type": "function", "function": {"name": "python", "arguments": {"code": "print(1)"}}}]},
  ]  # fmt: skip
  ours = chat.tokenize(chat.render(messages, tools=TOOLS), tiny_checkpoint.TOKENIZER)[0]
  assert words.apply_chat_template(messages, tools=TOOLS, return_dict=False) == ours
  assert words.decode(ours) == chat.text_of(chat.render(messages, tools=TOOLS))
