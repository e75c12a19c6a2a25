"""A random checkpoint of a large model's shape, all that a device needs of it, and one sample.

A program: JSON in and JSON out, so that what it takes of memory and time ends with it.
"""

import json
import string
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

QWEN_3B = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
"""Qwen2.5-3B's config but for its number of layers."""

_SPECIAL = ("<pad>", "<s>", "</s>")
_SCALE = 0.02


def save_large_model(folder: Path, seed: int, config: Mapping[str, Any]) -> None:
    """Random weights in bfloat16, a file a tensor, and a tokenizer with as many tokens."""
    torch.manual_seed(seed)
    shape = AutoConfig.for_model(**config)
    shape.save_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    for name, parameter in empty.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        else:
            tensor.normal_(std=_SCALE)
        save_file({name: tensor}, folder / f"{name}.safetensors", metadata={"format": "pt"})
    _tokenizer(config["vocab_size"]).save_pretrained(folder)


def save_sample(path: Path, seed: int, folder: Path, tokens: int) -> None:
    """One sample, of as many tokens on both paths, a quarter of them target; as JSONL."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    words = [word for word in tokenizer.get_vocab() if word.startswith("Ġ")]
    chosen = torch.randint(len(words), (tokens,), generator=torch.Generator().manual_seed(seed))
    text = [words[index].replace("Ġ", " ") for index in chosen]
    target = tokens // 4
    # Each begins with a letter that is a token; behind a prompt come two line ends, and the end
    # token behind a target.
    prompt = "".join(["a", *text[: tokens - target - 3]])
    answer = "".join(["a", *text[-target + 2 :]])
    sample = {"prompt": prompt, "reference": prompt, "target": answer}
    path.write_text(json.dumps(sample) + "\n")


def _tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: each word of up to so many letters is one token, merged letter by letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*_SPECIAL, *alphabet])
    merges = []
    for word, letter in _words():
        if len(tokens) == num_tokens:
            break
        tokens[word + letter] = None
        merges.append((word, letter))
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _words() -> Iterator[tuple[str, str]]:
    """Words behind a space as beginning and last letter, shorter ones first."""
    for length in range(1, 5):
        for letters in product(string.ascii_letters, repeat=length):
            yield "Ġ" + "".join(letters[:-1]), letters[-1]


def make(request: Mapping[str, Any]) -> None:
    """Of a request with `folder`, `sample`, `seed`, `tokens` and what is not as in `QWEN_3B`."""
    (folder := Path(request["folder"])).mkdir()
    save_large_model(folder, request["seed"], {**QWEN_3B, **request["config"]})
    save_sample(Path(request["sample"]), request["seed"], folder, request["tokens"])


if __name__ == "__main__":
    asked, answer = map(Path, sys.argv[1:])
    make(json.loads(asked.read_bytes()))
    answer.write_text("{}")
