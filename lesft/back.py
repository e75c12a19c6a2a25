"""The back of the model and its training step: METHOD section 3, steps 3 to 6. Pure torch.

The server runs it for its cohort; a program that holds the whole model runs it beside the front.
Shape letters: N tokens of the whole batch, T its target tokens, L tokens of the longest sample,
B samples, D width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from lesft.adapters import enable_adapters, lora_parameters
from lesft.cohort_batch import CohortBatch, Part, TokenTerms, concatenate, grouped, remember
from lesft.decoding import Step, back_steps
from lesft.device import Precision, autocast
from lesft.errors import InvalidInput
from lesft.loss import sample_token_weights, slice_log_probs
from lesft.micro_batch import Path, StepKey, StepResult, Targets, at_predictors, pad
from lesft.optimizer import Optimizer
from lesft.sample_memory import PREFIX as REMEMBERED
from lesft.sample_memory import SampleMemory
from lesft.seeds import derive_seed
from lesft.spec import RunSpec
from lesft.split import back_hidden, head_logits
from lesft.training_state import load_training_state, training_state

MOST_TOKENS = {"cpu": 512, "cuda": 16384}
"""Of one batch, by the device's type: a CPU is busy with few, and pays for padding in full."""


class Back:
    """Decoder layers from the cut on, final norm and LM head, with their adapters and optimizer."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: RunSpec,
        precision: Precision = "fp32",
        logits_slice: int = 1024,
        dropout_role: str = "server",
        memory: SampleMemory | None = None,
        most_tokens: int = 0,
    ) -> None:
        """`model` is frozen but for its adapters; logits are made `logits_slice` tokens a time.

        A cohort's step of more than `most_tokens`, with padding, is taken in several batches; 0
        stands for `MOST_TOKENS` of the model's device. Dropout is drawn by the role's name, beside
        the run's seed and the step. `memory` is a new one of its own, unless given.
        """
        self.model = model
        self.spec = spec
        self.optimizer = Optimizer(lora_parameters(model), spec.optimizer, spec.rounds)
        self.memory = memory or SampleMemory()
        """What need not be sent again; empty where all is taken anew in each step."""
        self._precision = precision
        self._logits_slice = logits_slice
        self._dropout_role = dropout_role
        self._most_tokens = most_tokens or MOST_TOKENS.get(model.device.type, MOST_TOKENS["cuda"])
        self._untuned = False

    def with_model(self, model: PreTrainedModel, spec: RunSpec) -> "Back":
        """A back that computes as this one, with optimizer and memory of its own."""
        return Back(
            model,
            spec,
            self._precision,
            self._logits_slice,
            self._dropout_role,
            most_tokens=self._most_tokens,
        )

    # ------------------------------------------------------------------ the training step

    def train_step(self, key: StepKey, parts: Sequence[Part]) -> list[StepResult]:
        """One micro-batch of the cohort; after the window's last one AdamW steps Φ.

        Returns the clients' results in the order of their parts. Raises InvalidInput, and changes
        nothing, when a client's activations are or lead to values that are not finite; raises what
        `Optimizer.step` raises.
        """
        groups = grouped(parts, self._most_tokens)
        torch.manual_seed(derive_seed(self.spec.seed, self._dropout_role, key.round, key.micro))
        with self._gradients_kept_from_failure(len(groups)):
            trained = [self._train(key, group) for group in groups]
        results: dict[str, StepResult] = {}
        for group, (of_group, reference_log_probs_T) in zip(groups, trained, strict=True):
            results |= {part.client_id: each for part, each in zip(group, of_group, strict=True)}
            if reference_log_probs_T is not None:
                remember(group, reference_log_probs_T)
        if key.micro == self.spec.accumulation - 1:
            self.optimizer.step(key.round)
        return [results[part.client_id] for part in parts]

    def _train(
        self, key: StepKey, parts: Sequence[Part]
    ) -> tuple[list[StepResult], torch.Tensor | None]:
        """Forward and backward with one batch; returns results, and log P~ `[T]` where it is known.

        Raises InvalidInput before anything is changed.
        """
        loss = self.spec.loss
        # Step 3: S and S~ of all clients.
        batch = CohortBatch(parts, self.model.device, self.spec.train_front)
        ids_T = batch.targets.ids_T

        reference_TD = reference_log_probs_T = None
        if loss.needs_reference:
            reference_TD, reference_log_probs_T = self._reference(batch)
        base_TD = self._hidden(batch.base, batch.targets, grad=True, dropout=True)
        _check_finite(batch, base_TD, reference_TD)

        # Step 4: S_t is a constant, so a token's coefficient is known before its probability, and
        # the LM head can run forward and backward slice by slice.
        made_of_T = reference_log_probs_T if loss.token_weights == "adaptive" else None
        if loss.token_weights == "probability":
            made_of_T = self._log_probs(base_TD, ids_T)
        weights_T, classes_T = self._token_weights(made_of_T, base_TD, batch.targets)
        weights_T = weights_T + loss.base_nll_weight
        scales_T = batch.token_scales() / self.spec.accumulation

        # Step 5: backward, into the adapters' and the activations' gradients.
        log_probs_T = self._backward(base_TD, ids_T, weights_T * scales_T)
        losses_T = -(weights_T * log_probs_T)
        if reference_TD is not None and loss.trains_reference:
            reference_log_probs_T = self._backward(
                reference_TD, ids_T, loss.reference_nll_weight * scales_T
            )
            losses_T = losses_T - loss.reference_nll_weight * reference_log_probs_T

        # Step 6: the gradient with respect to S, split by client.
        terms = TokenTerms(losses_T, log_probs_T, classes_T)
        return batch.results(key, terms), reference_log_probs_T

    # ------------------------------------------------------------------ its pieces

    @contextmanager
    def _gradients_kept_from_failure(self, num_batches: int) -> Iterator[None]:
        """A batch that is refused leaves no gradients behind of those before it in its step."""
        if num_batches == 1:
            yield
            return
        parameters = lora_parameters(self.model)
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        try:
            yield
        except InvalidInput:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            raise

    def _reference(self, batch: CohortBatch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Hidden states where log P~ is not known yet, if that is anywhere; log P~ `[T]` of all."""
        if batch.reference is None:
            return None, batch.with_known(None)
        targets = batch.reference_targets
        hidden_TD = self._hidden(batch.reference, targets, self.spec.loss.trains_reference)
        return hidden_TD, batch.with_known(self._log_probs(hidden_TD, targets.ids_T))

    def _hidden(
        self, path: Path, targets: Targets, grad: bool, dropout: bool = False
    ) -> torch.Tensor:
        """Hidden states `[T, D]` after the final norm where the target tokens are predicted."""
        self.set_mode(dropout)
        with torch.set_grad_enabled(grad), autocast(self.model.device, self._precision):
            activations_BLD, mask = pad(path.activations_ND.to(self.model.dtype), path.lengths)
            hidden_BLD = back_hidden(self.model, activations_BLD, mask)
            return at_predictors(hidden_BLD, path.lengths, targets.lengths)

    def _token_weights(
        self, log_probs_T: torch.Tensor | None, hidden_TD: torch.Tensor, targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """S_t and the class of every token, sample by sample; see `sample_token_weights`."""
        lengths = list(targets.lengths)
        hidden = torch.split(hidden_TD.detach(), lengths)
        probs: Sequence[torch.Tensor | None] = [None] * len(lengths)
        if log_probs_T is not None:
            probs = torch.split(log_probs_T.exp(), lengths)
        samples = [
            sample_token_weights(p, h, self.spec.loss) for p, h in zip(probs, hidden, strict=True)
        ]
        classes = [classes_T for _, classes_T in samples if classes_T is not None]
        weights_T = torch.cat([weights_T for weights_T, _ in samples])
        return weights_T, torch.cat(classes) if classes else None

    def _backward(
        self, hidden_TD: torch.Tensor, ids_T: torch.Tensor, coefficients_T: torch.Tensor
    ) -> torch.Tensor:
        """Back-propagate -Σ c_t log P_t; return log P `[T]`. Never holds logits of all tokens."""
        leaf_TD = hidden_TD.detach().requires_grad_()
        log_probs = []
        for rows in self._slices(len(ids_T)):
            with autocast(self.model.device, self._precision):
                log_probs_T = slice_log_probs(head_logits(self.model, leaf_TD[rows]), ids_T[rows])
            (-(coefficients_T[rows] * log_probs_T).sum()).backward()  # type: ignore[no-untyped-call]
            log_probs.append(log_probs_T.detach())
        self.set_mode(dropout=True)  # as it went forward: checkpointing computes that again
        hidden_TD.backward(leaf_TD.grad)  # type: ignore[no-untyped-call]
        return torch.cat(log_probs)

    @torch.no_grad()
    def _log_probs(self, hidden_TD: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
        """log P `[T]` of the target tokens, without graph."""
        with autocast(self.model.device, self._precision):
            return torch.cat(
                [
                    slice_log_probs(head_logits(self.model, hidden_TD[rows]), ids_T[rows])
                    for rows in self._slices(len(ids_T))
                ]
            )

    def _slices(self, num_tokens: int) -> list[slice]:
        starts = range(0, num_tokens, self._logits_slice)
        return [slice(start, start + self._logits_slice) for start in starts]

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, torch.Tensor]:
        """Φ, its optimizer and its memory between two rounds; see `lesft.training_state`."""
        state = training_state(self.model, self.spec.cut_layer, self.optimizer)
        return state | self.memory.state()

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state`. Raises BundleError for one that is not this back's."""
        remembered = {name: t for name, t in tensors.items() if name.startswith(REMEMBERED)}
        own = {name: tensor for name, tensor in tensors.items() if name not in remembered}
        load_training_state(self.model, self.spec.cut_layer, self.optimizer, own)
        self.memory.load_state(remembered)

    # ------------------------------------------------------------------ held-out likelihood

    @torch.no_grad()
    def score(self, base: Path, targets: Targets) -> list[float]:
        """Each sample's sum of -log P over its target tokens, in nats; trains nothing."""
        base = concatenate([base], self.model.device, grad=False)
        hidden_TD = self._hidden(base, targets, grad=False)
        log_probs_T = self._log_probs(hidden_TD, targets.ids_T.to(self.model.device))
        return [
            -float(sample.double().sum())
            for sample in torch.split(log_probs_T, list(targets.lengths))
        ]

    # ------------------------------------------------------------------ decoding

    def next_logits(
        self, steps: Sequence[Step], wanted: Sequence[int], untuned: bool
    ) -> list[torch.Tensor]:
        """Float32 logits `[W, V]` after each step's last W tokens; see `back_steps`.

        `untuned` is for the model as it was before the training.
        """
        self.set_mode(dropout=False, untuned=untuned)
        with autocast(self.model.device, self._precision):
            return back_steps(self.model, steps, wanted)

    def set_mode(self, dropout: bool, untuned: bool = False) -> None:
        """With or without dropout and adapters; only what changes is set, as each costs time."""
        if self.model.training is not dropout:
            self.model.train(dropout)
        if self._untuned is not untuned:
            self._untuned = untuned
            enable_adapters(self.model, not untuned)


def _check_finite(
    batch: CohortBatch, base_TD: torch.Tensor, reference_TD: torch.Tensor | None
) -> None:
    """Samples do not touch each other, so the rows that are not finite tell whose they are.

    The activations themselves count too: no hidden state need depend on those of the last token,
    which predicts nothing, but the adapters' gradient would.
    """
    for part, rows, reference_rows in zip(
        batch.parts, batch.token_rows(), batch.reference_rows(), strict=True
    ):
        tensors = [part.micro_batch.base.activations_ND, base_TD[rows]]
        if part.micro_batch.reference is not None and reference_TD is not None:
            tensors += [part.micro_batch.reference.activations_ND, reference_TD[reference_rows]]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise InvalidInput(
                f"client {part.client_id!r}: its activations of {part.micro_batch.key} are or lead "
                "to values that are NaN or infinite: check its front and its precision"
            )
