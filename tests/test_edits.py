"""SEARCH/REPLACE edits: how they are parsed, and how they change whole lines of a file."""

import pytest

from nemocascade.verifiers.edits import Edit, EditError, UnknownFile, apply, parse, show

FILE = "import os\n\ndef f(x):\n  return x\n\ndef g(x):\n  return x + 1\n"
EDIT = Edit("a/b.py", "def f(x):\n  return x", "def f(x):\n  return -x")


def test_what_is_shown_is_parsed():
  second = Edit("c.py", "x = 1", "")
  text = f"First this:\n{show(EDIT)}\nthen that:\n{show(second, 'python')}\nThat is all."
  empty = Edit("c.py", "x = 1", "")
  assert parse(text) == [EDIT, empty]


def test_a_path_may_be_marked_and_a_fence_may_hold_several_edits():
  text = show(EDIT).replace("a/b.py", "### a/b.py").replace("```diff", "```python")
  assert parse(text) == [EDIT]
  body = show(EDIT).split("\n")[1:-1]
  assert parse("\n".join(["```diff", *body, "", *body, "```"])) == [EDIT, EDIT]


def test_fences_within_an_edit_are_its_text():
  edit = Edit("README.md", "```\ncode\n```", "```python\ncode\n```")
  assert parse(show(edit)) == [edit]


MALFORMED = {
  "nothing": "",
  "no edit": "```diff\nnothing\n```",
  "no fence": show(EDIT).replace("```diff\n", "").replace("\n```", ""),
  "an open fence": show(EDIT).removesuffix("\n```"),
  "no path": show(EDIT).replace("a/b.py\n", ""),
  "no path for the second": show(EDIT).removesuffix("```") + show(EDIT)[len("```diff\na/b.py\n") :],
  "no divider": show(EDIT).replace("=======\n", ""),
  "no end": show(EDIT).replace(">>>>>>> REPLACE\n", ""),
  "no start": show(EDIT).replace("<<<<<<< SEARCH\n", ""),
  "two dividers": show(EDIT).replace("=======", "=======\nx\n======="),
  "markers only": "```diff\n>>>>>>> REPLACE\n=======\n<<<<<<< SEARCH\n```",
  "cut off": show(EDIT)[:40],
  "a unified diff": "```diff\n--- a/b.py\n+++ a/b.py\n@@ -1 +1 @@\n-x\n+y\n```",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_has_a_reason(name):
  with pytest.raises(EditError) as error:
    parse(MALFORMED[name])
  assert str(error.value)


def test_an_edit_replaces_its_lines_and_nothing_else():
  assert apply({"a/b.py": FILE}, [EDIT]) == {"a/b.py": FILE.replace("return x\n", "return -x\n")}
  removed = apply({"a/b.py": FILE}, [Edit("a/b.py", "import os\n", "")])
  assert removed == {"a/b.py": FILE.removeprefix("import os\n\n")}
  at_the_end = apply({"a": "x\ny"}, [Edit("a", "y", "z")])
  assert at_the_end == {"a": "x\nz"}


def test_edits_apply_in_order_and_the_given_files_stay():
  files = {"a": "x\n", "b": "y\n"}
  assert apply(files, [Edit("a", "x", "y"), Edit("a", "y", "z")]) == {"a": "z\n", "b": "y\n"}
  assert files == {"a": "x\n", "b": "y\n"}


@pytest.mark.parametrize(
  ("edit", "reason"),
  [
    (Edit("a/b.py", "return x", "return y"), "not there"),  # The line is indented in the file.
    (Edit("a/b.py", "  return", "  pass"), "not there"),  # Not a whole line.
    (Edit("a/b.py", "def f(x): ", "def f(x):"), "not there"),
    (Edit("a/b.py", "", "x"), "nothing to search"),
    (Edit("a/b.py", "\n", "x"), "nothing to search"),
    (Edit("a/b.py", "import os", "import os"), "change nothing"),
    (Edit("two", "x", "y"), "more than once"),
  ],
)
def test_what_does_not_apply_has_a_reason(edit, reason):
  with pytest.raises(EditError, match=reason):
    apply({"a/b.py": FILE, "two": "x\nx\n"}, [edit])


def test_a_file_that_is_not_there_is_told_apart():
  with pytest.raises(UnknownFile):
    apply({"a": "x"}, [Edit("b", "x", "y")])


@pytest.mark.parametrize(
  "text",
  ["```diff\n" * 50_000, "```diff\na\n<<<<<<< SEARCH\n" * 50_000, "<<<<<<< SEARCH\n" * 50_000,
   "=======\n" * 50_000, "\n" * 300_000, "```diff\na\n<<<<<<< SEARCH\n" + "x\n" * 100_000, "\0\ud800"],
)  # fmt: skip
def test_hostile_text_is_refused_in_one_pass(text):
  class Lines(list):
    def __iter__(self):
      for line in super().__iter__():
        read.append(line)
        yield line

  class Text(str):
    def split(self, *how):
      return Lines(super().split(*how))

  read: list[str] = []
  with pytest.raises(EditError):
    parse(Text(text))
  assert 0 < len(read) <= text.count("\n") + 1  # Each line is read once at most.
