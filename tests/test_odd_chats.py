"""Conversations and files with what nobody planned for: each is read, or is a bad row with a reason."""

import json

import pytest
from test_loader import TOKENIZER, said, user

from nemocascade.data.documents import to_documents
from nemocascade.data.row_files import first_rows, open_rows
from nemocascade.domains.rows import make_prompt, prompt_tools
from nemocascade.errors import UserError


def nested(depth):
  value = {}
  for _ in range(depth):
    value = {"a": value}
  return value


def called(function):
  return {"messages": [user, said | {"tool_calls": [{"function": function}]}]}


@pytest.mark.parametrize(
  "row, complaint",
  [
    ({"messages": [user, said | {"tool_calls": 1}]}, "tool_calls: must be a list, is int"),
    ({"messages": [user, said | {"tool_calls": {"name": "f"}}]}, "tool_calls: must be a list, is dict"),
    (called(["f"]), "its function must be an object, is list"),
    (called("f"), "its function must be an object, is str"),
    (called(None), "needs a name"),
    (called({"name": "f", "arguments": {"a": [b"x"]}}), "cannot be rendered .TypeError"),
    (called({"name": "f", "arguments": {"a": nested(200)}}), "nested too deep"),
    (called({"name": nested(200)}), "nested too deep"),
    ({"messages": "[" * 200_000}, "nested too deep"),
    ({"messages": [user, said], "tools": [{"name": "f", "parameters": nested(200)}]}, "nested too deep"),
    ({"messages": [user | {"role": nested(200)}, said]}, "nested too deep"),
  ],
)
def test_a_value_that_cannot_be_rendered_is_a_bad_row(row, complaint):
  with pytest.raises(UserError, match=complaint) as error:
    to_documents(row, TOKENIZER)
  assert len(str(error.value)) < 200


def test_null_fields_of_tools_are_left_out_of_a_document_and_of_a_prompt():
  """Rows of JSON lines often have the null fields of all tools of their file, as Parquet has them."""
  nulls = dict.fromkeys(["description", "enum", "items", "default"])
  bare = {
    "type": "function", "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}},
  }  # fmt: skip
  full = {
    "type": "function", "strict": None, "description": None, "name": "add",
    "parameters": {
      "type": "object", "required": None,
      "properties": {"a": {"type": "array", **nulls, "items": {"type": "string", **nulls}}, "b": None},
    },
  }  # fmt: skip
  (expected,), (found,) = (
    to_documents({"messages": [user, said], "tools": [tool]}, TOKENIZER) for tool in (bare, full)
  )
  assert found.tokens_T.tolist() == expected.tokens_T.tolist()
  assert prompt_tools(make_prompt("mine", "add 1 and 2", tools=[full])) == [bare]


CHAT = json.dumps({"messages": [user, said]}).encode()


@pytest.mark.parametrize(
  "text, lines",
  [
    (CHAT + b"\n  \n\t\t\r\n \r\n" + CHAT, [1, 5]),
    (b" " * 9 + b"\n" + CHAT + b"\n   ", [2]),
    (b"\xef\xbb\xbf" + CHAT + b"\r\n\r\n  " + CHAT + b"\r\n", [1, 3]),
    (CHAT + b"\n" + CHAT.replace(b"x", b"x" * 20_000_000, 1) + b"\n\n" + CHAT, [1, 2, 4]),
    (CHAT + b"\n5\n" + CHAT, [1, "bad", 3]),
    (b"5", ["bad"]),
  ],
  ids=["blank", "blank at the ends", "byte order mark", "20 MB", "one byte", "one byte alone"],
)
def test_lines_of_white_space_are_no_rows_and_all_others_are(tmp_path, text, lines):
  path = tmp_path / "chats.jsonl"
  path.write_bytes(text)
  rows = open_rows(str(path), tmp_path / "index")
  read = []
  for i in range(len(rows)):
    try:
      read.append(int(rows.place(i).split("line ")[1]) if rows[i]["messages"] else None)
    except UserError:
      read.append("bad")
  assert read == lines
  first = [int(place.split("line ")[1]) if isinstance(row, dict) else "bad" for place, row in first_rows(str(path), 9)]
  assert first == lines
