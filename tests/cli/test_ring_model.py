"""The cost model of ring attention: against closed forms, counted masks and published shares, and its command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest

from warpform import cli
from warpform.cli.ring_model.cost_model import (
    DIRECTIONS,
    LAYOUTS,
    Cluster,
    Link,
    StepTime,
    Workload,
    linformer_saved_elements,
    overlap_chunk,
    predict,
    rsa_saved_elements,
)
from warpform.cli.ring_model.measure import measure_steps

FREE = Link(0.0, math.inf)
# 8 GPUs of one node: attention as FlashAttention 2 and 3 reach it on Hopper, 160 of NVLink's 200 GB/s each way (a GPU
# with 400 GB/s both ways together, as in the published table below), launches hidden but for a few microseconds.
NVLINK = Link(20e-6, 160e9)


def hopper(head_dim: int, *, forward: float = 450e12, backward: float = 350e12, link: Link = NVLINK) -> Cluster:
    return Cluster(
        StepTime.from_flops(forward, head_dim, overhead=5e-6, memory=2.5e12),
        StepTime.from_flops(backward, head_dim, backward=True, overhead=5e-6, memory=2.5e12),
        link,
    )


def rows_of(layout: str, ranks: int, rank: int, seqlen: int) -> list[int]:
    c = seqlen // ranks
    if layout == "contiguous":
        return list(range(rank * c, rank * c + c))
    if layout == "striped":
        return list(range(rank, seqlen, ranks))
    half = c // 2
    late = 2 * ranks - 1 - rank
    return [*range(rank * half, rank * half + half), *range(late * half, late * half + half)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_pairs_are_those_of_the_mask(layout, ranks):
    seqlen = 12 * ranks
    work = Workload(seqlen, 1, 8, layout=layout)
    for s in range(ranks):
        rows, pairs = work.step(ranks, s)
        for rank in range(ranks):
            mine = rows_of(layout, ranks, rank, seqlen)
            theirs = rows_of(layout, ranks, (rank - s) % ranks, seqlen)
            assert pairs[rank] == sum(q >= k for q in mine for k in theirs), (rank, s)
            # Rows that see no key of the block at all need not be touched; a stripe's first row may be one.
            seen = sum(any(q >= k for k in theirs) for q in mine)
            assert rows[rank] == seen or (layout == "striped" and rows[rank] == seen + 1)
    full = dataclasses.replace(work, causal=False)
    assert sum(full.step(ranks, s)[1].sum() for s in range(ranks)) == seqlen**2


@pytest.mark.parametrize("hop_wins", [False, True])
def test_closed_form(hop_wins):
    """t_0 + (N - 1) max(t, alpha + bytes / beta), and with gradients that travel N hops, of which the last is seen."""
    n, c, heads, kv_heads, d = 6, 64, 4, 2, 16
    step = StepTime(1e-6, 1e-9, 1e-10 if hop_wins else 1e-7)
    link = Link(1e-3, 1e9)
    work = Workload(n * c, heads, d, kv_heads, batch=2, causal=False)
    t = 1e-6 + 2 * heads * (c * 1e-9 + c * c * step.per_pair)
    size = 2 * 2 * c * kv_heads * d
    hop, gradient_hop = 1e-3 + 2 * size / 1e9, 1e-3 + 4 * size / 1e9
    assert (hop > t) == hop_wins
    forward = predict(work, Cluster(step, step, link), n)
    assert forward.seconds == pytest.approx(t + (n - 1) * max(t, hop))
    assert forward.hidden == pytest.approx(t / hop if hop_wins else 1.0)
    assert forward.bytes_sent == (n - 1) * 2 * size
    backward = predict(work, Cluster(step, step, link), n, "backward")
    if hop_wins:  # the link carries both, one after the other; at the end only gradients
        least, most = n * gradient_hop + (n - 1) * hop, n * (gradient_hop + hop) + n * t
        assert least <= backward.seconds <= most
    else:
        assert backward.seconds == pytest.approx(n * t + gradient_hop)
    assert backward.bytes_sent == (n - 1) * 2 * size + n * 4 * size
    both = predict(work, Cluster(step, step, link), n, "forward+backward")
    assert both.seconds == pytest.approx(forward.seconds + backward.seconds)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_rank_is_one_device(direction):
    p = predict(Workload(1000, 4, 64, layout="contiguous"), hopper(64), 1, direction)
    assert p.efficiency == pytest.approx(1.0) and p.bytes_sent == 0 and p.hidden == 1.0


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_contiguous_causal_is_bounded_by_its_last_rank(ranks):
    step = StepTime(0.0, 0.0, 1e-12)
    kept = {
        layout: predict(Workload(ranks * 4096, 8, 64, layout=layout), Cluster(step, step, FREE), ranks).efficiency
        for layout in LAYOUTS
    }
    assert kept["contiguous"] == pytest.approx((ranks / 2) / (ranks - 1 / 2), rel=1e-3)
    assert kept["zigzag"] == pytest.approx(1.0, rel=1e-3) and kept["striped"] == pytest.approx(1.0, rel=1e-3)


def test_zigzag_keeps_nine_tenths_on_nvlink():
    """Modelled: 8 GPUs of one node, causal, forward with backward."""
    for heads, kv_heads, d, chunk in ((5, 5, 128, 8192), (32, 8, 128, 4096), (16, 16, 64, 16384), (32, 32, 128, 16384)):
        p = predict(Workload(8 * chunk, heads, d, kv_heads), hopper(d), 8, "forward+backward")
        assert p.efficiency >= 0.9, (heads, kv_heads, d, chunk, p)


def test_published_shares():
    """ring-flash-attention's table for 8 H800 (8192 tokens a rank, 5 heads of 128), forward, and with backward: 52 and
    54 % where contiguous, 85 and 90 % zigzag. Its merges are separate passes in float32, so a step costs more than
    with a carried-in state.
    """
    c, d = 8192, 128
    cluster = Cluster(
        StepTime.from_flops(450e12, d, overhead=20e-6, memory=2.5e12),
        StepTime.from_flops(350e12, d, backward=True, overhead=30e-6, memory=2.5e12),
        NVLINK,
    )
    for layout, direction, published in (
        ("contiguous", "forward", 0.52),
        ("contiguous", "forward+backward", 0.54),
        ("zigzag", "forward", 0.85),
        ("zigzag", "forward+backward", 0.90),
    ):
        modelled = predict(Workload(8 * c, 5, d, layout=layout), cluster, 8, direction).efficiency
        assert modelled == pytest.approx(published, rel=0.15), (layout, direction)


def test_slow_links_between_nodes_set_the_pace():
    work = Workload(16 * 2048, 32, 128)
    within = hopper(128)
    slow = dataclasses.replace(within, between=Link(20e-6, 12.5e9), ranks_per_node=8)
    alike = dataclasses.replace(within, link=Link(20e-6, 12.5e9))
    fast, mixed, slowest = (predict(work, c, 16).seconds for c in (within, slow, alike))
    assert fast < mixed <= slowest * (1 + 1e-12)
    assert mixed > 0.9 * slowest, "every rank waits for the slowest hop after a round"
    assert (
        predict(Workload(8 * 2048, 32, 128), slow, 8).seconds == predict(Workload(8 * 2048, 32, 128), within, 8).seconds
    )


def test_overlap_chunk():
    """About F / B tokens, where F is FLOP/s and B bytes/s: 312 TFLOP/s over 300 GB/s is 1.0 K. Fewer key heads need
    proportionally shorter chunks, and what is just long enough hides all of its messages.
    """
    step = StepTime.from_flops(312e12, 128)
    cluster = Cluster(step, step, Link(0.0, 300e9))
    assert overlap_chunk(Workload(1 << 20, 32, 128, causal=False), cluster) == pytest.approx(1040, abs=1)
    assert overlap_chunk(Workload(1 << 20, 32, 128, 8, causal=False), cluster) == pytest.approx(260, abs=1)
    work = Workload(1 << 20, 32, 128, causal=False)
    chunk = overlap_chunk(work, cluster)
    assert predict(dataclasses.replace(work, seqlen=8 * chunk), cluster, 8).hidden == 1.0
    assert predict(dataclasses.replace(work, seqlen=8 * (chunk - 50)), cluster, 8).hidden < 1.0
    with pytest.raises(ValueError, match="direction"):
        overlap_chunk(work, cluster, "forward+backward")


def test_ranks_that_share_processors_take_turns():
    """With free messages N ranks on one processor take as long as one device; on two, half."""
    step = StepTime(0.0, 0.0, 1e-9)
    for processors in (1, 2):
        cluster = Cluster(step, step, FREE, processors=processors)
        for layout in LAYOUTS:
            p = predict(Workload(960, 2, 16, layout=layout), cluster, 8)
            whole = 2 * 960 * 961 / 2 * 1e-9
            assert p.seconds >= whole / processors * (1 - 1e-12)
            assert p.seconds == pytest.approx(whole / processors, rel=0.02 if layout != "contiguous" else 0.2)
            assert p.efficiency <= 1 + 1e-9


@pytest.mark.parametrize(("direction", "times"), [("forward", 2), ("backward", 1), ("forward+backward", 3)])
def test_agreement_costs_small_messages(direction, times):
    work, cluster = Workload(960, 2, 16, layout="striped"), hopper(16, link=Link(1e-3, 1e9))
    for ranks, hops in ((1, 0), (2, 1), (3, 2), (8, 3), (10, 4)):
        plain, checked = (
            predict(work, dataclasses.replace(cluster, checked=checked), ranks, direction) for checked in (False, True)
        )
        assert checked.seconds - plain.seconds == pytest.approx(times * hops * 1e-3, abs=1e-12)


def test_memory_of_a_rank_falls_with_its_number():
    for direction in DIRECTIONS:
        found = [predict(Workload(1 << 16, 8, 64), hopper(64), n, direction) for n in (4, 8, 16)]
        for first, second in itertools.pairwise(found):
            assert first.saved_bytes == 2 * second.saved_bytes and first.working_bytes == 2 * second.working_bytes
    one = (2, 4096, 768, 12, 64)
    rsa = [rsa_saved_elements(2, 4096, n, 768, 12, 64) for n in (1, 2, 4)]
    assert rsa[0] == 2 * rsa[1] == 4 * rsa[2] == 4 * 2 * 4096 * 768 + 2 * 12 * 4096**2 + 2 * 4096 * 768
    constant = 2 * 2 * 12 * 256 * 64
    projected = [linformer_saved_elements(2, n * 4096, n, *one[2:], 256) for n in (1, 2, 4)]
    assert projected[0] == projected[1] == projected[2] > constant, "the same rows a rank, the same elements"


def test_fits_recover_what_made_the_samples():
    draw = random.Random(0)
    step = StepTime(3e-5, 2e-9, 5e-11, 7e-9)
    samples = []
    for c in (128.0, 256.0, 512.0, 2048.0):
        for calls, rows, pairs, own in ((1, c, c * c / 2, c), (3, 2.5 * c, 1.5 * c * c, 2 * c), (2, 2 * c, c * c, c)):
            seconds = 3e-5 * calls + 2e-9 * rows + 5e-11 * pairs + 7e-9 * own
            samples.append((float(calls), rows, pairs, own, seconds * draw.uniform(0.9999, 1.0001)))
    fitted = StepTime.fit(samples)
    for calls, rows, pairs, own, seconds in samples:
        terms = fitted.overhead * calls + fitted.per_row * rows + fitted.per_pair * pairs + fitted.setup * own
        assert terms == pytest.approx(seconds, rel=0.01)
    assert fitted.per_pair == pytest.approx(step.per_pair, rel=0.01)
    # Where a term would come out negative it is left out.
    negative = StepTime.fit([(1.0, 1.0, c * c, 0.0, 1e-9 * c * c - 1e-9 * c) for c in (10.0, 20.0, 40.0)])
    assert min(negative.overhead, negative.per_row, negative.per_pair, negative.setup) >= 0
    link = Link.fit([(size, 5e-5 + size / 2e9) for size in (0.0, 1e4, 1e6)])
    assert link.alpha == pytest.approx(5e-5) and link.beta == pytest.approx(2e9)
    assert Link.fit([(1e3, 1e-4), (1e6, 1e-4)]).beta == math.inf
    with pytest.raises(ValueError, match="two sizes"):
        Link.fit([(1.0, 1.0)])
    with pytest.raises(ValueError, match="positive"):
        StepTime.fit([])


def test_what_is_done_once_counts_once():
    """The ring's own preparations, which one device does not have: N times on one processor, else once."""
    work = Workload(800, 2, 16, layout="striped", batch=3)
    for processors, times in ((None, 1), (1, 8)):
        plain = Cluster(StepTime(0, 0, 1e-9), StepTime(0, 0, 1e-9), FREE, processors=processors)
        more = dataclasses.replace(plain, forward=StepTime(0, 0, 1e-9, 1e-7))
        found = [predict(work, cluster, 8) for cluster in (plain, more)]
        assert found[1].seconds - found[0].seconds == pytest.approx(times * 3 * 2 * 100 * 1e-7)
        assert found[1].ideal_seconds == found[0].ideal_seconds


def test_steps_of_this_machine_are_measured():
    """Positive, and such that the samples' own times come out of it: within a factor, for this machine may be busy."""
    work = Workload(1, 2, 16, 1, layout="contiguous")
    forward, backward = (measure_steps(work, (32, 256), backward=b, repeats=3) for b in (False, True))
    for step in (forward, backward):
        assert min(dataclasses.astuple(step)) >= 0 and max(dataclasses.astuple(step)) > 0
    p = predict(dataclasses.replace(work, seqlen=512), Cluster(forward, backward, FREE, processors=1), 2)
    assert 0 < p.seconds < 10


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seqlen": 0}, "seqlen must be at least 1"),
        ({"kv_heads": 3}, "kv_heads must divide heads 8"),
        ({"layout": "random"}, "layout must be one of"),
    ],
)
def test_bad_workloads(fields, words):
    with pytest.raises(ValueError, match=words):
        Workload(**{"seqlen": 64, "heads": 8, "head_dim": 16, **fields})


def test_lengths_that_do_not_divide():
    with pytest.raises(ValueError, match="multiple of 16 for 8 ranks"):
        predict(Workload(24, 1, 8), hopper(8), 8)
    assert predict(Workload(24, 1, 8, causal=False), hopper(8), 8).chunk == 3
    with pytest.raises(ValueError, match="direction must be one of"):
        predict(Workload(16, 1, 8), hopper(8), 8, "sideways")


FLAGS = ["--tflops", "450", "--alpha-us", "20", "--gbs", "160", "--seqlen", "65536"]


def run(capsys, *arguments: str) -> str:
    assert cli.main(["ring-model", *arguments]) == 0
    return capsys.readouterr().out


def test_command_says_that_it_models(capsys, tmp_path: Path):
    text = run(capsys, *FLAGS, "--kv-heads", "8")
    assert "modelled, not measured" in text and "zigzag" in text
    found = json.loads(run(capsys, *FLAGS, "--json", "--ranks", "2,8", "--direction", "forward"))
    assert found["kind"] == "modelled, not measured"
    assert [p["ranks"] for p in found["predictions"]] == [2, 8]
    work = Workload(65536, 32, 128)
    expected = predict(work, Cluster(*[StepTime.from_flops(450e12, 128)] * 2, NVLINK), 8)
    assert found["predictions"][1]["seconds"] == pytest.approx(expected.seconds)
    assert found["cluster"]["between"] is None
    # Thousands of ranks.
    many = json.loads(run(capsys, *FLAGS, "--json", "--seqlen", str(1 << 24)))
    assert many["predictions"][-1]["ranks"] == 4096
    # A measured step instead of a rate.
    seconds = 4 * 128 * 32 * 8192**2 / 450e12
    same = run(capsys, *FLAGS[2:], "--t-attn", str(seconds), "--at-chunk", "8192", "--json", "--ranks", "8",
               "--direction", "forward")  # fmt: skip
    assert json.loads(same)["predictions"][0]["seconds"] == pytest.approx(expected.seconds)


@pytest.mark.slow
def test_command_plots(capsys, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ring.svg"
    run(capsys, *FLAGS, "--plot", str(path))
    first = path.read_bytes()
    text = "".join(ElementTree.fromstring(first).itertext())
    assert all(layout in text for layout in LAYOUTS) and "modelled" in text
    run(capsys, *FLAGS, "--plot", str(path))
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--alpha-us and --gbs are needed"),
        (["--alpha-us", "1", "--gbs", "1"], "--tflops is needed"),
        (["--alpha-us", "1", "--gbs", "1", "--t-attn", "1"], "--t-attn needs --at-chunk"),
        ([*FLAGS, "--between-gbs", "1"], "--between-gbs needs --ranks-per-node"),
        ([*FLAGS, "--ranks", "7"], "seqlen must be a multiple of 14"),
        ([*FLAGS, "--kv-heads", "5"], "kv_heads must divide"),
    ],
)
def test_command_refuses(capsys, arguments, words):
    assert cli.main(["ring-model", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("--seqlen", "0", "a whole number from 1, got '0'"),
        ("--heads", "-4", "a whole number from 1, got '-4'"),
        ("--kv-heads", "0", "a whole number from 1"),
        ("--head-dim", "1.5", "a whole number from 1"),
        ("--batch", "0", "a whole number from 1"),
        ("--processors", "0", "a whole number from 1"),
        ("--tflops", "0", "a number above 0, got '0'"),
        ("--gbs", "-1", "a number above 0"),
        ("--gbs", "nan", "a number above 0"),
        ("--t-attn", "inf", "a number above 0"),
        ("--alpha-us", "-1", "a number from 0"),
        ("--memory-gbs", "0", "a number above 0, or inf"),
        ("--ranks", "0,2", "numbers from 1"),
    ],
)
def test_command_refuses_numbers(capsys, name, value, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ring-model", *FLAGS, f"{name}={value}"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {name}: must be " in said and words in said
