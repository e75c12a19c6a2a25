"""One training example (METHOD section 2), whatever data set it comes from."""

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Sample:
    """What the model is asked, and what it should write.

    `prompt` is the user's message on the base path (x) and `reference` the one on the reference
    path (x̃), which shows the ground truth too. `target` (y) is the worked solution that both paths
    are followed by, without end-of-sequence. `answer` is the final answer alone, and `label` the
    kind of problem; each is empty where the data names none.
    """

    prompt: str
    target: str
    reference: str
    answer: str
    label: str = ""
