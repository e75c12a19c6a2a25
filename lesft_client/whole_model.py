"""Front and back in one process: a client that holds the whole model and trains all of it."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from lesft.adapters import layer_of, load_lora_state, lora_parameters, lora_state
from lesft.back import Back
from lesft.device import Precision
from lesft_client.front import Front

_BACK = "back."


class WholeModel(Front):
    """A front whose adapter and state are those of the whole model.

    The training step is the same as with the back elsewhere: each side clips its own gradient and
    steps its own AdamW.
    """

    def __init__(
        self, model: PreTrainedModel, back: Back, client_id: str, precision: Precision = "fp32"
    ) -> None:
        super().__init__(model, back.spec, client_id, precision)
        self._back = back

    def num_parameters(self) -> tuple[int, int]:
        """How many parameters are in this process, and how many of them are trained."""
        parts = (self.model, self._back.model)
        every = {id(p): p.numel() for part in parts for p in part.parameters()}  # some are shared
        trained = sum(p.numel() for part in parts for p in lora_parameters(part))
        return sum(every.values()), trained

    def adapter(self) -> dict[str, torch.Tensor]:
        """Θ_i and Φ_i: float32 tensors on the CPU under whole-model names."""
        return super().adapter() | lora_state(self._back.model, self.spec.cut_layer)

    def load_adapter(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from an average. Raises for a state that is not this model's."""
        cut = self.spec.cut_layer
        back = {name: tensor for name, tensor in state.items() if layer_of(name) >= cut}
        super().load_adapter({name: state[name] for name in state.keys() - back.keys()})
        load_lora_state(self._back.model, cut, back)

    def state(self) -> dict[str, torch.Tensor]:
        """Both sides' adapters and optimizers between two rounds."""
        back = self._back.state()
        return super().state() | {f"{_BACK}{name}": tensor for name, tensor in back.items()}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state`. Raises BundleError for one that is not this model's."""
        back = {n.removeprefix(_BACK): t for n, t in tensors.items() if n.startswith(_BACK)}
        super().load_state({n: t for n, t in tensors.items() if not n.startswith(_BACK)})
        self._back.load_state(back)

    def drop_gradients(self) -> None:
        """Forget the gradients of a round that is given up."""
        super().drop_gradients()
        self._back.optimizer.drop_gradients()
