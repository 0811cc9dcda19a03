"""Tests of episodes: the collected tokens equal what the template renders, over several turns."""

import dataclasses
import functools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from nemocascade.data import chat
from nemocascade.data.tokenizer import IM_END, train_sentencepiece
from nemocascade.domains.domain import Domain, Failed, one_by_one
from nemocascade.domains.rows import make_prompt
from nemocascade.errors import UserError
from nemocascade.mesh import make_mesh
from nemocascade.rollout import episode as episode_file
from nemocascade.rollout import rewards
from nemocascade.rollout import samples as samples_file
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.episode import collect
from nemocascade.rollout.exact import ExactEngine, Weights
from nemocascade.rollout.samples import Samples
from nemocascade.verifiers.verdict import Verdict

P, T, G = 200, 400, 3
TOOLS = [{"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}}]
TOKENIZER = train_sentencepiece(
  ["add one to the sum and say the sum is one two three done"] * 20,
  vocab_size=700,
  phrases=chat.PHRASES,
)


class Counter:
  """An environment whose tool counts its calls; each episode has its own world."""

  max_turns, in_threads = 3, False

  def start(self, row):
    del row
    return []

  def act(self, world, turn):
    if not turn.tool_calls:
      return None
    world.append([call.arguments for call in turn.tool_calls])
    return [f"sum is {len(world)}" for _ in turn.tool_calls]


def judge(row, completion):
  return Verdict(float(completion.content == "done"), "")


class Beside(Counter):
  """A Counter whose calls run in threads: all G episodes of a row must call at the same time."""

  in_threads = True

  def __init__(self):
    self.meet = threading.Barrier(G, timeout=60)

  def act(self, world, turn):
    self.meet.wait()
    return super().act(world, turn)


class Troubled(Counter):
  """A Counter whose call fails in the way that the row's last message names."""

  in_threads = True

  def start(self, row):
    return [row["responses_create_params"]["input"][-1]["content"]]

  def act(self, world, turn):
    if not turn.tool_calls:
      return None
    if world[0] == "raise":
      raise ValueError("no tool")
    if world[0] == "hang":
      time.sleep(60)
    return ["done " * 200_000 if world[0] == "megabyte" else "the sum"]


class Strict:
  """A Verify of one completion at a time, that fails in the way that the row's last message names."""

  def __init__(self):
    self.given = threading.Event()  # Whether a verdict was given.

  def __call__(self, rows, completions):
    return [self._one(row, completion) for row, completion in zip(rows, completions, strict=True)]

  def _one(self, row, completion):
    how = row["responses_create_params"]["input"][-1]["content"]
    if how == "raise":
      raise ValueError("no judge")
    if how == "hang":
      time.sleep(60)
    self.given.set()
    return judge(row, completion)


def domains(max_turns=3):
  """Domains with a tool, and one of a single turn."""
  verify = one_by_one(judge)
  environments = {"counter": Counter(), "beside": Beside(), "troubled": Troubled()}
  return {name: Domain(name, None, verify, env, max_turns=max_turns) for name, env in environments.items()} | {
    "talk": Domain("talk", None, verify)
  }


COUNTER = make_prompt("counter", "add one", tools=TOOLS)
TALK = make_prompt("talk", "say the sum")
CALL = {"tool_calls": [{"function": {"name": "add", "arguments": {"x": "1"}}}]}


def assistant(content, thought="one", **fields):
  return {"role": "assistant", "content": content, "reasoning_content": thought, **fields}


def tool(content):
  return {"role": "tool", "content": content}


def conversation(row, answers, thinking):
  """(tokens, loss_mask) of the whole conversation as SFT would use it."""
  prompt = row["responses_create_params"]
  if not thinking:
    answers = [{k: v for k, v in a.items() if k != "reasoning_content"} for a in answers]
  pieces = chat.render([*prompt["input"], *answers], tools=prompt.get("tools"), enable_thinking=thinking)
  return chat.tokenize(pieces, TOKENIZER)


# A model that outputs a script of tokens, whatever its input.


@struct.dataclass
class Place:
  row_B: jax.Array
  length_B: jax.Array


def say(script_QT, place):
  here_B = script_QT[place.row_B, jnp.minimum(place.length_B, script_QT.shape[1] - 1)]
  return 50.0 * jax.nn.one_hot(here_B, TOKENIZER.vocab_size)


def prefill(script_QT, tokens_QP, length_Q, capacity):
  del capacity
  rows = tokens_QP.shape[0]  # One for each script, or G where an ExactEngine starts its requests again.
  place = Place(jnp.arange(rows) * script_QT.shape[0] // rows, length_Q)
  return say(script_QT, place), place


def step(script_QT, place, tokens_B, active_B):
  del tokens_B
  place = place.replace(length_B=place.length_B + active_B.astype(jnp.int32))
  return place, say(script_QT, place)


def verify(script_QT, tokens_BT, segment_ids_BT, wanted_BT, experts_BTY, key, row_id_B, options):
  del segment_ids_BT, experts_BTY, key, row_id_B, options
  own_BT = jnp.repeat(script_QT, len(tokens_BT) // len(script_QT), axis=0)
  zeros_BT = jnp.zeros(tokens_BT.shape)
  return zeros_BT, jnp.where(wanted_BT, own_BT, 0), zeros_BT


@functools.cache
def engine(prompt_tokens, total_tokens, mesh, exact):
  kind = functools.partial(ExactEngine, verify_fn=verify) if exact else Engine
  return kind(prefill, step, prompt_tokens=prompt_tokens, total_tokens=total_tokens, mesh=mesh)


def run(
  scripts, rows, *, thinking, prompt_tokens=P, total_tokens=T, max_turns=3, others=(), mesh=None, drafts=None, **how
):  # fmt: skip
  """Collects episodes in which the model outputs the tokens of the scripts, behind drafts with those of `drafts`."""
  script_QT = np.full((len(rows), T), IM_END, np.int32)
  for q, script in enumerate(scripts):
    script_QT[q, : len(script)] = script
  params = jnp.asarray(script_QT) if drafts is None else Weights(jnp.asarray(drafts(script_QT)), jnp.asarray(script_QT))
  return collect(
    engine(prompt_tokens, total_tokens, mesh, drafts is not None), params, jax.random.key(0), rows,
    domains(max_turns) | dict(others),
    tokenizer=TOKENIZER, G=G, temperature=0.0, thinking=thinking, **how,
  )  # fmt: skip


CALLS = [
  assistant("", **CALL), tool("sum is 1"), assistant("so", **CALL), tool("sum is 2"), assistant("done"),
]  # fmt: skip
SAYS = [assistant("the sum is two")]


def wrong(script_QT):
  """The script with every 11th token changed to another one, <|im_end|> at times."""
  place_T = np.arange(script_QT.shape[1])
  return np.where(place_T % 11 == 0, np.where(place_T % 2 == 0, IM_END, 300), script_QT)


@pytest.mark.parametrize(
  "thinking, slots, name, drafts",
  [(True, 0, "counter", None), (False, 0, "beside", wrong), (True, 2, "counter", None)],
)
def test_tokens_and_mask_are_those_of_the_rendered_conversation(thinking, slots, name, drafts):
  rows, answers = [make_prompt(name, "add one", tools=TOOLS), TALK], [CALLS, SAYS]
  wanted = [conversation(r, a, thinking) for r, a in zip(rows, answers, strict=True)]
  samples = run([tokens for tokens, _ in wanted], rows, thinking=thinking, slots=slots, drafts=drafts)
  assert samples.tokens_QGT.shape == (2, G, T) and samples.domains == [name, "talk"]
  assert samples.metrics.get("exact/changed", 0) > 0 or not drafts
  assert samples.metrics["speed/queued_occupancy"] > 0.5
  assert samples.finished_QG.all() and (samples.sampled_QG == samples.loss_mask_QGT.sum(-1)).all()
  for q, (tokens, loss_mask) in enumerate(wanted):
    end = np.flatnonzero(loss_mask)[-1] + 1  # The newline after the last turn is never sampled.
    for g in range(G):
      assert samples.tokens_QGT[q, g, :end].tolist() == tokens[:end]
      assert samples.loss_mask_QGT[q, g, :end].tolist() == loss_mask[:end]
      assert samples.segment_ids_QGT[q, g].tolist() == [1] * end + [0] * (T - end)
      assert samples.length_QG[q, g] == end
      assert not samples.tokens_QGT[q, g, end:].any()
      assert not samples.loss_mask_QGT[q, g, end:].any()
      assert not samples.behaviour_logprobs_QGT[q, g][~samples.loss_mask_QGT[q, g]].any()


def test_turns_are_read_back_and_every_copy_has_a_world_of_its_own():
  tokens, _ = conversation(COUNTER, CALLS, True)
  samples = run([tokens], [COUNTER], thinking=True)
  worlds = [completion.world for completion in samples.completions[0]]
  assert all(world == [[{"x": "1"}], [{"x": "1"}]] for world in worlds)
  assert len({id(world) for world in worlds}) == G
  for completion in samples.completions[0]:
    assert [turn.content for turn in completion.turns] == ["", "so", "done"]
    assert [turn.reasoning for turn in completion.turns] == ["one"] * 3
    assert completion.finished


def test_the_domain_says_whether_it_thinks_unless_the_caller_does():
  for thinking in (True, False):
    tokens, _ = conversation(TALK, SAYS, thinking)
    (group,) = run([tokens], [TALK], thinking=thinking).completions
    assert (group[0].reasoning is not None) == thinking
  tokens, _ = conversation(TALK, SAYS, True)
  (group,) = run([tokens], [TALK], thinking=None).completions
  assert group[0].reasoning == "one"


def test_an_episode_ends_with_its_last_turn_allowed_and_that_turns_call_is_not_made():
  tokens, _ = conversation(COUNTER, CALLS, True)
  (group,) = run([tokens], [COUNTER], thinking=True, max_turns=2).completions
  assert len(group[0].turns) == 2 and len(group[0].world) == 1
  assert group[0].finished  # It finished all its allowed turns.


def first_turn(loss_mask):
  """(first, last + 1) position of the first learned run."""
  begin = loss_mask.index(True)
  return begin, loss_mask.index(False, begin)


def test_a_turn_that_meets_the_limit_is_unfinished_and_calls_nothing():
  tokens, loss_mask = conversation(COUNTER, CALLS, True)
  begin, end = first_turn(loss_mask)
  samples = run([tokens], [COUNTER], thinking=True, prompt_tokens=begin, total_tokens=end - 1)
  (group,) = samples.completions
  assert not group[0].finished and len(group[0].turns) == 1 and group[0].world == []
  assert samples.segment_ids_QGT.all()


def test_what_follows_a_prompt_is_as_long_as_it_may_be():
  tokens, loss_mask = conversation(COUNTER, CALLS, True)
  begin, _ = first_turn(loss_mask)
  samples = run([tokens], [COUNTER], thinking=True, completion_tokens=3)
  assert (samples.segment_ids_QGT.sum(axis=-1) == begin + 3).all() and not samples.completions[0][0].finished


@pytest.mark.parametrize("room", [0, 2])
def test_an_episode_without_room_for_a_result_is_unfinished_and_ends_with_its_call(room):
  tokens, loss_mask = conversation(COUNTER, CALLS, True)
  begin, end = first_turn(loss_mask)
  samples = run([tokens], [COUNTER], thinking=True, prompt_tokens=begin, total_tokens=end + room)
  (group,) = samples.completions
  assert len(group[0].turns) == 1 and len(group[0].world) == 1
  assert not group[0].finished
  assert samples.segment_ids_QGT[0, 0].sum() == end


def test_tools_that_raise_hang_or_return_a_megabyte_end_their_own_episodes_only():
  rows = [make_prompt("troubled", how, tools=TOOLS) for how in ("raise", "hang", "megabyte", "say")]
  calls = [CALLS[0], tool("the sum"), assistant("done")]
  began = time.monotonic()
  samples = run([conversation(row, calls, True)[0] for row in rows], rows, thinking=True, calls_s=4.0)
  assert time.monotonic() - began < 50
  raised, hung, large, sound = samples.completions
  for group, why in ((raised, "ValueError: no tool"), (hung, "TookTooLong: no result within 4 s")):
    assert all(c.world == Failed(f"tools failed: {why}") and len(c.turns) == 1 and not c.finished for c in group)
  assert all(len(c.turns) == 1 and not c.finished and not isinstance(c.world, Failed) for c in large)
  assert all(c.finished and c.content == "done" for c in sound)
  verdicts = rewards.judge(samples, domains())
  assert [[v.masked for v in group] for group in verdicts] == [[True] * G, [True] * G, [False] * G, [False] * G]
  assert verdicts[1][0].reason.startswith("tools failed: TookTooLong") and verdicts[3][0].reward == 1


def test_completions_are_judged_while_others_are_decoded_and_a_verifier_that_fails_masks_its_own(monkeypatch):
  monkeypatch.setattr(episode_file, "JUDGED_LOOK", 8)
  rows = [make_prompt("strict", how) for how in ("say", "long", "raise", "hang")]
  answers = [[assistant("done")], [assistant("the sum is " * 30)], SAYS, SAYS]
  verify, waited = Strict(), []
  of = {"strict": Domain("strict", None, verify, beside=True)}

  def exchange(value, what):
    if what == "tools' results" and value[0] == G:  # Only the long ones are still decoded.
      waited.append(verify.given.wait(60))
    return [value]

  scripts = [conversation(row, said, True)[0] for row, said in zip(rows, answers, strict=True)]
  samples = run(scripts, rows, thinking=True, judged=4, verdict_s=3.0, others=of, exchange=exchange)
  assert waited and all(waited) and samples.metrics["speed/early_verdicts"] > 0
  verdicts = rewards.judge(samples, of)
  assert verdicts[:2] == rewards.judge(dataclasses.replace(samples, judging=None), of, prompts=2)
  assert [v.reward for v in verdicts[0] + verdicts[1]] == [1] * G + [0] * G
  for group, cause, why in ((verdicts[2], "error", "ValueError: no judge"), (verdicts[3], "time", "TookTooLong: no")):
    assert all(v.masked and v.cause == cause and v.reason.startswith(f"verifier failed: {why}") for v in group)


def test_a_process_that_shares_rows_follows_what_the_others_tell_of_them(monkeypatch):
  """Two devices do not divide three episodes, so that both processes hold all of them; the first one answers them."""
  mesh, script, told = make_mesh(2, 1, of=jax.devices()[:2]), [conversation(COUNTER, CALLS, True)[0]], []
  how = dict(thinking=True, slots=2, mesh=mesh)

  def first(value, what):
    told.append(json.loads(json.dumps(value)))
    return [told[-1], [] if what == "ends of episodes" else [0, [], []]]

  def second(value, what):
    assert value == ([] if what == "ends of episodes" else [0, [], []])
    return [told.pop(0), value]

  one = run(script, [COUNTER], exchange=first, **how)
  monkeypatch.setattr(episode_file, "owners", lambda mesh, count: np.full(count, -1))
  other = run(script, [COUNTER], exchange=second, **how)
  assert told == [] and other.completions == [[None] * G] and one.finished_QG.all()
  for name in ("tokens_QGT", "loss_mask_QGT", "length_QG", "sampled_QG", "finished_QG"):
    np.testing.assert_array_equal(getattr(other, name), getattr(one, name))


def test_a_prompt_that_does_not_fit_is_refused():
  with pytest.raises(UserError, match=f"prompt_tokens={P}"):
    run([[]], [make_prompt("talk", "one two " * P)], thinking=True)


def test_prompts_of_several_parts_are_picked_in_any_order(monkeypatch):
  monkeypatch.setattr(samples_file, "WIDTH", 96)  # Less than T, and no divisor of it.
  rows, answers = [COUNTER, TALK], [CALLS, SAYS]
  scripts = [conversation(r, a, True)[0] for r, a in zip(rows, answers, strict=True)]
  first, second = run(scripts, rows, thinking=True), run(scripts[::-1], rows[::-1], thinking=True, completion_tokens=3)
  places = [(1, 1), (0, 0)]
  picked = Samples.pick([first, second], places)
  for field in dataclasses.fields(Samples):
    if field.name == "metrics":
      continue
    for q, (i, place) in enumerate(places):
      value, part = getattr(picked, field.name), getattr((first, second)[i], field.name)
      assert (value is None and part is None) or np.array_equal(value[q], part[place])
  assert picked.domains == ["counter", "counter"] and picked.tokens_QGT.sharding == first.tokens_QGT.sharding


def test_the_text_of_a_completion_shows_what_the_tools_answered():
  tokens, _ = conversation(COUNTER, CALLS, True)
  ((one, *_),) = run([tokens], [COUNTER], thinking=True).completions
  assert one.results == (("sum is 1",), ("sum is 2",))
  said = [one.text.index(words) for words in ("sum is 1", "so", "sum is 2", "done")]
  assert said == sorted(said)
