"""Build the corpus and the tokenizer of the example models.

The corpus is the source of the standard library of the Python that runs this script, its test suite included, and,
where `--docs` names a folder of reST files, the documentation (Debian's package python3.11-doc has them under
/usr/share/doc/python3.11/html/_sources). Both are under the PSF licence. One file in about 50, chosen by the hash of
its path, is held out for validation.

    python examples/training/build_corpus.py --out corpus [--docs FOLDER]

writes corpus/tokens.npz (`train` and `validation`, uint16 token ids, documents separated by the end-of-text token) and
corpus/tokenizer/ (a byte-level BPE of 4096 entries, which `AutoTokenizer.from_pretrained` loads).
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 1024
PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# Words with their leading space, numbers of up to three digits, punctuation with the line break after it, and runs of
# spaces less the last one (which belongs to the word), so that an indentation is one token.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Generated tables and the documentation as one string: no prose, no programs.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"}
LARGEST_FILE = 400_000


def documents(docs: Path | None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document of the corpus, sorted by path."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = [(library, "*.py")] + ([(docs, "*.rst*")] if docs else [])
    for root, pattern in roots:
        for path in sorted(root.rglob(pattern)):
            name = path.relative_to(root)
            if SKIPPED_FOLDERS.intersection(name.parts) or path.stat().st_size > LARGEST_FILE:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few tests of source encodings
            if is_prose_or_program(text):
                yield name.as_posix(), text


def is_prose_or_program(text: str) -> bool:
    """False for tables of numbers and escapes, which would waste a small model's capacity."""
    words = sum(character.isalpha() or character.isspace() for character in text)
    return len(text) >= 200 and words / len(text) > 0.6


def held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] * 50 < 256


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that puts `<s>` in front of a text, as Llama's tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return the token ids of all texts in a row, uint16, `</s>` after each."""
    backend = tokenizer.backend_tokenizer
    end = tokenizer.eos_token_id
    encoded = backend.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*item.ids, end], dtype=np.uint16) for item in encoded])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="folder of reST sources of Python's documentation")
    arguments = parser.parse_args()

    corpus = list(documents(arguments.docs))
    train = [text for name, text in corpus if not held_out(name)]
    validation = [text for name, text in corpus if held_out(name)]
    tokenizer = train_tokenizer(train)

    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.out / "tokenizer")
    tokens = {"train": encode(train, tokenizer), "validation": encode(validation, tokenizer)}
    np.savez_compressed(arguments.out / "tokens.npz", **tokens)
    for split, texts in (("train", train), ("validation", validation)):
        size = sum(len(text.encode()) for text in texts)
        print(f"{split}: {len(texts)} files, {size:,} bytes, {len(tokens[split]):,} tokens")


if __name__ == "__main__":
    main()
