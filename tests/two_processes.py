"""Runs a script in two connected processes of four CPU devices each."""

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
jax.config.update("jax_num_cpu_devices", 4)
address, index, here, *arguments = sys.argv[1:]
from nemocascade.runtime import hosts
hosts.join(f"{address},2,{index}")
assert jax.device_count() == 8 and jax.local_device_count() == 4
sys.path.append(here)
"""
END = """
hosts.leave()
"""


def assert_both_say(said: str, script: str, *arguments: str) -> None:
  """Asserts that both processes succeed and that their output ends with `said`."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", BEGIN + script + END, address, str(i), str(HERE), *arguments],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    ended = [process.communicate(timeout=240) for process in processes]
    errors = "\n".join(error[-2000:] for _, error in ended)
    for process, (out, _) in zip(processes, ended):
      assert process.returncode == 0, errors
      assert out.strip().endswith(said)
  finally:
    for process in processes:
      process.kill()
