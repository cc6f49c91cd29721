"""The words that the command knows, without torch."""

from typing import Literal

FormName = Literal["kohya", "diffusers", "common"]
"""Whose names an adapter's tensors have."""
GGUFName = Literal["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16", "F16"]
"""Types of a GGUF file that can be written without llama.cpp."""
NumbersName = Literal["bf16", "fp16", "fp32"]
