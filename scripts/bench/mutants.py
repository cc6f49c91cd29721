"""Plants faults in the core, one at a time, and checks whether the tests of the same module catch them.

    python scripts/bench/mutants.py [--only geometry,order]

Each line of `FAULTS` changes one place. The change is made in a temporary copy of the repository, never in the repository
itself, and one test module runs on it until its first failure. The output is `caught`, `missed`, or `broken` if the tests
did not run at all; without a fault, all of them must pass. The exit code is 1 if not all faults are caught. All of them take
about ten minutes on one core.
"""

import argparse
import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

LIBRARIES = ("torch", "numpy", "PIL.Image", "diffusers", "peft", "datasets")
"""Imported once, before the tests' processes are forked."""
OUTCOMES = {0: "missed", 1: "caught"}
"""By the exit code of pytest."""


class Fault(NamedTuple):
    """A change of one place of a file."""

    file: str
    old: str
    """Stands exactly once in the file."""
    new: str
    tests: str
    """The module that must catch it, below `tests/`."""


KEYS, GEOMETRY, ORDER = "data_prep/cache/keys.py", "data_prep/model/geometry.py", "data_prep/cache/order.py"
BATCHES, PATHS, BRIDGE = "data_prep/cache/batches.py", "losses/paths.py", "losses/bridge_matching.py"
SIGMAS, WALK, FLOW = (f"eval/qwen/samplers/{name}.py" for name in ("sigmas", "bridge", "flow"))
SAMPLERS, CHECKPOINT, ADAPTER = "eval/qwen/samplers/sampler.py", "train/record/checkpoint.py", "train/model/adapter.py"
LORA = "train/model/layers/lora.py"
WHOLE, MODULES, EXTRAS = (f"train/model/extra/{name}.py" for name in ("whole", "modules", "extras"))
WEIGHTS, BATCH = "eval/qwen/weights/extra_weights.py", "losses/batch.py"

OF_KEYS, OF_GEOMETRY = "data_prep/cache/test_keys.py", "data_prep/model/test_geometry.py"
OF_ORDER, OF_BATCHES = "data_prep/cache/test_order.py", "data_prep/cache/test_batches.py"
OBJECTIVES, STREAMS, ROLLOUT = "losses/test_objectives.py", "losses/test_streams.py", "losses/test_rollout.py"
STRATA, OF_SAMPLERS = "losses/test_stratification.py", "eval/qwen/samplers/test_samplers.py"
OF_CHECKPOINT, OF_ADAPTER = "train/record/test_checkpoint.py", "train/model/test_adapter.py"
OF_LORA = "train/model/layers/test_lora.py"
OF_EXTRA, OF_WEIGHTS = "train/model/test_extra.py", "eval/qwen/weights/test_extra_weights.py"

FAULTS = [
    Fault(WHOLE, "return self._parameters[name].to(", "return self._parameters[name].detach().to(", OF_EXTRA),
    Fault(WHOLE, "parameter.data.to(device, torch.float32)", "parameter.data.to(device, dtype)", OF_EXTRA),
    Fault(WHOLE, '(*UNUSED_IN_LAST_BLOCK, "attn.norm_added_q")', "()", OF_EXTRA),
    Fault(MODULES, "nn.init.zeros_(self.leave.weight)", "pass", OF_EXTRA),
    Fault(MODULES, "mask = torch.zeros_like(source[:, :1])", "mask = torch.ones_like(source[:, :1])", OF_EXTRA),
    Fault(MODULES, "[cells, places(cells)]", "[0 * cells, places(cells)]", OF_EXTRA),
    Fault(MODULES, "if not torch.equal(returned, tokens):", "if returned.shape != tokens.shape:", OF_EXTRA),
    Fault(MODULES, "issubclass(kind, ExtraModule)", "issubclass(kind, object)", OF_EXTRA),
    Fault(ADAPTER, " - {*in_full} and not name.startswith(inside)]", "]", OF_EXTRA),
    Fault(BATCH, "scene = self.scene and self.scene.take(places)", "scene = self.scene", OF_EXTRA),
    Fault("train/model/offload.py", " and id(tensor) not in trained]", "]", OF_EXTRA),
    Fault("train/model/quantize.py", ' and not hasattr(module, "in_full"):', ":", OF_EXTRA),
    Fault(EXTRAS, "any(header.get(key) != first.get(key) for key in TOGETHER)", "False", OF_WEIGHTS),
    Fault(WEIGHTS, "tensor.data.copy_(before)", "pass", OF_WEIGHTS),
    Fault(WEIGHTS, "shared = module if weight == 1 else Share(module, weight)", "shared = module", OF_WEIGHTS),
    Fault(WEIGHTS, "shared.to(device, dtype)", "nn.Identity()", OF_WEIGHTS),
    Fault(WEIGHTS, "return torch.lerp(base, *tensors[0])", "return tensors[0][0]", OF_WEIGHTS),
    Fault(KEYS, '"back_mask": digest(row.back_mask) if row.back_mask else None,', '"back_mask": None,', OF_KEYS),
    Fault(KEYS, '"bridge_image": row.bridge_image,', '"bridge_image": 0,', OF_KEYS),
    Fault(KEYS, "(row.negative_prompt or EMPTY_PROMPT) if header", "EMPTY_PROMPT if header", OF_KEYS),
    Fault(KEYS, '"image": digest(row.image),', '"image": str(row.image),', OF_KEYS),
    Fault(
        KEYS, '"edit_image": [digest(path) for path in row.edit_image],', '"edit_image": [digest(row.image)],', OF_KEYS
    ),
    Fault(GEOMETRY, "method=Image.Resampling.LANCZOS", "Image.Resampling.NEAREST", OF_GEOMETRY),
    Fault(GEOMETRY, "Image.Resampling.BICUBIC", "Image.Resampling.NEAREST", OF_GEOMETRY),
    Fault(
        GEOMETRY, "method=Image.Resampling.LANCZOS)", "method=Image.Resampling.LANCZOS, centering=(0, 0))", OF_GEOMETRY
    ),
    Fault(GEOMETRY, "pooled = adaptive_max_pool2d(", "pooled = torch.nn.functional.adaptive_avg_pool2d(", OF_GEOMETRY),
    Fault(GEOMETRY, "return 1 - mask_to_latent(ImageOps.invert(mask))", "return mask_to_latent(mask)", OF_GEOMETRY),
    Fault(GEOMETRY, "abs(aspects - 1) <= SAME_ASPECT", "abs(aspects - 1) <= 10 * SAME_ASPECT", OF_GEOMETRY),
    Fault(GEOMETRY, ".float() / 127.5 - 1.0", ".float() / 128 - 1.0", OF_GEOMETRY),
    Fault(GEOMETRY, "math.sqrt(pixels * aspect)", "math.sqrt(pixels / aspect)", OF_GEOMETRY),
    Fault(ORDER, 'self._generator(epoch, f"bucket {name}")', 'self._generator(0, f"bucket {name}")', OF_ORDER),
    Fault(ORDER, 'self._generator(epoch, "groups")', 'self._generator(0, "groups")', OF_ORDER),
    Fault(ORDER, 'f"{self.seed} {epoch} {purpose}"', 'f"{epoch} {purpose}"', OF_ORDER),
    Fault(ORDER, "in sorted(found, key=lambda pair: pair[0])", "in found", OF_ORDER),
    Fault(BATCHES, "first = step * self.global_batch_size", "first = step * self.micro_batch_size", OF_BATCHES),
    Fault(BATCHES, "/ num_samples if", "/ self.global_batch_size if", OF_BATCHES),
    Fault(BATCHES, "self.rank < len(together) else 0.0", "self.rank < len(together) else 0.5", OF_BATCHES),
    Fault(BATCHES, "prompt_emb=record.empty_prompt_emb", "prompt_emb=record.prompt_emb", OF_BATCHES),
    Fault(BATCHES, "< lengths[:, None]", "<= lengths[:, None]", OF_BATCHES),
    Fault(PATHS, "self.bridge_noise * (s * (1 - s)).sqrt() * noise", "self.bridge_noise * s * noise", OBJECTIVES),
    Fault(PATHS, "(1 - s) * target, start - target, torch", "(1 - s) * target, target - start, torch", OBJECTIVES),
    Fault(PATHS, "drift, 1 / alpha_squared)", "drift, torch.ones_like(alpha_squared))", OBJECTIVES),
    Fault(PATHS, "return latents - per_sample(sigma, latents) * velocity", "return latents - velocity", OBJECTIVES),
    Fault(BRIDGE, "(self.weights[name] / p if p else", "(self.weights[name] if p else", OBJECTIVES),
    Fault(BRIDGE, "latent / distance.clamp_min(DISTANCE_FLOOR)", "latent / distance", OBJECTIVES),
    Fault(
        BRIDGE,
        "distance = squared_error(start, target, batch.mask, self.mask_weight)",
        "distance = squared_error(start, target)",
        STREAMS,
    ),
    Fault(BRIDGE, "start[drawn] - (1 - s) * velocity", "start[drawn] - s * velocity", ROLLOUT),
    Fault(BRIDGE, "self._draw_rollout(generator.everywhere)", "self._draw_rollout(generator)", ROLLOUT),
    Fault("losses/errors.py", "weight.sum(1).clamp_min(1e-6)", "weight.shape[1]", OBJECTIVES),
    Fault("losses/pixel.py", 'generator.uniform("crop", (2,)) * room', 'generator.uniform("crop", (2,)) * 1', STREAMS),
    Fault("losses/flow_matching.py", "LossTerms(weight * error,", "LossTerms(error,", STREAMS),
    Fault("losses/randomness.py", "return ((places + within) / self.step_size)", "return (within)", STRATA),
    Fault("losses/sigmas.py", "(num_tokens - 256) / (8192 - 256)", "num_tokens / 8192", OBJECTIVES),
    Fault("losses/sigmas.py", "(1 - generator.stratified(PURPOSE))", "generator.stratified(PURPOSE)", OBJECTIVES),
    Fault(
        WALK,
        "else:\n                latents = latents - (sigma - next_sigma) * velocity",
        "else:\n                latents = latents - sigma * velocity",
        OF_SAMPLERS,
    ),
    Fault(WALK, "(reached - next_sigma) / reached) ** 0.5", "(reached - next_sigma)) ** 0.5", OF_SAMPLERS),
    Fault(FLOW, "guided = negative + scale", "guided = positive + scale", OF_SAMPLERS),
    Fault(SAMPLERS, "kept = sigma * start + (1 - sigma) * self.latents", "kept = self.latents", OF_SAMPLERS),
    Fault(
        WALK,
        'edit.source_latents if self.start == "source" else edit.sub_noise',
        "edit.source_latents",
        OF_SAMPLERS,
    ),
    Fault(WALK, 'f"bridge_noise_{step}"', '"bridge_noise"', OF_SAMPLERS),
    Fault(SIGMAS, "(start - SHIFT_TERMINAL) /", "start /", OF_SAMPLERS),
    Fault(
        SIGMAS,
        "num_steps - min(num_steps * strength, num_steps)",
        "num_steps - num_steps * strength + 0.5",
        OF_SAMPLERS,
    ),
    Fault(WALK, "deviation * (next_sigma / sigma) if", "deviation if", OF_SAMPLERS),
    Fault(
        "eval/qwen/masks.py", "Image.composite(edited, self.picture, self.mask)", "edited", "eval/qwen/test_masks.py"
    ),
    Fault(
        "eval/qwen/samplers/solvers.py", "length / 2 * (slope", "length * (slope", "eval/qwen/samplers/test_solvers.py"
    ),
    Fault(CHECKPOINT, "with optimizer.averaged():", "if True:", OF_CHECKPOINT),
    Fault(CHECKPOINT, "done[: -self.keep_last]", "done[: -self.keep_last - 1]", OF_CHECKPOINT),
    Fault(CHECKPOINT, "if _step(path) <= step]", "]", OF_CHECKPOINT),
    Fault(CHECKPOINT, 'is_better(name, numbers[name], best["value"])', "True", OF_CHECKPOINT),
    Fault(CHECKPOINT, "in reversed(self.resumable())", "in self.resumable()", OF_CHECKPOINT),
    Fault(
        CHECKPOINT,
        "rmtree(temporary, ignore_errors=True)\n            raise",
        "disk_usage('.')\n            raise",
        OF_CHECKPOINT,
    ),
    Fault(ADAPTER, 'scale = self.layers[module].scaling["default"] if', "scale = 1.0 if", OF_ADAPTER),
    Fault(ADAPTER, 'f"{seed}/{name}".encode()', "name.encode()", OF_ADAPTER),
    Fault(ADAPTER, "in matched - unused - ", "in matched - ", OF_ADAPTER),
    Fault(ADAPTER, 'PREFIX = "diffusion_model."', 'PREFIX = "transformer."', OF_ADAPTER),
    Fault(ADAPTER, "parameter.copy_(state[name])", "parameter.copy_(parameter)", OF_CHECKPOINT),
    Fault(LORA, "output.addmm_(part, up.t(), alpha=scale)", "output.addmm_(part, up.t())", OF_LORA),
    Fault(LORA, "d_up if scale == 1 else d_up.mul_(scale)", "d_up", OF_LORA),
]


def copy_tree(folder: Path) -> None:
    """The files that git knows or would take, as they are now."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: str) -> int:
    """Is `pytest tests/TESTS` in the folder, without a word. Returns the exit code."""
    os.chdir(folder)
    sys.path[0] = str(folder)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--timeout", "900"]
    imported = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    code = int(import_module("pytest").main([*options, "-W", imported, f"tests/{tests}"]))
    atexit._run_exitfuncs()  # they end the servers that tests have started
    return code


def outcome(folder: Path, tests: str) -> str:
    """Outcome of a test module, run in a fork up to its first failure."""
    if (process := os.fork()) == 0:
        code = 3  # pytest's for an error of its own
        try:
            code = run_tests(folder, tests)
        finally:
            os._exit(code)
    status = os.waitpid(process, 0)[1]
    return OUTCOMES.get(os.waitstatus_to_exitcode(status), "broken")


def plant(folder: Path, fault: Fault) -> str:
    """What becomes of the tests while the fault is there."""
    file = folder / fault.file
    text = file.read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"{fault.old!r} does not stand once in {fault.file}"
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        return outcome(folder, fault.tests)
    finally:
        file.write_text(text, encoding="utf-8")


def main() -> int:
    """Plants all of them, or those whose file or test module is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="Plant only the faults whose file or test module has one of these parts in its name."
    )
    wanted = parser.parse_args().only.split(",")
    faults = [fault for fault in FAULTS if any(part in f"{fault.file} {fault.tests}" for part in wanted)]
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a file that changes twice in a second would look the same
    sys.dont_write_bytecode = True
    for name in LIBRARIES:
        import_module(name)
    found: list[str] = []
    folder = Path(tempfile.mkdtemp())
    try:
        copy_tree(folder)
        make = [sys.executable, "scripts/make_tiny_model.py", "--out", str(folder / "models/tiny")]
        subprocess.run(make, cwd=folder, check=True, capture_output=True)
        os.environ["TINY_MODEL"] = str(folder / "models/tiny")  # once for all, before there is a fault
        for tests in dict.fromkeys(fault.tests for fault in faults):
            if outcome(folder, tests) != "missed":
                sys.exit(f"tests/{tests} fails without a fault: nothing can be said of it")
        for fault in faults:
            found.append(plant(folder, fault))
            print(f"{found[-1]:7} {fault.file}: {fault.old!r} -> {fault.new!r} ({fault.tests})", flush=True)
    finally:
        shutil.rmtree(folder)
    print(f"{found.count('caught')} of {len(faults)} caught")
    return int(found.count("caught") != len(faults))


if __name__ == "__main__":
    sys.exit(main())
