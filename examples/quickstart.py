"""Optimize a model in one line, and see that it writes the same text.

python examples/quickstart.py
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import regraft

MODEL = Path(__file__).parent / "model"  # a small Llama trained on Python's standard library; see its README.md
PROMPT = """import argparse
import sys


def main():
    parser = argparse.ArgumentParser("""


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    # float32, so that every greedy choice must agree: in bf16, rounding alone may swap two near-equal logits.
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    arguments = {"max_new_tokens": 48, "do_sample": False}

    expected = model.generate(**prompt, **arguments)

    model = regraft.optimize(model)
    tokens = model.generate(**prompt, **arguments)

    print(tokenizer.decode(tokens[0], skip_special_tokens=True), "\n")
    print(model.report)
    assert torch.equal(tokens, expected), "the optimized model wrote other tokens than the original"
    served = json.loads(model.report.to_json())["generated"]
    assert served == {"the fast loop": 1}, f"generate was served otherwise: {served}"
    print(f"\nThe original's {tokens.shape[1]} tokens, from pages, by the engine alone.")


if __name__ == "__main__":
    main()
