"""Times episodes of several turns, with a tool that sleeps, against decoding as many tokens without tools."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.bench import rl
from nemocascade.data import chat
from nemocascade.data.tokenizer import IM_END
from nemocascade.domains.domain import Domain
from nemocascade.model.decode_state import row_axes
from nemocascade.model.hybrid import Hybrid
from nemocascade.rollout.engine import Engine
from nemocascade.rollout.episode import collect
from nemocascade.rollout.samples import Samples
from nemocascade.runtime.parts import Parts
from nemocascade.runtime.programs import Programs
from nemocascade.types import Params


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of the case.

  Attributes:
    each: episodes a slot. As many as are not in slots may wait for their tools.
    turns, tokens: turns of an episode, and sampled tokens of a turn.
    result: words that the tool answers with.
    tool_s: time that the tool takes.
    runs: each side runs this many times, in turns, after a run that compiles.
  """

  slots: int = 32
  each: int = 4
  turns: int = 8
  tokens: int = 64
  result: int = 16
  tool_s: float = 0.2
  runs: int = 3


class Tool:
  """An environment that answers every turn with the same words after some time."""

  in_threads = True

  def __init__(self, sizes: Sizes):
    self.max_turns, self.seconds, self.said = sizes.turns, sizes.tool_s, " ".join(rl.words(sizes.result))

  def start(self, row):
    del row

  def act(self, world, turn):
    del world, turn
    time.sleep(self.seconds)
    return [self.said]


def engine_of_turns(programs: Programs, T: int, turn: int, given: int) -> Engine:
  """An engine whose requests sample <|im_end|> as the last of every `turn` tokens; `given` tokens follow a turn."""
  model, P = Hybrid(programs.config, programs.mesh, samples=True), rl.PROMPT_TOKENS
  end_V = jnp.where(jnp.arange(programs.config.vocab_size) == IM_END, 0.0, -jnp.inf)

  def ended(state, logits_BV):
    last_B = (state.length_B - P) % (turn + given) == turn - 1
    return jnp.where(last_B[:, None], end_V[None], logits_BV)

  def apply(params, *args, method):
    return model.apply({"params": params}, *args, method=method)

  def prefill(*args):
    logits_BV, state = apply(*args, method="prefill")
    return ended(state, logits_BV), state

  def taken_in(method: str) -> Callable:
    def take_in(*args):
      state, logits_BV = apply(*args, method=method)
      return state, ended(state, logits_BV)

    return take_in

  places = jax.tree.map(lambda p: p.sharding, programs.sampling_template)
  return Engine(
    prefill, taken_in("step"), taken_in("extend"), row_axes, prompt_tokens=P, total_tokens=T, stop_ids=(IM_END,),
    mesh=programs.mesh, params_places=places,
  )  # fmt: skip


def line(p: Parts, weights: Params, sizes: Sizes) -> dict:
  """The line of the case: sampled tokens a second, with tools and without.

  Without tools an episode is one turn of as many tokens, in the same slots.
  """
  tool = Tool(sizes)
  results = chat.tokenize(chat.tool_response([tool.said], enable_thinking=False), p.text.tokenizer)[0]
  new, B = sizes.turns * sizes.tokens, sizes.slots * sizes.each
  T = rl.PROMPT_TOKENS + new + (sizes.turns - 1) * len(results)
  rows = [rl.INITIALS.rows.train(0, number) for number in range(B)]

  def side(engine: Engine, domain: Domain) -> Callable[[], tuple[float, Samples]]:
    def run() -> tuple[float, Samples]:
      began = time.perf_counter()
      samples = collect(
        engine, weights, jax.random.key(0), rows, {domain.name: domain}, tokenizer=p.text.tokenizer, G=1,
        slots=sizes.slots, parked=B - sizes.slots,
      )  # fmt: skip
      took = time.perf_counter() - began
      if (samples.sampled_QG != new).any():
        raise RuntimeError(f"episodes of {new} sampled tokens have {samples.sampled_QG.tolist()}")
      return took, samples

    run()
    return run

  with_tools = side(
    engine_of_turns(p.programs, T, sizes.tokens, len(results)), dataclasses.replace(rl.INITIALS, environment=tool)
  )
  without = side(engine_of_turns(p.programs, rl.PROMPT_TOKENS + new, new, 0), rl.INITIALS)
  pairs = [(with_tools(), without()) for _ in range(sizes.runs)]
  (ours, samples), (peer, _) = (min(of, key=lambda r: r[0]) for of in zip(*pairs, strict=True))
  print(f"episodes: {', '.join(f'{name} {value:.3g}' for name, value in samples.metrics.items())}")
  return dict(
    case=f"episodes_{sizes.turns}_turns_{1e3 * sizes.tool_s:.0f}_ms", ours=B * new / ours, peer=B * new / peer,
    peer_name="as many tokens without tools", unit="tokens/s", ratio=peer / ours,
  )  # fmt: skip
