"""Times rollouts of the hybrid of `bench rl` (11.9M parameters) on random prompts of equal length.

  python -m experiments.bench rollout --table=TABLE.md
  python -m experiments.bench rollout --full --table=TABLE.md

Lines, for products in fp32 and in bf16:
- generate: tokens a second of 32 prompts of 32 tokens with 64 new ones, prefill included, against transformers'
  `generate` on the same weights. Both sample at temperature 1 and take turns.
- tick_B: tokens a second of decoding B rows, against the limit of this machine.
- LENGTHS_S_slots_P: tokens a second of 4 requests a slot with prompts of P tokens, against the limit of full slots.
  `equal` requests have 64 new tokens each. The lengths of `long_tail` are lognormal with the 99th percentile at ten
  times the median. Further lines have the occupancy of the slots while requests wait, and the seconds of each part.
- episodes_8_turns_200_ms: tokens a second of episodes with a tool that takes so long, against as many without tools.

The limit of a tick is the longer of two times: that of moving the weights and states that it must read or write at
the measured rate of a copy, and that of its FLOPs at the measured rate of a matmul.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import convert
from experiments.bench import episodes, rl
from nemocascade.config import ModelConfig
from nemocascade.data.tokenizer import SPECIAL_NAMES
from nemocascade.errors import UserError
from nemocascade.report.bars import draw_shares
from nemocascade.runtime.programs import Programs
from nemocascade.runtime.resharding import for_sampling
from nemocascade.runtime.step_time import Sizes
from nemocascade.types import Params

TURNS = 3  # Each side runs this many times, and its best time is compared.


@dataclasses.dataclass(frozen=True)
class Cases:
  """The sizes of the cases.

  Attributes:
    generate: (prompts, tokens of a prompt, new tokens) of the comparison with transformers.
    ticks: rows of the ticks that are compared with the limit.
    slots, prompts: of the requests of every distribution of lengths.
    new: new tokens of `equal` requests, and the median of `long_tail`.
    tools: of the episodes with tools.
    side, copied: of the matmul, and bytes of the copy, that measure the machine's rates.
  """

  dtypes: tuple[str, ...] = ("float32", "bfloat16")
  generate: tuple[int, int, int] = (32, 32, 64)
  ticks: tuple[int, ...] = (32, 128)
  slots: tuple[int, ...] = (32,)
  prompts: tuple[int, ...] = (32,)
  new: int = 64
  tools: episodes.Sizes = episodes.Sizes()
  side: int = 2_048
  copied: int = 1 << 28


FULL = Cases(ticks=(1, 8, 32, 128, 256), slots=(8, 32, 128), prompts=(32, 512))
SIZES = Cases()


def cases(full: bool = False) -> Iterator[dict]:
  """Yields the lines. `full`: all numbers of slots and lengths of prompts."""
  sizes = FULL if full else SIZES
  try:
    from experiments.bench.generate import Peer
  except ImportError as error:
    raise UserError(
      f"bench rollout compares with transformers, which is not installed ({error}): pip install -e '.[bench]'"
    ) from error
  for dtype in sizes.dtypes:
    c = rl.config(dtype=dtype)
    p = rl.make_parts(c)
    params = rl.endless_params(p.programs, c.seed)
    weights, cost = for_sampling(p.programs, params)
    print(f"{dtype}: weights for sampling in {cost['time/reshard_ms']:.1f} ms")
    with tempfile.TemporaryDirectory() as place:
      peer = _peer(Peer, c, p, params, dtype, Path(place))
      lines = [_against(peer, p.programs, weights, sizes)]
    rates = Rates.measure(dtype, sizes)
    print(f"{dtype}: copy {rates.copy / 1e9:.1f} GB/s, matmul {rates.matmul / 1e9:.0f} GFLOP/s")
    lines += _ticks(p.programs, weights, rates, sizes)
    lines += _requests(p.programs, weights, rates, sizes)
    lines.append(episodes.line(p, weights, sizes.tools))
    yield from (line | dict(case=f"{line['case']}_{dtype}") for line in lines)


def draw(lines: Sequence[dict], path: Path) -> None:
  """A picture of each case's share of its limit, or its ratio to transformers."""
  shares = {line["case"]: line["ratio"] for line in lines if line["unit"] == "tokens/s"}
  draw_shares(shares, path, "tokens a second over the peer's (transformers, or the machine's limit)")


# Against transformers.


def _peer(make: Callable, c: ConfigDict, p, params: Params, dtype: str, root: Path):
  """Their model of the same weights. Raises RuntimeError if its log-probabilities are not ours."""
  start = rl.save(c, p.text.tokenizer, params, root / "start")
  convert.run(start, f"hf:{root / 'hf'}")
  peer = make(root / "hf", dtype)
  row_BT = np.array(random_prompts(c.model.vocab_size, rl.SCORED, 64), np.int32)
  ours_BT = np.asarray(p.programs.score(params, row_BT, np.ones_like(row_BT)).logprobs_BT)
  gap = float(np.abs(ours_BT[:, 1:] - peer.logprobs(row_BT)).max())
  if gap > rl.DTYPES[dtype]:
    raise RuntimeError(f"log-probabilities of the same tokens differ by {gap:.1e} nats")
  print(f"{dtype}: log-probabilities of the same tokens differ by at most {gap:.1e} nats")
  return peer


def _against(peer, programs: Programs, weights: Params, sizes: Cases) -> dict:
  B, P, new = sizes.generate
  prompts = random_prompts(programs.config.vocab_size, B, P)
  forms = peer.choose(prompts, new)
  print("generate, by form of the experts: " + ", ".join(f"{form} {s:.2f} s" for form, s in forms.items()))
  run(programs, weights, prompts, [new] * B, B)  # Compiles.
  seconds = [(run(programs, weights, prompts, [new] * B, B).seconds, peer.generate(prompts, new)) for _ in range(TURNS)]
  ours, theirs = map(min, zip(*seconds, strict=True))
  return _line("generate", B * new / ours, B * new / theirs, peer.name)


def random_prompts(vocab_size: int, count: int, tokens: int) -> list[list[int]]:
  return np.random.default_rng(count).integers(len(SPECIAL_NAMES), vocab_size, (count, tokens)).tolist()


# Our side.


@dataclasses.dataclass(frozen=True)
class Run:
  """A rollout that was measured.

  Attributes:
    parts: part -> seconds.
    tokens: sampled ones.
    occupancy: share of the slots that decoded a token, over the ticks at which requests waited for a slot.
  """

  parts: dict[str, float]
  tokens: int
  occupancy: float

  @property
  def seconds(self) -> float:
    return sum(self.parts.values())


def run(programs: Programs, weights: Params, prompts: Sequence[Sequence[int]], new: Sequence[int], slots: int) -> Run:
  """Samples new[i] tokens after prompt i, all of equal length, in `slots` slots."""
  P, parts = len(prompts[0]), dict.fromkeys(("host", "prefill", "decode"), 0.0)
  engine, mark = programs.engine(P, P + max(new)), time.perf_counter()

  def passed(part: str) -> None:
    nonlocal mark
    parts[part] += (now := time.perf_counter()) - mark
    mark = now

  d = jax.block_until_ready(engine.start(weights, prompts, 1, slots=slots))
  passed("prefill")
  d = d.replace(limit_B=np.array(new, np.int32) + np.int32(P))
  passed("host")
  d = jax.block_until_ready(engine.decode(weights, d, jax.random.key(0)))
  passed("decode")
  known_B, count = np.asarray(d.known_B), jax.device_get(d.counts)
  if (known_B != np.asarray(new) + P).any():
    raise RuntimeError(f"a completion of ours stopped early: {known_B.tolist()}")
  passed("host")
  busy, of = (count.queued_busy, count.queued_slots) if count.queued_slots else (count.busy, count.slots)
  return Run(parts, sum(new), float(busy / of))


def _best(make: Callable[[], Run]) -> Run:
  make()  # Compiles.
  return min((make() for _ in range(TURNS)), key=lambda r: r.seconds)


def _ticks(programs: Programs, weights: Params, rates: "Rates", sizes: Cases) -> Iterator[dict]:
  P, new = sizes.generate[1:]
  for B in sizes.ticks:
    prompts = random_prompts(programs.config.vocab_size, B, P)
    tick = _best(lambda B=B, prompts=prompts: run(programs, weights, prompts, [new] * B, B)).parts["decode"] / new
    limit = rates.tick(programs.config, B, P + new / 2)
    print(f"tick of {B} rows: {1e3 * tick:.2f} ms, limit {1e3 * limit:.2f} ms")
    yield _line(f"tick_{B}", B / tick, B / limit, "limit")


def _requests(programs: Programs, weights: Params, rates: "Rates", sizes: Cases) -> Iterator[dict]:
  for slots in sizes.slots:
    for P in sizes.prompts:
      for name, new in lengths(4 * slots, sizes.new).items():
        prompts = random_prompts(programs.config.vocab_size, len(new), P)
        got = _best(lambda p=prompts, new=new, slots=slots: run(programs, weights, p, new, slots))
        case = f"{name}_{slots}_slots_{P}"
        limit = rates.tick(programs.config, slots, P + np.mean(new) / 2)
        yield _line(case, got.tokens / got.seconds, slots / limit, "limit of full slots")
        yield _line(f"{case}_occupancy", got.occupancy, 1.0, "every slot busy", "share of slots")
        for part, seconds in got.parts.items():
          yield _line(f"{case}_{part}", seconds, got.seconds, "the whole", "s", got.seconds / seconds)


def lengths(count: int, tokens: int) -> dict[str, list[int]]:
  """Distribution -> the new tokens of `count` requests."""
  sigma = math.log(10) / 2.326  # The 99th percentile is 2.326 standard deviations above the median.
  drawn = tokens * np.exp(sigma * np.random.default_rng(0).standard_normal(count))
  return {"equal": [tokens] * count, "long_tail": np.clip(drawn, 1, 20 * tokens).astype(int).tolist()}


# The limit.


@dataclasses.dataclass(frozen=True)
class Rates:
  """Measured rates of this machine: bytes/s, read plus written, and FLOP/s in one dtype."""

  dtype: str
  copy: float
  matmul: float

  @classmethod
  def measure(cls, dtype: str, sizes: Cases) -> "Rates":
    array = jnp.ones(sizes.copied // 4, jnp.float32)
    square = jnp.ones((sizes.side, sizes.side), dtype)
    copy = _seconds(jax.jit(lambda a: a * 1.5), array)
    return cls(dtype, 2 * array.nbytes / copy, 2 * sizes.side**3 / _seconds(jax.jit(jnp.matmul), square, square))

  def tick(self, config: ModelConfig, B: int, seen: float) -> float:
    """Seconds of a tick of B rows that see `seen` tokens."""
    of, E, X = Sizes.of(config), config.n_routed_experts, config.num_experts_per_tok
    touched = of.shared + of.routed * (1 - (1 - X / E) ** B)  # Parameters that a tick reads.
    moved = touched * jnp.dtype(self.dtype).itemsize + B * (2 * of.state + of.cache * seen)
    return max(moved / self.copy, of.forward(B, seen) / self.matmul)


def _seconds(fn: Callable, *args) -> float:
  """The best of several runs after one that compiles."""

  def timed() -> float:
    began = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - began

  timed()
  return min(timed() for _ in range(2 * TURNS))


def _line(case: str, ours: float, peer: float, name: str, unit: str = "tokens/s", ratio: float | None = None) -> dict:
  return dict(case=case, ours=ours, peer=peer, peer_name=name, unit=unit, ratio=ours / peer if ratio is None else ratio)
