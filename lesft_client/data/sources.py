"""From what `--data` says to samples: a name, a JSONL file, or a folder of a known data set."""

from collections.abc import Iterable
from pathlib import Path

from lesft.errors import DataError
from lesft.seeds import derive_seed
from lesft_client.data import aqua_rat, commonsense_qa, gsm8k, hub, jsonl, wordproblems
from lesft_client.data.order import permutation
from lesft_client.data.rows import Row, read_rows
from lesft_client.data.samples import Sample, Split

_FILES: dict[str, dict[Split, str]] = {
    "gsm8k": {"train": "train.jsonl", "test": "test.jsonl"},
    "commonsense_qa": {"train": "train.jsonl", "test": "validation.jsonl"},
    "aqua_rat": {"train": "train_dev.jsonl", "test": "test.jsonl"},
}
_FIELDS = {
    "gsm8k": {"question", "answer"},
    "commonsense_qa": {"id", "question", "answerKey"},
    "aqua_rat": {"question", "options", "correct"},
}
_EXPLANATIONS = "cose_train.jsonl"
_NAMES = (*_FILES, "wordproblems")
_HELD_OUT_ONE_IN = 10


def load_samples(data: str, split: Split, count: int | None, seed: int) -> list[Sample]:
    """The samples of one split of a data set.

    `data` is one of
    - `wordproblems`: `count` generated problems; test and train never overlap, whatever the seed;
    - `gsm8k`, `commonsense_qa` or `aqua_rat`: the hub's train and test split (for commonsense_qa,
      validation);
    - a folder with one of these three: `train.jsonl` and `test.jsonl`, `train.jsonl` and
      `validation.jsonl` (and `cose_train.jsonl` with explanations), or `train_dev.jsonl` and
      `test.jsonl`; which it is, the fields of its rows tell;
    - a JSONL file (see `jsonl`): a tenth of its prompts, drawn with the seed, is the test split,
      and the rest is for training. Both calls must use the same seed; between them the file should
      stay as it is, or prompts near the border change sides.

    A name goes before a file or folder of that name (`./gsm8k` means the folder). With `count`,
    that many samples are drawn with the seed; with None, all are returned in the order of the
    file. Raises DataError when the data cannot be read or has fewer samples than `count`.
    """
    if data == "wordproblems":
        if count is None:
            raise DataError(
                "wordproblems makes as many samples as asked for: say how many with --samples"
            )
        return wordproblems.samples(split, count, seed)
    return _draw(_all_samples(data, split, seed), count, f"{data} ({split})", seed)


def _all_samples(data: str, split: Split, seed: int) -> list[Sample]:
    path = Path(data).expanduser()
    if data in _FILES:
        explained = data == "commonsense_qa" and split == "train"
        explanations = hub.read_explanations() if explained else ()
        return _samples(data, hub.read_rows(data, split), explanations)
    if path.is_dir():
        return _from_folder(path, split)
    if path.is_file():
        return _split(jsonl.samples(read_rows(path)), path, split, seed)
    raise DataError(
        f"{data!r} is neither a data set ({', '.join(_NAMES)}) nor a JSONL file or folder that "
        "exists; check the spelling or the path"
    )


def _draw(samples: list[Sample], count: int | None, name: str, seed: int) -> list[Sample]:
    if not samples:
        raise DataError(f"{name} has no samples: the file is empty")
    if count is None:
        return samples
    if count > len(samples):
        raise DataError(
            f"{name} has {len(samples)} samples, {count} were asked for; ask for fewer samples or "
            "clients, or give more data"
        )
    order = permutation(derive_seed(seed, "samples"), len(samples))
    return [samples[i] for i in order[:count]]


def _samples(kind: str, rows: Iterable[Row], explanations: Iterable[Row]) -> list[Sample]:
    if kind == "gsm8k":
        return gsm8k.samples(rows)
    if kind == "commonsense_qa":
        return commonsense_qa.samples(rows, explanations)
    return aqua_rat.samples(rows)


def _from_folder(folder: Path, split: Split) -> list[Sample]:
    kind = kind_of(folder)
    explanations = folder / _EXPLANATIONS
    explained = kind == "commonsense_qa" and split == "train" and explanations.is_file()
    rows = read_rows(folder / _FILES[kind][split])
    return _samples(kind, rows, read_rows(explanations) if explained else ())


def kind_of(folder: Path) -> str:
    """Which data set a folder holds, told by its files' names and their first rows' fields."""
    for kind, files in _FILES.items():
        for path in (folder / name for name in files.values()):
            first = next(read_rows(path), None) if path.is_file() else None
            if first and _FIELDS[kind] <= first.fields.keys():
                return kind
    layouts = "; ".join(
        f"{kind}: {' and '.join(files.values())} with {', '.join(sorted(_FIELDS[kind]))}"
        for kind, files in _FILES.items()
    )
    inside = [kind for kind in _FILES if (folder / kind).is_dir()]
    hint = f"; did you mean {folder / inside[0]}?" if inside else ""
    raise DataError(
        f"{folder} holds no data set that is known here ({layouts}); for data of your own give "
        f"the JSONL file itself{hint}"
    )


def _split(samples: list[Sample], path: Path, split: Split, seed: int) -> list[Sample]:
    """One side of a file: by prompt, so that one on several lines is not on both sides."""
    prompts = list(dict.fromkeys(sample.prompt for sample in samples))
    if len(prompts) == 1 and split == "test":
        raise DataError(
            f"{path}: has one prompt only, which is for training; held-out samples need two or more"
        )
    num_train = min(len(prompts) - len(prompts) // _HELD_OUT_ONE_IN, max(1, len(prompts) - 1))
    # By the prompt itself: where others come and go, few change sides.
    prompts.sort(key=lambda prompt: derive_seed(seed, "held out", prompt))
    held_out = set(prompts[num_train:])
    return [sample for sample in samples if (sample.prompt in held_out) == (split == "test")]
