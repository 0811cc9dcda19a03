"""Before a run of several processes begins: all must have the same code, packages, config and flags."""

import glob
import importlib.metadata
import os
import platform
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemocascade.errors import UserError
from nemocascade.runtime.hosts import exchange
from nemocascade.runtime.workdir import difference, own_versions

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes", "sentencepiece")
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


def check(config: Mapping[str, Any] | None, flags: Mapping[str, Any]) -> None:
  """Compares the processes; all must call it.

  Args:
    config: the resolved config as JSON; None for a command without one.
    flags: flag -> value, as parsed.

  Raises:
    UserError: processes differ. The message, the same in all, names the first difference and the processes.
  """
  here = {
    "code": code(),
    "packages": packages(),
    "environment": {name: os.environ.get(name, "") for name in ENVIRONMENT},
    "flags": {name: str(value) for name, value in flags.items()},
    "config": config or {},
    "files of functions": own_versions(config or {}),
    "files of data": data(config or {}),
  }
  everywhere = exchange(here, "what the processes start with")
  for part in here:  # The code first: other differences can come from it.
    for there in everywhere:
      if found := difference(everywhere[0][part], there[part], part):
        name, first, other = found
        alike = [i for i, one in enumerate(everywhere) if difference(there[part], one[part], part) is None]
        raise UserError(
          f"processes differ in {name}: {_shown(first)} in process 0, {_shown(other)} in {_processes(alike)}"
        )


def data(fields: Any) -> dict[str, str]:
  """Value of the config that names files or folders here -> how many files they are, and of how many bytes."""
  if isinstance(fields, dict | list):
    values = fields.values() if isinstance(fields, dict) else fields
    return {word: size for value in values for word, size in data(value).items()}
  paths = [Path(path) for path in glob.glob(fields)] if isinstance(fields, str) else []
  files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
  return {fields: f"{len(files)} files of {sum(f.stat().st_size for f in files)} bytes"} if files else {}


def code() -> dict[str, str]:
  """Python file -> checksum, for this package and the folders beside it that its commands use."""
  files = [p for folder in ("nemocascade", "experiments", "configs") for p in sorted((ROOT / folder).rglob("*.py"))]
  return {str(p.relative_to(ROOT)): f"{zlib.crc32(p.read_bytes()):08x}" for p in files}


def packages() -> dict[str, str]:
  """Package -> version, for Python and the packages that several processes must share."""
  return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _shown(value: Any) -> str:
  return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def _processes(indices: list[int]) -> str:
  return f"process{'es' * (len(indices) > 1)} {', '.join(map(str, indices))}"
