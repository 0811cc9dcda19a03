"""Runs a script in connected processes of a few CPU devices each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# The script has `index` (its process number) and `arguments`, and can import test modules.
BEGIN = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
address, processes, index, devices, here, *arguments = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
from nemocascade.runtime import hosts
hosts.join(f"{address},{processes},{index}")
assert jax.process_count() == int(processes) and jax.local_device_count() == int(devices)
sys.path.append(here)
"""
END = """
hosts.leave()
"""


def assert_all_say(said: str, script: str, *arguments: str, processes: int = 2, devices: int = 4) -> None:
  """Asserts that all processes succeed and that their output ends with `said`."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
  places = [[address, str(processes), str(i), str(devices), str(HERE)] for i in range(processes)]
  started = [
    subprocess.Popen(
      [sys.executable, "-c", BEGIN + script + END, *place, *arguments],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )
    for place in places
  ]  # fmt: skip
  try:
    ended = [process.communicate(timeout=300) for process in started]
    errors = "\n".join(error[-2000:] for _, error in ended)
    for process, (out, _) in zip(started, ended):
      assert process.returncode == 0, errors
      assert out.strip().endswith(said)
  finally:
    for process in started:
      process.kill()


def assert_both_say(said: str, script: str, *arguments: str) -> None:
  """Asserts that two processes of four devices each succeed and that their output ends with `said`."""
  assert_all_say(said, script, *arguments)
