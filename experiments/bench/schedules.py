"""Compares TPU compiler schedules of the routed matmul and of peers, HBM bytes of the routed MLP, and attention's schedules."""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import megablox
from jax.sharding import SingleDeviceSharding

from experiments.bench import scan
from experiments.bench.cores import slower_core
from experiments.bench.kernels import TOKENS, D, E, F, X
from nemocascade.errors import UserError
from nemocascade.kernels import routed_matmul_tpu as tpu
from nemocascade.kernels.attention import attention
from nemocascade.kernels.attention_tpu import KINDS
from nemocascade.kernels.groups import group_bounds
from nemocascade.kernels.routed_mlp_sorted import relu2, weigh

ROWS = 8192  # Rows of the compiled products. A kernel's schedule depends on neither ROWS nor EXPERTS.
EXPERTS = 16
PEER_TILE = (512, 896, 640)  # (rows, summed, columns). F is padded to 1920 for it.
# v5p, from its published 459 TFLOP/s and 2,765 GB/s: two cores, each with four 128 x 128 matrix units.
# CLOCK in Hz, FLOPS in FLOP/s, BANDWIDTH in bytes/s.
CLOCK, CORES, FLOPS, BANDWIDTH = 1.75e9, 2, 459e12, 2.765e12
KERNELS = "routed_product|routed_weight_product|gmm"  # In the names of the dump's files.


def cases() -> Iterator[dict]:
  """Yields lines on v5p schedules of the products of Nano's experts, and on the routed MLP's HBM bytes.

  A kernel is measured in the branch-free stretch of instructions with the most matrix operations: the inner
  loop over whole tiles. Bundles are counted per 1e9 useful operations; work on padding is not useful.
  """
  peers = {name: _schedule(name) for name in PEERS if name == "megablox" or importlib.util.find_spec(name)}
  ours = {name: _schedule(name) for name in PRODUCTS}
  for name, peer in itertools.product(PRODUCTS, peers):
    line = dict(peer_name=f"{peer}, forward of up")
    slots, bundles, _ = zip(ours[name], peers[peer], strict=True)
    yield line | dict(
      case=f"{name}_slots", ours=slots[0], peer=slots[1], unit="share of matmul slots", ratio=slots[0] / slots[1]
    )
    yield line | dict(
      case=f"{name}_bundles", ours=bundles[0], peer=bundles[1], unit="bundles/GFLOP", ratio=bundles[1] / bundles[0]
    )
  for name, (_, bundles, cores) in ours.items():
    yield from slower_core(name, bundles, cores, CLOCK)
  fused = (ours["up_relu2"][1] + ours["down_weighed"][1]) / 2
  for tokens in TOKENS:
    for what, count, theirs in (
      ("forward", mlp_bytes, chain_bytes), ("backward", mlp_backward_bytes, chain_backward_bytes),
    ):  # fmt: skip
      moved = count(tokens), theirs(tokens)
      yield dict(
        case=f"mlp_{what}_{tokens}_tokens", ours=moved[0] / 1e9, peer=moved[1] / 1e9, unit="GB of HBM",
        peer_name=f"sort, gather, products in tiles {PEER_TILE}, activation, scatter-add", ratio=moved[1] / moved[0],
      )  # fmt: skip
    for peer in peers:
      took = [
        bound(tokens, bundles, moved(tokens)) * 1e3
        for bundles, moved in ((fused, mlp_bytes), (peers[peer][1], chain_bytes))
      ]
      yield dict(
        case=f"mlp_forward_{tokens}_tokens_bound", ours=took[0], peer=took[1], peer_name=f"the same with {peer}",
        unit="ms on a v5p chip: the larger of bundles at clock and bytes at bandwidth", ratio=took[1] / took[0],
      )  # fmt: skip

  yield from attention_cases()
  yield from scan.cases(FLOPS, BANDWIDTH)


def attention_cases() -> Iterator[dict]:
  """Yields the share of matmul slots that each kernel of attention uses in a visit, beside all slots.

  Each kind of visit has a stretch of instructions of its own, in the order of attention_tpu.KINDS.
  """
  with _dump("attention") as place:
    for kernel in ("forward", "dq", "dkv"):
      found = list(enumerate(_stretches(place, f"attention_{kernel}")))
      visits = sorted(sorted(found, key=lambda of: of[1], reverse=True)[: len(KINDS)])
      for name, (_, (busy, bundles)) in zip(KINDS, visits, strict=True):
        yield dict(
          case=f"attention_{kernel}_{name}_slots", ours=busy / bundles, peer=1.0, peer_name="every slot used",
          unit=f"share of matmul slots, {bundles} bundles, {cores_of(place, kernel)} cores", ratio=busy / bundles,
        )  # fmt: skip


def bound(T: int, bundles: float, moved: int) -> float:
  """Lower bound in seconds of the routed MLP's forward: compute or memory, whichever takes longer.

  Ignores the extra cost of tiles that several experts share.

  Args:
    T: tokens.
    bundles: per 1e9 useful operations.
    moved: HBM bytes.
  """
  return max(2 * 2 * T * X * D * F / 1e9 * bundles / (CLOCK * CORES), moved / BANDWIDTH)


def mlp_bytes(T: int) -> int:
  """HBM bytes of our routed MLP's forward on T tokens: each array's bf16 size times the passes over it."""
  N = T * X
  up, down = N * (D + F) + (E + 1) * D * F, N * (F + D) + (E + 1) * D * F  # Both halves may read one expert.
  weights = N * 512 // 2  # An fp32 column is padded to 128 lanes.
  return 2 * (_gather(N) + up + down + weights + _combine(T))


def mlp_backward_bytes(T: int) -> int:
  """HBM bytes of its backward. x is gathered again; of the arrays of width F only the activation is saved."""
  N, expert = T * X, D * F
  da, dx = N * (D + F) + (E + 1) * expert, N * (F + D) + (E + 1) * expert
  between = 2 * N * F + 2 * N * F  # Reads the activation and da; writes dh and the weighted activation.
  # The expert that both halves share is written by each, in fp32 too; its fp32 sums are read and it is written.
  dw = N * (D + F) + (E + 2) * expert + 2 * 2 * 2 * expert
  return 2 * (2 * _gather(N) + da + between + 2 * dw + dx + _combine(T))


def _gather(N: int) -> int:
  return 2 * N * D


def _combine(T: int) -> int:
  """Writes each token's X rows next to each other, reads them, and writes their sum."""
  return 2 * T * X * D + T * X * D + T * D


def chain_bytes(T: int) -> int:
  """HBM bytes of the usual chain's forward: rows are read per column tile, an expert per row tile."""
  N = T * X
  activation = 2 * N * WIDE
  return 2 * (_gather(N) + _tiled(N, D, WIDE) + activation + _tiled(N, WIDE, D) + _scatter(T))


def chain_backward_bytes(T: int) -> int:
  """HBM bytes of its backward. The forward saved both activations and the output rows."""
  N = T * X
  weighed = _gather(N) + N * D  # dy by rows, and the output rows, for the gradient of the router's weights.
  experts = 2 * (N * WIDE * -(-D // PEER_TILE[1]) + N * D * (WIDE // PEER_TILE[2]) + E * D * WIDE)
  return 2 * (weighed + _tiled(N, D, WIDE) + 3 * N * WIDE + experts + _tiled(N, WIDE, D) + _scatter(T))


WIDE = 1920  # F as padded by the usual chain.


def _tiled(N: int, inner: int, outer: int) -> int:
  """Numbers moved by a tiled product [N, inner] x [inner, outer] of each expert.

  Rows are read once per column tile, an expert's matrix once per row tile; the result is written once.
  """
  visits = -(-N // PEER_TILE[0]) + E - 1  # A tile that two experts share is visited twice.
  columns = PEER_TILE[2] if outer == WIDE else PEER_TILE[1]
  return N * inner * (outer // columns) + visits * inner * outer + N * outer


def _scatter(T: int) -> int:
  """Numbers moved by the scatter-add: reads each row, and reads and writes its token's sum."""
  return T * X * D + 2 * T * X * D + T * D


def _ours(x_ND, w_EDF, sizes_E, *extras, **how):
  N, experts = x_ND.shape[0], w_EDF.shape[0]
  return tpu.product(x_ND, w_EDF, group_bounds(sizes_E, N, experts), extras=extras, **how)


def _megablox(x_ND, w_EDF, sizes_E):
  w_EDF = jnp.pad(w_EDF, [(0, 0), (0, 0), (0, -F % 128)])  # megablox takes whole tiles only.
  return megablox.gmm(x_ND, w_EDF, sizes_E, jnp.bfloat16, PEER_TILE)


TOKAMAX_TILE = (512, 2688, 384)  # (rows, summed, columns): the largest that fits 16 MiB of VMEM.


def _tokamax(x_ND, w_EDF, sizes_E):
  """tokamax's private kernel. Its public one needs a TPU and has no tile for Nano's shapes."""
  from tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel import gmm

  precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
  return gmm(x_ND, w_EDF, sizes_E, precision, jnp.bfloat16, tiling=TOKAMAX_TILE)


def _weights(x_ND, dy_NF, sizes_E):
  bounds = group_bounds(sizes_E, x_ND.shape[0], sizes_E.shape[0])
  return tpu.weight_product(x_ND, dy_NF, bounds, dtype=jnp.bfloat16)


_rows = lambda columns: ((ROWS, columns), jnp.bfloat16)
_experts = lambda inner, outer: ((EXPERTS, inner, outer), jnp.bfloat16)
_sizes, _column = ((EXPERTS,), jnp.int32), ((ROWS, 1), jnp.float32)

# Name -> (product, (shape, dtype) of each argument).
PRODUCTS = {
  "up": (_ours, (_rows(D), _experts(D, F), _sizes)),
  "up_relu2": (functools.partial(_ours, finish=relu2), (_rows(D), _experts(D, F), _sizes)),
  "down": (_ours, (_rows(F), _experts(F, D), _sizes)),
  "down_weighed": (functools.partial(_ours, finish=weigh), (_rows(F), _experts(F, D), _sizes, _column)),
  "down_dx": (functools.partial(_ours, transpose=True), (_rows(D), _experts(F, D), _sizes)),
  "up_dw": (_weights, (_rows(D), _rows(F), _sizes)),
}


def _attention(q, k, v, segment_ids_BT, dy):
  """Value and gradients, so that the program has all three kernels."""
  y, pull = jax.vjp(lambda *a: attention(*a, segment_ids_BT, form="tpu", block=1024), q, k, v)
  return y, pull(dy)


_heads = lambda *of: ((1, 16_384, *of, 128), jnp.bfloat16)
# Nano's heads: 2 of keys and values, 16 of queries for each.
ATTENTION = (_attention, (_heads(2, 16), _heads(2), _heads(2), ((1, 16_384), jnp.int32), _heads(2, 16)))
# Name -> (product, (shape, dtype) of each argument, tile (rows, summed, columns)).
PEERS = {
  "megablox": (_megablox, PRODUCTS["up"][1], PEER_TILE),
  "tokamax": (_tokamax, PRODUCTS["up"][1], TOKAMAX_TILE),
}


def _stretch_flops(name: str) -> float:
  """Useful operations (2 per multiply-add) in the stretch that `read_schedule` finds: one step of a tile."""
  if name in PEERS:
    rows, depth, columns = PEERS[name][2]
    return 2 * rows * depth * columns * F / WIDE
  if name == "up_dw":
    tile = tpu.choose_tile(ROWS, EXPERTS, D, F)
    return 2 * tile.rows * tile.chunk * F
  ((_, inner), _), ((_, *experts), _), *_ = PRODUCTS[name][1]
  outer = experts[0 if name == "down_dx" else 1]
  tile = tpu.choose_tile(ROWS, EXPERTS, inner, outer)
  return 2 * tile.rows * inner * tile.chunk * outer / (-(-outer // tile.chunk) * tile.chunk)


def _schedule(name: str) -> tuple[float, float, int]:
  """(share of matmul slots used, bundles per 1e9 useful operations, cores that run it) of a program."""
  with _dump(name) as place:
    slots, bundles = read_schedule(place)
    return slots, bundles / _stretch_flops(name) * 1e9, cores_of(place)


def cores_of(place: Path, kernel: str = KERNELS) -> int:
  """The cores that run a kernel: its body is in a "PrimaryCoreRegion" where the second core idles."""
  texts = [p.read_text() for p in place.glob("*original*") if re.search(kernel, p.name)]
  return 1 if any("PrimaryCoreRegion" in text for text in texts) else CORES


@contextlib.contextmanager
def _dump(name: str) -> Iterator[Path]:
  """A folder with the compiler's dump of a program, compiled in its own process: compiler flags are global.

  Raises:
    UserError: it does not compile.
  """
  with tempfile.TemporaryDirectory() as place:
    environment = os.environ | {
      "TPU_SKIP_MDS_QUERY": "1",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "JAX_PLATFORMS": "cpu",
      "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={place} --xla_jf_dump_llo_text=true",
    }
    command = [sys.executable, "-m", "experiments.bench.schedules", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
      said = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
      reason = (said or ["no message"])[-1]
      raise UserError(f"kernels --static: {name} did not compile ({reason}): pip install -e '.[tpu]'")
    yield Path(place)


def read_schedule(place: Path) -> tuple[float, int]:
  """Reads the compiler's dump of a kernel in the folder `place`.

  Returns:
    (share of matmul slots used, bundles) of the branch-free stretch with the most matrix operations.
  """
  busy, bundles = max(_stretches(place, KERNELS))
  return busy / bundles, bundles


def _stretches(place: Path, kernel: str) -> list[tuple[float, int]]:
  """(matrix operations in units of all slots of a bundle, bundles) of each branch-free stretch of a kernel.

  Args:
    kernel: a regular expression for its name.
  """
  named = re.compile(rf"(\d+)-[a-z_]*?({kernel})[^-]*-\d+-final_bundles.txt")
  (file, stamp), *_ = [(p, m[1]) for p in place.iterdir() if (m := named.fullmatch(p.name))]
  (use,) = place.glob(f"{stamp}-*final_hlo-static-per-bundle-utilization.txt")
  _, _, (capacity, *_), _, *rows = (line.split() for line in use.read_text().splitlines() if line.strip())
  busy = [int(row[0]) for row in rows]
  bundle = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+(?:([A-Z]{2})\s*)?:(.*)")
  found = [m for line in file.read_text().splitlines() if (m := bundle.fullmatch(line))]
  # Stretches begin at labels and end at branches.
  edges = sorted({0, len(busy), *(int(m[1], 16) for m in found if m[2] or "sbr.rel" in m[3])})
  return [(sum(busy[i:j]) / int(capacity), j - i) for i, j in itertools.pairwise(edges)]


def _compile(name: str) -> None:
  """Compiles a program for v5p. The environment's compiler flags name the folder of the dump."""
  fn, shapes, *_ = (PRODUCTS | PEERS | {"attention": ATTENTION})[name]
  chip = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
  place = SingleDeviceSharding(chip)
  with jax.sharding.use_abstract_mesh(_told(chip)):
    jax.jit(fn).lower(*(jax.ShapeDtypeStruct(*of, sharding=place) for of in shapes)).compile()


def _told(chip: jax.Device) -> jax.sharding.AbstractMesh:
  """An abstract mesh of one such chip, from which Pallas' pipelines read the target chip."""
  device = jax.sharding.AbstractDevice(chip.device_kind, chip.num_cores, chip.platform)
  return jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)


if __name__ == "__main__":
  _compile(sys.argv[1])
