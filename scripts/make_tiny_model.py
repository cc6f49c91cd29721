"""Writes the tiny model: a directory in the hub layout of Qwen/Qwen-Image-Edit-2511 with the same modules at a few megabytes.

    python scripts/make_tiny_model.py [--out models/tiny] [--seed 0]

Sizes are in scripts/tiny/*.json. The VAE and the transformer are trained (scripts/tiny/*.safetensors), the tokenizer is the
real Qwen BPE, and the text encoder is random: the transformer has learned the embeddings of seed 0. The same seed gives the
same bytes.
"""

import argparse
import base64
import json
import shutil
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
__import__("data_prep")  # without the environment, it says how to enter it

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from data_prep.errors import InputError, exit_codes
from data_prep.model.editions import EDITIONS, FIRST, PLUS

SHIPPED = Path(__file__).parent / "tiny"
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
]
FIRST_SPECIAL = 151_643  # the number of BPE ranks


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shipped(name: str) -> Path:
    """A file of the tiny model that is in the repository.

    Raises:
        InputError: it is not.
    """
    file = SHIPPED / name
    if not file.is_file():
        raise InputError(f"{file} is missing: restore it from the repository, or train it (see CONTRIBUTING.md)")
    return file


def copy_shipped(name: str, to: Path) -> None:
    """Puts a file that is in the repository in its place."""
    source = shipped(name)
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)


def read_config(component: str) -> dict:
    """The component's sizes, shipped beside the weights that have them."""
    return json.loads(shipped(f"{component}_config.json").read_text(encoding="utf-8"))


def read_ranks() -> dict[bytes, int]:
    """Qwen's byte-pair ranks, as the package `dashscope` ships them."""
    package = find_spec("dashscope")  # not imported: that takes seconds
    if package is None or package.origin is None:
        raise InputError(
            "the tokenizer's ranks come with the package dashscope: install the group dev of pyproject.toml"
        )
    file = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    pairs = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, which vocab.json and merges.txt are written in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that the merge of rank `ranks[token]` joined: byte-pair encoding with the lower ranks alone."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [(ranks.get(a + b, FIRST_SPECIAL), i) for i, (a, b) in enumerate(pairwise(parts))]
        i = min(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def write_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and a configuration with the special tokens at their true ids."""
    ranks, alphabet = read_ranks(), byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = [last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    write_json(folder / "vocab.json", {spell(token): rank for token, rank in ranks.items()})
    lines = ["#version: 0.2", *(f"{spell(left)} {spell(right)}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(FIRST_SPECIAL + i): {"content": token, "special": token.startswith("<|") and i < 14, **flags}
        for i, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL_TOKENS[1:14],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_text_encoder(folder: Path, seed: int) -> None:
    """A random Qwen2.5-VL, scaled so that different words and pictures give clearly different hidden states."""
    copy_shipped("text_encoder_config.json", folder / "config.json")
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**read_config("text_encoder")))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
            value = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
        else:
            value = torch.ones(parameter.shape) if name.endswith("weight") else torch.zeros(parameter.shape)
        weights[hub_name(name)] = value.to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def hub_name(name: str) -> str:
    """The parameter's name in the published checkpoint, which predates the split into language model and vision tower."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_trained(component: str, folder: Path) -> None:
    """A component whose weights are in the repository."""
    copy_shipped(f"{component}_config.json", folder / "config.json")
    copy_shipped(f"{component}.safetensors", folder / "diffusion_pytorch_model.safetensors")


def write_random_transformer(folder: Path, seed: int) -> None:
    """An untrained transformer, for pre-training and for tests that need no edit."""
    from diffusers import QwenImageTransformer2DModel

    copy_shipped("transformer_config.json", folder / "config.json")
    with torch.device("meta"):
        model = QwenImageTransformer2DModel.from_config(read_config("transformer"))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name and parameter.ndim == 1 and name.endswith("weight")
        scaled = 1 + 0.1 * value if norm else value * (parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.1)
        weights[name] = scaled.to(torch.bfloat16)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_index(folder: Path, pipeline: str) -> None:
    """`model_index.json`, whose class says which edition of Qwen-Image-Edit the directory holds."""
    index = json.loads(shipped("model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | {"_class_name": pipeline})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models/tiny"),
        help="Folder to write, by default the one that model=tiny reads.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Random seed for the text encoder's weights.")
    parser.add_argument(
        "--random-transformer", action="store_true", help="Write a random transformer instead of the trained one."
    )
    parser.add_argument(
        "--pipeline",
        choices=list(EDITIONS),
        default=PLUS.pipeline,
        help=f"Pipeline class for model_index.json. {FIRST.pipeline} is the first Qwen-Image-Edit, with another template.",
    )
    args = parser.parse_args()

    write_trained("vae", args.out / "vae")
    if args.random_transformer:
        write_random_transformer(args.out / "transformer", args.seed)
    else:
        write_trained("transformer", args.out / "transformer")
    write_text_encoder(args.out / "text_encoder", args.seed)
    write_tokenizer(args.out / "tokenizer")
    shutil.copytree(args.out / "tokenizer", args.out / "processor", dirs_exist_ok=True)
    copy_shipped("preprocessor_config.json", args.out / "processor" / "preprocessor_config.json")
    copy_shipped("scheduler_config.json", args.out / "scheduler" / "scheduler_config.json")
    write_index(args.out, args.pipeline)  # last: a directory with an index is complete
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    with exit_codes():
        main()
