"""Asserts the response to a bad request: one line on stderr and exit code 2."""

import subprocess


def assert_refused(done: subprocess.CompletedProcess, complaint: str) -> None:
  assert done.returncode == 2, done.stderr
  assert complaint in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
