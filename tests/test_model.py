"""The static model: what it counts in Triton's intermediate code, what bounds it knows, and what it lets a search choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lagen import data
from lagen.ir.tunable import Config
from lagen.runtime.launches import Shape, gather
from lagen.spec.read import read
from lagen.targets.compile import Report, compile_launches
from lagen.targets.launch import describe
from lagen.targets.model import model, occupancy
from lagen.targets.target import TARGETS, find
from lagen.targets.work import count, evaluate, work
from lagen.tune.job import job
from lagen.tune.modelled import Model
from lagen.tune.outcome import Timed
from lagen.tune.space import space_of

TTIR = """
module {
  tt.func public @k(%q: !tt.ptr<bf16>, %o: !tt.ptr<f32>, %T: i32, %SEG: i32) {
    %c64 = arith.constant 64 : i32
    %c1 = arith.constant 1 : i32
    %c0 = arith.constant 0 : i32
    %cst = arith.constant dense<0.0> : tensor<64x64xf32>
    %0 = arith.divsi %T, %c64 : i32
    %n = arith.minsi %0, %SEG : i32
    %p = tt.splat %q : !tt.ptr<bf16> -> tensor<64x64x!tt.ptr<bf16>>
    %s = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %cst) -> (tensor<64x64xf32>)  : i32 {
      %a = tt.load %p : tensor<64x64x!tt.ptr<bf16>>
      %d = tt.dot %a, %a, %acc, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>
      %e = math.exp %d : tensor<64x64xf32>
      %r = "tt.reduce"(%e) <{axis = 0 : i32}> ({
      ^bb0(%x: f32, %y: f32):
        %z = arith.addf %x, %y : f32
        tt.reduce.return %z : f32
      }) : (tensor<64x64xf32>) -> tensor<64xf32>
      scf.yield %e : tensor<64x64xf32>
    }
    %w = tt.splat %o : !tt.ptr<f32> -> tensor<64x64x!tt.ptr<f32>>
    tt.store %w, %s : tensor<64x64x!tt.ptr<f32>>
    tt.return
  }
}
"""


def test_work_is_counted_in_loops_whose_trips_are_formulas() -> None:
    nest = count(TTIR).to_json()
    done = work(nest, {"T": 640, "SEG": 4})
    assert done.loads == {"q": 4 * 64 * 64 * 2} and done.stores == {"o": 64 * 64 * 4}
    assert done.flops == {"half": 4 * 2 * 64**3} and done.dots == done.chain == 4
    assert done.special == done.reduced == 4 * 64 * 64 and done.elements == 0
    assert work(nest, {"T": 640, "SEG": 99}).chain == 10
    assert evaluate(["div", ["add", "T", 63], 64], {"T": 65}) == 2


ROLES = """
  tt.func public @k(%q: !tt.ptr<f32>, %k: !tt.ptr<f32>, %NY: i32, %T: i32) {
    %c1 = arith.constant 1 : i32
    %c0 = arith.constant 0 : i32
    %c3 = arith.constant 3 : i32
    %pid = tt.get_program_id x : i32
    %role = arith.remsi %pid, %c3 : i32
    %first = arith.cmpi slt, %role, %NY : i32
    scf.if %first {
      scf.for %i = %c0 to %T step %c1  : i32 {
        %a = tt.load %q : !tt.ptr<f32>
      }
    } else {
      %b = tt.load %k : !tt.ptr<f32>
      %far = arith.cmpi sgt, %pid, %T : i32
      scf.if %far {
        tt.store %k, %b : !tt.ptr<f32>
      }
    }
    tt.return
  }
"""


def test_programs_of_different_roles_are_counted_role_by_role() -> None:
    nest = count(ROLES).to_json()
    done = work(nest, {"NY": 2, "T": 6}, 9)  # two programs in three are of the first role
    assert done.loads == {"q": pytest.approx(4 * 6 * 2 / 3), "k": pytest.approx(4 / 3)} and done.chain == 6
    assert done.stores == {"k": pytest.approx(4 / 9)}  # the last alone is far
    many = work(nest, {"NY": 2, "T": 6}, 30_000)
    assert many.loads["q"] == pytest.approx(16, rel=0.02) and many.stores["k"] == pytest.approx(4 / 3, rel=0.02)


def test_an_else_belongs_to_its_own_branch() -> None:
    met, far = (count(ROLES).inner[0].trips, count(ROLES).inner[1].inner[0].trips)
    nested = ROLES.replace("      scf.for", "      scf.if %near {\n        tt.store %q, %x : !tt.ptr<f32>\n      }\n      scf.for").replace(
        "    scf.if %first", "    %near = arith.cmpi eq, %pid, %c1 : i32\n    scf.if %first"
    )
    inner, other = count(nested).inner
    assert inner.trips == met and other.trips == ["sub", 1, met] and other.inner[0].trips == far
    done = work(count(nested).to_json(), {"NY": 2, "T": 6}, 9)  # as without it, but for one program's store
    assert done.loads == work(count(ROLES).to_json(), {"NY": 2, "T": 6}, 9).loads and done.stores["q"] == pytest.approx(4 / 9)


def test_a_loop_down_to_0_is_counted() -> None:
    down = TTIR.replace("arith.constant 0 : i32", "arith.constant -1 : i32").replace("%c0_i32", "%c-1_i32").replace("%c0 ", "%c-1 ")
    assert down != TTIR and work(count(down).to_json(), {"T": 640, "SEG": 4}).chain == 5


def test_occupancy_and_bounds_follow_the_device() -> None:
    target = find("cuda:90")
    launch = describe("m", "k", {}, {}, 4, 2, target)
    report = Report("k", "cuda:90", registers=128, shared_bytes=50_000)
    assert occupancy(report, 4, target) == 4  # 64 K registers; shared memory would hold 4 of them too
    assert occupancy(replace(report, shared_bytes=120_000), 4, target) == 1
    assert occupancy(replace(report, shared_bytes=target.shared_bytes + 1), 4, target) == 0
    nest = {"trips": 1, "loads": {"q": 1 << 20}}
    many = replace(launch, grid=(1320, 1, 1), sizes=(("q", 1 << 30),))
    shared = replace(many, sizes=(("q", 1 << 20),))
    apart, together = (model(x, replace(report, nest=nest), target) for x in (many, shared))
    assert apart.read == 1 << 30 and together.read == 1 << 20 and together.asked == apart.asked == 1320 << 20
    assert apart.seconds > together.seconds and apart.bound in ("memory", "L2")


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "cuda:89", "cuda:120", "hip:gfx942"])
def test_large_defaults_fit_where_shared_memory_is_small(target: str) -> None:
    for name in ("simple_gla", "gla"):
        found = gather(read(data.spec(name)), Shape(4, 4096, 16, 128, 128, torch.bfloat16), find(target), tuned=())
        for g, r in zip(found, compile_launches([g.launch for g in found], workers=1), strict=True):
            assert r.fits(find(target)), f"{name} {g.phase} {r.kernel}: {r.failure or r.shared_bytes}"


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_bytes_of_a_fused_scan_are_the_least_and_the_default_is_never_removed() -> None:
    variant = read(data.spec("simple_gla"))
    j = job(variant, "cuda:90", False, ("forward", "backward"), "bf16", {"K": 128, "V": 128}, 4, 4096, 16)
    judge, space = Model(j, workers=1), space_of(j)
    made = judge.compiled(Config())
    forward = [model(g.launch, r, TARGETS["cuda:90"]) for g, r in made if g.phase == "forward"]
    least = 4 * 4096 * 16 * (4 * 128 * 2 + 2)
    assert sum(m.read + m.written for m in forward) == pytest.approx(least, rel=0.01)
    default = judge.judge(space.default, space.default, ())
    assert isinstance(default, Timed) and default.ratio == pytest.approx(1.0)
    assert judge.confirm(space.default) is None
    assert not {"forward warps", "forward stages"} & {t.name for t in space.tunables if len(t.values) > 1}
