"""Gates on the built binary that need no GPU: architectures, stack, tensor-core instructions, wgmma, launches, and the
instruction sets of CPU kernels.

    python tools/gates.py [libwarpform.so]

Reads the binary with cuobjdump (Python packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or a toolkit's), not a
compiler's log, because a cached build prints none. The objects of CPU kernels it reads with nm and objdump, in the
folder of the build. Prints a table; exits 0 only if every gate passed.
"""

from __future__ import annotations

import filecmp
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "python" / "warpform" / "libwarpform.so"

# Every kernel must exist as machine code for each of these, and every object file must carry PTX for later GPUs.
ARCHS = ("sm_80", "sm_90a")
PTX_ARCH = "sm_80"


@dataclass(frozen=True)
class StackRule:
    """Kernels that may use stack: up to `size` bytes in `archs`, because of `reason`."""

    kernel: str
    size: int
    reason: str
    archs: tuple[str, ...] = ARCHS


@dataclass(frozen=True)
class OpcodeRule:
    """Kernels whose point is an instruction: `opcode` (a regular expression) must occur in each of `archs`."""

    kernel: str
    opcode: str
    archs: tuple[str, ...] = ARCHS


@dataclass(frozen=True)
class AbsentRule:
    """Kernels that must do without an instruction: `opcode` (a regular expression) occurs nowhere, as `reason` says."""

    kernel: str
    opcode: str
    reason: str


@dataclass(frozen=True)
class ArchRule:
    """Kernels that exist for `archs` only, because of `reason`."""

    kernel: str
    archs: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class HopperRule:
    """A kernel on wgmma and TMA, in all its instances that `kernel` matches.

    Threads of a block, and registers a thread before setmaxnreg moves them. waits: how many WARPGROUP.DEPBAR
    (wgmma_wait) the machine code has; fences: how many WARPGROUP.ARRIVE (wgmma_fence). Both are
    counted in the source, in an unrolled loop as often as it is unrolled.
    """

    kernel: str
    threads: int
    registers: int
    waits: int
    fences: int


# `kernel` is a regular expression, searched in the demangled name. A rule that matches no kernel fails its gate.
STACK: tuple[StackRule, ...] = (
    StackRule(
        r"window_attention_backward_keys<.*, 128>",
        24,
        "all 255 registers are taken; what waits is of the window, written and read outside of the products",
    ),
    StackRule(
        r"fft_conv_kernel<.*FftSize<1024>",
        8,
        "ptxas stops at 64 registers, one value of the outer loops short",
        ("sm_90a",),
    ),
    StackRule(
        r"fft_conv_kernel<.*FftSize<2048>",
        8,
        "ptxas stops at 64 registers, one value of the outer loops short",
        ("sm_80",),
    ),
)
ATTENTION = r"(varlen|window)_attention_(forward|backward_(keys|queries|short|bias))<"
MONARCH = r"(block_gemm|block_weight_gradient|monarch_forward|glu_(forward|gradient))<"
STEPS = r"varlen_attention_(forward|backward_(keys|queries))<.*\bAttentionStep>"
VECTORS = (
    r"(gather_(long|short)_rows<uint4,|bias_gelu(_backward)?_kernel<(float, 4|\w+, 8),"
    r"|row_norm(_backward)?_kernel<.+, (float, 4|\w+, 8), \d+, \d+>)"
)
SHORT_CONV = r"short_conv_gate(_backward)?_kernel<"
SPATIAL = r"(depthwise_conv2d(_backward)?|pool_mixer(_sums|_backward)?)_kernel<"
MIX = r"window_mix_(forward|gradient|weight_gradient)<"
MIX_HALF = r"window_mix_(forward|gradient|weight_gradient)<(__half|__nv_bfloat16)>"
HIDDEN = r"hidden_(gather|scatter|weight_grad)<"
FFT_CONV = r"fft_conv_(gradient_)?kernel<"
OPCODES: tuple[OpcodeRule, ...] = (
    OpcodeRule(ATTENTION, r"HMMA\.16816\.F32"),  # tensor cores, accumulating in float32
    OpcodeRule(ATTENTION, r"LDSM\."),  # ldmatrix
    OpcodeRule(ATTENTION, r"LDGSTS\."),  # cp.async
    # The sums of dQ: two floats at once, where the machine has it.
    OpcodeRule(r"varlen_attention_backward_keys<.*(ScaleOnly|SoftcapAlibi)", r"REDG?\.E\.ADD\.F32x2", ("sm_90a",)),
    OpcodeRule(r"column_sum_(whole|split)<true>", r"LDG\..*128"),
    OpcodeRule(r"column_sum_(whole|split)<true>", r"STG\..*128"),
    OpcodeRule(MONARCH, r"HMMA\.16816\.F32"),
    OpcodeRule(MONARCH, r"LDSM\."),
    OpcodeRule(MONARCH, r"LDGSTS\."),
    OpcodeRule(MONARCH, r"STG\..*128"),  # from registers, without shared memory between
    OpcodeRule(r"(block_gemm|monarch_forward)_hopper<", r"STG\..*128", ("sm_90a",)),
    OpcodeRule(r"monarch_forward_hopper<", r"STSM\.", ("sm_90a",)),  # stmatrix
    OpcodeRule(FFT_CONV, r"HMMA\.16816\.F32"),
    OpcodeRule(FFT_CONV, r"LDSM\..*\.MT88"),  # ldmatrix, transposing
    OpcodeRule(FFT_CONV, r"LDG\..*128"),
    OpcodeRule(HIDDEN, r"HMMA\.16816\.F32"),
    OpcodeRule(HIDDEN, r"LDSM\."),
    OpcodeRule(HIDDEN, r"LDGSTS\."),
    OpcodeRule(r"hidden_(gather|scatter)<", r"STG\..*128"),
    OpcodeRule(r"hidden_(gather|scatter)_gemv<", r"LDG\..*128"),
    OpcodeRule(r"hidden_(gather|scatter)_hopper<", r"LDGSTS\..*128", ("sm_90a",)),  # rows of tokens
    OpcodeRule(r"hidden_(gather|scatter)_hopper<", r"STG\..*128", ("sm_90a",)),
    OpcodeRule(r"hidden_gather_hopper<.*, true>", r"LDSM\.", ("sm_90a",)),
    OpcodeRule(STEPS, r"HMMA\.16816\.F32"),  # ring attention's policy of the same kernels
    OpcodeRule(STEPS, r"LDG\..*64"),  # the float32 state, 8 bytes a thread
    OpcodeRule(STEPS, r"STG\..*64"),
    OpcodeRule(VECTORS, r"LDG\..*128"),  # 16 bytes a thread
    OpcodeRule(VECTORS, r"STG\..*128"),
    OpcodeRule(MIX_HALF, r"HMMA\.16816\.F32"),
    OpcodeRule(MIX_HALF, r"LDSM\."),
    OpcodeRule(r"window_mix_(forward|gradient)<(__half|__nv_bfloat16)>", r"LDSM\..*\.MT88"),  # ldmatrix, transposing
    OpcodeRule(r"window_mix_(forward|gradient)<", r"LDGSTS\..*128"),  # slabs of the weight
    OpcodeRule(MIX, r"LDG\..*128"),  # 16 bytes of a token a lane
    OpcodeRule(MIX, r"STG\..*128"),
    OpcodeRule(SHORT_CONV, r"LDGSTS\..*128"),
    OpcodeRule(SHORT_CONV, r"STG\..*128"),
    OpcodeRule(r"short_conv_gate_backward_kernel<", r"LDG\..*128"),
    OpcodeRule(SPATIAL, r"LDGSTS\..*128"),  # tiles with their halo
    OpcodeRule(r"pool_statistics_kernel<", r"LDG\..*128"),
)
ABSENT: tuple[AbsentRule, ...] = (
    AbsentRule(r"window_mix_\w+<float>", r"HMMA\.", "products of float32 are exact to float32, which TF32 is not"),
)
ONLY: tuple[ArchRule, ...] = ()

# Kernels for compute capability 9.0 alone, and no others, have this in their names. Each of them matches one row of
# HOPPER, and each row a kernel. Registers: 168 with 384 threads (two warpgroups of consumers), 128 with 512 (three).
# The gate says of a kernel without a row what its machine code has; a row holds what the source has.
HOPPER_NAME = "hopper"
HOPPER: tuple[HopperRule, ...] = (
    # A branch for each of four depths.
    HopperRule(r"wgmma_product_hopper<.*ProductLeft\)[01],", threads=128, registers=58, waits=4, fences=4),
    HopperRule(r"wgmma_product_hopper<.*ProductLeft\)2,", threads=128, registers=74, waits=4, fences=4),
    # One wait before the loops and one behind them, two in each of three loops, or in one where nothing is masked but
    # the end; a fence before, one behind, and one in each loop.
    HopperRule(r"varlen_attention_forward_hopper<.*<64, 192, 128, ", threads=512, registers=128, waits=8, fences=5),
    HopperRule(
        r"varlen_attention_forward_hopper<.*<(64|128), 128, 128, ", threads=384, registers=168, waits=8, fences=5
    ),
    HopperRule(r"varlen_attention_forward_hopper<.*<128, 128, 176, ", threads=384, registers=168, waits=4, fences=3),
    HopperRule(r"\bblock_gemm_hopper<", threads=384, registers=168, waits=2, fences=2),
    # One warpgroup of consumers and a warp that loads, which leave registers enough without setmaxnreg. Two products.
    HopperRule(r"\bmonarch_forward_hopper<", threads=160, registers=163, waits=4, fences=4),
    # With gates the left operand takes its way through registers: a group for each of four products of a step.
    HopperRule(r"hidden_gather_hopper<.*, true>", threads=384, registers=168, waits=6, fences=5),
    HopperRule(r"hidden_gather_hopper<.*, false>", threads=384, registers=168, waits=2, fences=2),
    HopperRule(r"hidden_scatter_hopper<", threads=384, registers=168, waits=2, fences=2),
)
HOPPER_OPCODES: tuple[OpcodeRule, ...] = (
    OpcodeRule(HOPPER_NAME, r"HGMMA\.", ("sm_90a",)),  # wgmma
    OpcodeRule(HOPPER_NAME, r"UTMALDG\.", ("sm_90a",)),  # TMA
    OpcodeRule(HOPPER_NAME, r"SYNCS\.", ("sm_90a",)),  # mbarrier
)
WARPGROUPS = r"(?<!wgmma_product)(?<!monarch_forward)_hopper"  # kernels of several
WARPGROUPS_OPCODES: tuple[OpcodeRule, ...] = (
    OpcodeRule(WARPGROUPS, r"USETMAXREG\.DEALLOC", ("sm_90a",)),  # producers give registers
    OpcodeRule(WARPGROUPS, r"USETMAXREG\.TRY_ALLOC", ("sm_90a",)),  # consumers take them
)
HOPPER_ABSENT: tuple[AbsentRule, ...] = (
    AbsentRule(HOPPER_NAME, r"HMMA\.", "mma.sync beside wgmma waits for shared memory that wgmma does not need"),
)
HOPPER_ONLY: tuple[ArchRule, ...] = (ArchRule(HOPPER_NAME, ("sm_90a",), "wgmma and TMA"),)
if any(row.threads > 128 for row in HOPPER):
    OPCODES += WARPGROUPS_OPCODES
# Kernels that compute their softmax while products run.
OVERLAPPED = r"varlen_attention_forward_hopper<"
if HOPPER:
    OPCODES += HOPPER_OPCODES
    ABSENT += HOPPER_ABSENT
    ONLY += HOPPER_ONLY


# No op that can be planned launches these kernels (without template arguments), because of a reason.
NEVER_LAUNCHED: dict[str, str] = {
    "probe": "it is what the runtime is asked about: whether the GPU has machine code of this library",
    "wgmma_product_hopper": "the test op _wgmma_product launches it, which has no reference and no plan",
}

# Registers that code of an instruction set must not touch. csrc/cpu is compiled once for each.
WIDER = {"v3": re.compile(r"%zmm|%k[1-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")}
# What objects of CPU kernels may take from elsewhere: the C library, giving up the core while another thread works, and
# cleaning up behind an exception of the host.
CPU_NEEDS = frozenset(
    (
        *("memcpy", "memset", "memmove", "memcmp"),
        *("logf", "exp2f", "log2f", "expf", "tanhf", "sqrtf"),
        "sched_yield",
        *("__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"),
        *("_Unwind_Resume", "__gxx_personality_v0", "DW.ref.__gxx_personality_v0"),
    )
)

# Launches are planned for these GPUs: compute capability, the architecture whose code it runs, SMs, and bytes of shared
# memory that a block may have.
MACHINES: tuple[tuple[str, str, int, int], ...] = (
    ("8.0", "sm_80", 108, 163 * 1024),
    ("8.9", "sm_80", 142, 99 * 1024),
    ("9.0", "sm_90a", 132, 227 * 1024),
)
REGISTERS_A_BLOCK = 65536
# What the system takes of each block's shared memory from Hopper on. cuobjdump counts it with the static memory, and
# the limit of a block leaves it out.
RESERVED = {"sm_90a": 1024}


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: stack and shared memory in bytes, without what a launch adds, and registers a thread."""

    stack: int = 0
    registers: int = 0
    shared: int = 0


@dataclass
class Kernel:
    """One kernel in one architecture: what it takes, and how often each opcode occurs."""

    name: str
    arch: str
    resources: Resources = Resources()
    opcodes: Counter[str] = field(default_factory=Counter)
    order: str = ""  # of MARKS, a letter for each instruction

    @property
    def stack(self) -> int:
        return self.resources.stack


@dataclass(frozen=True)
class Launch:
    """One launch that an op plans for a machine: the compute capability, and the architecture whose code it runs."""

    op: str
    kernel: str
    capability: str
    arch: str
    threads: int
    shared: int  # dynamic, bytes a block
    limit: int  # of static and dynamic shared memory together, bytes a block


@dataclass(frozen=True)
class Verdict:
    gate: str
    problems: list[str]
    summary: str
    asked: bool = True


# ---- reading ----


def find_cuobjdump() -> str | None:
    """cuobjdump of the Python packages, else of a toolkit."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("cu[0-9]*/bin/cuobjdump"), reverse=True):
            return str(path)
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("cuobjdump") or shutil.which(str(Path(home) / "bin" / "cuobjdump"))


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gates: {' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if not tool or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def parse_resources(text: str) -> dict[str, Resources]:
    """Resources by kernel, of `cuobjdump -res-usage`. LOCAL is stack too, under another name."""
    usage: dict[str, Resources] = {}
    line = r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *numbers in re.findall(line, text):
        registers, stack, shared, local = map(int, numbers)
        before = usage.get(name, Resources())
        usage[name] = Resources(
            max(before.stack, stack + local), max(before.registers, registers), max(before.shared, shared)
        )
    return usage


INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
# The instructions between which the order matters: products, waits for them, exponentials.
MARKS = {"HGMMA.": "P", "WARPGROUP.DEPBAR": "W", "MUFU.EX2": "E"}


def parse_order(text: str) -> dict[str, str]:
    """The letters of MARKS by kernel, in the order of the machine code, of `cuobjdump -sass`."""
    kernels: dict[str, str] = {}
    for function, code in zip(
        *[iter(re.split(r"^\s*Function : (\S+)", text, flags=re.MULTILINE)[1:])] * 2, strict=True
    ):
        opcodes = (found[1] for found in map(INSTRUCTION.match, code.splitlines()) if found)
        kernels[function] = "".join(letter for o in opcodes for mark, letter in MARKS.items() if o.startswith(mark))
    return kernels


def parse_opcodes(text: str) -> dict[str, Counter[str]]:
    """Opcodes by kernel, of `cuobjdump -sass`."""
    kernels: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in text.splitlines():
        function = re.match(r"\s*Function : (\S+)", line)
        if function:
            current = kernels.setdefault(function[1], Counter())
            continue
        instruction = INSTRUCTION.match(line)
        if instruction and current is not None:
            current[instruction[1]] += 1
    return kernels


def read_arch(tool: str, library: Path, arch: str) -> list[Kernel]:
    """All kernels of one architecture. Not cubin by cubin: extracted, those of source files of one name overwrite
    each other."""
    usage = parse_resources(run([tool, "-res-usage", "-arch", arch, str(library)]))
    code = run([tool, "-sass", "-arch", arch, str(library)])
    opcodes, order = parse_opcodes(code), parse_order(code)
    if usage.keys() != opcodes.keys():
        raise SystemExit(f"gates: cuobjdump lists {len(usage)} kernels of {arch} and disassembles {len(opcodes)}")
    return [Kernel(kernel, arch, resources, opcodes[kernel], order[kernel]) for kernel, resources in usage.items()]


def read_library(tool: str, library: Path) -> tuple[list[Kernel], Counter[str], Counter[str]]:
    """All kernels, and how many machine-code and PTX images there are by architecture."""
    images = re.findall(r"^ELF file.*\.(sm_\w+)\.cubin$", run([tool, "-lelf", str(library)]), re.MULTILINE)
    ptx = re.findall(r"^PTX file.*\.(sm_\w+)\.ptx$", run([tool, "-lptx", str(library)]), re.MULTILINE)
    kernels: list[Kernel] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(lambda arch: read_arch(tool, library.resolve(), arch), sorted(set(images))):
            kernels += found
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        kernel.name = name
    return kernels, Counter(images), Counter(ptx)


def planned_launches() -> list[Launch]:
    """As plan_launches says, whatever WARPFORM_HOPPER is."""
    setting = os.environ.pop("WARPFORM_HOPPER", None)
    try:
        return plan_launches()
    finally:
        if setting is not None:
            os.environ["WARPFORM_HOPPER"] = setting


def plan_launches() -> list[Launch]:
    """Every launch of the calls in every_kernel.py, on each machine that has room for it."""
    import warpform._C as module
    from every_kernel import every_call
    from warpform.cli.self_test import NO_ROOM, ROOM_FOR_ALL

    calls = list(every_call())
    found: dict[Launch, None] = {}
    for capability, arch, sm_count, limit in MACHINES:
        machine = {
            "sm_count": sm_count,
            "shared_memory_limit": limit,
            "capability": int(capability.replace(".", "")),
        }
        for op, args, kwargs in calls:
            if module.supported(op) is not None:
                continue
            try:
                plan = module.launch_plan(op, *args, **machine, **kwargs)
            except ValueError as none:
                # Any other refusal is a mistake in every_kernel.py, and on larger machines there is room for all.
                if NO_ROOM not in str(none) or limit >= ROOM_FOR_ALL:
                    raise
                continue
            for each in plan["launches"]:
                kernel = each["kernel"]
                found[Launch(op, kernel, capability, arch, each["threads"], each["shared_bytes"], limit)] = None
    return list(found)


# ---- gates ----


@functools.cache
def enumerators() -> dict[str, str]:
    """What a demangler calls an enumerator of the kernels, (Major)0, by what a compiler calls it, Major::kDepth."""
    found = {}
    for path in sorted((ROOT / "csrc" / "kernels").rglob("*.*h")):
        text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        for kind, names in re.findall(r"\benum class (\w+)[^{;]*\{([^}]*)\}", text):
            number = -1
            for entry in filter(None, map(str.strip, names.split(","))):
                name, _, value = entry.partition("=")
                number = int(value, 0) if value else number + 1
                found[f"{kind}::{name.strip()}"] = f"({kind}){number}"
    return found


def bare(name: str) -> str:
    """A kernel's name and its template arguments, spelled alike by a compiler and by a demangler.

    A compiler leaves out arguments that are a template's defaults, so templates that name a kernel must have none.
    """
    name = re.sub(r"warpform::|\(anonymous namespace\)::", "", name.removeprefix("void "))
    name = name.replace("short unsigned int", "unsigned short").replace("long int", "long")
    name = re.sub(r"\w+::k\w+", lambda found: enumerators().get(found[0], found[0]), name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def short(name: str) -> str:
    """A kernel's name without its parameters."""
    return re.sub(r"\(.*", "", name.removeprefix("void "))[:100]


Rules = (
    tuple[StackRule, ...]
    | tuple[OpcodeRule, ...]
    | tuple[AbsentRule, ...]
    | tuple[ArchRule, ...]
    | tuple[HopperRule, ...]
)


def stale(rules: Rules, kernels: list[Kernel]) -> list[str]:
    return [
        f"the rule for /{rule.kernel}/ matches no kernel"
        for rule in rules
        if not any(re.search(rule.kernel, kernel.name) for kernel in kernels)
    ]


def check_architectures(
    kernels: list[Kernel], images: Counter[str], ptx: Counter[str], only: tuple[ArchRule, ...] = ONLY
) -> Verdict:
    problems = stale(only, kernels)
    by_name: dict[str, set[str]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, set()).add(kernel.arch)
    if not by_name:
        problems.append("the library holds no kernel")
    for name, archs in by_name.items():
        wanted = next((set(rule.archs) for rule in only if re.search(rule.kernel, name)), set(ARCHS))
        if archs != wanted:
            problems.append(f"{short(name)} is built for {', '.join(sorted(archs))}, not {', '.join(sorted(wanted))}")
    for arch in ARCHS:
        if not images[arch]:
            problems.append(f"no machine code for {arch}")
    # Object files of kernels for one architecture alone have neither code of PTX_ARCH nor PTX.
    if ptx[PTX_ARCH] < images[PTX_ARCH] or not ptx[PTX_ARCH]:
        problems.append(f"{ptx[PTX_ARCH]} of {images[PTX_ARCH]} object files carry PTX for {PTX_ARCH}")
    listed = {arch for rule in only for arch in rule.archs}
    for arch in ARCHS:
        alone = images[arch] - images[PTX_ARCH]
        if alone > 0 and arch not in listed:
            problems.append(
                f"{alone} object files have code of {arch} without PTX, and no kernel is listed for it alone"
            )
    for arch in sorted(ptx.keys() - {PTX_ARCH}):
        problems.append(f"{ptx[arch]} object files carry PTX for {arch}, which no GPU needs")
    summary = f"{len(by_name)} kernels in {', '.join(ARCHS)}; PTX of {PTX_ARCH} in {ptx[PTX_ARCH]} files"
    return Verdict("architectures", problems, summary)


def check_stack(kernels: list[Kernel], rules: tuple[StackRule, ...] = STACK) -> Verdict:
    problems = stale(rules, kernels)
    allowed = 0
    for kernel in kernels:
        limit = max(
            (rule.size for rule in rules if kernel.arch in rule.archs and re.search(rule.kernel, kernel.name)),
            default=0,
        )
        allowed += 0 < kernel.stack <= limit
        if kernel.stack > limit:
            problems.append(
                f"{short(kernel.name)} ({kernel.arch}) uses {kernel.stack} bytes of stack, allowed are {limit}"
            )
    none = sum(kernel.stack == 0 for kernel in kernels)
    return Verdict("stack", problems, f"{none} of {len(kernels)} use none, {allowed} what is listed for them")


def check_opcodes(
    kernels: list[Kernel], rules: tuple[OpcodeRule, ...] = OPCODES, absent: tuple[AbsentRule, ...] = ABSENT
) -> Verdict:
    problems = stale(rules, kernels) + stale(absent, kernels)
    checked: set[tuple[str, str]] = set()
    for rule in rules:
        for kernel in kernels:
            if kernel.arch in rule.archs and re.search(rule.kernel, kernel.name):
                checked.add((kernel.name, kernel.arch))
                if not any(re.match(rule.opcode, opcode) for opcode in kernel.opcodes):
                    problems.append(f"{short(kernel.name)} ({kernel.arch}) has no /{rule.opcode}/")
    for never in absent:
        for kernel in kernels:
            count = sum(count for opcode, count in kernel.opcodes.items() if re.match(never.opcode, opcode))
            if count and re.search(never.kernel, kernel.name):
                problems.append(f"{short(kernel.name)} ({kernel.arch}) has {count} /{never.opcode}/: {never.reason}")
    return Verdict(
        "instructions", problems, f"{len(checked)} kernels checked" if checked else "no kernel is listed yet"
    )


def count_of(kernel: Kernel, *opcodes: str) -> int:
    """How many instructions of a kernel begin with one of `opcodes`."""
    return sum(count for opcode, count in kernel.opcodes.items() if opcode.startswith(opcodes))


def check_wgmma(kernels: list[Kernel], rules: tuple[HopperRule, ...] = HOPPER) -> Verdict:
    """Kernels on wgmma have the registers, waits and fences that their rows say.

    ptxas serialises wgmma by a wait behind every one, and it adds fences where they are missing. The source of a kernel
    may wait for each product too, so the counts are those of the source.
    """
    problems = stale(rules, kernels)
    users = 0
    for kernel in kernels:
        where = f"{bare(kernel.name)} ({kernel.arch})"
        products = count_of(kernel, "HGMMA", "QGMMA", "IGMMA")
        waits, fences = count_of(kernel, "WARPGROUP.DEPBAR"), count_of(kernel, "WARPGROUP.ARRIVE")
        registers = kernel.resources.registers
        users += products > 0
        if HOPPER_NAME not in kernel.name:
            if products:
                problems.append(f"{where} has {products} wgmma, and its name lacks {HOPPER_NAME}")
            continue
        rows = [rule for rule in rules if re.search(rule.kernel, kernel.name)]
        if len(rows) != 1:
            serial = " and may be serialised" if waits >= products > 1 else ""
            problems.append(
                f"{where} matches {len(rows)} rows of HOPPER{serial}; it has {registers} registers, {waits} waits and "
                f"{fences} fences for {products} wgmma"
            )
            continue
        row = rows[0]
        if registers != row.registers:
            problems.append(f"{where} begins with {registers} registers a thread, not {row.registers}")
        if waits != row.waits:
            problems.append(f"{where} has {waits} WARPGROUP.DEPBAR, and {row.waits} are written")
        if fences != row.fences:
            problems.append(f"{where} has {fences} WARPGROUP.ARRIVE, and {row.fences} are written")
    return Verdict("wgmma", problems, f"{users} kernels, none serialised" if users else "no kernel uses it yet")


def check_overlap(kernels: list[Kernel], overlapped: str = OVERLAPPED) -> Verdict:
    """The softmax runs under products: of a step's exponentials four in five stand before its second wait.

    A step issues S and P V, waits for S, and after its softmax for P V. In straight code ptxas moves that second wait
    in front of the exponentials, and then P V hides nothing.
    """
    problems, steps = [], 0
    found = [kernel for kernel in kernels if re.search(overlapped, kernel.name)]
    if not found:
        problems.append(f"the rule for /{overlapped}/ matches no kernel")
    for kernel in found:
        of_kernel = [(len(a), len(b)) for a, b in re.findall(r"P+W(E*)W(E*)", kernel.order)]
        steps += len(of_kernel)
        if not of_kernel:
            problems.append(f"{bare(kernel.name)} ({kernel.arch}) has no step of two waits")
        for under, behind in of_kernel:
            if under < 4 * behind:
                text = f"has {behind} of {under + behind} exponentials of a step behind its second wait"
                problems.append(f"{bare(kernel.name)} ({kernel.arch}) {text}")
    return Verdict("overlap", problems, f"{len(found)} kernels, {steps} steps whose softmax runs under products")


def check_launches(
    kernels: list[Kernel],
    launches: list[Launch],
    never: dict[str, str] = NEVER_LAUNCHED,
    rules: tuple[HopperRule, ...] = HOPPER,
) -> Verdict:
    """Every kernel is one that a call launches, and every launch has the registers and the shared memory it needs.

    Registers are those at entry: that setmaxnreg hands out no more than a block has, the kernels assert.
    """
    known = {(bare(kernel.name), kernel.arch): kernel for kernel in kernels}
    names = {name for name, _ in known}
    launched = {bare(launch.kernel) for launch in launches}
    listed = {name for name in names | launched if name.partition("<")[0] in never}
    absent = never.keys() - {name.partition("<")[0] for name in names}
    problems = [f"no kernel is called {name}, which is listed as never launched" for name in absent]
    problems += [f"{name} is launched by no call" for name in sorted(names - launched - listed)]
    problems += [f"{name} is launched, though it is listed as never launched" for name in sorted(listed & launched)]
    for launch in launches:
        where = f"{launch.op} launches {bare(launch.kernel)} ({launch.capability}) "
        kernel = known.get((bare(launch.kernel), launch.arch))
        if kernel is None:
            problems.append(where + f"which is not in the library for {launch.arch}")
            continue
        for rule in rules:
            if re.search(rule.kernel, kernel.name) and launch.threads != rule.threads:
                problems.append(where + f"with {launch.threads} threads, not {rule.threads}")
        # Registers are handed out eight a thread at a time.
        registers = launch.threads * -(-kernel.resources.registers // 8) * 8
        if registers > REGISTERS_A_BLOCK:
            problems.append(where + f"with {registers} registers a block, allowed are {REGISTERS_A_BLOCK}")
        shared = launch.shared + max(0, kernel.resources.shared - RESERVED.get(launch.arch, 0))
        if shared > launch.limit:
            problems.append(where + f"with {shared} bytes of shared memory a block, allowed are {launch.limit}")
    return Verdict("launches", problems, f"{len(launched)} kernels in {len(launches)} launches, each with room to run")


def cpu_objects(library: Path, builds: Path = ROOT / "build") -> dict[str, list[Path]]:
    """The objects of CPU kernels that the library was linked from, by instruction set; empty without its build."""
    for folder in sorted(builds.glob("cmake-*"), key=lambda path: path.stat().st_mtime, reverse=True):
        built = folder / "libwarpform.so"
        if built.is_file() and filecmp.cmp(built, library, shallow=False):
            found: dict[str, list[Path]] = {}
            for path in sorted(folder.glob("CMakeFiles/warpform_cpu_*.dir/csrc/cpu/*.o")):
                isa = path.parents[2].name.removeprefix("warpform_cpu_").removesuffix(".dir")
                found.setdefault(isa, []).append(path)
            return found
    return {}


def check_cpu_object(name: str, isa: str, symbols: str, code: str) -> list[str]:
    """Problems of one object, from the outputs of `nm --format=posix` and `objdump -d`.

    The linker keeps one copy of a function that several objects share (a weak symbol), and a CPU without AVX-512 would
    run the copy that was compiled for it; so no such symbol may be there, nor one that belongs to no instruction set.
    """
    problems = []
    space = f"{len(isa)}{isa}"  # as a mangled name has it
    for symbol, kind, *_ in filter(None, map(str.split, symbols.splitlines())):
        if symbol in CPU_NEEDS:
            continue
        if kind == "U":
            if f"3cpu{space}" not in symbol:
                problems.append(f"{name} ({isa}) needs {symbol}")
        elif kind in "WVuwvi":
            problems.append(f"{name} ({isa}) shares {symbol}")
        elif kind.isupper() and f"3cpu{space}" not in symbol:
            problems.append(f"{name} ({isa}) defines {symbol} outside of its namespace")
    wider = WIDER.get(isa)
    if wider is not None and (found := wider.search(code)):
        problems.append(f"{name} ({isa}) uses {found[0]}")
    return problems


def check_cpu_objects(objects: dict[str, list[Path]]) -> Verdict:
    """CPU kernels of one instruction set share nothing with those of another, and keep to its registers."""
    if not objects:
        return Verdict("CPU kernels", [], "no build folder has the library's objects", asked=False)
    problems = []
    for isa, paths in objects.items():
        for path in paths:
            symbols = run(["nm", "--format=posix", str(path)])
            code = run(["objdump", "-d", "--no-show-raw-insn", str(path)]) if isa in WIDER else ""
            problems += check_cpu_object(path.stem, isa, symbols, code)
        if {path.name for path in paths} != {path.name for path in next(iter(objects.values()))}:
            problems.append(f"{isa} has other objects than the first instruction set")
    count = sum(map(len, objects.values()))
    return Verdict("CPU kernels", problems, f"{count} objects of {', '.join(objects)}, nothing shared between them")


def main(arguments: list[str]) -> int:
    library = Path(arguments[0]) if arguments else LIBRARY
    if not library.is_file():
        raise SystemExit(f"gates: {library} does not exist; run make build")
    tool = find_cuobjdump()
    if tool is None:
        raise SystemExit("gates: cuobjdump is missing; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    kernels, images, ptx = read_library(tool, library)
    verdicts = [
        check_architectures(kernels, images, ptx),
        check_stack(kernels),
        check_opcodes(kernels),
        check_wgmma(kernels),
        check_overlap(kernels),
        check_cpu_objects(cpu_objects(library)),
    ]
    if library.resolve() == LIBRARY:
        verdicts.append(check_launches(kernels, planned_launches()))
    else:
        why = "only the library that the package loads has plans"
        verdicts.append(Verdict("launches", [], why, asked=False))
    print(f"{'gate':14} {'result':7} {library.name}")
    for verdict in verdicts:
        result = "FAILED" if verdict.problems else "ok" if verdict.asked else "-"
        print(f"{verdict.gate:14} {result:7} {verdict.summary}")
        for problem in verdict.problems:
            print(f"{'':22} {problem}")
    return 1 if any(verdict.problems for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
