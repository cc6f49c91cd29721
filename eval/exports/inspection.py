"""What an adapter's file says and holds, and what of it other programs would ignore; of its numbers, only alphas are read."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from data_prep.errors import InputError
from eval.exports.adapter_names import module_name
from eval.request.metadata import trained_sigmas
from train.model.adapter_files import CONFIG_FILE, EXTRA_FILE, EXTRA_KEY, WEIGHTS_FILE, adapter_file
from train.model.adapter_reader import DIFFUSERS_HEADER, KEY, KINDS, without_prefix
from train.model.layers.lokr import NAMES

SHOWN = ("base_model", "objective", "step", "kind", "weights", "config_hash")
"""Of the header, as it stands there."""
MAX_STEPS = 16
OTHER_KINDS = {"hada_": "LoHa", "diff": "differences of whole tensors", "oft_": "OFT", "boft_": "BOFT"}
"""Kinds of adapters that are named and not read here, by how the last part of a key begins (LyCORIS's and ComfyUI's names)."""


@dataclass(frozen=True)
class Inspection:
    """What is known of an adapter's file."""

    file: str
    method: str
    """LoRA, DoRA or LoKr; several where modules differ."""
    form: str
    """Of the keys: where they are from."""
    dtypes: dict[str, int]
    """Number of tensors by dtype."""
    num_modules: int
    ranks: dict[int, int]
    """Number of modules by rank."""
    scales: str
    """Where alpha / rank stands."""
    endings: dict[str, int]
    """Number of modules by the end of their names."""
    unknown: list[str]
    """Modules that Qwen-Image's transformer lacks."""
    others: dict[str, int]
    """Number of tensors of other kinds of adapters, by kind."""
    header: dict[str, str]
    sigmas: list[float] | None
    steps: list[int]
    """Step counts of a bridge that visit trained sigmas alone; empty where any do."""
    geometry: dict[str, Any] | None
    extra: dict[str, Any] | None
    ignored: dict[str, list[str]]
    """What programs would leave out, by their names."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """For people."""
        lines = {
            "file": self.file,
            "method": self.method,
            "keys": self.form,
            "numbers": _counted(self.dtypes),
            "modules": f"{self.num_modules}: {_counted(self.endings)}",
            "rank": _counted(self.ranks),
            "alpha": self.scales,
            **self.header,
            "sigmas": ", ".join(f"{sigma:g}" for sigma in self.sigmas) if self.sigmas else "",
            "steps": " or ".join(map(str, self.steps)),
            "geometry": ", ".join(f"{name} {value}" for name, value in (self.geometry or {}).items()),
            "beside LoRA": ", ".join([*self.extra["in_full"], *self.extra["added"]]) if self.extra else "",
            "unknown": f"{len(self.unknown)} modules that Qwen-Image lacks, such as {self.unknown[0]}"
            if self.unknown
            else "",
            "others": ", ".join(f"{number} tensors of {kind}" for kind, number in self.others.items()),
        }
        width = max(map(len, lines))
        known = [f"{name:<{width}}  {value}" for name, value in lines.items() if value]
        return "\n".join([*known, "", *(f"{name}: {'; '.join(notes)}" for name, notes in self.ignored.items())])


@dataclass(frozen=True)
class _Keys:
    """The tensors of a file, by module."""

    prefixes: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """Name of a module as written, without prefix -> what there is of it, and its shape."""
    endings: set[str] = field(default_factory=set)
    """What the keys end in, as written."""
    dtypes: Counter[str] = field(default_factory=Counter)
    alphas: dict[str, float] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    """Tensors of `OTHER_KINDS`."""

    def has(self, *kinds: str) -> bool:
        return any(kind in found for found in self.kinds.values() for kind in kinds)

    @property
    def prefix(self) -> str:
        return self.prefixes.most_common(1)[0][0] if self.prefixes else ""


def inspect_adapter(path: Path) -> Inspection:
    """Reads what an adapter's file says of itself.

    Args:
        path: a checkpoint folder or a safetensors file.

    Raises:
        InputError: there is no such file, or it holds no adapter.
    """
    file = adapter_file(path)
    keys, header = _read(file)
    extra = json.loads(header.get(EXTRA_KEY, "null"))
    names = {written: module_name(written) for written in keys.kinds}
    methods = Counter(_method(found) for found in keys.kinds.values())
    ends = Counter((name or written).split(".", 2)[-1] for written, name in names.items())
    sigmas, unknown = trained_sigmas(header), [written for written, name in names.items() if name is None]
    return Inspection(
        file=str(file),
        method=_counted(methods) if methods else "of another kind",
        form=_form(keys),
        dtypes=dict(keys.dtypes),
        num_modules=len(keys.kinds),
        ranks=dict(Counter(map(_rank, keys.kinds.values()))),
        scales=_scales(file, keys, header),
        endings=dict(ends.most_common()),
        unknown=unknown,
        others=dict(keys.others),
        header={key: header[key] for key in SHOWN if key in header},
        sigmas=sigmas,
        steps=_suited_steps(sigmas) if sigmas else [],
        geometry=json.loads(header["geometry"]) if "geometry" in header else None,
        extra=extra,
        ignored=_ignored(keys, header, extra, unknown),
    )


def _read(file: Path) -> tuple[_Keys, dict[str, str]]:
    keys = _Keys()
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118
                match = KEY.fullmatch(key)
                if not match and (other := _other_kind(key)):
                    keys.others[other] += 1
                    continue
                if not match:
                    what = " (it is what an adapter has beside LoRA: inspect the adapter)" if "added" in header else ""
                    raise InputError(f"{file} is no adapter: no adapter has a tensor {key!r}{what}")
                name, kind, stored = without_prefix(match[1]), KINDS[match[2]], opened.get_slice(key)
                keys.prefixes[match[1].removesuffix(name)] += 1
                keys.kinds.setdefault(name, {})[kind] = tuple(stored.get_shape())
                keys.endings.add(match[2])
                keys.dtypes[stored.get_dtype()] += 1
                if kind == "alpha":
                    keys.alphas[name] = opened.get_tensor(key).item()
    except SafetensorError as error:
        raise InputError(f"{file} is not a readable safetensors file ({error})") from error
    if not keys.kinds and not keys.others:
        raise InputError(f"{file} is no adapter: it holds no tensor")
    return keys, header


def _other_kind(key: str) -> str | None:
    last = key.rpartition(".")[2]
    return next((kind for start, kind in OTHER_KINDS.items() if last.startswith(start)), None)


def _method(found: Mapping[str, tuple[int, ...]]) -> str:
    if found.keys() & set(NAMES):
        return "LoKr"
    return "DoRA" if "magnitude" in found else "LoRA"


def _rank(found: Mapping[str, tuple[int, ...]]) -> int:
    """Of the matrices whose product a module's change is; 0 for a LoKr of whole factors."""
    for kind in ("down", "lokr_w2_b", "lokr_w1_b"):
        if kind in found:
            return found[kind][0]
    return 0


def _form(keys: _Keys) -> str:
    forms = {
        "diffusion_model.": "common: diffusion_model.…, which diffusers, DiffSynth and ComfyUI read",
        "transformer.": "diffusers: transformer.…",
        "lora_unet_": "kohya: lora_unet_…",
        "lycoris_": "LyCORIS: lycoris_…",
        "base_model.model.": "PEFT: base_model.model.…",
        "": "bare names of modules",
    }
    return forms.get(keys.prefix, f"prefix {keys.prefix!r}")


def _scales(file: Path, keys: _Keys, header: Mapping[str, str]) -> str:
    if keys.alphas:
        shares = {
            alpha / rank for name, alpha in keys.alphas.items() if (rank := _rank(keys.kinds[name]))
        } or {1.0}  # fmt: skip
        shown = f"{min(shares):g}" if len(shares) == 1 else f"{min(shares):g} to {max(shares):g}"
        return f"in the file; alpha / rank is {shown}"
    if DIFFUSERS_HEADER in header:
        return "in the header"
    if file.name == WEIGHTS_FILE and (file.parent / CONFIG_FILE).is_file():
        return f"in {CONFIG_FILE} beside it"
    return "none: alpha / rank is 1, or inside B"


def _suited_steps(sigmas: list[float]) -> list[int]:
    """Even step counts of a sampler that visits trained sigmas alone."""

    def suits(count: int) -> bool:
        return all(any(abs(1 - step / count - sigma) <= 1e-3 for sigma in sigmas) for step in range(count))

    return list(filter(suits, range(1, MAX_STEPS + 1)))


def _ignored(
    keys: _Keys, header: Mapping[str, str], extra: Mapping[str, Any] | None, unknown: list[str]
) -> dict[str, list[str]]:
    lokr = keys.has(*NAMES)
    notes = {
        "this project": _project(keys, header, unknown),
        "diffusers": ["refuses the file: its converter for Qwen-Image knows no LoKr"] if lokr else _diffusers(keys),
        "DiffSynth": ["loads nothing: it knows no LoKr"] if lokr else _diffsynth(keys),
        "ComfyUI": _comfyui(keys),
    }
    for name, found in notes.items():
        if name != "this project":
            if unknown:
                found.append(f"has no place for {len(unknown)} modules, such as {unknown[0]}")
            if keys.others and name != "ComfyUI":
                found.append(f"{_counted(keys.others)}: not looked up here")
            if extra:
                found.append(f"misses {EXTRA_FILE}")
            if header.get("objective") == "lbm":
                found.append("starts at noise unless told otherwise, and a bridge starts at the source")
    return {name: found or ["uses all of it"] for name, found in notes.items()}


def _project(keys: _Keys, header: Mapping[str, str], unknown: list[str]) -> list[str]:
    if unknown:
        return [f"refuses the file: it changes {len(unknown)} modules that Qwen-Image lacks, such as {unknown[0]}"]
    if keys.others:
        return [f"refuses the file: it reads no {_counted(keys.others)}"]
    if half := [name for name, found in keys.kinds.items() if ("down" in found) != ("up" in found)]:
        return [f"refuses the file: of {half[0]} it has one of lora_A and lora_B alone"]
    beneath = list(json.loads(header.get("frozen", "{}")).values())
    return [f"wants {name} in use too, over which it was trained" for name in beneath]


def _diffusers(keys: _Keys) -> list[str]:
    converted = (
        bool(keys.alphas)
        or keys.prefix in ("diffusion_model.", "lora_unet_")
        or any("default." in e for e in keys.endings)
    )
    if "dora_scale" in keys.endings:
        return ["leaves out DoRA's magnitudes, with a warning: convert --to diffusers"]
    if converted and keys.has("magnitude"):
        return ["refuses the file: its converter knows no DoRA; convert --to diffusers"]
    if not converted and keys.prefix != "transformer.":
        return ["loads nothing, without a word: convert --to common"]
    return []


def _diffsynth(keys: _Keys) -> list[str]:
    if keys.prefix not in ("diffusion_model.", ""):
        return ["loads nothing, without a word: convert --to common"]
    return ["leaves out DoRA's magnitudes, without a word: merge the adapter"] if keys.has("magnitude") else []


def _comfyui(keys: _Keys) -> list[str]:
    if keys.prefix not in ("diffusion_model.", "transformer.", "lora_unet_", "lycoris_", ""):
        return ["loads nothing, and names each key in its log: convert --to common"]
    if keys.has("magnitude") and "dora_scale" not in keys.endings:
        return ["leaves out DoRA's magnitudes, and names them in its log: convert --to kohya"]
    return []


def _counted(numbers: Mapping[Any, int]) -> str:
    if len(numbers) == 1:
        return str(next(iter(numbers)))
    return ", ".join(f"{name} ({number})" for name, number in numbers.items())
