"""The gates on the built binary, each made to fail once on data that is wrong in one way."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
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


def test_names_of_kernels():
    compiler = "forward<short unsigned int, Tile<128, 6, warpform::Major::kDepth, warpform::Major::kOuter> >"
    demangler = (
        "void warpform::forward<unsigned short, warpform::Tile<128, 6, (warpform::Major)0, (warpform::Major)1> >"
        "(warpform::Params)"
    )
    assert gates.bare(compiler) == gates.bare(demangler)
    assert gates.bare(compiler) == "forward<unsigned short, Tile<128, 6, (Major)0, (Major)1> >"
    assert gates.enumerators()["Swizzle::k128"] == "(Swizzle)3"


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


def test_object_files_without_ptx():
    """Those of kernels for sm_90a alone carry none; all others carry PTX of sm_80, and none carries other PTX."""
    kernels, images, ptx = [both("pack")[1], *both("b")], Counter({"sm_80": 2, "sm_90a": 5}), Counter({"sm_80": 2})
    rule = gates.ArchRule("pack", ("sm_90a",), "uses wgmma")
    assert not gates.check_architectures(kernels, images, ptx, (rule,)).problems
    missing = gates.check_architectures(kernels, images, Counter({"sm_80": 1}), (rule,)).problems
    assert missing == ["1 of 2 object files carry PTX for sm_80"]
    assert gates.check_architectures(both("b"), images, ptx, ()).problems == [
        "3 object files have code of sm_90a without PTX, and no kernel is listed for it alone"
    ]
    other = gates.check_architectures(kernels, images, ptx + Counter({"sm_90a": 3}), (rule,)).problems
    assert other == ["3 object files carry PTX for sm_90a, which no GPU needs"]


def test_stack():
    assert not gates.check_stack(both("pack"), ()).problems
    assert "uses 8 bytes" in gates.check_stack(both("pack", 8), ()).problems[0]
    rule = gates.StackRule("pack", 8, "head_dim 256")
    assert not gates.check_stack(both("pack", 8), (rule,)).problems
    assert gates.check_stack(both("pack", 16), (rule,)).problems
    assert gates.check_stack(both("other"), (rule,)).problems == ["the rule for /pack/ matches no kernel"]


def test_instructions():
    rule = gates.OpcodeRule("attention", r"HMMA\.")
    assert not gates.check_opcodes(both("attention", HMMA_16816=4), (rule,), ()).problems
    assert len(gates.check_opcodes(both("attention", FFMA=4), (rule,), ()).problems) == 2
    assert gates.check_opcodes(both("pack"), (rule,), ()).problems


def test_instructions_that_must_not_be_there():
    rule = gates.AbsentRule("attention", r"HMMA\.", "it has wgmma")
    assert not gates.check_opcodes(both("attention", HGMMA_64x64x16=4), (), (rule,)).problems
    assert not gates.check_opcodes([*both("attention", FFMA=4), *both("pack", HMMA_16816=4)], (), (rule,)).problems
    found = gates.check_opcodes(both("attention", HMMA_16816=4), (), (rule,)).problems
    assert found[1] == r"attention (sm_90a) has 4 /HMMA\./: it has wgmma" and len(found) == 2
    assert gates.check_opcodes(both("pack"), (), (rule,)).problems == ["the rule for /attention/ matches no kernel"]


# ---- kernels for Hopper ----

HOPPER_ROW = gates.HopperRule("_hopper<", threads=384, registers=168, waits=4, fences=5)
WAITS, FENCES = "WARPGROUP.DEPBAR.LE", "WARPGROUP.ARRIVE"
HOPPER_OPCODES = {
    "HGMMA.64x128x16.F32.BF16": 32,
    "UTMALDG.3D": 8,
    "SYNCS.ARRIVE.TRANS64": 8,
    "USETMAXREG.DEALLOC.CTAPOOL": 1,
    "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
    WAITS: 4,
    FENCES: 5,
}


def hopper(
    opcodes: dict[str, int] | None = None, registers: int = 168, name: str = "forward_hopper<half, 128>"
) -> gates.Kernel:
    """A kernel as HOPPER_ROW says it, but for `opcodes`; a count of 0 takes one away."""
    return gates.Kernel(name, "sm_90a", gates.Resources(0, registers, 1024), +Counter(HOPPER_OPCODES | (opcodes or {})))


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (hopper(), None),
        (hopper({FENCES: 4}), "has 4 WARPGROUP.ARRIVE, and 5 are written"),
        (hopper(registers=176), "begins with 176 registers a thread, not 168"),
        (hopper({WAITS: 5}), "has 5 WARPGROUP.DEPBAR, and 4 are written"),
        (hopper({WAITS: 3}), "has 3 WARPGROUP.DEPBAR, and 4 are written"),
        (hopper({FENCES: 6}), "has 6 WARPGROUP.ARRIVE, and 5 are written"),
    ],
)
def test_registers_waits_and_fences_of_a_kernel_for_hopper(kernel, problem):
    found = gates.check_wgmma([kernel], (HOPPER_ROW,)).problems
    assert found == ([] if problem is None else [f"forward_hopper<half, 128> (sm_90a) {problem}"])


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ("PPW" + 66 * "E" + 2 * ("PPPPW" + 56 * "E" + "W" + 10 * "E") + "PPW", None),
        ("PPPPW" + 16 * "E" + "W" + 4 * "E", None),
        ("PPPPW" + 15 * "E" + "W" + 5 * "E", "has 5 of 20 exponentials of a step behind its second wait"),
        ("PPPPW" + 16 * "E" + "WPPPPWW" + 16 * "E", "has 16 of 16 exponentials of a step behind its second wait"),
        ("PPW" + 16 * "E" + "PPW", "has no step of two waits"),
    ],
)
def test_softmax_runs_under_products(order, problem):
    kernel = gates.Kernel("varlen_attention_forward_hopper<half>", "sm_90a", order=order)
    found = gates.check_overlap([kernel]).problems
    assert found == ([] if problem is None else [f"{kernel.name} (sm_90a) {problem}"])


def test_a_rule_of_overlap_without_kernels():
    assert "matches no kernel" in gates.check_overlap([hopper()]).problems[0]


def test_order_of_instructions():
    code = """
    Function : first
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0020*/              @!P1 WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/                   FADD R1, R2, R3 ;
        /*0040*/                   MUFU.EX2 R5, R6 ;
    Function : second
        /*0010*/                   MUFU.RCP R5, R6 ;
    """
    assert gates.parse_order(code) == {"first": "PWE", "second": ""}


def test_serialised_wgmma():
    found = gates.check_wgmma([hopper({WAITS: 36})], (HOPPER_ROW,)).problems
    assert "has 36 WARPGROUP.DEPBAR, and 4 are written" in found[0]
    assert "0 rows of HOPPER and may be serialised;" in gates.check_wgmma([hopper({WAITS: 36})], ()).problems[0]
    row = dataclasses.replace(HOPPER_ROW, waits=36)  # a source that waits for each product
    assert not gates.check_wgmma([hopper({WAITS: 36})], (row,)).problems
    assert not gates.check_wgmma(both("k", HMMA_16816=8), ()).problems


def test_each_kernel_for_hopper_has_a_row():
    text = "matches 0 rows of HOPPER; it has 168 registers, 4 waits and 5 fences for 32 wgmma"
    assert gates.check_wgmma([hopper()], ()).problems == [f"forward_hopper<half, 128> (sm_90a) {text}"]
    assert "matches 2 rows" in gates.check_wgmma([hopper()], (HOPPER_ROW, HOPPER_ROW)).problems[0]
    assert gates.check_wgmma(both("pack"), (HOPPER_ROW,)).problems == ["the rule for /_hopper</ matches no kernel"]
    assert "its name lacks hopper" in gates.check_wgmma([hopper(name="forward<half>")], ()).problems[0]


@pytest.mark.parametrize("missing", ["HGMMA", "UTMALDG", "SYNCS", "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"])
def test_instructions_of_kernels_for_hopper(missing):
    rules = (*gates.HOPPER_OPCODES, *gates.WARPGROUPS_OPCODES), gates.HOPPER_ABSENT
    assert not gates.check_opcodes([hopper(), *both("pack", HMMA_16816=1)], *rules).problems
    kernel = hopper({opcode: 0 for opcode in HOPPER_OPCODES if opcode.startswith(missing)})
    (problem,) = gates.check_opcodes([kernel], *rules).problems
    assert missing in problem.replace("\\", "")
    assert "has 2 /HMMA" in gates.check_opcodes([hopper({"HMMA.16816.F32": 2})], *rules).problems[0]


def test_architectures_and_stack_of_kernels_for_hopper():
    images, ptx = Counter({"sm_80": 1, "sm_90a": 2}), Counter({"sm_80": 1})
    kernels = [hopper(), *both("pack")]
    assert not gates.check_architectures(kernels, images, ptx, gates.HOPPER_ONLY).problems
    assert gates.check_architectures([*kernels, *both("b_hopper")], images, ptx, gates.HOPPER_ONLY).problems
    assert gates.check_architectures(kernels, images, ptx, ()).problems
    assert not gates.check_stack(kernels, ()).problems


def test_machines_launch_the_kernels_that_they_have():
    """On compute capability 9.0 those for Hopper, elsewhere those for every GPU; a plan of the wrong one is found."""
    kernels = [hopper(), *both("forward<half, 128>")]

    def launch(kernel: str, capability: str, arch: str, threads: int = 384) -> gates.Launch:
        return gates.Launch("attention", kernel, capability, arch, threads, 200 << 10, 227 << 10)

    def problems(*launches: gates.Launch) -> list[str]:
        return gates.check_launches(kernels, list(launches), {}, (HOPPER_ROW,)).problems

    ampere = launch("forward<half, 128>", "8.0", "sm_80", 128)
    on_hopper = launch("forward_hopper<half, 128>", "9.0", "sm_90a")
    assert not problems(ampere, on_hopper)
    assert problems(ampere) == ["forward_hopper<half, 128> is launched by no call"]
    assert problems(on_hopper) == ["forward<half, 128> is launched by no call"]
    wrong = launch("forward_hopper<half, 128>", "8.0", "sm_80")
    assert "(8.0) which is not in the library for sm_80" in problems(ampere, on_hopper, wrong)[0]
    assert "with 256 threads, not 384" in problems(ampere, launch("forward_hopper<half, 128>", "9.0", "sm_90a", 256))[0]
    more = [hopper(registers=176), *both("forward<half, 128>")]
    assert "with 67584 registers" in gates.check_launches(more, [ampere, on_hopper], {}, (HOPPER_ROW,)).problems[0]


def test_the_rows_of_hopper_fit_a_block():
    for row in gates.HOPPER:
        exchanges = re.search(gates.WARPGROUPS, row.kernel) is not None  # registers between its warpgroups
        assert row.threads % (128 if exchanges else 32) == 0, row
        assert row.registers % 8 == 0 or not exchanges, row
        assert row.threads * row.registers <= gates.REGISTERS_A_BLOCK, row
        assert row.waits > 0 and row.fences > 0, row


# ---- launches ----


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
    assert not problems(never={"pack": "a reason"})
    assert "though it is listed" in problems(launch(), never={"pack": "a reason"})[0]
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
    never = {kernel for kernel in kernels if kernel.partition("<")[0] in gates.NEVER_LAUNCHED}
    assert kernels == {gates.bare(launch.kernel) for launch in launches} | never


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
