"""Conversations and files with what nobody planned for: each is read, or is a bad row with a reason."""

import json

import pytest
from test_loader import TOKENIZER, said, user

from nemocascade.data.documents import to_documents
from nemocascade.data.row_files import first_rows, open_rows
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
    (called({"name": "f", "arguments": {"a": nested(20_000)}}), "nested too deep"),
    (called({"name": nested(20_000)}), "nested too deep"),
    ({"messages": "[" * 200_000}, "nested too deep"),
    ({"messages": [user, said], "tools": [{"name": "f", "parameters": nested(20_000)}]}, "nested too deep"),
    ({"messages": [user | {"role": nested(20_000)}, said]}, "nested too deep"),
  ],
)
def test_a_value_that_cannot_be_rendered_is_a_bad_row(row, complaint):
  with pytest.raises(UserError, match=complaint) as error:
    to_documents(row, TOKENIZER)
  assert len(str(error.value)) < 200
