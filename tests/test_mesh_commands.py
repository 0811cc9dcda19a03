"""generate, score, chat and evaluate over eight devices give what they give on one."""

import json

import numpy as np
import pytest
import tiny_checkpoint

from configs.recipe import generated
from configs.tiny import if_rl
from experiments import chat, evaluate, generate, score
from nemocascade.errors import UserError
from nemocascade.mesh import mesh_sizes

MESHES = ("data:2,expert:4", "data:8")
ROWS = [
  {"tokens": [5, 300, 41, 77, 600, 3]},
  {"messages": [{"role": "user", "content": "the cat sat on the mat"}]},
  {"tokens": list(range(20, 70))},
]
pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.make(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def command(checkpoint, tmp_path):
  def run(module, mesh, *settings):
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    module.run(checkpoint, str(given), str(out), *settings, mesh=mesh)
    return [json.loads(line) for line in out.read_text().splitlines()]

  return run


def assert_same(one, other):
  for a, b in zip(one, other, strict=True):
    assert a["tokens"] == b["tokens"]
    np.testing.assert_allclose([x or 0 for x in a["logprobs"]], [x or 0 for x in b["logprobs"]], atol=1e-5)


def test_score_is_that_of_one_device(command):
  one = command(score, "data:1")
  for mesh in MESHES:
    assert_same(one, command(score, mesh))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 0.9)])
def test_generate_is_that_of_one_device(command, temperature, top_p):
  settings = temperature, top_p, 8, 0, True
  one = command(generate, "data:1", *settings)
  for mesh in MESHES:
    assert_same(one, command(generate, mesh, *settings))


def test_a_conversation_has_one_row_and_works_on_every_mesh(checkpoint, monkeypatch, capsys):
  said = []
  for mesh in ("data:1", *MESHES):
    lines = iter(["the cat", "12 and 7"])

    def read(prompt, lines=lines):
      for line in lines:
        return line
      raise EOFError

    monkeypatch.setattr("builtins.input", read)
    chat.run(checkpoint, False, 0.0, 1.0, 6, 128, 0, "", "none", mesh)
    said.append(capsys.readouterr().out)
  assert said[0] == said[1] == said[2] and len(said[0]) > 60


def test_evaluate_takes_the_mesh_of_the_command(checkpoint, tmp_path):
  c = if_rl.get_config("smoke")
  c.domains, c.evaluation.long_domains = generated("math"), ("math",)
  c.evaluation.update(prompts=8, batch=8, long_batch=8, long_prompt_tokens=96, long_total_tokens=112)
  one, many = (
    evaluate.run(c, tmp_path / mesh.replace(":", ""), checkpoint, temperature=0.0, mesh=mesh)
    for mesh in ("", MESHES[0])
  )
  assert one == many and one["math"].prompts == 8


@pytest.mark.parametrize(
  "said, sizes",
  [("data:1,expert:8", (1, 8)), ("expert:8", (1, 8)), ("data:-1,expert:2", (-1, 2)), ("data:4", (4, 1))],
)
def test_the_axes_of_a_mesh_are_read(said, sizes):
  assert tuple(mesh_sizes(said).values()) == sizes


@pytest.mark.parametrize(
  "said, complaint",
  [
    ("8", "each axis once"), ("data", "each axis once"), ("data:x", "each axis once"), ("", "each axis once"),
    ("data:1,data:2", "each axis once"), ("dta:1", "did you mean 'data'"),
    ("data:3", "there are 8 devices"), ("expert:8", "experts"),
  ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_one_line(command, said, complaint):
  with pytest.raises(UserError, match=complaint) as error:
    command(score, said)
  assert "\n" not in str(error.value)
