"""Starts a command: parses flags, reads the config, prints errors in one line, sets the exit code."""

import dataclasses
import json
import os
import re
import select
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from nemocascade import errors, field_check, fields, host_memory
from nemocascade.errors import StageStopped, Terminated, UserError, nearest
from nemocascade.field_table import UNREAD
from nemocascade.fields import Field
from nemocascade.runtime import config_file, hosts, same_start, termination
from nemocascade.runtime.ending import NotAdmitted, end
from nemocascade.runtime.newest import FLAGS, name_newest, newest
from nemocascade.runtime.start_model import take_model
from nemocascade.state_files import on_bucket, own_name, place

HELP = ("--help", "-h", "-help", "--helpshort")
LONGEST = 199  # Most characters of an error line. --debug prints the whole error.

# Flags that many commands share.
CONFIG = fields.text("The config file, with an argument after a colon; --config.NAME=VALUE changes a field.")
WORKDIR = fields.text("Where the run is written, and resumed from.")
MESH = fields.text("Devices that share the model, as data:1,expert:8; -1 takes those that are left.")
DEBUG = fields.flag("Show the traceback of an error.")
# Name -> (field, default) of the flags of commands that run in several processes.
SEVERAL: dict[str, tuple[Field, object]] = {
  "distributed": (
    fields.text("To run in several processes: 'auto' on a TPU pod or under Slurm, or HOST:PORT,PROCESSES,INDEX."), "",
  ),
  "connect_s": (fields.number("Seconds until all processes must have connected.", above=0), hosts.CONNECT_S),
  "wait_s": (fields.number("Seconds that the processes of an exchange wait for the last one.", above=0), hosts.WAIT_S),
  "grace_s": (
    fields.number("Seconds from SIGTERM to the end of a step; then the run ends without saving.", above=0),
    termination.GRACE_S,
  ),
  "check_hosts": (fields.flag("Compare the decisions of all processes, to find where they part."), False),
}  # fmt: skip


def launch(
  run: Callable[..., object], *, config: bool = True, workdir: bool = True, several: bool = False,
  buckets: bool = False, positional: str = "", without_workdir: Sequence[str] = (), **extra: tuple[Field, object],
) -> None:  # fmt: skip
  """Parses the command line and calls `run`; does not return.

  Args:
    run: called as run(config, workdir, **extra flags); without config or workdir if the command lacks them.
    config: whether the command takes --config and, with `workdir`, --workdir.
    several: whether the command may run in several processes. Otherwise --distributed is an error.
    buckets: whether the work directory may be in a bucket (gs://).
    positional: the name of the one argument written without a flag, or "".
    without_workdir: flags of `extra` with which --workdir may be left out; `run` then gets None.
    **extra: further flags, name -> (field that parses and checks the value, default).
  """
  host_memory.keep()
  debug = "--debug" in sys.argv
  own = SEVERAL if several else {"grace_s": SEVERAL["grace_s"]} if config and workdir else {}
  try:
    if own and not set(HELP) & set(sys.argv):
      _meet(sys.argv[1:], several)
    request = _request(sys.argv[1:], config, workdir, positional, extra | own, buckets, without_workdir)
    if request is not None:
      first, arguments, flags = request
      settings = {name: arguments.pop(name) for name in own}
      if settings.get("distributed"):
        _begin_together(settings, first[0] if config else None, flags, first[1] if config and workdir else None)
      run(*first, **arguments)
    sys.stdout.flush()
    hosts.leave()
  except NotAdmitted as error:
    end(error.ending)
  except UserError as error:
    _report(error, errors.BAD_REQUEST, debug)
  except KeyboardInterrupt:
    _report(
      KeyboardInterrupt("interrupted: the same command goes on from the last checkpoint"), errors.INTERRUPTED, debug
    )
  except Terminated as error:
    _report(error, errors.TERMINATED, debug)
  except Exception as error:  # A failure rather than a wrong request.
    if isinstance(error, BrokenPipeError) and _unread():
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left when it ends.
      if ending := hosts.fail("error: nobody reads what this command prints", errors.UNREAD, user=False):
        end(ending)
      sys.exit(errors.UNREAD)  # Without a word, like other commands.
    _report(error, errors.FAILURE, debug)
  sys.exit(0)


def _unread() -> bool:
  """Whether stdout is a pipe whose reader has ended."""
  stdout = select.poll()
  stdout.register(1, 0)
  return any(event & select.POLLERR for _, event in stdout.poll(0))


def _meet(argv: Sequence[str], several: bool) -> None:
  """Connects to the other processes if there are any: before anything that can fail in one of them alone.

  Raises UserError if there are, and the command runs in one process; or if a flag that is read for it has no value
  that it may have.
  """
  told, wrong = {}, None
  for name in ("distributed", "connect_s", "grace_s"):
    field, told[name] = SEVERAL[name]
    for i, word in enumerate(argv):
      flag, equals, value = word.lstrip("-").partition("=")
      if flag == name and word.startswith("-"):
        try:
          given = field.parse(f"--{name}", value if equals else next(iter(argv[i + 1 :]), ""))
          field.check(f"--{name}", given)
          told[name] = given
        except UserError as error:
          wrong = wrong or error
  if told["distributed"] and not several:
    raise UserError(f"--distributed={told['distributed']}: must be left out: this command runs in one process")
  termination.listen(told["grace_s"])
  if told["distributed"]:
    hosts.connect(told["distributed"], told["connect_s"], told["grace_s"])
  if wrong:  # Now the others hear of it.
    raise wrong


def _begin_together(settings: dict, c: ConfigDict | None, flags: dict, workdir: Path | None) -> None:
  """Compares the processes and starts JAX. Raises UserError if they differ."""
  hosts.configure(wait_s=settings["wait_s"], check=settings["check_hosts"])
  same_start.check(
    None if c is None else json.loads(c.to_json_best_effort()),
    {name: value for name, value in flags.items() if name != "distributed"},
  )
  if workdir is not None:
    same_start.check_shared(workdir)
  hosts.start_jax()
  same_start.check_devices()


def _request(
  argv: Sequence[str], config: bool, workdir: bool, positional: str, extra: dict, buckets: bool,
  without_workdir: Sequence[str],
):  # fmt: skip
  """Parses the command line; prints the help if asked for.

  Returns:
    (positional arguments of `run`, keyword arguments by the names of `extra`, all flags), or None after help
  """
  known = dict(extra)
  if config and workdir:
    known = {"workdir": (WORKDIR, None)} | known
  known["debug"] = (DEBUG, False)
  named, changes, others = config_file.split(argv) if config else (None, [], list(argv))
  wanted = [word for word in others if word in HELP]
  found, left = _parse([word for word in others if word not in wanted], known, ["config"] if config else [])
  c = None
  if named is not None:
    c = config_file.load(named)
    config_file.change(c, changes)
    field_check.check(c)
    if not wanted:
      name_newest(c)
    take_model(c)
    config_file.change(c, changes)  # A field of the command line counts more than a checkpoint's.
    if not wanted:
      name_newest(c)
    c = c.copy_and_resolve_references().lock()
  if wanted:
    _help(c, {"config": (CONFIG, None)} | known if config else known)
    return None
  arguments = {positional: left.pop(0) if left else ""} if positional else {}
  if left:
    raise UserError(f"unexpected argument {fields.shown(left[0])}: flags are written --name=value")
  if config and c is None:
    raise UserError("--config is missing: give a file of configs/, such as --config=configs/tiny/cascade.py")
  first = [c] if config else []
  if config and workdir:
    spared = found["workdir"] is None and any(found[flag] for flag in without_workdir)
    first.append(None if spared else _workdir(found["workdir"], buckets))
  found |= {name: newest(found[name], f"--{name}") for name in FLAGS if name in extra}
  arguments |= {name: found[name] for name in extra}
  return first, arguments, found


def _parse(argv: Sequence[str], known: dict[str, tuple[Field, object]], more: Sequence[str]):
  """(flag -> value, words that are not flags). `more` names flags read elsewhere, for error messages."""
  own = flags.FlagValues()
  for name, (field, default) in known.items():
    if field.kind is bool:
      flags.DEFINE_bool(name, default, field.help, flag_values=own)
    else:
      flags.DEFINE_string(name, None, field.help, flag_values=own)
  for word in argv:
    name, equals, said = word.lstrip("-").partition("=")
    if equals and name in known and known[name][0].kind is bool:
      known[name][0].parse(f"--{name}", said)
  if (
    argv
    and not argv[-1].partition("=")[1]
    and argv[-1].lstrip("-") in {n for n, (f, _) in known.items() if f.kind is not bool}
  ):
    raise UserError(f"{argv[-1]} lacks its value: write {argv[-1]}=...")
  try:
    left = own([sys.argv[0], *argv])[1:]
  except flags.UnrecognizedFlagError as error:
    names = [f"--{name}" for name in (*more, *known)]
    near = nearest(f"--{error.flagname}", names)
    hint = f"did you mean {near}? " if near else ""
    raise UserError(f"unknown flag --{error.flagname}: {hint}allowed: {', '.join(names)}") from error
  except flags.Error as error:
    raise UserError(_one_line(error)) from error
  found = {}
  for name, (field, default) in known.items():
    said = getattr(own, name)
    if isinstance(said, str):
      said = field.parse(f"--{name}", said)
      field.check(f"--{name}", said)
    found[name] = default if said is None else said
  flags.FLAGS([sys.argv[0]])  # Marks absl's global flags as parsed; libraries read them.
  return found, left


def _workdir(said: str | None, buckets: bool) -> Path:
  """The absolute path of the work directory. Raises UserError if it is missing or not writable."""
  if said is None:
    raise UserError("--workdir is missing: give the folder that the run is written to")
  if not said:
    raise UserError("--workdir='': must be a folder, not empty")
  if not on_bucket(said):
    if re.match(r"\w+://", said):  # It would be a folder of this name here.
      raise UserError(f"--workdir={config_file.shown_path(said)}: must be a folder, or gs://BUCKET/FOLDER")
    return writable_folder("--workdir", said)
  if not re.match(r"gs://[^/]", said):
    raise UserError(f"--workdir={config_file.shown_path(said)}: names no bucket; give gs://BUCKET/FOLDER")
  if not buckets:
    raise UserError(
      f"--workdir={config_file.shown_path(said)}: this command writes to a folder of this machine; give one"
    )
  return writable_bucket("--workdir", said)


def writable_bucket(flag: str, said: str) -> Path:
  """The path in a bucket. Raises UserError if nothing can be written there."""
  trial = place(said) / f"trial.{own_name()}"
  try:  # The libraries of buckets raise errors of their own.
    trial.write_bytes(b"trial")
    trial.unlink()
  except Exception as error:
    how = "pip install -e '.[gcs]'" if isinstance(error, ImportError) else "give another place"
    why = " ".join(str(error).split())[:80] or type(error).__name__
    raise UserError(f"{flag}={config_file.shown_path(said)}: cannot be written ({why}); {how}") from error
  return place(said)


def writable_folder(flag: str, said: str | Path) -> Path:
  """The folder as an absolute path; it may not exist yet. Raises UserError if it cannot be written."""
  there = Path(os.path.abspath(said))
  if any(len(os.fsencode(part)) > 255 for part in there.parts):
    raise UserError(
      f"{flag}={config_file.shown_path(str(said))}: a name in it is longer than 255 bytes; give another place"
    )
  while not os.path.lexists(there) and there != there.parent:
    there = there.parent
  if not there.is_dir():
    raise UserError(
      f"{flag}={config_file.shown_path(str(said))}: {there.name!r} is there and is no folder; give another place"
    )
  try:  # A trial write: permission bits do not show a read-only file system, or what root may do.
    os.rmdir(tempfile.mkdtemp(dir=there))
  except OSError as error:
    raise UserError(
      f"{flag}={config_file.shown_path(str(said))}: {there} cannot be written ({error.strerror}); give another place"
    ) from error
  return Path(said).resolve()


def _help(c: ConfigDict | None, known: dict[str, tuple[Field, object]]) -> None:
  """Prints the command's module docstring, its flags, and the fields of the given config."""
  print((sys.modules["__main__"].__doc__ or "").strip(), end="\n\nFlags:\n")
  for name, (field, default) in known.items():
    print(f"  --{name:16} {field.help}" + ("" if default in (None, "") else f" Default: {default}."))
  if c is None:
    if "config" in known:
      print("\nWith --config=FILE too, --help lists the fields of that config: value, range, meaning.")
    return
  print("\nFields of the config, set by --config.NAME=VALUE:")
  unread = UNREAD.get(field_check.kind_of(c.to_dict()), ())
  for name, value, field in field_check.described(c):
    if name.split(".")[0] not in unread:
      print(f"  {name} = {fields.shown(value)}\n      {field.help} {field.allowed()[:1].upper()}{field.allowed()[1:]}.")
  if unread:
    print(
      f"\nNot listed: {', '.join(unread)}. This stage does not read them, but a new tokenizer is trained on the domains."
    )


def _one_line(error: BaseException) -> str:
  if isinstance(error, OSError) and error.strerror:
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
  return " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__


def _report(error: BaseException, code: int, debug: bool) -> None:
  """Prints the error and exits. In several processes, all exit with what the hub decides (`hosts.fail`)."""
  kind = "" if isinstance(error, (UserError, StageStopped, OSError)) else f"{type(error).__name__}: "
  line, rest = f"error: {kind}{_one_line(error)}", " ... (--debug: all of it)"
  if isinstance(error, (KeyboardInterrupt, Terminated)):
    line = _one_line(error)
  elif len(line) > LONGEST:
    line = line[: LONGEST - len(rest)] + rest
  if debug:
    traceback.print_exception(error)
  if ending := hosts.fail(line, code, user=isinstance(error, UserError)):
    end(dataclasses.replace(ending, line=line) if ending.cause == hosts.index() else ending)
  if not debug:
    print(line, file=sys.stderr)
  sys.exit(code)
