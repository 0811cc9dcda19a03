"""The text format of tool definitions, tool calls and tool results: rendering and parsing.

The format is that of NVIDIA's template `nano3.jinja` (github.com/NVIDIA-NeMo/Nemotron).
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemocascade.data.pieces import Piece, mark
from nemocascade.errors import UserError

# The template's instructions on tools. Keep them verbatim: models were trained on this wording.
_HEAD = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
_TAIL = "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
_EXAMPLE = (
  "\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
  "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\n"
  "multiple lines\n</parameter>\n</function>\n"
)
_REMINDER = (
  "\n\n<IMPORTANT>\nReminder:\n"
  "- Function calls MUST follow the specified format: an inner <function=...></function> block "
  "must be nested within "
)
_REMINDER_END = (
  " XML tags\n"
  "- Required parameters MUST be specified\n"
  "- You may provide optional reasoning for your function call in natural language BEFORE the "
  "function call, but NOT after\n"
  "- If there is no function call available, answer the question like normal with your current "
  "knowledge and do not tell the user about function calls\n</IMPORTANT>"
)

# The format's fixed strings between special tokens. A tokenizer that we train gives each one token.
PHRASES: tuple[str, ...] = (
  _HEAD, _TAIL, _EXAMPLE, _REMINDER, _REMINDER_END,
  "\n<function>\n<name>", "</name>\n<description>", "</name>\n<parameters>", "</name>\n<type>",
  "</description>\n<parameters>", "\n<parameter>\n<name>", "</type>\n<description>",
  "</description>\n</parameter>", "</type>\n</parameter>", "\n</parameters>\n</function>",
  "\n<required>", "</required>\n</parameters>\n</function>",
  "\n<function=", ">\n", "<parameter=", "\n</parameter>\n", "</function>\n",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """A parsed tool call. Argument values are strings; the caller converts them by the tool's schema."""

  name: str
  arguments: dict[str, str]


# Rendering.


def tools_section(tools: Sequence[Mapping]) -> list[Piece]:
  """The part of the system turn that lists the tools.

  Raises:
    UserError: a tool is not an object or has no name.
  """
  text = _HEAD
  for place, tool in enumerate(tools):
    tool = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if not isinstance(tool, Mapping) or "name" not in tool:
      raise UserError(f"tool {place} has no name")
    text += f"\n<function>\n<name>{tool['name']}</name>"
    if "description" in tool:
      text += f"\n<description>{str(tool['description']).strip()}</description>"
    text += "\n<parameters>"
    parameters = tool.get("parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    properties = parameters.get("properties")
    for name, field in properties.items() if isinstance(properties, Mapping) else ():
      text += f"\n<parameter>\n<name>{name}</name>"
      field = field if isinstance(field, Mapping) else {}
      if "type" in field:
        text += f"\n<type>{field['type']}</type>"
      if "description" in field:
        text += f"\n<description>{str(field['description']).strip()}</description>"
      if "enum" in field:
        text += f"\n<enum>{_json(field['enum'])}</enum>"
      text += _other_keys(field, ("name", "type", "description", "enum")) + "\n</parameter>"
    text += _other_keys(parameters, ("type", "properties", "required"))
    if "required" in parameters:
      text += f"\n<required>{_json(parameters['required'])}</required>"
    text += "\n</parameters>"
    text += _other_keys(tool, ("type", "name", "description", "parameters")) + "\n</function>"

  call, call_end = mark("<tool_call>"), mark("</tool_call>")
  return [
    Piece(text), Piece(_TAIL), call, Piece(_EXAMPLE), call_end,
    Piece(_REMINDER), call, call_end, Piece(_REMINDER_END),
  ]  # fmt: skip


def without_nulls(value: Any) -> Any:
  """The value without null fields of objects. Files often give an object the fields of all rows' objects.

  The published chat template shows null as "None", so readers of files drop such fields before rendering.
  """
  if isinstance(value, Mapping):
    return {key: without_nulls(part) for key, part in value.items() if part is not None}
  return [without_nulls(part) for part in value] if isinstance(value, list) else value


def calls(tool_calls: Sequence[Mapping], *, learned: bool) -> list[Piece]:
  """Renders the calls of an assistant's message, each between <tool_call> and </tool_call>.

  Raises:
    UserError: they are no list, a call has no name, or its arguments are not an object.
  """
  if not isinstance(tool_calls, list | tuple):
    raise UserError(f"tool_calls: must be a list, is {type(tool_calls).__name__}")
  pieces = []
  for call in tool_calls:
    pieces += [mark("<tool_call>", learned), Piece(_call_text(call), learned=learned)]
    pieces += [mark("</tool_call>", learned), Piece("\n", learned=learned)]
  return pieces


def responses(results: Sequence[str]) -> list[Piece]:
  """Renders the results of calls, in the order of the calls."""
  pieces = []
  for result in results:
    pieces += [mark("<tool_response>"), Piece(f"\n{result}\n"), mark("</tool_response>")]
    pieces += [Piece("\n")]
  return pieces


def _call_text(call: Mapping) -> str:
  call = call.get("function") or call if isinstance(call, Mapping) else {}
  if not isinstance(call, Mapping):
    raise UserError(f"tool call: its function must be an object, is {type(call).__name__}")
  name, arguments = call.get("name"), call.get("arguments") or {}
  if isinstance(arguments, str):
    try:
      arguments = json.loads(arguments)
    except ValueError as error:
      raise UserError(f"arguments of tool call {name!r}: not JSON ({error})") from error
  if not isinstance(name, str) or not isinstance(arguments, Mapping):
    raise UserError(f"tool call {name!r}: needs a name and arguments as an object")
  filled = "".join(f"<parameter={key}>\n{_value(value)}\n</parameter>\n" for key, value in arguments.items())
  return f"\n<function={name}>\n{filled}</function>\n"


def _other_keys(fields: Mapping, handled: Sequence[str]) -> str:
  return "".join(f"\n<{key}>{_value(value)}</{key}>" for key, value in fields.items() if key not in handled)


def _value(value: object) -> str:
  return _json(value) if isinstance(value, Mapping | list | tuple) else str(value)


def _json(value: object) -> str:
  return json.dumps(value, ensure_ascii=False)


# Parsing.

# An argument's value may itself contain tags. So the last </function> ends the call, and a </parameter>
# ends a value only if another parameter or the end of the call follows it.
_CALL = re.compile(r"\s*<function=([^\n>]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^\n>]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|\Z))", re.DOTALL)


def parse_call(text: str) -> ToolCall | str:
  """Parses the text between <tool_call> and </tool_call>; returns a message if it is malformed."""
  call = _CALL.fullmatch(text)
  if call is None:
    return "a tool call is not <function=NAME> ... </function>"
  name, filled = call[1], call[2].rstrip()
  arguments, start = {}, 0
  while start < len(filled):
    parameter = _PARAMETER.match(filled, start)
    if parameter is None:
      return f"a parameter of {name} is not <parameter=NAME> ... </parameter>"
    key, value = parameter.groups()
    if key in arguments:
      return f"parameter {key} of {name} is given twice"
    arguments[key] = value
    start = parameter.end()
  return ToolCall(name, arguments)
