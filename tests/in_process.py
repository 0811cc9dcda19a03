"""Runs a command of experiments/ in this process, because a new process imports for seconds."""

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nemocascade import host_memory

ROOT = Path(__file__).parent.parent


def run_command(name: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
  """What `python -m experiments.NAME FLAGS` in the folder `cwd` prints, and its exit code."""
  module, out, err = f"experiments.{name}", io.StringIO(), io.StringIO()
  with (
    pytest.MonkeyPatch.context() as patch,
    pytest.raises(SystemExit) as ended,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    patch.chdir(cwd)
    patch.setattr(host_memory, "keep", lambda: None)
    patch.setattr(sys, "argv", [module, *flags])
    for imported in (module, f"{module}.__main__"):  # runpy warns of a module that is imported already.
      patch.delitem(sys.modules, imported, raising=False)
    runpy.run_module(module, run_name="__main__")
  return subprocess.CompletedProcess([module, *flags], ended.value.code, out.getvalue(), err.getvalue())
