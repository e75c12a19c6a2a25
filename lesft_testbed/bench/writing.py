"""Texts of the likeliest tokens, by a whole model or by a client of a server: a program.

JSON in and JSON out. The client's code is loaded in a process of its own, as it is nowhere else in
the testbed.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lesft.commands import load

_WARM_UP_TOKENS = 8


def written(request: Mapping[str, Any]) -> dict[str, Any]:
    """`texts` as token ids, the `seconds` of them all, prompts included, and `round_trips`.

    The request has `model`, `threads`, `prompts`, `tokens` of each text, and either the `adapter`
    of a whole model or `server`, `state`, `guesses` and `at_once`. A first text, which warms up, is
    not counted.
    """
    torch.set_num_threads(request["threads"])
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    prompts = [tokenizer(prompt)["input_ids"] for prompt in request["prompts"]]
    if "adapter" in request:
        return _whole(request, prompts)
    return asyncio.run(_split(request, prompts))


@torch.no_grad()
def _whole(request: Mapping[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """By the library's own `generate`."""
    base = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, request["adapter"]).eval()

    def write(prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        text = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        new: list[int] = text[0, len(prompt) :].tolist()
        return new

    write(prompts[0], _WARM_UP_TOKENS)
    start = time.monotonic()
    texts = [write(prompt, request["tokens"]) for prompt in prompts]
    seconds = time.monotonic() - start
    return {"texts": texts, "seconds": seconds, "round_trips": sum(map(len, texts))}


async def _split(request: Mapping[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """By the client, with the server's help."""
    settings = load("lesft_client.settings:LanguageModelSettings")(
        server=request["server"],
        model=request["model"],
        state=request["state"],
        weights="local",
        threads=request["threads"],
        speculate=request["guesses"],
    )
    asked = load("lesft_client.language_model:GenerationRequest")
    async with load("lesft_client.open_model:open_model")(settings) as model:

        async def write(prompt: list[int], tokens: int) -> list[int]:
            pieces = model.generate(asked(prompt_ids=prompt, max_tokens=tokens))
            return [token async for piece in pieces for token in piece.token_ids]

        await write(prompts[0], _WARM_UP_TOKENS)
        before, start = model.round_trips, time.monotonic()
        if request["at_once"]:
            every = (write(prompt, request["tokens"]) for prompt in prompts)
            texts = await asyncio.gather(*every)
        else:
            texts = [await write(prompt, request["tokens"]) for prompt in prompts]
        seconds = time.monotonic() - start
        return {
            "texts": texts,
            "seconds": seconds,
            "round_trips": model.round_trips - before,
        }


if __name__ == "__main__":
    asked, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(written(json.loads(asked.read_bytes()))))
