"""Tests of the Python tool: it keeps state, prints like a notebook, and leaves nothing behind."""

import pytest

from nemocascade.errors import UserError
from nemocascade.sandbox import python_tool
from nemocascade.sandbox.python_tool import NAME, PythonTool
from nemocascade.sandbox.sandbox import Sandbox


@pytest.fixture(scope="module")
def box():
  return Sandbox(workers=1)


@pytest.fixture
def tool(box):
  tool = PythonTool(box)
  yield tool
  tool.reset()


def run(tool, code, **settings):
  return tool.call(NAME, {"code": code}, **settings)


def test_variables_functions_and_modules_stay(tool):
  assert run(tool, "import math\nx = 6\ndef f(y):\n  return x * y") == ""
  assert run(tool, "f(7)") == "42"
  assert run(tool, "x = 2; f(7) + _") == "56"
  assert run(tool, "open('file', 'w').write('a' * x)") == "2"
  assert run(tool, "open('file').read()") == "'aa'"
  assert tool.calls == 5


def test_output_and_the_last_value_come_in_the_order_of_the_code(tool):
  code = "import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')\n[1]"
  assert run(tool, code) == "a\nb\nc\n[1]"
  assert run(tool, "print('é日😀'); None") == "é日😀"
  assert run(tool, "1; 2;") == "2"


def test_an_error_shows_its_line_and_the_session_goes_on(tool):
  run(tool, "kept = 1\ndef broken():\n  return kept / 0")
  told = run(tool, "print('before')\nbroken()")
  assert told.splitlines()[0] == "before"
  assert told.splitlines()[-1] == "ZeroDivisionError: division by zero"
  assert "return kept / 0" in told and "<call 1>" in told and "main.py" not in told
  assert run(tool, "kept") == "1"
  assert "SyntaxError" in run(tool, "def")
  assert run(tool, "exit(3)") == run(tool, "raise SystemExit") == "SystemExit: the session goes on"
  assert run(tool, "input()").endswith("EOFError: EOF when reading a line")
  assert run(tool, "kept") == "1"


@pytest.mark.parametrize(
  "code, why",
  [
    ("while True: pass", "no result within 1 seconds"),
    ("import time; time.sleep(600)", "no result within 1 seconds"),
    ("try:\n  while True: pass\nexcept BaseException:\n  pass", "no result within 1 seconds"),
    ("import os; os._exit(1)", "the process ended"),
    ("import ctypes; ctypes.string_at(0)", "the process ended"),
    ("while True: print('x' * 1000)", "the code wrote over 1048576 bytes"),
  ],
)
def test_a_call_that_ends_the_session_is_said_and_the_next_one_has_a_new_one(tool, code, why):
  run(tool, "x = 1")
  tool.timeout_s = 1 if "result" in why else 60
  told = run(tool, f"print('begun', flush=True)\n{code}")
  tool.timeout_s = 60
  assert told.startswith("begun\n")
  assert told.endswith(f"error: {why}; the session was started anew and its variables are gone")
  assert len(told) < python_tool.MOST_SHOWN + 300
  assert run(tool, "x").endswith("NameError: name 'x' is not defined")
  assert tool.calls == 3


def test_it_is_confined_as_any_program(tool):
  assert "Error" in run(tool, "open('/etc/passwd')")
  assert "Error" in run(tool, "import socket; socket.socket()")
  assert "Error" in run(tool, "import os; os.fork()")
  assert "MemoryError" in run(tool, "x = bytearray(1 << 31)")
  assert "Error" in run(tool, "open('/usr/lib/x', 'w')")
  assert "etc" not in run(tool, "import os; sorted(os.listdir('/'))")


def test_the_user_may_stop_it(tool):
  asked = []
  told = run(tool, "while True: pass", stopped=lambda: asked.append(1) or len(asked) > 3)
  assert told.startswith("error: the user stopped the code")
  assert run(tool, "1") == "1"


def test_of_a_long_result_the_middle_is_left_out(tool):
  told = run(tool, "print('a' * 6000 + 'b' * 6000)")
  assert told.startswith("a" * 5000 + "\n... 2001 characters are left out ...\n")
  assert told.endswith("b" * 4999)


def test_long_code_and_many_lines_are_taken_in(tool):
  assert run(tool, f"x = '{'y' * 300_000}'\nlen(x)") == "300000"
  assert run(tool, "print(*range(20_000))").count("left out") == 1


def test_calls_are_counted_until_the_conversation_ends(box):
  tool = PythonTool(box, most_calls=2)
  assert run(tool, "x = 1\nx") == "1" and run(tool, "x") == "1"
  assert run(tool, "x") == "error: all 2 calls of this conversation are used"
  tool.reset()
  assert run(tool, "x").endswith("NameError: name 'x' is not defined")
  tool.reset()


@pytest.mark.parametrize(
  "name, arguments, told",
  [
    ("python", {"code": "1"}, f"error: there is no tool 'python', only '{NAME}'"),
    (NAME, {}, f"error: {NAME} takes one parameter 'code', given: none"),
    (NAME, {"code": "1", "x": "2"}, f"error: {NAME} takes one parameter 'code', given: code, x"),
  ],
)
def test_a_call_that_is_none_costs_nothing(tool, name, arguments, told):
  assert tool.call(name, arguments) == told
  assert tool.calls == 0


def test_two_sessions_do_not_see_each_other(box, tool):
  other = PythonTool(box)
  run(tool, "x = 1; open('f', 'w')")
  assert "NameError" in run(other, "x")
  assert run(other, "import os; os.listdir('.')") == run(PythonTool(box), "import os; os.listdir('.')")
  other.reset()


def test_settings_that_make_no_sense_are_refused(box):
  with pytest.raises(UserError, match="timeout_s=0"):
    PythonTool(box, timeout_s=0)
