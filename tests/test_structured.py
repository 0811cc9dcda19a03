"""Structured output: validation of text and of a tool's arguments."""

import json
import pathlib

import pytest

from nemocascade.data.chat import ToolCall, Turn
from nemocascade.domains import structured
from nemocascade.sandbox import limited
from nemocascade.verifiers.verdict import Completion, Verdict

GYM = pathlib.Path(__file__).parents[2] / "shared/data/gym"
SCHEMA = {
  "type": "object",
  "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
  "required": ["name", "age"],
  "additionalProperties": False,
}
ROW = {"schema_str": json.dumps(SCHEMA), "schema_type": "json", "response_mode": "text"}


def judge(row, content, *calls):
  turn = Turn(reasoning="", content=content, tool_calls=calls, error=None, finished=True)
  return structured.make_verify()([row], [Completion((turn,))])[0]


@pytest.mark.parametrize(
  ("content", "reward"),
  [('{"name": "Ann", "age": 7}', 1), (' {"age": 7, "name": ""}\n', 1),
   ('```json\n{"name": "Ann", "age": 7}\n```', 0), ('```\n{"name": "Ann", "age": 7}\n```', 0),
   ('{"name": "Ann", "age": "7"}', 0), ('{"name": "Ann"}', 0), ("{}", 0), ("[]", 0), ("", 0),
   ('{"name": "Ann", "age": 7, "pet": "cat"}', 0), ('{"name": "Ann", "age": 7.5}', 0),
   ('Here: {"name": "Ann", "age": 7}', 0), ('{"name": "Ann", "age": 7} ok', 0),
   ('{"name": "Ann", "age": NaN}', 0), ("{'name': 'Ann', 'age': 7}", 0), ("[" * 100_000, 0)],
)  # fmt: skip
def test_the_text_must_be_json_that_validates(content, reward):
  verdict = judge(ROW, content)
  assert (verdict.reward, verdict.masked) == (reward, False)


@pytest.mark.parametrize("schema", ["not json", '{"type": "no such type"}', '{"$ref": "http://x.invalid/y"}'])
def test_a_bad_schema_gives_no_verdict_and_fetches_nothing(schema):
  verdict = judge({**ROW, "schema_str": schema}, "{}")
  assert (verdict.masked, verdict.cause) == (True, "row")


LOOP = {"$ref": "#/$defs/x"}
ENDLESS = {  # Schemas that refer to themselves without end, and an object that reaches the end of none of them.
  "itself": {"$ref": "#"},
  "by two steps": {"$defs": {"x": {"$ref": "#/$defs/y"}, "y": LOOP}, **LOOP},
  "among branches": {"$defs": {"x": {"anyOf": [{"type": "null"}, LOOP]}}, **LOOP},
  "in a property": {"$defs": {"x": {"allOf": [LOOP]}}, "type": "object", "properties": {"name": LOOP}},
}


@pytest.mark.parametrize("schema", ENDLESS)
@pytest.mark.parametrize("kind, text", [("json", '{"name": "Ann"}'), ("yaml", "name: Ann"), ("xml", "<name>Ann</name>"),
                                        ("toml", 'name = "Ann"'), ("tool", "Ann")])  # fmt: skip
def test_a_schema_without_an_end_gives_no_verdict(schema, kind, text):
  row = {"schema_str": json.dumps(ENDLESS[schema])}
  if kind == "tool":
    verdict = judge(row | {"response_mode": "tool_call"}, "", ToolCall("f", {"name": text}))
  else:
    verdict = judge(row | {"schema_type": kind}, text)
  assert (verdict.masked, verdict.cause) == (True, "row") and "refers to itself without end" in verdict.reason


def test_a_text_that_is_nested_too_deep_is_wrong_under_a_schema_that_ends():
  tree = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}
  of_tool = tree | {"properties": {"a": {"$ref": "#/$defs/t"}}}
  tree |= {"$ref": "#/$defs/t"}
  deep = "[" * 900 + "]" * 900
  assert judge({"schema_str": json.dumps(tree)}, "[[[], []]]") == Verdict(1.0, "valid")
  for verdict in (
    judge({"schema_str": json.dumps(tree)}, deep),
    judge(
      {"schema_str": json.dumps(of_tool), "response_mode": "tool_call"},
      "",
      ToolCall("f", {"a": deep}),
    ),
  ):
    assert (verdict.reward, verdict.masked, verdict.reason) == (0.0, False, "invalid nested too deep")


def test_an_array_whose_items_take_too_long_to_compare_masks_the_sample(monkeypatch):
  monkeypatch.setattr(limited.call, "__kwdefaults__", {"limit_s": 1.0})
  row = {**ROW, "schema_str": json.dumps({"type": "array", "uniqueItems": True})}
  many = [{"a": {"b": place}} for place in range(12_000)]
  verdict = judge(row, json.dumps(many))
  assert (verdict.masked, verdict.cause, verdict.reward) == (True, "time", 0.0)
  assert judge(row, json.dumps(many[:3])).reward == 1.0


def test_the_draft_that_the_schema_names_is_followed():
  draft = "http://json-schema.org/draft-04/schema#"
  old = json.dumps({"$schema": draft, "maximum": 5, "exclusiveMaximum": True})
  assert judge({**ROW, "schema_str": old}, "4").reward == 1.0
  assert judge({**ROW, "schema_str": old}, "5").reward == 0.0


def test_in_tool_mode_the_payload_is_in_the_arguments_of_the_one_call():
  row = {**ROW, "response_mode": "tool_call", "tool_name": "save", "tool_payload_key": "data"}
  good = {"data": '{"name": "Ann", "age": 7}'}
  assert judge(row, "", ToolCall("save", good)).reward == 1.0
  assert judge(row, "", ToolCall("save", {"data": {"name": "Ann", "age": 7}})).reward == 1.0
  assert judge(row, "", ToolCall("save", {"data": '{"name": "Ann"}'})).reward == 0.0
  assert judge(row, "", ToolCall("save", {"other": good["data"]})).reward == 0.0
  assert judge(row, "", ToolCall("send", good)).reward == 0.0
  assert judge(row, "", ToolCall("save", good), ToolCall("save", good)).reward == 0.0
  assert judge(row, good["data"]).reward == 0.0


def test_direct_arguments_are_read_by_their_schema():
  row = {**ROW, "response_mode": "tool_call", "tool_name": "save", "tool_payload_key": None}
  assert judge(row, "", ToolCall("save", {"name": "12", "age": "7"})).reward == 1.0
  assert judge(row, "", ToolCall("save", {"name": "Ann", "age": "seven"})).reward == 0.0


def example_of(schema, root):
  """A minimal value that satisfies a schema of the released kind."""
  if "$ref" in schema:
    return example_of(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
  if "enum" in schema:
    return schema["enum"][0]
  for word in ("anyOf", "oneOf"):
    if word in schema:
      return example_of(schema[word][0], root)
  kind = schema.get("type", "null")
  kind = kind if isinstance(kind, str) else kind[0]
  if kind == "object":
    wanted = schema.get("required", ())
    return {name: example_of(schema["properties"][name], root) for name in wanted}
  if kind == "array":
    return [example_of(schema["items"], root) for _ in range(schema.get("minItems", 0))]
  return {"string": "a", "integer": 1, "number": 1.5, "boolean": True, "null": None}[kind]


@pytest.mark.skipif(not GYM.exists(), reason="the released rows are not here")
def test_released_rows_take_a_valid_payload_and_refuse_an_empty_call():
  for line in (GYM / "structured_outputs.jsonl").read_text().splitlines():
    row = json.loads(line)
    schema = json.loads(row["schema_str"])
    payload, key = example_of(schema, schema), row["tool_payload_key"]
    arguments = {key: payload} if key else payload
    written = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    verdict = judge(row, "", ToolCall(row["tool_name"], written))
    assert verdict == Verdict(1.0, "valid")
    refused = judge(row, "", ToolCall(row["tool_name"], {"no such key": "1"}))
    assert (refused.reward, refused.masked) == (0.0, False)


@pytest.mark.parametrize(
  ("kind", "content"),
  [("json", '{"name": "LONG", "age": "LONG"}'), ("json", '"LONG"'), ("json", '{"LONG": 1, "LONG": 1}'),
   ("toml", 'name = "LONG"'), ("xml", "<name>LONG</name>"), ("csv", "name,age\n,LONG")],
)  # fmt: skip
def test_a_wrong_text_is_wrong_however_long_it_is(kind, content):
  verdict = judge({**ROW, "schema_type": kind}, content.replace("LONG", "a" * 2 * limited.MAX_REPLY_BYTES))
  assert (verdict.reward, verdict.masked) == (0, False), verdict.reason
  assert len(verdict.reason) <= 200
