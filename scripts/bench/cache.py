"""Measures writing and reading a cache, compared with DiffSynth's data-process task and `torch.load`, and a reader's memory.

    python scripts/bench/cache.py --model models/tiny --json cache.json
    python scripts/bench/cache.py --only write --random --device cuda --dtype bfloat16 --write-side 1024
    python scripts/bench/cache.py --only read,memory --side 512
    python scripts/bench/cache.py --tiny

`write` encodes the same images (in their own sizes, one reference each) with the same VAE and text encoder, already loaded.
"Theirs" is DiffSynth's pipeline up to the transformer, one row at a time, with references at our sizes (it would resize each to
one megapixel), and `torch.save`. It has no source at the target's size, no mask and no white. `read` reads random records of the
real size, warm, from our files and from one `.pth` each with the same tensors. `memory` is the anonymous memory, without mapped
files, of a process that has opened a dataset and planned its epochs.

With `--device cuda`, both sides of `write` compute on the GPU; the other parts compute nothing. The two sides alternate
`--repeat` times, and the median counts.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from PIL import Image
from torch import Tensor, nn

from data_prep.cache.batches import BatchStream
from data_prep.cache.encoding import Encoders
from data_prep.cache.index import CacheFolder, CacheHeader, write_index
from data_prep.cache.reader import CacheReader, Record, bucket_name
from data_prep.cache.shards import LATENTS_SCHEMA, SUB_NOISE_SCHEMA, TEXT_SCHEMA, to_arrow, write_arrow
from data_prep.cache.writer import build_cache
from data_prep.errors import InputError, exit_codes
from data_prep.model.directory import ModelDirectory
from data_prep.model.encoders import LATENT_CHANNELS, build_vae, load_prompt_encoder, load_vae
from data_prep.model.geometry import LATENT_CELL, Geometry
from data_prep.rows.rows import Row
from eval.request.placement import DTYPES, make_placement
from scripts.bench.edit import make_tiny_model, random_model
from scripts.bench.report import Report, environment

PARTS = ("write", "read", "memory")
COLUMNS = {"what": -34, "records/s": 11, "ours/theirs": 12, "MB a record": 12, "bytes a row": 12}
SHARD = 16
"""Records of a file that is read."""
HEADER = CacheHeader("bench", Geometry(1024 * 1024), "bfloat16", caption_dropout=False, negative=False)


class HiddenStates(nn.Module):
    """The text encoder, called as DiffSynth calls its own, whose sizes are fixed."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, output_hidden_states: bool, **inputs: Tensor) -> tuple[Tensor, ...]:
        """All hidden states."""
        return self.model(**inputs, output_hidden_states=output_hidden_states, use_cache=False).hidden_states


class Theirs:
    """DiffSynth's data-process task."""

    def __init__(self, model: ModelDirectory, prompt_encoder: Any, device: torch.device, dtype: torch.dtype):
        self.pipe = QwenImagePipeline(device, dtype)
        self.pipe.scheduler.set_timesteps(1000, training=True)
        vae = build_vae(model.config("vae"))
        model.load_into(vae, "vae", device, dtype)
        self.pipe.vae, self.pipe.text_encoder = vae.eval(), HiddenStates(prompt_encoder.model)
        self.pipe.processor = prompt_encoder.processor
        _, self.units = self.pipe.split_pipeline_units(["dit"])
        if not self.units:
            raise InputError("this version of DiffSynth splits its pipeline otherwise than the bench expects")

    @torch.no_grad()
    def write(self, rows: list[Row], folder: Path) -> None:
        """A file for each row."""
        folder.mkdir()
        for row in rows:
            target, *references = (Image.open(path).convert("RGB") for path in (row.image, *row.edit_image))
            shared = {"input_image": target, "edit_image": references, "edit_image_auto_resize": False, "cfg_scale": 1}
            shared |= {"height": target.height, "width": target.width, "rand_device": "cpu"}
            inputs: Any = (shared, {"prompt": row.prompt}, {})
            for unit in self.units:
                inputs = self.pipe.unit_runner(unit, self.pipe, *inputs)
            torch.save(inputs, folder / f"{row.number}.pth")


def make_rows(folder: Path, number: int, side: int) -> list[Row]:
    """Pictures of noise and the rows that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for place in range(number):
        paths = [folder / f"{name}{place}.jpg" for name in ("target", "source")]
        for path in paths:
            Image.effect_noise((side, side), 60).convert("RGB").save(path, quality=92)
        rows.append(Row(place + 1, f"r{place}", f"make edit number {place}", paths[0], (paths[1],)))
    return rows


def write(report: Report, options: argparse.Namespace, folder: Path) -> None:
    """Rows of `write`."""
    device = make_placement(options.device, options.dtype).device
    model = ModelDirectory.resolve(make_tiny_model(folder / "model") if options.random else options.model)
    if options.random:
        model = random_model(model.path, options.device, tiny=options.tiny)
    dtype, side = DTYPES[options.dtype], options.write_side
    encoders = Encoders(load_vae(model, device, dtype), load_prompt_encoder(model, device, dtype))
    rows, stored = make_rows(folder / "pictures", options.rows, side), str(dtype).removeprefix("torch.")
    theirs = Theirs(model, encoders.prompt_encoder, device, dtype)

    def ours(out: Path) -> None:
        header = CacheHeader("bench", Geometry(side * side), stored, encoder_dtype=stored)
        build_cache(rows, header, lambda: encoders, out, rejected_path=folder / "r")

    names = f"write {side}x{side}, ours", "DiffSynth's data-process task"
    race(report, names, (ours, lambda out: theirs.write(rows, out)), folder, options.repeat, len(rows))


def read(report: Report, options: argparse.Namespace, folder: Path) -> None:
    """Rows of `read`."""
    number = options.records
    make_cache(folder / "cache", number, number, options.side, options.text, options.width)
    reader, order = CacheReader(folder / "cache"), random.Random(0).sample(range(number), number)
    (folder / "pth").mkdir()
    for place, record in enumerate(reader):
        torch.save(stored_tensors(record), folder / "pth" / f"{place}.pth")

    def ours(_: Path) -> None:
        for place in order:
            reader[place]

    def theirs(_: Path) -> None:
        for place in order:
            torch.load(folder / "pth" / f"{place}.pth", weights_only=True)

    sizes = [folder_bytes(folder / name) / number / 1e6 for name in ("cache", "pth")]
    names = f"read {options.side}x{options.side}, ours", "torch.load"
    race(report, names, (ours, theirs), folder, options.repeat, number, sizes)


def race(
    report: Report,
    names: tuple[str, str],
    runners: tuple[Callable[[Path], None], Callable[[Path], None]],
    folder: Path,
    repeat: int,
    number: int,
    sizes: list[float] | None = None,
) -> None:
    """Runs ours and theirs by turns, once before without a clock, and reports both."""
    taken: tuple[list[float], list[float]] = [], []
    for turn in range(repeat + 1):
        for who, runner in enumerate(runners):
            start = time.perf_counter()
            runner(folder / f"{turn}-{who}")
            if turn:
                taken[who].append(time.perf_counter() - start)
    rates = [number / statistics.median(each) for each in taken]
    sizes = sizes or [folder_bytes(folder / f"0-{who}") / number / 1e6 for who in range(2)]
    for who, name in enumerate(names):
        row: dict[str, Any] = {"records/s": rates[who], "MB a record": sizes[who]}
        report.add(name, row if who else row | {"ours/theirs": rates[0] / rates[1]})


def stored_tensors(record: Record) -> dict[str, Any]:
    """What a `.pth` with the same contents holds."""
    tensors: dict[str, Any] = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    del tensors["sub_noise"]
    return tensors | {"source_latents": record.source_latents.clone(), "edit_latents": record.edit_latents}


def make_cache(folder: Path, num_rows: int, num_records: int, side: int, text: int, width: int) -> None:
    """A cache of random numbers whose source is the reference; rows share the records if there are fewer of them."""
    store, latent = CacheFolder(folder), side // LATENT_CELL
    shape = LATENT_CHANNELS, latent, latent
    white = torch.zeros(shape, dtype=torch.bfloat16)
    write_arrow(store.sub_noise(HEADER, latent, latent), [{"sub_noise": to_arrow(white)}], SUB_NOISE_SCHEMA)
    sizes: dict[str, int] = {}
    for first in range(0, num_records, SHARD):
        keys = [f"{number:032x}" for number in range(first, min(first + SHARD, num_records))]
        latents, texts = [], []
        for key in keys:
            target, source = (torch.randn(shape).bfloat16() for _ in range(2))
            value = {"target_latents": to_arrow(target), "edit_latents": [to_arrow(source)], "bridge_image": 0}
            latents.append({"key": key, "bucket": bucket_name(target, [source]), **value})
            texts.append({"key": key, "prompt_emb": to_arrow(torch.randn(text, width).bfloat16())})
        for where, values, schema in ((store.latents, latents, LATENTS_SCHEMA), (store.texts, texts, TEXT_SCHEMA)):
            path = where / f"{first:016x}.arrow"
            write_arrow(path, values, schema)
            sizes[f"{where.name}/{path.name}"] = path.stat().st_size
    lines = index_lines(num_rows, num_records, f"{latent}x{latent}+{latent}x{latent}", text)
    write_index(store, f"{num_rows:016x}", HEADER, "bench", sizes, lines)


def index_lines(num_rows: int, num_records: int, bucket: str, text: int) -> Iterator[dict[str, Any]]:
    """Rows with paths and prompts of the usual length."""
    for number in range(num_rows):
        place = number % num_records
        location = {"shard": f"{place // SHARD * SHARD:016x}", "place": place % SHARD}
        paths = [f"/data/photographs/{name}/{number:09}.jpg" for name in ("target", "source")]
        row = {"number": number, "id": f"row-{number}", "prompt": "make it look like the evening of a summer day" * 2}
        row |= {"image": paths[0], "edit_image": paths[1:], "bridge_image": 0, "split": "train"}
        yield {
            "key": f"{number:032x}",
            "id": f"row-{number}",
            "bucket": bucket,
            "text_tokens": text,
            "latents": location,
            "prompt": location,
            "row": json.dumps(row),
        }


def memory(report: Report, options: argparse.Namespace, folder: Path) -> None:
    """The row of `memory`, measured in a process of its own."""
    make_cache(folder / "cache", options.memory_rows, SHARD, 64, 16, 8)
    command = [sys.executable, __file__, "--hold", str(folder / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"the reading process failed: {done.stderr.strip().splitlines()[-1]}")
    held = int(done.stdout.splitlines()[-1])
    report.add(f"a reader of {options.memory_rows} rows", {"bytes a row": held / options.memory_rows})


def hold(folder: Path) -> None:
    """Opens a dataset, reads a step, and prints the bytes that it holds."""
    before = anonymous_memory()
    stream = BatchStream(CacheReader(folder), seed=0, global_batch_size=8, micro_batch_size=1)
    stream.micro_batches(0)
    held = anonymous_memory() - before
    stream.close()
    print(held)


def anonymous_memory() -> int:
    """Bytes, from the kernel; Linux alone says it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(options: argparse.Namespace) -> None:
    """Prints a table."""
    report = Report(COLUMNS, options.json, environment(options.device))
    parts = {"write": write, "read": read, "memory": memory}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](report, options, Path(folder))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"Parts to run, out of {', '.join(PARTS)} (default all)."
    )
    parser.add_argument("--model", default="models/tiny", help="Model folder for `write` (default models/tiny).")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Device for `write` (default cpu).")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Data type for `write` (default float32).")
    parser.add_argument("--rows", type=int, default=64, help="Number of rows to write (default 64).")
    parser.add_argument(
        "--write-side", type=int, default=128, help="Side of the images to write, in pixels (default 128)."
    )
    parser.add_argument("--records", type=int, default=128, help="Number of records to read (default 128).")
    parser.add_argument(
        "--side", type=int, default=1024, help="Side of the images of the records to read, in pixels (default 1024)."
    )
    parser.add_argument("--text", type=int, default=211, help="Text tokens of each record to read (default 211).")
    parser.add_argument("--width", type=int, default=3584, help="Width of the text's hidden states (default 3584).")
    parser.add_argument(
        "--memory-rows", type=int, default=1_000_000, help="Rows of the dataset for `memory` (default 1000000)."
    )
    parser.add_argument("--repeat", type=int, default=5, help="Timed runs per measurement (default 5).")
    parser.add_argument(
        "--random", action="store_true", help="Use random weights of Qwen-Image-Edit-2511's sizes for `write`."
    )
    parser.add_argument(
        "--tiny", action="store_true", help="Use small sizes and one timed run, to check that the benchmark works."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write the results to, after every row.")
    parser.add_argument("--hold", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in PARTS]:
        raise InputError(f"--only knows {', '.join(PARTS)}, got {unknown[0]}")
    if options.tiny:
        options.rows, options.write_side, options.records, options.side = 4, 64, 8, 64
        options.memory_rows, options.repeat = 1000, 1
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    with exit_codes():
        arguments = parse_arguments()
        if arguments.hold:
            hold(arguments.hold)
        else:
            main(arguments)
