"""The chat template as a Jinja text, for Hugging Face folders: transformers renders with it what `chat.render` renders.

Jinja cannot read JSON, so the template reads the arguments of a tool call that are JSON text itself, sign by sign.
It takes for granted that they are JSON. Unknown template arguments are an error of `chat.render`; transformers ignores
them.
"""

import json

from nemocascade.data.chat import DEFAULT_SYSTEM
from nemocascade.data.pieces import text_of
from nemocascade.data.tool_format import tools_section

FILE = "chat_template.jinja"

_TEMPLATE = """\
{%- set cutting = truncate_history_thinking if truncate_history_thinking is defined else true -%}
{%- set thinking = enable_thinking if enable_thinking is defined else true -%}

{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{%- macro value(it) -%}
  {%- if it is mapping or (it is sequence and it is not string) -%}{{- it | tojson -}}
  {%- else -%}{{- it | string -}}{%- endif -%}
{%- endmacro -%}

{%- macro others(fields, handled) -%}
  {%- for key in fields if key not in handled -%}
    {{- '\\n<' ~ key ~ '>' ~ value(fields[key]) ~ '</' ~ key ~ '>' -}}
  {%- endfor -%}
{%- endmacro -%}

{%- macro definition(tool) -%}
  {{- '\\n<function>\\n<name>' ~ tool['name'] ~ '</name>' -}}
  {%- if 'description' in tool -%}
    {{- '\\n<description>' ~ (tool['description'] | string).strip() ~ '</description>' -}}
  {%- endif -%}
  {{- '\\n<parameters>' -}}
  {%- set parameters = tool['parameters'] if 'parameters' in tool and tool['parameters'] is mapping else {} -%}
  {%- if 'properties' in parameters and parameters['properties'] is mapping -%}
    {%- for name in parameters['properties'] -%}
      {%- set given = parameters['properties'][name] -%}
      {%- set field = given if given is mapping else {} -%}
      {{- '\\n<parameter>\\n<name>' ~ name ~ '</name>' -}}
      {%- if 'type' in field -%}{{- '\\n<type>' ~ (field['type'] | string) ~ '</type>' -}}{%- endif -%}
      {%- if 'description' in field -%}
        {{- '\\n<description>' ~ (field['description'] | string).strip() ~ '</description>' -}}
      {%- endif -%}
      {%- if 'enum' in field -%}{{- '\\n<enum>' ~ (field['enum'] | tojson) ~ '</enum>' -}}{%- endif -%}
      {{- others(field, ['name', 'type', 'description', 'enum']) ~ '\\n</parameter>' -}}
    {%- endfor -%}
  {%- endif -%}
  {{- others(parameters, ['type', 'properties', 'required']) -}}
  {%- if 'required' in parameters -%}
    {{- '\\n<required>' ~ (parameters['required'] | tojson) ~ '</required>' -}}
  {%- endif -%}
  {{- '\\n</parameters>' ~ others(tool, ['type', 'name', 'description', 'parameters']) ~ '\\n</function>' -}}
{%- endmacro -%}

{%- macro unescaped(token) -%}
  {%- set ns = namespace(out='', escape=false, hex=none, high=0) -%}
  {%- for sign in token[1:-1] -%}
    {%- if ns.hex is not none -%}
      {%- set ns.hex = ns.hex ~ sign -%}
      {%- if ns.hex | length == 4 -%}
        {%- set code = ns.hex | int(0, 16) -%}
        {%- set ns.hex = none -%}
        {%- if 55296 <= code < 56320 -%}
          {%- set ns.high = 1024 * (code - 55296) + 9216 -%}
        {%- else -%}
          {%- set ns.out = ns.out ~ ('%c' | format(code + ns.high)) -%}
          {%- set ns.high = 0 -%}
        {%- endif -%}
      {%- endif -%}
    {%- elif ns.escape -%}
      {%- set ns.escape = false -%}
      {%- if sign == 'u' -%}
        {%- set ns.hex = '' -%}
      {%- else -%}
        {%- set ns.out = ns.out ~ {'n': '\\n', 't': '\\t', 'r': '\\r', 'b': '\\b', 'f': '\\f'}.get(sign, sign) -%}
      {%- endif -%}
    {%- elif sign == '\\\\' -%}
      {%- set ns.escape = true -%}
    {%- else -%}
      {%- set ns.out = ns.out ~ sign -%}
    {%- endif -%}
  {%- endfor -%}
  {{- ns.out -}}
{%- endmacro -%}

{%- macro spelt(token, inside) -%}
  {%- if token[:1] == '"' -%}
    {{- unescaped(token) | tojson if inside else unescaped(token) -}}
  {%- elif token in ['true', 'false', 'null'] -%}
    {{- token if inside else {'true': 'True', 'false': 'False', 'null': 'None'}[token] -}}
  {%- elif token -%}
    {{- token | float | string if '.' in token or 'e' in token or 'E' in token else token | int | string -}}
  {%- endif -%}
{%- endmacro -%}

{%- macro given_as_text(arguments, name) -%}
  {%- set ns = namespace(depth=0, string=false, escape=false, token='', nested='', key=none, out='') -%}
  {%- for sign in arguments -%}
    {%- if ns.string -%}
      {%- set ns.token = ns.token ~ sign -%}
      {%- if ns.escape -%}{%- set ns.escape = false -%}
      {%- elif sign == '\\\\' -%}{%- set ns.escape = true -%}
      {%- elif sign == '"' -%}{%- set ns.string = false -%}
      {%- endif -%}
    {%- elif sign == '"' -%}
      {%- set ns.string = true -%}
      {%- set ns.token = sign -%}
    {%- elif sign in '{[' -%}
      {%- set ns.nested = ns.nested ~ (sign if ns.depth else '') -%}
      {%- set ns.depth = ns.depth + 1 -%}
    {%- elif sign in '}],:' -%}
      {%- if ns.depth > 1 -%}
        {%- set ns.nested = ns.nested ~ spelt(ns.token, true) ~ sign ~ (' ' if sign in ',:' else '') -%}
        {%- set ns.depth = ns.depth - (1 if sign in '}]' else 0) -%}
      {%- elif sign == ':' -%}
        {%- set ns.key = unescaped(ns.token) -%}
      {%- else -%}
        {%- if ns.key is not none -%}
          {%- set said = ns.nested if ns.nested else spelt(ns.token, false) -%}
          {%- set ns.out = ns.out ~ '<parameter=' ~ ns.key ~ '>\\n' ~ said ~ '\\n</parameter>\\n' -%}
        {%- endif -%}
        {%- set ns.key = none -%}
        {%- set ns.nested = '' -%}
        {%- set ns.depth = ns.depth - (1 if sign in '}]' else 0) -%}
      {%- endif -%}
      {%- set ns.token = '' -%}
    {%- elif sign.strip() -%}
      {%- set ns.token = ns.token ~ sign -%}
    {%- endif -%}
  {%- endfor -%}
  {%- if ns.depth or ns.string or ns.token or arguments.strip()[:1] != '{' -%}
    {{- raise_exception('arguments of tool call ' ~ name ~ ' must be an object, or one as JSON text') -}}
  {%- endif -%}
  {{- ns.out -}}
{%- endmacro -%}

{%- macro call(given) -%}
  {%- set call = given['function'] if 'function' in given else given -%}
  {{- '<tool_call>\\n<function=' ~ call['name'] ~ '>\\n' -}}
  {%- set arguments = call['arguments'] if 'arguments' in call and call['arguments'] else {} -%}
  {%- if arguments is string -%}
    {{- given_as_text(arguments, call['name']) -}}
  {%- elif arguments is mapping -%}
    {%- for key in arguments -%}
      {{- '<parameter=' ~ key ~ '>\\n' ~ value(arguments[key]) ~ '\\n</parameter>\\n' -}}
    {%- endfor -%}
  {%- else -%}
    {{- raise_exception('arguments of tool call ' ~ call['name'] ~ ' must be an object, or one as JSON text') -}}
  {%- endif -%}
  {{- '</function>\\n</tool_call>\\n' -}}
{%- endmacro -%}

{%- macro answer(message, cut) -%}
  {%- set content = text(message['content']) -%}
  {%- set reasoning = message['reasoning_content'] if message['reasoning_content'] is string else '' -%}
  {%- set calls = message['tool_calls'] or [] -%}
  {%- set ns = namespace(thought='', said=content, written=false) -%}
  {%- if reasoning.strip() -%}
    {%- set ns.thought = '\\n' ~ reasoning ~ '\\n' -%}
    {%- set ns.said = '\\n' ~ content -%}
  {%- elif '<think>' not in content and '</think>' not in content -%}
  {%- elif '</think>' in content and (cut or content.lstrip().startswith('<think>')) -%}
    {%- set parts = content.lstrip().removeprefix('<think>').split('</think>') -%}
    {%- set ns.thought = parts[:-1] | join('</think>') -%}
    {%- set ns.said = parts[-1] -%}
  {%- elif cut and calls -%}
    {%- set ns.said = content.split('<think>')[0] -%}
  {%- else -%}
    {%- set ns.written = true -%}
  {%- endif -%}
  {%- if ns.written -%}
    {{- content.strip() ~ ('\\n' if calls else '') -}}
  {%- else -%}
    {%- if cut -%}
      {%- set ns.thought = '' -%}
      {%- set ns.said = ns.said.split('</think>')[-1] -%}
    {%- endif -%}
    {{- '<think>' ~ ns.thought ~ '</think>' -}}
    {{- (ns.said.strip() if cut and calls else ns.said.rstrip()) ~ ('\\n' if calls else '') -}}
  {%- endif -%}
  {%- for given in calls -%}{{- call(given) -}}{%- endfor -%}
{%- endmacro -%}

{%- set head = messages[0] if messages and messages[0]['role'] in ['system', 'developer'] else none -%}
{%- set system = text(head['content']) if head else ('' if tools else @DEFAULT_SYSTEM@) -%}
{{- '<|im_start|>system\\n' ~ system -}}
{%- if tools -%}
  {{- ('\\n\\n' if system else '') ~ @TOOLS@ -}}
  {%- for tool in tools -%}{{- definition(tool['function'] if 'function' in tool else tool) -}}{%- endfor -%}
  {{- @AFTER_TOOLS@ -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}

{%- set turns = messages[1:] if head else messages -%}
{%- set last = namespace(user=-1) -%}
{%- for message in turns if message['role'] == 'user' -%}
  {%- set last.user = loop.index0 -%}
{%- endfor -%}
{%- set seen = namespace(users=-1) -%}
{%- for message in turns -%}
  {%- if message['role'] == 'tool' -%}
    {%- if loop.first or loop.previtem['role'] != 'tool' -%}{{- '<|im_start|>user\\n' -}}{%- endif -%}
    {{- '<tool_response>\\n' ~ text(message['content']) ~ '\\n</tool_response>\\n' -}}
    {%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' ~ answer(message, cutting and seen.users < last.user) ~ '<|im_end|>\\n' -}}
  {%- elif message['role'] in ['user', 'system', 'developer'] -%}
    {%- set user = message['role'] == 'user' -%}
    {%- if user -%}{%- set seen.users = seen.users + 1 -%}{%- endif -%}
    {{- '<|im_start|>' ~ ('user' if user else 'system') ~ '\\n' ~ text(message['content']) -}}
    {%- if user and seen.users == last.user and reasoning_budget is defined and reasoning_budget is not none -%}
      {{- '\\n\\n{thinking token budget: ' ~ reasoning_budget ~ '}' -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
  {%- else -%}
    {{- raise_exception('unknown role ' ~ message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if thinking else '<think></think>') -}}
{%- endif -%}
"""


def jinja() -> str:
  """The text of chat_template.jinja."""
  head, *after = tools_section(())
  texts = {"@DEFAULT_SYSTEM@": DEFAULT_SYSTEM, "@TOOLS@": head.text, "@AFTER_TOOLS@": text_of(after)}
  found = _TEMPLATE
  for place, text in texts.items():
    found = found.replace(place, json.dumps(text))  # A JSON string is a Jinja string.
  return found
