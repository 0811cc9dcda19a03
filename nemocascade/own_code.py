"""Functions and classes in a user's own Python file, named by a config as `FILE.py:NAME`."""

import hashlib
import importlib.util
import inspect
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nemocascade.errors import UserError, nearest, short

FORM = "FILE.py:NAME"


class TookTooLong(Exception):
  """A user's function did not return within its time limit."""


def is_own(spec: str) -> bool:
  """Whether a config's word names something in a Python file (`FILE.py:NAME`), not a built-in name."""
  file, _, _ = spec.rpartition(":")
  return file.endswith(".py")


def name_of(spec: str) -> str:
  """The NAME of `FILE.py:NAME`; a built-in name as it is."""
  return spec.rpartition(":")[2]


def load(spec: str, *, field: str, renew: bool = False) -> Callable:
  """The function or class that `spec` names. Its file is executed once per process, however often it is named.

  Args:
    renew: execute the file again if it has changed since. A run does this in its checks and not later, so
      that all of the run has the same code.
    spec: `FILE.py:NAME`; a relative path starts at the working directory.
    field: the config field that holds it, for messages.

  Raises:
    UserError: the spec has another form, the file is missing, is not Python or raises when it is imported, or
      the name is not in it or is not callable.
  """
  where = f"{field}={spec!r}"
  if not isinstance(spec, str) or not is_own(spec):
    raise UserError(f"{where}: allowed is {FORM}, a function or a class in a Python file")
  file, _, name = spec.rpartition(":")
  module = _module(Path(file), where, renew)
  if not hasattr(module, name):
    has = [own for own, value in vars(module).items() if callable(value) and not own.startswith("_")]
    near = nearest(name, has)
    hint = f"did you mean {near!r}? " if near else ""
    raise UserError(f"{where}: {file} has no {name!r}: {hint}it defines {', '.join(has) or 'no function or class'}")
  found = getattr(module, name)
  if not callable(found):
    raise UserError(f"{where}: {name} in {file} is {type(found).__name__}, not a function or a class")
  return found


def version(spec: str) -> str:
  """SHA-256, in hexadecimal, of the file of a `spec` that was loaded, as it was when it was executed."""
  file, _, _ = spec.rpartition(":")
  return _DIGESTS[_module(Path(file), spec, False).__name__]


def parameters(function: Callable) -> tuple[str, ...]:
  """Names of the parameters that a call can give by position. Empty if the signature cannot be read."""
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return ()
  by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  return tuple(p.name for p in signature.parameters.values() if p.kind in by_position)


def call(function: Callable, *arguments: Any, limit_s: float) -> Any:
  """Returns `function(*arguments)`, a user's function, which is ended after `limit_s` seconds.

  An alarm signal interrupts it: Python code, waits, and matching by `re`; a call of other C code ends first. It stays
  in this process, so it may keep state and take any objects. Only the main thread is interrupted; a call from
  another thread has no limit.

  Raises:
    TookTooLong: at the limit. Whatever the function raises passes.
  """
  if math.isinf(limit_s) or threading.current_thread() is not threading.main_thread():
    return function(*arguments)
  running = [True]

  def ring(*_) -> None:
    if running:
      raise _Rings

  before = signal.signal(signal.SIGALRM, ring)
  signal.setitimer(signal.ITIMER_REAL, limit_s, AGAIN_S)
  try:
    try:
      return function(*arguments)
    finally:
      running.clear()  # From here on the alarm does nothing.
  except _Rings as rings:
    raise TookTooLong(f"did not return within {limit_s:g} s").with_traceback(rings.__traceback__) from None
  finally:
    running.clear()  # Again, in case that the alarm rang before the first one.
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


AGAIN_S = 1.0  # The alarm rings again after this time, in case that the function has caught the exception.


class _Rings(BaseException):
  """Raised inside of a user's function at its limit. No `except Exception` of that function catches it."""


def raised(error: BaseException) -> str:
  """An exception on one line, with the last line of a file of the user's that it came from."""
  line = ""
  traceback = error.__traceback__
  while traceback is not None:
    code = traceback.tb_frame.f_code
    if traceback.tb_frame.f_globals.get("__name__", "").startswith(_PREFIX):
      line = f" (line {traceback.tb_lineno} of {Path(code.co_filename).name})"
    traceback = traceback.tb_next
  return f"{type(error).__name__}: {short(str(error), 120)}{line}"


_PREFIX = "nemocascade_own_"  # Of the names of the users' modules in sys.modules.
_DIGESTS: dict[str, str] = {}  # Such a name -> SHA-256 of the file that was executed.


def _module(file: Path, where: str, renew: bool) -> ModuleType:
  path = file.expanduser().resolve()
  key = _PREFIX + "".join(c if c.isalnum() else "_" for c in str(path))
  loaded = sys.modules.get(key)
  if loaded is not None and not renew:
    return loaded
  if not path.is_file():
    raise UserError(f"{where}: there is no file {str(file)!r} (from {Path.cwd()})")
  source = path.read_bytes()
  digest = hashlib.sha256(source).hexdigest()
  if loaded is not None and _DIGESTS[key] == digest:
    return loaded
  try:
    code = compile(source, str(path), "exec")
  except (SyntaxError, ValueError) as error:  # ValueError: null bytes.
    line = f" (line {error.lineno})" if isinstance(error, SyntaxError) and error.lineno else ""
    raise UserError(f"{where}: {str(file)!r} is not Python: {short(str(error), 120)}{line}") from error
  spec = importlib.util.spec_from_file_location(key, path)
  assert spec is not None  # The suffix is .py.
  module = importlib.util.module_from_spec(spec)
  sys.modules[key], _DIGESTS[key] = module, digest  # Dataclasses and pickle look a class's module up by name.
  try:
    exec(code, module.__dict__)  # Not `exec_module`, which may take the code of an older file from its cache.
  except (Exception, SystemExit) as error:
    del sys.modules[key]
    raise UserError(f"{where}: importing {str(file)!r} failed: {raised(error)}") from error
  return module
