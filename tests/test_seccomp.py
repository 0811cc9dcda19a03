"""The filter of system calls decides as its list says, on both machines."""

import struct

import pytest

from nemocascade.sandbox import seccomp

CALLS = {  # Name -> (number on x86-64, number on arm64, arguments, "allowed" or the errno).
  "read": (0, 63, (), "allowed"),
  "getrandom": (318, 278, (), "allowed"),
  "thread": (56, 220, (0x3D0F00,), "allowed"),
  "fork": (56, 220, (17,), 1),
  "thread in a namespace": (56, 220, (0x3D0F00 | 0x20000000,), 1),
  "clone3": (435, 435, (), 38),
  "execve": (59, 221, (), 1),
  "ptrace": (101, 117, (), 1),
  "setxattr": (188, 5, (), 1),
  "a call of later years": (999, 999, (), 38),
  "the highest number": (0x3FFFFFFF, 0x3FFFFFFF, (), 38),
  "another architecture's number": (0x40000000, 0x40000000, (), 1),
  "dup": (72, 25, (5, 0), "allowed"),
  "lock": (72, 25, (5, 6), 1),
  "signal at input": (72, 25, (5, 10), 1),
  "dup with a high half": (72, 25, (5, 1 << 32), "allowed"),  # The kernel reads only the lower half.
  "isatty": (16, 29, (1, 0x5401), "allowed"),
  "typing for the terminal": (16, 29, (1, 0x5412), 25),
  "own limits": (302, 261, (0,), "allowed"),
  "limits of another": (302, 261, (1,), 1),
  "free memory": (28, 233, (0, 0, 4), "allowed"),
  "drop cached memory": (28, 233, (0, 0, 21), 1),
  "pair": (53, 199, (1,), "allowed"),
  "pair of another family": (53, 199, (30,), 1),
}


@pytest.mark.parametrize("column, machine, audit", [(0, "x86_64", 0xC000003E), (1, "aarch64", 0xC00000B7)])
def test_the_filter_decides(column, machine, audit):
  for name, (*numbers, arguments, right) in CALLS.items():
    assert decision(machine, audit, numbers[column], arguments) == right, name
  assert decision(machine, audit ^ 1, 0, ()) == "killed"
  assert seccomp.filter_program("pdp11") is None


def decision(machine, audit, number, arguments):
  """The filter's decision on a system call, by interpreting its BPF instructions."""
  code = list(struct.iter_unpack("=HBBI", seccomp.filter_program(machine)))
  record = struct.pack("=IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
  place, value = 0, None
  while True:
    kind, yes, no, operand = code[place]
    place += 1
    if kind == 0x20:
      (value,) = struct.unpack_from("=I", record, operand)
    elif kind == 0x05:
      place += operand
    elif kind == 0x15:
      place += yes if value == operand else no
    elif kind == 0x35:
      place += yes if value >= operand else no
    else:
      assert kind == 0x06
      outcome = {0x7FFF: "allowed", 0x8000: "killed", 0x0005: operand & 0xFFFF}
      return outcome[operand >> 16]
