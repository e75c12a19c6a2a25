"""The front of the model and its half of the training step: METHOD section 3, steps 1 and 7.

Pure torch; nothing of the network. Shape letters: B samples, L tokens of the longest sample,
N tokens of the whole micro-batch, T its target tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lesft.adapters import load_lora_state, lora_parameters, lora_state
from lesft.device import Precision, autocast
from lesft.micro_batch import MicroBatch, Path, StepKey, StepResult, Targets, pad, unpad
from lesft.optimizer import Optimizer
from lesft.quantized_linear import QuantizedLinear
from lesft.seeds import derive_seed
from lesft.spec import RunSpec
from lesft.split import front_forward
from lesft.training_state import load_training_state, training_state
from lesft_client.data import EncodedSample


@dataclass(frozen=True)
class ForwardPass:
    """A micro-batch on its way: what is sent, and the graphs that wait for its gradient, if any."""

    micro_batch: MicroBatch
    base_ND: torch.Tensor | None
    reference_ND: torch.Tensor | None


class Front:
    """Token embedding and decoder layers up to the cut, with their adapters and optimizer."""

    def __init__(
        self, model: PreTrainedModel, spec: RunSpec, client_id: str, precision: Precision = "fp32"
    ) -> None:
        """`model` is frozen but for its adapters."""
        self.model = model
        self.spec = spec
        self._client_id = client_id
        self._precision = precision
        self._optimizer = Optimizer(lora_parameters(model), spec.optimizer, spec.rounds)

    # ------------------------------------------------------------------ the training step

    def forward(
        self,
        key: StepKey,
        samples: Sequence[EncodedSample],
        numbers: Sequence[int] = (),
        enclosed: Mapping[int, EncodedSample] | None = None,
    ) -> ForwardPass:
        """Step 1: S = φ(x ∥ y) and S~ = φ(x~ ∥ y); what step 2 uploads is in `micro_batch`.

        With `enclosed`, S~ and y are only of these: the back remembers what came of the others,
        and `numbers` are all samples of the micro-batch.
        """
        fresh = samples if enclosed is None else list(enclosed.values())
        loss = self.spec.loss
        torch.manual_seed(
            derive_seed(self.spec.seed, "client", self._client_id, key.round, key.micro)
        )
        base = self._activations([s.base_ids + s.target_ids for s in samples], dropout=True)
        reference = None
        if loss.needs_reference and fresh:
            # A yardstick, not a training signal: without dropout, and unless asked for without
            # gradient.
            with torch.set_grad_enabled(loss.trains_reference):
                reference = self._activations([s.reference_ids + s.target_ids for s in fresh])
        batch = MicroBatch(
            key,
            _detached(base),
            reference and _detached(reference),
            _targets(fresh),
            tuple(numbers),
            tuple(enclosed or ()),
        )
        return ForwardPass(
            batch,
            base.activations_ND,
            reference.activations_ND if reference and loss.trains_reference else None,
        )

    @torch.no_grad()
    def forward_frozen(
        self, key: StepKey, numbers: Sequence[int], enclosed: Mapping[int, EncodedSample]
    ) -> ForwardPass:
        """Step 1 of a front that does not train, for those samples that the back does not hold.

        `numbers` are all samples of the micro-batch. Without adapters to train there is no dropout,
        and a sample's activations are the same in every epoch, to the last bit: each goes forward
        alone, since padding for its neighbours changes that bit.
        """
        new = list(enclosed.values())
        base = self._one_by_one([s.base_ids + s.target_ids for s in new])
        reference = None
        if new and self.spec.loss.needs_reference:
            reference = self._one_by_one([s.reference_ids + s.target_ids for s in new])
        batch = MicroBatch(key, base, reference, _targets(new), tuple(numbers), tuple(enclosed))
        return ForwardPass(batch, None, None)

    def backward(self, sent: ForwardPass, result: StepResult) -> None:
        """Step 7: go on with the backward pass from the cut, into the adapters' gradients."""
        assert sent.base_ND is not None, "a front that does not train goes forward only"
        assert result.base_gradient_ND is not None, "its gradient is the answer to a micro-batch"
        outputs, gradients = [sent.base_ND], [result.base_gradient_ND]
        if sent.reference_ND is not None and result.reference_gradient_ND is not None:
            outputs.append(sent.reference_ND)
            gradients.append(result.reference_gradient_ND)
        self.model.train()  # as it went forward: checkpointing computes that again
        torch.autograd.backward(
            outputs, [g.to(o.device, o.dtype) for g, o in zip(gradients, outputs, strict=True)]
        )

    def step(self, round_index: int) -> float:
        """Step 7, at the end of a round's window: AdamW steps Θ_i. Returns the gradient's norm."""
        return self._optimizer.step(round_index)

    # ------------------------------------------------------------------ its pieces

    def _activations(self, sequences: Sequence[Sequence[int]], dropout: bool = False) -> Path:
        """Cut-layer activations of token id sequences, without padding."""
        self.model.train(dropout)
        lengths = tuple(len(ids) for ids in sequences)
        flat_N = torch.tensor([i for ids in sequences for i in ids], device=self.model.device)
        ids_BL, mask_BL = pad(flat_N, lengths)
        with autocast(self.model.device, self._precision):
            return Path(unpad(front_forward(self.model, ids_BL, mask_BL), lengths), lengths)

    def _one_by_one(self, sequences: Sequence[Sequence[int]]) -> Path:
        """As `_activations`, of which none depends on the others; there may be none at all."""
        if not sequences:
            return Path(torch.empty(0, self.model.config.hidden_size), ())
        paths = [self._activations([ids]) for ids in sequences]
        return Path(
            torch.cat([path.activations_ND for path in paths]), tuple(len(ids) for ids in sequences)
        )

    # ------------------------------------------------------------------ beside training

    @torch.no_grad()
    def held_out(self, samples: Sequence[EncodedSample]) -> tuple[Path, Targets]:
        """What the back needs to score held-out samples: base path only, no dropout."""
        return self._activations([s.base_ids + s.target_ids for s in samples]), _targets(samples)

    def num_parameters(self) -> tuple[int, int]:
        """How many parameters are in this process, and how many of them are trained.

        Rows of the token embedding that are read on demand are in it for a moment only.
        """
        every = [parameter.numel() for parameter in self.model.parameters()]
        every += [
            layer.in_features * layer.out_features
            for layer in self.model.modules()
            if isinstance(layer, QuantizedLinear)
        ]
        trained = [p.numel() for p in lora_parameters(self.model)] if self.spec.train_front else []
        return sum(every), sum(trained)

    def adapter(self) -> dict[str, torch.Tensor]:
        """Θ_i: float32 tensors on the CPU under whole-model names."""
        return lora_state(self.model, 0)

    def load_adapter(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from Θ̄ (step 10). Raises for a state that is not this front's."""
        load_lora_state(self.model, 0, state)

    def state(self) -> dict[str, torch.Tensor]:
        """Θ_i and its optimizer between two rounds; see `lesft.training_state`."""
        return training_state(self.model, 0, self._optimizer)

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state`. Raises BundleError for one that is not this front's."""
        load_training_state(self.model, 0, self._optimizer, tensors)

    def drop_gradients(self) -> None:
        """Forget the gradients of a round that is given up."""
        self._optimizer.drop_gradients()


def _detached(path: Path) -> Path:
    return Path(path.activations_ND.detach(), path.lengths)


def _targets(samples: Sequence[EncodedSample]) -> Targets:
    ids_T = torch.tensor([i for sample in samples for i in sample.target_ids], dtype=torch.long)
    return Targets(ids_T, tuple(len(sample.target_ids) for sample in samples))
