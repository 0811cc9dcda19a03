"""A field that configs share is written once: in configs/recipe.py, or in the base of its scale."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import recipe
from configs.nano_30b import rl as nano
from configs.tiny import cascade
from configs.tiny import rl as tiny
from nemocascade import field_table
from nemocascade.errors import UserError
from nemocascade.runtime import checks, config_file
from nemocascade.runtime.objective import SLOTS

CONFIGS = Path(__file__).parent.parent / "configs"
FIELDS = {name for table in field_table.WHOLE.values() for name in table}
LAST = {name.split(".")[-1] for name in FIELDS}
FUNCTIONS = {name for functions in SLOTS.values() for name in functions}  # The sections of `options`.
SECTIONS = {name.split(".")[-2] for name in FIELDS if "." in name} | FUNCTIONS
# Lengths, sizes and rates that are chosen for each run. Two runs may have the same number by chance. A switch
# has two values, so it is left aside too.
CHOSEN = {
  "steps", "save_every", "samples", "amount", "seeds", "prompts", "completions", "rows", "pieces", "pairs", "heldout_pairs",
  "prompt_tokens", "total_tokens", "long_prompt_tokens", "long_total_tokens", "row_tokens", "batch", "long_batch", "at", "full_at",
  "samples_every", "peak_lr", "warmup_steps", "rates", "mixture", "init_from", "num_key_value_heads",
}  # fmt: skip

Written = tuple[str | None, str, str]  # (section, or None if the source does not show it; field; value)


def written(tree: ast.AST) -> Iterator[Written]:
  """The fields to which a config's source gives a literal value.

  They are assigned (`c.rollout.prompts = 8`), or are keywords of a call (`c.rollout.update(prompts=8)`,
  `c.rollout = dict(prompts=8)`, a row of a table).
  """
  seen = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Assign):
      for target in node.targets:
        pairs = zip(target.elts, node.value.elts) if _both_tuples(target, node.value) else [(target, node.value)]
        for one, value in pairs:
          path = _path(one)
          yield from _literal(path[-2:-1], path[-1:], value)
          if path and isinstance(value, ast.Call):
            seen.add(value)
            yield from _keywords(path[-1:], value)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
      seen.add(node)
      yield from _keywords(_path(node.func.value)[-1:], node)
    elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Call):
      seen.add(node.value)
      yield from _keywords([node.arg] if node.arg in SECTIONS else None, node.value)
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and node not in seen:
      yield from _keywords(None, node)


def _both_tuples(target: ast.AST, value: ast.AST) -> bool:
  return isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)


def _path(node: ast.AST) -> list[str]:
  """["rollout", "prompts"] of the expression c.rollout.prompts."""
  return [*_path(node.value), node.attr] if isinstance(node, ast.Attribute) else []


def _keywords(section: list[str] | None, call: ast.Call) -> Iterator[Written]:
  for keyword in call.keywords:
    yield from _literal(section, [keyword.arg], keyword.value)


def _literal(section: list[str] | None, name: list[str], value: ast.AST) -> Iterator[Written]:
  if not name or name[0] not in LAST - CHOSEN:
    return
  try:
    found = ast.literal_eval(value)
  except ValueError:
    return
  if isinstance(found, bool):
    return
  inside = None if section is None else section[0] if section and section[0] in SECTIONS else ""
  yield inside, name[0], repr(found)


def twice(files: dict[str, str]) -> list[str]:
  """A line "field=value: FILE, FILE" for each field that two of the sources (name -> text) give the same value."""
  found = [(file, *one) for file, source in files.items() for one in set(written(ast.parse(source)))]
  return sorted(
    {
      f"{field}={value}: {file}, {other}"
      for file, section, field, value in found
      for other, its_section, its_field, its_value in found
      if file < other and (field, value) == (its_field, its_value)
      if section == its_section or None in (section, its_section)
    }
  )


def test_no_field_is_written_in_two_configs_with_the_same_value():
  files = {str(path.relative_to(CONFIGS)): path.read_text() for path in CONFIGS.rglob("*.py")}
  assert len(files) > 20
  assert twice(files) == []


@pytest.mark.parametrize(
  "sources",
  [
    ('c.optimizer.b1 = 0.9', 'c.optimizer = dict(b1=0.9, b2=0.95)'),
    ('c.optimizer.update(b1=0.9)', 'STAGES = dict(rlhf=dict(b1=0.9))'),
    ('c.overlong, c.kl = "filter", "k1"', 'c.update(overlong="filter")'),
  ],
)  # fmt: skip
def test_it_is_found_in_every_way_to_write_it(sources):
  assert len(twice(dict(zip("ab", sources, strict=True)))) == 1
  assert not twice({"a": sources[0], "b": "c.evaluation.greedy = c.optimizer.eps"})


@pytest.mark.parametrize("stage", recipe.STAGES)
def test_what_two_scales_of_a_stage_have_in_common_is_the_recipe(stage):
  """Except numbers of CHOSEN, a value that both scales have is that of configs/recipe.py."""
  of = lambda c: {
    (section, name): value
    for section, fields in {"": c, **{s: c[s] for s in ("rollout", "packing", "optimizer", "router_balance")}}.items()
    for name, value in fields.to_dict().items()
    if not isinstance(value, dict) and name not in CHOSEN
  }
  ours, small, large = of(recipe.rl(stage)), of(tiny.fields(stage)), of(nano.stage(stage, ""))
  for name in small.keys() & large.keys():
    assert small[name] != large[name] or ours.get(name) == small[name], name


@pytest.mark.parametrize("name", sorted(recipe.STAGES))
def test_lengths_and_rows_of_a_stage_on_its_own_follow_the_length_of_its_prompts(name):
  c = importlib.import_module(f"configs.tiny.{name}").get_config().lock()
  before = c.rollout.total_tokens
  assert c.packing.row_tokens == before and c.packing.rows == c.rollout.prompts * c.rollout.completions
  longer = ("rollout.prompt_tokens", str(3 * c.rollout.prompt_tokens))
  config_file.change(c, [longer, ("rollout.prompts", "5"), ("packing.pieces", "16")])
  assert c.rollout.total_tokens == c.packing.row_tokens == 3 * before
  assert 0 <= c.packing.rows - 5 * c.rollout.completions < 16 and c.packing.rows % 16 == 0
  c.init_from, c.judge, c.teachers = "CKPT", "CKPT", dict.fromkeys(c.mixture, "CKPT")
  checks.check_rl(c)
  config_file.change(c, [("packing.row_tokens", "9"), ("packing.rows", "9"), ("rollout.total_tokens", "7")])
  assert (c.packing.row_tokens, c.packing.rows, c.rollout.total_tokens, c.rollout.prompts) == (9, 9, 7, 5)
  with pytest.raises(UserError):
    checks.check_rl(c)


def test_the_stages_of_a_cascade_share_one_shape_of_rows():
  c = cascade.get_config()
  shapes = {(s.packing.rows, s.packing.row_tokens) for s in c.stages.values() if s.kind == "rl"}
  assert shapes == {(128, 272)}
