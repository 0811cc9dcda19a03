"""Graders for the tests of `limited`: they answer, hang, exit, raise, or misbehave."""

import os
import sys
import time

prepared = []


def prepare():
  prepared.append(True)


def echo(value):
  return [value, len(prepared)]


def spin():
  while True:
    pass


def wait(seconds):
  time.sleep(seconds)
  return "late"


def die(status):
  os._exit(status)


def fail(text):
  raise ValueError(text)


def hoard():
  return len(bytes(1 << 40))


def shout(text):
  """Writes the text to every standard stream of the process, then answers."""
  print(text, flush=True)
  print(text, file=sys.stderr, flush=True)
  for fd in (0, 1, 2):
    try:
      os.write(fd, text.encode())
    except OSError:
      pass
  return "own answer"


def connect():
  import socket

  with socket.create_connection(("127.0.0.1", 1), timeout=1):
    return "connected"


def start_process():
  import subprocess

  subprocess.run(["/bin/true"], check=True)
  return "started"


def write(path):
  with open(path, "w") as file:
    file.write("x")
  return "written"


def read(path):
  with open(path) as file:
    return file.read(10)


def pid():
  return os.getpid()


def unserializable():
  return {1, 2}


def evaluate(text):
  """A library that evaluates text and catches the resulting error."""
  try:
    return eval(text)
  except RuntimeError:
    return "caught"
