"""The routed matmul against peers: times on this machine, or the TPU compiler's own schedule."""

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import megablox
from jax.sharding import SingleDeviceSharding

from nemocascade.errors import UserError
from nemocascade.kernels import routed_matmul_tpu as tpu
from nemocascade.kernels.groups import group_bounds
from nemocascade.kernels.routed_matmul import routed_matmul

REPEATS = 3  # In turns; the best of each is compared.
D, F, E, X = 2688, 1856, 128, 6  # Nano's.
ROWS = 8192  # Of the static products; a kernel's schedule does not depend on it.
EXPERTS = 16  # Nor on this.


def cases(D: int = 256, F: int = 192, rows: int = 4096) -> Iterator[dict]:
  """The platform's own form against jax.lax.ragged_dot on uneven random loads, in fp32 on a CPU."""
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  for experts in (16, 128):
    keys = jax.random.split(jax.random.key(experts), 3)
    x_ND = jax.random.normal(keys[0], (rows, D), dtype)
    w_EDF = jax.random.normal(keys[1], (experts, D, F), dtype)
    sizes_E = jnp.bincount(jax.random.randint(keys[2], (rows,), 0, experts), length=experts)
    sizes_E = sizes_E.astype(jnp.int32)
    own, peer = (
      jax.jit(fn).lower(x_ND, w_EDF, sizes_E).compile() for fn in (routed_matmul, jax.lax.ragged_dot)
    )
    best = {"ours": float("inf"), "peer": float("inf")}
    for _ in range(REPEATS):
      for who, act in (("peer", peer), ("ours", own)):
        best[who] = min(best[who], _seconds(lambda: act(x_ND, w_EDF, sizes_E)))
    ours, theirs = (2 * rows * D * F / best[who] / 1e9 for who in ("ours", "peer"))
    yield dict(
      case=f"forward_{experts}_experts", ours=ours, peer=theirs, peer_name="jax.lax.ragged_dot",
      unit="GFLOP/s", ratio=ours / theirs,
    )  # fmt: skip


def _seconds(act: Callable[[], jax.Array]) -> float:
  began = time.perf_counter()
  jax.block_until_ready(act())
  return time.perf_counter() - began


def static_cases() -> Iterator[dict]:
  """What v5p's compiler made of the products of Nano's experts, and bytes of the whole routed MLP.

  Of a kernel the branch-free stretch counts in which the matrix units do most: the loop that whole
  tiles spend their time in. Bundles are those of 1e9 useful operations, padding being none.
  """
  peer = _schedule("megablox")
  for name in [name for name in PROGRAMS if name != "megablox"]:
    ours = _schedule(name)
    line = dict(peer_name="megablox gmm (512, 896, 640), forward of up")
    yield line | dict(
      case=f"{name}_slots", ours=ours[0], peer=peer[0], unit="share of matmul slots", ratio=ours[0] / peer[0]
    )
    yield line | dict(
      case=f"{name}_bundles", ours=ours[1], peer=peer[1], unit="bundles/GFLOP", ratio=peer[1] / ours[1]
    )
  for tokens in (4096, 32768, 262144):
    ours, peer = mlp_bytes(tokens), megablox_mlp_bytes(tokens)
    yield dict(
      case=f"mlp_forward_{tokens}_tokens", ours=ours / 1e9, peer=peer / 1e9, unit="GB of HBM",
      peer_name="gather, megablox, activation, megablox, scatter-add", ratio=peer / ours,
    )  # fmt: skip


def mlp_bytes(T: int) -> int:
  """HBM bytes of our routed MLP's forward: every array times the passes over it; bf16."""
  N = T * X
  gather, up, down = 2 * N * D, N * (D + F) + E * D * F, N * (F + D) + E * D * F
  weights = N * 512 // 2  # A column of fp32 takes 128 lanes.
  combine = 2 * N * D + N * D + T * D  # A token's rows side by side, then their sum.
  return 2 * (gather + up + down + weights + combine)


def megablox_mlp_bytes(T: int) -> int:
  """The same of the usual chain: rows are read once for each tile of columns, experts for each tile."""
  N, rows, wide = T * X, 512, 1920
  visits = -(-N // rows) + E - 1  # Groups don't end where tiles do.
  gather, activation = 2 * N * D, 2 * N * wide
  up = N * D * (wide // 640) + visits * D * wide + N * wide
  down = N * wide * (D // 896) + visits * D * wide + N * D
  scatter = N * D + 2 * N * D + T * D  # Each row is read, and its token's sum read and written.
  return 2 * (gather + up + activation + down + scatter)


def _relu2(h):
  return jnp.square(jnp.maximum(h, 0.0))


def _ours(x_ND, w_EDF, sizes_E, **how):
  N, (experts, D, F) = x_ND.shape[0], w_EDF.shape
  bounds = group_bounds(sizes_E, N, experts)
  return tpu.product(x_ND, w_EDF, bounds, tile=tpu.choose_tile(N, experts, D, F), **how)


def _megablox(x_ND, w_EDF, sizes_E):
  w_EDF = jnp.pad(w_EDF, [(0, 0), (0, 0), (0, -F % 128)])  # It takes whole tiles.
  return megablox.gmm(x_ND, w_EDF, sizes_E, jnp.bfloat16, (512, 896, 640))


# name -> (the product, columns of a row, columns of an expert, whether the experts lie transposed).
PROGRAMS = {
  "up": (_ours, D, F, False),
  "up_relu2": (functools.partial(_ours, finish=_relu2), D, F, False),
  "down": (_ours, F, D, False),
  "down_dx": (functools.partial(_ours, transpose=True), D, F, True),
  "megablox": (_megablox, D, F, False),
}


def _stretch_flops(name: str) -> float:
  """Useful operations of the stretch that `_read` finds: one chunk of a tile."""
  _, inner, outer, _ = PROGRAMS[name]
  if name == "megablox":
    return 2 * 512 * 896 * 640 * F / 1920
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
    command = [sys.executable, "-m", "experiments.bench_kernels", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
      reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
      raise UserError(f"kernels --static: {name} did not compile ({reason}): pip install 'nemocascade[tpu]'")
    slots, bundles = read_schedule(Path(place))
    return slots, bundles / _stretch_flops(name) * 1e9


def read_schedule(place: Path) -> tuple[float, int]:
  """(share of slots, bundles) of the busiest branch-free stretch of the kernel dumped in a folder."""
  kernel = re.compile(r"(\d+)-(routed_product|gmm)[^-]*-\d+-final_bundles.txt")
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
  fn, inner, outer, transpose = PROGRAMS[name]
  chip = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
  of = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))
  w = (EXPERTS, outer, inner) if transpose else (EXPERTS, inner, outer)
  jax.jit(fn).lower(
    of(ROWS, inner, dtype=jnp.bfloat16), of(*w, dtype=jnp.bfloat16), of(EXPERTS, dtype=jnp.int32)
  ).compile()


if __name__ == "__main__":
  _compile(sys.argv[1])
