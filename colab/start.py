"""The first cell of every notebook: finds the machine, installs this clone for it, and prints what computes.

  from colab.start import start
  start()

Nothing is installed where the installed packages fit. A package that this kernel has imported in another version than
is installed now (Colab's own NumPy or JAX) needs a new kernel: it is restarted, and the cell run again.
"""

import glob
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "nemocascade"
EXTRAS = {"TPU": "tpu", "GPU": "cuda", "CPU": ""}  # The extra that the package needs on each kind of device.


def start() -> None:
  """Makes this kernel ready for the notebook's other cells, or restarts it."""
  computes = accelerator()
  if missing := lacking(EXTRAS[computes]):
    print(f"{len(missing)} packages are missing or of other versions, such as {missing[0]}: a few minutes of pip ...")
    install(EXTRAS[computes])
  if old := outdated():
    print(f"The kernel restarts, because it has imported {', '.join(old)}. Run this cell again when it is back.")
    restart()
    return
  quiet(computes)
  import jax

  devices = jax.devices()
  where = "Colab" if on_colab() else platform.system()
  kind = devices[0].device_kind
  print(
    f"{where}, Python {platform.python_version()}, JAX {jax.__version__}, {os.cpu_count()} CPU cores;"
    f" computes on {len(devices)} x {kind if kind != 'cpu' else 'CPU'}"
  )


def on_colab() -> bool:
  return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def accelerator() -> str:
  """The best of TPU, GPU and CPU that this machine has; its devices are looked for without JAX."""
  if platform.system() != "Linux":  # JAX's wheels for other systems compute on CPUs.
    return "CPU"
  if "TPU_ACCELERATOR_TYPE" in os.environ or glob.glob("/dev/accel[0-9]*"):
    return "TPU"
  if shutil.which("nvidia-smi"):
    found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    if found.returncode == 0 and "GPU 0" in found.stdout:
      return "GPU"
  return "CPU"


def lacking(extra: str) -> list[str]:
  """The requirements of this package, with those of the extra, that what is installed does not meet."""
  try:
    from packaging.requirements import Requirement

    lines = importlib.metadata.requires(PACKAGE) or []
  except ImportError:  # PackageNotFoundError is one too.
    return [PACKAGE]
  found = []
  for requirement in map(Requirement, lines):
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}) or (extra and marker.evaluate({"extra": extra})):
      try:
        version = importlib.metadata.version(requirement.name)
      except importlib.metadata.PackageNotFoundError:
        version = None
      if version is None or not requirement.specifier.contains(version, prereleases=True):
        found.append(str(requirement).partition(";")[0].strip())
  return found


def install(extra: str) -> None:
  """Installs this clone with pip, whose output is shown only if it fails."""
  what = f"{ROOT}[{extra}]" if extra else str(ROOT)
  done = subprocess.run(
    [sys.executable, "-m", "pip", "install", "--quiet", "-e", what], capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(f"pip could not install {what}:\n{done.stderr[-2000:]}")
  importlib.invalidate_caches()


def outdated() -> list[str]:
  """Packages that this kernel has imported in another version than is installed: "numpy 1.26.4 and not 2.4.6"."""
  found = []
  for name in ("jax", "jaxlib", "numpy", "flax", "ml_dtypes", "matplotlib"):
    imported = getattr(sys.modules.get(name), "__version__", None)
    try:
      installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
    if imported not in (None, installed):
      found.append(f"{name} {imported} and not {installed}")
  return found


def restart() -> None:
  """Ends the kernel; the notebook's server starts a new one."""
  from IPython import get_ipython

  get_ipython().kernel.do_shutdown(True)


def quiet(computes: str) -> None:
  """Keeps out of the notebook what libraries say that its reader can do nothing about."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  if computes == "CPU":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  warnings.filterwarnings("ignore")
  logging.getLogger("jax").setLevel(logging.ERROR)
  logging.getLogger("absl").setLevel(logging.CRITICAL)
