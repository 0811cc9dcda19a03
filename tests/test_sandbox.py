"""The sandbox: every program gets a verdict in time, and reaches nothing outside."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import time
import zlib

import pytest

from nemocascade.errors import UserError
from nemocascade.sandbox import confinement, launcher, worker
from nemocascade.sandbox.program import Call, Program
from nemocascade.sandbox.sandbox import Sandbox

CPU_S, WALL_S = 1, 2.5
REPOSITORY = pathlib.Path(__file__).parents[1]


def script(source, stdin=""):
  return Program({"main.py": source}, stdin=stdin)


@pytest.fixture(scope="module")
def box():
  return Sandbox(cpu_s=CPU_S, wall_s=WALL_S, output_kb=64)


HOSTILE = {  # Name -> (program, allowed statuses).
  "infinite loop": ("while True: pass", {"timeout"}),
  "sleep": ("import time; time.sleep(60)", {"timeout"}),
  "closes its streams and sleeps": (
    "import os, time\nfor fd in range(64):\n  try: os.close(fd)\n  except OSError: pass\ntime.sleep(60)",
    {"timeout"},
  ),
  "ignores the CPU limit": (
    "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    {"killed", "timeout"},
  ),
  "fork bomb": ("import os\nwhile True: os.fork()", {"error"}),
  "thread bomb": (
    "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
    {"error", "timeout"},
  ),
  "memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 20))", {"error"}),
  "one huge string": ("'x' * 10**12", {"error"}),
  "stdout flood": ("while True: print('x' * 1000)", {"killed"}),
  "stderr flood": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"killed"}),
  "control flood": ("import os\nwhile True: os.write(3, b'{' * 1000)", {"killed"}),
  "huge file": ("f = open('f', 'wb')\nwhile True: f.write(b'x' * 10**6)", {"error"}),
  "many files": (
    "for i in range(10**5): open(f'f{i}', 'wb').write(b'x' * 10**6)",
    {"error"},
  ),
  "deep recursion": ("def f(): f()\nf()", {"error"}),
  "deep recursion in C": (
    "import sys; sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    {"killed", "error", "timeout"},
  ),
  "deep nesting of source": ("(" * 10**5, {"error", "killed"}),
  "reads the shadow file": ("open('/etc/shadow')", {"error"}),
  "reads the users": ("open('/etc/passwd')", {"error"}),
  "reads processes": ("open('/proc/1/environ')", {"error"}),
  "reads the repository": (f"open({str(REPOSITORY / 'setup.py')!r})", {"error"}),
  "reads this test": (f"open({str(pathlib.Path(__file__).resolve())!r})", {"error"}),
  "reads home": (f"open({str(pathlib.Path.home() / '.bashrc')!r})", {"error"}),
  "imports an installed package": ("import numpy", {"error"}),
  "opens a socket": ("import socket; socket.socket()", {"error"}),
  "opens a local socket": (
    "import socket; socket.socket(socket.AF_UNIX).connect('\\0x')",
    {"error"},
  ),
  "writes to the system": ("open('/usr/lib/x', 'w')", {"error"}),
  "writes to the interpreter": ("import os; open(os.__file__, 'a')", {"error"}),
  "writes to the root": ("open('/x', 'w')", {"error"}),
  "kills its parent": ("import os; os.kill(os.getppid(), 9)", {"error"}),
  "kills everyone": ("import os; os.kill(-1, 9)", {"error"}),
  "limits its parent": (
    "import resource\nfor pid in range(1, 99): resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0))",
    {"error"},
  ),
  "raises its limits": (
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    {"error"},
  ),
  "leaves a daemon": ("import os\nif not os.fork(): os.setsid()", {"error"}),
  "leaves its session": ("import os; os.setsid()", {"error"}),
  "runs a program": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])", {"error"}),
  "becomes a program": ("import os, sys; os.execv(sys.executable, ['python'])", {"error"}),
  "makes a namespace": (
    "import ctypes\nif ctypes.CDLL(None, use_errno=True).unshare(0x10000000):\n  raise OSError(ctypes.get_errno(), '')",
    {"error"},
  ),
  "crashes": ("import ctypes; ctypes.string_at(0)", {"killed"}),
  "aborts": ("import os; os.abort()", {"killed"}),
  "exits": ("raise SystemExit(3)", {"failed"}),
  "exits at once": ("import os; os._exit(137)", {"failed"}),
  "empties its folder": ("import os; os.unlink('main.py')", {"passed"}),
  "bars its folder": ("import os; os.mkdir('d'); os.chmod('d', 0); os.chmod('.', 0)", {"passed"}),
  "deep folders": (
    "import os\nfor _ in range(2000): os.mkdir('d'); os.chdir('d')",
    {"passed", "error"},
  ),
  "binary output": ("import sys; sys.stdout.buffer.write(bytes(range(256)))", {"passed"}),
  "no text": ("\0", {"error"}),
  "half a surrogate": ("'\ud800'", {"error"}),
  "no python": ("def", {"error"}),
  "nothing": ("", {"passed"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_program_gets_a_verdict_in_time_and_the_next_one_is_well(box, name):
  source, allowed = HOSTILE[name]
  start = time.monotonic()
  result = box.run(script(source))
  assert result.status in allowed, result
  assert time.monotonic() - start < WALL_S + 2
  assert len(result.stdout) <= 64 << 10
  fresh = str(time.monotonic_ns())  # A new program, which no cached result can answer.
  assert box.run(script(f"print({fresh})")).stdout == f"{fresh}\n"


def test_nothing_of_the_host_is_to_be_seen(box):
  seen = box.run(script("import os; print(*os.listdir('/'), *os.environ, os.getuid())")).stdout
  assert "etc" not in seen.split() and "proc" not in seen.split()
  assert seen.split()[-1] == confinement.NOBODY
  assert not {"PATH", "USER", "PYTHONPATH"} & set(seen.split())


def test_no_program_sees_what_another_left(box):
  for i in range(6):  # Two workers, so that each serves several programs.
    result = box.run(script(f"import os; print(os.listdir('.')); open('left{i}', 'w')"))
    assert result.stdout == "['main.py']\n"


def test_a_program_outlives_neither_its_run_nor_its_sandbox(tmp_path):
  box = Sandbox(workers=1, cpu_s=CPU_S, wall_s=0.5)
  assert box.run(script("import time; time.sleep(77)")).status == "timeout"
  box.run(script("print(1)"))
  (worker,) = [w for w in box._workers if not w.ended()]
  box.close()
  assert worker.ended()


def test_a_sandbox_dies_with_its_owner():
  source = (
    "import os\nfrom nemocascade.sandbox.sandbox import Program, Sandbox\n"
    "box = Sandbox(workers=1); box.run(Program({'main.py': ''}))\n"
    "print(box._workers[0]._process.pid, flush=True); os._exit(0)"
  )
  environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
  run = subprocess.run([sys.executable, "-c", source], capture_output=True, env=environment)
  deadline = time.monotonic() + 5
  while time.monotonic() < deadline and _runs(int(run.stdout)):
    time.sleep(0.02)
  assert not _runs(int(run.stdout))


def _runs(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_what_an_honest_program_needs_is_there(box):
  source = """
import bisect, collections, decimal, fractions, functools, heapq, itertools, json, math, re, sys
import threading
def main():
  print(sys.stdin.readline().strip(), sys.argv[1:], input())
thread = threading.Thread(target=main)
thread.start()
thread.join()
open("note", "w").write("x")
exit()
"""
  program = Program({"a/main.py": source}, argv=("a/main.py", "é"), stdin="one é\ntwo\n")
  result = box.run(program)
  assert (result.status, result.stdout) == ("passed", "one é ['é'] two\n"), result


def test_modules_of_the_library_that_are_here_are_there(box):
  names = ("asyncio", "bz2", "ctypes", "hashlib", "lzma", "multiprocessing.dummy", "sqlite3", "uuid", "zlib")
  here = [name for name in names if importlib.util.find_spec(name)]
  result = box.run(script(f"import {', '.join(here)}\nprint(zlib.crc32(b'x'))"))
  assert (result.status, result.stdout) == ("passed", f"{zlib.crc32(b'x')}\n"), result


def test_threads_event_loops_and_copies_of_files_work(box):
  source = """
import asyncio, concurrent.futures, os, shutil, sqlite3, tempfile
async def main():
  return await asyncio.to_thread(sum, [1, 2]), await asyncio.gather(asyncio.sleep(0, 3))
print(asyncio.run(main()), asyncio.run(main()))
with concurrent.futures.ThreadPoolExecutor(8) as pool:
  print(sum(pool.map(abs, range(-9, 0))))
with tempfile.TemporaryDirectory() as folder:
  shutil.copy2("main.py", folder)
  shutil.copytree(folder, "copy")
  os.replace("copy/main.py", "copy/other")
print(os.listdir("copy"), sqlite3.connect(":memory:").execute("select 1 + 1").fetchone())
"""
  result = box.run(script(source))
  assert result.stdout == "(3, [3]) (3, [3])\n45\n['other'] (2,)\n", result


@pytest.mark.parametrize(
  "source",
  [
    "import threading, time\nthreading.Thread(target=lambda: time.sleep(0.05) or print('late')).start()",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start(); print(1)",
    "import atexit; atexit.register(print, 'end'); print('begin')",
    "class C:\n  def __del__(self): print('gone')\nc = C(); c.me = c\nd = C()",
    "import sys; sys.stdout.write('no newline')",
    "import io, sys; out = io.TextIOWrapper(sys.stdout.buffer, write_through=False); out.write('held back')",
    "import io, sys; print('kept'); sys.stdout = io.StringIO(); print('lost')",
    "import sys; print('x'); sys.stdout.close()",
    "import sys; print('x'); sys.stdout = None",
    "import os; print('x'); os.close(1)",
    "exit()", "import sys; sys.exit(3)", "raise SystemExit('why')", "raise SystemExit(True)",
    "raise SystemExit(256)", "raise SystemExit(-1)", "raise SystemExit([])", "1 / 0",
    "import atexit; atexit.register(lambda: 1 / 0); print(1)", "from concurrent.futures import ThreadPoolExecutor as T\nT(2).submit(print, 'pooled')",
  ],
)  # fmt: skip
def test_a_program_ends_as_python_ends(box, tmp_path, source):
  file = tmp_path / "main.py"
  file.write_text(source)
  plain = subprocess.run([worker.EXECUTABLE, "main.py"], cwd=tmp_path, capture_output=True, text=True, env={})
  result = box.run(script(source))
  code = 0 if result.status == "passed" else 1 if result.status == "error" else int(result.reason.split()[-1])
  assert (result.stdout, code) == (plain.stdout, plain.returncode), result


def test_modules_of_a_program_import_each_other(box):
  files = {
    "main.py": "from a.b import f; import c; print(f(c.x))",
    "a/b.py": "f = str",
    "c.py": "x = 1",
  }
  assert box.run(Program(files)).stdout == "1\n"


def test_calls_return_plain_values_and_name_their_errors(box):
  source = """
import sys
def f(x): return [x, (1.5, True, None), {"k": "é\\ud800\\n"}]
def quits(): sys.exit(0)
def odd(): return object()
def deep(x=()): return deep((x,))
class N(int):
  __repr__ = __str__ = lambda self: "2"
  __eq__ = lambda self, other: True
def n(): return N(1)
class Solution:
  def g(self, x): return x + 1
"""
  names = [("f", (3,)), ("quits", ()), ("odd", ()), ("deep", ()), ("n", ()), ("none", ())]
  calls = tuple(Call("m", name, arguments) for name, arguments in names)
  result = box.run(Program({"m.py": source}, calls=calls))
  first, *others = result.returns
  assert first == {"value": [3, [1.5, True, None], {"k": "é\ud800\n"}]}
  wrong = [{"error": n} for n in ("SystemExit", "TypeError", "RecursionError")]
  assert others == [*wrong, {"value": 1}, {"error": "AttributeError"}]
  (only,) = box.run(Program({"s.py": "class Solution:\n  def g(self, x): return x + 1"},
                            calls=(Call("s", "g", (1,)),))).returns  # fmt: skip
  assert only == {"value": 2}


@pytest.mark.parametrize(
  "source",
  ["import os; os._exit(0)", "raise SystemExit(0)", "print('PASS')", "while True: pass", "def f(:",
   "import os; os.write(3, b'[1]\\n1\\nnull\\n{\\n'); os._exit(0)", "import sys; sys.modules.clear()"],
)  # fmt: skip
def test_a_program_that_never_returns_has_no_values(box, source):
  result = box.run(Program({"m.py": source}, calls=(Call("m", "f", ()),) * 2))
  assert not any("value" in told for told in result.returns)


def test_programs_run_in_order_and_equal_ones_once(monkeypatch):
  box = Sandbox(workers=2)
  runs = []
  run = box._run
  monkeypatch.setattr(box, "_run", lambda program: runs.append(program) or run(program))
  programs = [script(f"print({i % 3})") for i in range(12)]
  assert [r.stdout for r in box.run_batch(programs)] == [f"{i % 3}\n" for i in range(12)]
  assert len(runs) == 3
  box.run_batch(programs)
  assert len(runs) == 3  # Taken from the cache.
  assert box.run_batch([]) == []


def test_batches_of_several_threads_share_the_run_of_equal_programs():
  box, program = Sandbox(), script("import os; print(os.urandom(8))")
  with box._lock:  # No run ends in this block, because a run takes the lock at its end.
    first, second = (box._ask(program.digest(), program) for _ in range(2))
  assert first.result(60).stdout == second.result(60).stdout
  assert not box._running


def test_what_may_depend_on_the_load_is_not_remembered(monkeypatch):
  box = Sandbox(workers=1, wall_s=0.2)
  for _ in range(2):
    assert box.run(script("import time; time.sleep(5)")).status == "timeout"
  assert not [r for r in box._remembered.values() if r.status == "timeout"]


def test_programs_of_a_batch_run_side_by_side():
  box = Sandbox(workers=4)
  box.run_batch([script(f"print({i})") for i in range(4)])
  start = time.monotonic()
  box.run_batch([script(f"import time; time.sleep(0.5); print({i})") for i in range(4)])
  assert time.monotonic() - start < 1.6


def test_a_result_of_equal_programs_is_equal_in_every_process(box):
  source = "print(hash('a'), list({'x', 'y', 'z'}))"
  assert box.run(script(source)).stdout == Sandbox().run(script(source)).stdout


def test_a_broken_sandbox_says_nothing_of_the_program(box, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError("no room")

  monkeypatch.setattr(worker.Worker, "run", fail)
  result = box.run(script("print('fresh')"))
  assert (result.status, result.reason) == ("unstarted", "no room")


def test_long_outputs_are_not_remembered(box):
  assert len(box.run(script("print('x' * 20_000)")).stdout) == 20_001
  assert max(len(result.stdout) for result in box._remembered.values()) < 20_000


@pytest.mark.parametrize("field", ["workers", "cpu_s", "wall_s", "memory_mb"])
def test_limits_of_nothing_are_refused(field):
  with pytest.raises(UserError, match=f"sandbox.{field}=0 must be above 0"):
    Sandbox(**{field: 0})


def test_misspelt_settings_are_answered_with_the_nearest():
  with pytest.raises(UserError, match="did you mean 'wall_s'"):
    Sandbox(wal_s=1)


@pytest.mark.parametrize("path", ["", "/x", "../x", "a/../x", "a//b", "./x", "x/", "."])
def test_files_stay_in_the_programs_folder(path):
  with pytest.raises(ValueError):
    Program({path: ""})


def test_the_launchers_json_is_json():
  import json
  from json.encoder import encode_basestring_ascii as quote

  for value in (None, True, 0, -3, 1.5, 1e300, 'a\n"é\ud800', [1, (2, [])], {"a": {"b": []}}):
    assert json.loads(launcher.encode(value, quote)) == json.loads(json.dumps(value))
  assert json.loads(launcher.encode(float("-inf"), quote)) == float("-inf")
  with pytest.raises(TypeError):
    launcher.encode({1, 2}, quote)


@pytest.mark.parametrize("depth", [700, 1500, 3000])
def test_arguments_nested_too_deep_start_nothing_and_raise_nothing(box, depth):
  nested = []
  for _ in range(depth):
    nested = [nested]
  deep = Program({"m.py": "def f(x): return 1"}, calls=(Call("m", "f", (nested,)),))
  results = box.run_batch([deep, script("print(5)")])
  assert [result.status for result in results] == ["unstarted", "passed"]
