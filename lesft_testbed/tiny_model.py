"""A tiny random model with a tokenizer, and data for it: one step takes milliseconds.

It learns nothing worth having; it is for runs whose point is what happens around the training.
"""

import json
from collections.abc import Iterator
from pathlib import Path

MAX_LENGTH = 64
"""Every sample is shorter than this many tokens."""

_VOCAB_SIZE = 300
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def save_tiny_model(folder: Path, seed: int, **shape: int) -> Path:
    """A random four-layer llama in Hugging Face layout with a byte-level tokenizer.

    `shape` are entries of its config, for one that is not as tiny.
    """
    # Seconds to load, and needed only here.
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample["prompt"] for sample in _samples(9)], trainer)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = AutoConfig.for_model(
        "llama",
        **_SHAPE | shape,
        vocab_size=_VOCAB_SIZE,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
    model.save_pretrained(folder)
    return folder


def save_tiny_data(path: Path, count: int) -> Path:
    """`count` short problems, each another one, as JSONL."""
    path.write_text("".join(json.dumps(sample) + "\n" for sample in _samples(count)))
    return path


def _samples(count: int) -> Iterator[dict[str, str]]:
    for n in range(count):
        total = 2 * n + 3
        yield {
            "prompt": f"Add {n} and {n + 3}.",
            "reference": f"{total}: add {n} and {n + 3}.",
            "target": f"It is {total}.",
        }
