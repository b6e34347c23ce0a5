"""The gates on the built binary, each made to fail once on data that is wrong in one way."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
if not TOOLS.is_dir():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import gates  # noqa: E402

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z4packv:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z4spilv:
  REG:255 STACK:48 SHARED:1024 LOCAL:16 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
\t\tFunction : _Z4packv
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x00000a0000017a02 */
                                                                            /* 0x000fe40000000f00 */
        /*0010*/              @!P0 HMMA.16816.F32 R4, R2, R6, R4 ;          /* 0x0000000000027919 */
        /*0020*/             @UP0  HMMA.16816.F32 R4, R2, R6, R4 ;          /* 0x0000000000027919 */
\t\tFunction : _Z4spilv
        /*0000*/                   EXIT ;                                   /* 0x0000000000027919 */
"""


def both(name: str, stack: int = 0, **opcodes: int) -> list[gates.Kernel]:
    counts = Counter({key.replace("_", "."): value for key, value in opcodes.items()})
    return [gates.Kernel(name, arch, gates.Resources(stack), counts) for arch in gates.ARCHS]


IMAGES = Counter({"sm_80": 2, "sm_90a": 2})


def test_parsing():
    assert gates.parse_resources(RESOURCES) == {
        "_Z4packv": gates.Resources(0, 8, 0),
        "_Z4spilv": gates.Resources(64, 255, 1024),
    }
    opcodes = gates.parse_opcodes(SASS)
    assert opcodes["_Z4packv"] == {"MOV": 1, "HMMA.16816.F32": 2}
    assert opcodes["_Z4spilv"] == {"EXIT": 1}


def test_architectures():
    ptx = Counter({"sm_80": 2})
    assert not gates.check_architectures(both("pack"), IMAGES, ptx, ()).problems
    assert gates.check_architectures([], Counter(), Counter(), ()).problems
    assert "pack is built for sm_80" in gates.check_architectures(both("pack")[:1], IMAGES, ptx, ()).problems[0]
    assert (
        "1 of 2 object files" in gates.check_architectures(both("pack"), IMAGES, Counter({"sm_80": 1}), ()).problems[0]
    )
    rule = gates.ArchRule("pack", ("sm_90a",), "uses wgmma")
    assert not gates.check_architectures(both("pack")[1:] + both("b"), IMAGES, ptx, (rule,)).problems
    assert gates.check_architectures(both("pack"), IMAGES, ptx, (rule,)).problems


def test_stack():
    assert not gates.check_stack(both("pack"), ()).problems
    assert "uses 8 bytes" in gates.check_stack(both("pack", 8), ()).problems[0]
    rule = gates.StackRule("pack", 8, "head_dim 256")
    assert not gates.check_stack(both("pack", 8), (rule,)).problems
    assert gates.check_stack(both("pack", 16), (rule,)).problems
    assert gates.check_stack(both("other"), (rule,)).problems == ["the rule for /pack/ matches no kernel"]


def test_instructions():
    rule = gates.OpcodeRule("attention", r"HMMA\.")
    assert not gates.check_opcodes(both("attention", HMMA_16816=4), (rule,)).problems
    assert len(gates.check_opcodes(both("attention", FFMA=4), (rule,)).problems) == 2
    assert gates.check_opcodes(both("pack"), (rule,)).problems


def test_serialised_wgmma():
    assert not gates.check_wgmma(both("k", HGMMA_64x64x16=8, WARPGROUP_DEPBAR=2)).problems
    assert gates.check_wgmma(both("k", HGMMA_64x64x16=8, WARPGROUP_DEPBAR_LE=8)).problems
    assert not gates.check_wgmma(both("k", HMMA_16816=8)).problems


def test_launches():
    kernels = [
        gates.Kernel(
            "void warpform::(anonymous namespace)::pack<unsigned short, long>(warpform::P<(1)>)", arch, resources
        )
        for arch in gates.ARCHS
        for resources in [gates.Resources(0, 60, 1024)]
    ]

    def launch(
        threads: int = 1024, shared: int = 8192, name: str = "pack<short unsigned int, long int>"
    ) -> gates.Launch:
        return gates.Launch("pack", name, "9.0", "sm_90a", threads, shared, 9216)

    def problems(*launches: gates.Launch, never: dict[str, str] | None = None) -> list[str]:
        return gates.check_launches(kernels, list(launches), never or {}).problems

    assert not problems(launch())
    assert "with 9217 bytes of shared memory" in problems(launch(shared=9217))[0]
    assert "with 66560 registers" in problems(launch(threads=1040))[0]
    # From Hopper on a kilobyte of what cuobjdump counts is the system's.
    assert not problems(launch(shared=9216))
    assert "which is not in the library" in problems(launch(), launch(name="unpack"))[0]
    name = "pack<unsigned short, long>"
    assert problems() == [f"{name} is launched by no call"]
    assert not problems(never={name: "a reason"})
    assert "though it is listed" in problems(launch(), never={name: "a reason"})[0]
    assert "no kernel is called probe" in problems(launch(), never={"probe": "a reason"})[0]


@pytest.mark.slow
def test_every_kernel_is_launched_by_a_call():
    """The gate on the names alone, which asks for no code of other architectures than this build has."""
    from warpform import _library

    tool = gates.find_cuobjdump()
    if importlib.util.find_spec("warpform._C") is None or not _library.build_info()["cuda"] or tool is None:
        pytest.skip("needs warpform._C, kernels and cuobjdump")
    launches = gates.planned_launches()
    assert {launch.capability for launch in launches} == {capability for capability, *_ in gates.MACHINES}
    listed = gates.parse_resources(gates.run([tool, "-res-usage", str(gates.LIBRARY)]))
    kernels = {gates.bare(name) for name in gates.demangle(list(listed))}
    assert len(kernels) > 300
    assert kernels == {gates.bare(launch.kernel) for launch in launches} | gates.NEVER_LAUNCHED.keys()


# ---- the instruction sets of CPU kernels ----

NAMES = """
_ZN8warpform3cpu2v39bias_geluERKNS_14BiasGeluParamsERKNS0_4HostE T 0 40
_ZN8warpform3cpu2v312_GLOBAL__N_17forwardEv t 40 80
memset U
"""


@pytest.mark.parametrize(
    ("symbols", "code", "problem"),
    (
        (NAMES, "vaddps %ymm15,%ymm1,%ymm2", None),
        (NAMES + "_ZN8warpform4sizeEv W 0 10", "", "shares _ZN8warpform4sizeEv"),
        (NAMES + "_ZN8warpform4sizeEv T 0 10", "", "outside of its namespace"),
        (NAMES + "_ZN8warpform3cpu2v44sizeEv U", "", "needs _ZN8warpform3cpu2v44sizeEv"),
        (NAMES + "_Znwm U", "", "needs _Znwm"),
        (NAMES, "vaddps %zmm1,%zmm2,%zmm3", "uses %zmm"),
        (NAMES, "vaddps %ymm1,%ymm17,%ymm3", "uses %ymm17"),
        (NAMES, "vmovups %ymm1{%k1},(%rdi)", "uses %k1"),
    ),
)
def test_an_object_of_cpu_kernels(symbols: str, code: str, problem: str | None) -> None:
    found = gates.check_cpu_object("activation", "v3", symbols, code)
    assert not found if problem is None else len(found) == 1 and problem in found[0]


def test_the_objects_of_cpu_kernels_share_nothing():
    library = gates.LIBRARY
    objects = gates.cpu_objects(library) if library.is_file() else {}
    if not objects or not shutil.which("nm") or not shutil.which("objdump"):
        pytest.skip("needs the build's folder and binutils")
    assert gates.check_cpu_objects(objects).problems == []
