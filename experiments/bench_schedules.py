"""The TPU compiler's own schedules of the routed matmul and of peers, and bytes of the whole routed MLP."""

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

from experiments.bench_kernels import TOKENS, D, E, F, X
from nemocascade.errors import UserError
from nemocascade.kernels import routed_matmul_tpu as tpu
from nemocascade.kernels.groups import group_bounds
from nemocascade.kernels.routed_mlp_sorted import relu2, weigh

ROWS = 8192  # Of the static products; a kernel's schedule does not depend on it.
EXPERTS = 16  # Nor on this.
PEER_TILE = (512, 896, 640)  # Rows, summed, columns; F is padded to 1920 for it.
# v5p, by its published peak: 459 TFLOP/s of two cores with four 128 x 128 units each, 2,765 GB/s.
CLOCK, CORES, BANDWIDTH = 1.75e9, 2, 2.765e12


def cases() -> Iterator[dict]:
  """What v5p's compiler made of the products of Nano's experts, and bytes of the whole routed MLP.

  Of a kernel the branch-free stretch counts in which the matrix units do most: the loop that whole
  tiles spend their time in. Bundles are those of 1e9 useful operations, padding being none.
  """
  peers = {name: _schedule(name) for name in PEERS if name == "megablox" or importlib.util.find_spec(name)}
  ours = {name: _schedule(name) for name in PRODUCTS}
  for name, peer in itertools.product(PRODUCTS, peers):
    line = dict(peer_name=f"{peer}, forward of up")
    slots, bundles = zip(ours[name], peers[peer], strict=True)
    yield line | dict(
      case=f"{name}_slots", ours=slots[0], peer=slots[1], unit="share of matmul slots", ratio=slots[0] / slots[1]
    )
    yield line | dict(
      case=f"{name}_bundles", ours=bundles[0], peer=bundles[1], unit="bundles/GFLOP", ratio=bundles[1] / bundles[0]
    )
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


def bound(T: int, bundles: float, moved: int) -> float:
  """Seconds of the routed MLP's forward, in which tiles that experts share cost nothing extra."""
  return max(2 * 2 * T * X * D * F / 1e9 * bundles / (CLOCK * CORES), moved / BANDWIDTH)


def mlp_bytes(T: int) -> int:
  """HBM bytes of our routed MLP's forward: every array times the passes over it; bf16."""
  N = T * X
  up, down = N * (D + F) + E * D * F, N * (F + D) + E * D * F
  weights = N * 512 // 2  # A column of fp32 takes 128 lanes.
  return 2 * (_gather(N) + up + down + weights + _combine(T))


def mlp_backward_bytes(T: int) -> int:
  """The same of its backward, in which x is gathered anew and of what is F wide only the activation is there."""
  N, experts = T * X, E * D * F
  da, dx = N * (D + F) + experts, N * (F + D) + experts
  between = 2 * N * F + 2 * N * F  # The activation and da are read; dh and the weighed activation written.
  return 2 * (2 * _gather(N) + da + between + 2 * (N * (D + F) + experts) + dx + _combine(T))


def _gather(N: int) -> int:
  return 2 * N * D


def _combine(T: int) -> int:
  """A token's rows side by side, then their sum."""
  return 2 * T * X * D + T * X * D + T * D


def chain_bytes(T: int) -> int:
  """The forward of the usual chain: rows are read once for each tile of columns, experts for each tile."""
  N = T * X
  activation = 2 * N * WIDE
  return 2 * (_gather(N) + _tiled(N, D, WIDE) + activation + _tiled(N, WIDE, D) + _scatter(T))


def chain_backward_bytes(T: int) -> int:
  """Its backward: both activations and the weighed output's rows were kept."""
  N = T * X
  weighed = _gather(N) + N * D  # dy by rows, and the output's rows for the weights' gradient.
  experts = 2 * (N * WIDE * -(-D // PEER_TILE[1]) + N * D * (WIDE // PEER_TILE[2]) + E * D * WIDE)
  return 2 * (weighed + _tiled(N, D, WIDE) + 3 * N * WIDE + experts + _tiled(N, WIDE, D) + _scatter(T))


WIDE = 1920  # F as the chain pads it.


def _tiled(N: int, inner: int, outer: int) -> int:
  """A product of N rows: of [rows, inner] for each tile of columns, of an expert for each tile of rows."""
  visits = -(-N // PEER_TILE[0]) + E - 1  # Groups don't end where tiles do.
  columns = PEER_TILE[2] if outer == WIDE else PEER_TILE[1]
  return N * inner * (outer // columns) + visits * inner * outer + N * outer


def _scatter(T: int) -> int:
  """Each row is read, and its token's sum read and written."""
  return T * X * D + 2 * T * X * D + T * D


def _ours(x_ND, w_EDF, sizes_E, *extras, **how):
  N, experts = x_ND.shape[0], w_EDF.shape[0]
  return tpu.product(x_ND, w_EDF, group_bounds(sizes_E, N, experts), extras=extras, **how)


def _megablox(x_ND, w_EDF, sizes_E):
  w_EDF = jnp.pad(w_EDF, [(0, 0), (0, 0), (0, -F % 128)])  # It takes whole tiles.
  return megablox.gmm(x_ND, w_EDF, sizes_E, jnp.bfloat16, PEER_TILE)


TOKAMAX_TILE = (512, 2688, 384)  # The largest of its kind within the 16 MiB that it asks for.


def _tokamax(x_ND, w_EDF, sizes_E):
  """Its table has no tile for Nano's shapes, and its public function runs only where a TPU is."""
  from tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel import gmm

  precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
  return gmm(x_ND, w_EDF, sizes_E, precision, jnp.bfloat16, tiling=TOKAMAX_TILE)


def _weights(x_ND, dy_NF, sizes_E):
  bounds = group_bounds(sizes_E, x_ND.shape[0], sizes_E.shape[0])
  return tpu.weight_product(x_ND, dy_NF, bounds, dtype=jnp.bfloat16)


_rows = lambda columns: ((ROWS, columns), jnp.bfloat16)
_experts = lambda inner, outer: ((EXPERTS, inner, outer), jnp.bfloat16)
_sizes, _column = ((EXPERTS,), jnp.int32), ((ROWS, 1), jnp.float32)

# name -> (the product, shapes and dtypes of what it takes).
PRODUCTS = {
  "up": (_ours, (_rows(D), _experts(D, F), _sizes)),
  "up_relu2": (functools.partial(_ours, finish=relu2), (_rows(D), _experts(D, F), _sizes)),
  "down": (_ours, (_rows(F), _experts(F, D), _sizes)),
  "down_weighed": (functools.partial(_ours, finish=weigh), (_rows(F), _experts(F, D), _sizes, _column)),
  "down_dx": (functools.partial(_ours, transpose=True), (_rows(D), _experts(F, D), _sizes)),
  "up_dw": (_weights, (_rows(D), _rows(F), _sizes)),
}
# The same, and the tile (rows, summed, columns) that it goes by.
PEERS = {
  "megablox": (_megablox, PRODUCTS["up"][1], PEER_TILE),
  "tokamax": (_tokamax, PRODUCTS["up"][1], TOKAMAX_TILE),
}


def _stretch_flops(name: str) -> float:
  """Useful operations of the stretch that `read_schedule` finds: one step of a tile."""
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


def _schedule(name: str) -> tuple[float, float]:
  """Share of slots and bundles of a program, compiled in a process of its own: its flags are global."""
  with tempfile.TemporaryDirectory() as place:
    environment = os.environ | {
      "TPU_SKIP_MDS_QUERY": "1",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "JAX_PLATFORMS": "cpu",
      "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={place} --xla_jf_dump_llo_text=true",
    }
    command = [sys.executable, "-m", "experiments.bench_schedules", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
      said = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
      reason = (said or ["no message"])[-1]
      raise UserError(f"kernels --static: {name} did not compile ({reason}): pip install 'nemocascade[tpu]'")
    slots, bundles = read_schedule(Path(place))
    return slots, bundles / _stretch_flops(name) * 1e9


def read_schedule(place: Path) -> tuple[float, int]:
  """(share of slots, bundles) of the busiest branch-free stretch of the kernel dumped in a folder."""
  kernel = re.compile(r"(\d+)-(routed_product|routed_weight_product|gmm)[^-]*-\d+-final_bundles.txt")
  (file, stamp), *_ = [(p, m[1]) for p in place.iterdir() if (m := kernel.fullmatch(p.name))]
  (use,) = place.glob(f"{stamp}-*final_hlo-static-per-bundle-utilization.txt")
  _, _, (capacity, *_), _, *rows = (line.split() for line in use.read_text().splitlines() if line.strip())
  busy = [int(row[0]) for row in rows]
  bundle = re.compile(r"\s*(?:0x)?([0-9a-f]+)\s+(?:([A-Z]{2})\s*)?:(.*)")
  found = [m for line in file.read_text().splitlines() if (m := bundle.fullmatch(line))]
  # A label begins a stretch, a branch ends one.
  edges = sorted({0, len(busy), *(int(m[1], 16) for m in found if m[2] or "sbr.rel" in m[3])})
  stretch = max((busy[i:j] for i, j in itertools.pairwise(edges)), key=sum)
  return sum(stretch) / len(stretch) / int(capacity), len(stretch)


def _compile(name: str) -> None:
  """Compiles a program for v5p; the compiler's flags say where its dump goes."""
  fn, shapes, *_ = (PRODUCTS | PEERS)[name]
  chip = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
  place = SingleDeviceSharding(chip)
  with jax.sharding.use_abstract_mesh(_told(chip)):
    jax.jit(fn).lower(*(jax.ShapeDtypeStruct(*of, sharding=place) for of in shapes)).compile()


def _told(chip: jax.Device) -> jax.sharding.AbstractMesh:
  """A mesh of one such chip, by which Pallas' pipelines know what they are lowered for."""
  device = jax.sharding.AbstractDevice(chip.device_kind, chip.num_cores, chip.platform)
  return jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)


if __name__ == "__main__":
  _compile(sys.argv[1])
