"""How every command starts: flags, the config, one line for what is wrong, an exit code."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import processes
from nemocascade import host_memory
from nemocascade.errors import StageStopped, UserError


def launch(
  run: Callable[..., object], *, config: bool = True, workdir: bool = True, positional: str = "", **extra: tuple
) -> None:  # fmt: skip
  """Parses the command line and calls `run`; does not return.

  Args:
    run: called as run(config, workdir, **extra flags), without what the command does not take.
    config: whether the command takes --config and, with `workdir`, --workdir.
    positional: the name of the one argument written without a flag, if there is one.
    **extra: further flags, name -> (kind, default, help), kind one of str, int, float, bool.
  """
  doc = (sys.modules["__main__"].__doc__ or "").strip()
  if config:
    config_flags.DEFINE_config_file("config", None, "The config file, with an argument after a colon.")
    if workdir:
      flags.DEFINE_string("workdir", None, "Where the run is written, and resumed from.")
      flags.DEFINE_string("distributed", "", "Of several processes: 'auto' on a TPU pod, or HOST:PORT,PROCESSES,INDEX.")
  flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
  define = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
  for name, (kind, default, text) in extra.items():
    define[kind](name, default, text)

  needed = (["config", "workdir"] if workdir else ["config"]) if config else []
  shown = needed + (["distributed"] if "workdir" in needed else []) + list(extra) + ["debug"]
  host_memory.keep()
  debug = "--debug" in sys.argv
  if any(word in ("--help", "-h", "-help", "--helpshort") for word in sys.argv[1:]):
    print(doc, end="\n\nFlags:\n")
    for name in shown:
      print(f"  --{name:16} {flags.FLAGS[name].help}")
    sys.exit(0)
  try:
    left = _parse(sys.argv)
    arguments = {positional: left.pop(1) if len(left) > 1 else ""} if positional else {}
    if len(left) > 1:
      raise UserError(f"unexpected argument {left[1]!r}: flags are written --name=value")
    arguments |= {name: getattr(flags.FLAGS, name) for name in extra}
    for name in needed:
      if getattr(flags.FLAGS, name) is None:
        raise UserError(f"--{name} is missing")
    first = [flags.FLAGS.config] if config else []
    if "workdir" in needed:
      first.append(Path(flags.FLAGS.workdir).resolve())
      if flags.FLAGS.distributed:
        processes.join(flags.FLAGS.distributed)
    run(*first, **arguments)
  except UserError as error:
    _report(error, 2, debug)
  except KeyboardInterrupt:
    print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(130)
  except Exception as error:  # A failure, not a bad request.
    _report(error, 1, debug)
  sys.exit(0)


def _parse(argv: list[str]) -> list[str]:
  """Flags parsed; any complaint of a library about them becomes one line."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, ImportError, SyntaxError) as error:
    raise UserError(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
  if isinstance(error, OSError) and error.strerror:
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
  return " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__


def _report(error: BaseException, code: int, debug: bool) -> None:
  if debug:
    traceback.print_exception(error)
  else:
    kind = "" if isinstance(error, (UserError, StageStopped, OSError)) else f"{type(error).__name__}: "
    print(f"error: {kind}{_one_line(error)}", file=sys.stderr)
  sys.exit(code)
