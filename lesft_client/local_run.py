"""A run without a server: this client holds the whole model, front and back in one process."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lesft.adapter_export import export_adapter
from lesft.adapter_halves import AdapterHalf, HalfInfo, Side
from lesft.adapters import attach_lora, layer_of
from lesft.back import Back
from lesft.device import choose_device, compute_dtype
from lesft.hub import model_folder
from lesft.model_card import Figures
from lesft.spec import RunSpec
from lesft.split import (
    check_cut_layer,
    check_personal_layers,
    checkpoint_gradients,
    default_cut_layer,
)
from lesft.weights import Checkpoint, front_fingerprint, load_back, load_front
from lesft_client.back import LocalBack
from lesft_client.data import EncodedSample
from lesft_client.front import Front
from lesft_client.recovery import ADAPTER_FOLDER, ClientCheckpoints
from lesft_client.train_settings import TrainSettings
from lesft_client.whole_model import WholeModel


class LocalRun:
    """This client's own run. Calls go in the order of the methods.

    The cut says only where the model is taken apart within the process: nothing crosses it on a
    wire, and results do not depend on it but for each side's clipping.
    """

    def __init__(self, settings: TrainSettings, client_id: str) -> None:
        self._settings = settings
        self._client_id = client_id
        self._checkpoint = Checkpoint(model_folder(settings.model))
        self._back: Back | None = None

    def describe(self) -> RunSpec:
        """The run as the settings have it. Raises InvalidInput where they do not fit the model."""
        settings, own = self._settings, self._settings.run
        assert own is not None, "the settings were validated"
        num_layers = self._checkpoint.config.num_hidden_layers
        cut_layer = settings.cut_layer or default_cut_layer(num_layers)
        check_cut_layer(cut_layer, num_layers)
        check_personal_layers(own.personal_layers, num_layers)
        model = settings.model
        return RunSpec(
            **own.model_dump(),
            model_name=Path(model).name if Path(model).exists() else model,
            cut_layer=cut_layer,
            front_fingerprint=front_fingerprint(self._checkpoint, cut_layer),
        )

    def load(self, spec: RunSpec) -> Front:
        """The whole model with fresh adapters."""
        settings, checkpoint, cut = self._settings, self._checkpoint, spec.cut_layer
        device = choose_device(settings.device)
        dtype = compute_dtype(settings.precision, device)
        front = load_front(checkpoint, cut, dtype, device)
        back = load_back(checkpoint, cut, dtype, device)
        embedding: torch.nn.Module = front.get_input_embeddings()
        head: torch.nn.Module = back.get_output_embeddings()  # type: ignore[no-untyped-call]
        if torch.equal(embedding.weight, head.weight):  # type: ignore[arg-type]
            head.weight = embedding.weight  # tied: held once
        attach_lora(front, spec.lora, spec.seed, 0)
        attach_lora(back, spec.lora, spec.seed, cut)
        if settings.gradient_checkpointing:
            checkpoint_gradients(front)
            checkpoint_gradients(back)
        # Clients of one run draw their dropout apart from each other, on this side of the cut too.
        role = "server" if spec.clients == 1 else self._client_id
        self._back = Back(back, spec, settings.precision, dropout_role=role)
        return WholeModel(front, self._back, self._client_id, settings.precision)

    def link(
        self,
        front: Front,
        training: Sequence[EncodedSample],
        checkpoints: ClientCheckpoints,
        on_turn: Callable[[], None],
    ) -> LocalBack:
        """The back in this process."""
        assert self._back is not None, "the model is loaded first"
        return LocalBack(self._back, self._client_id, checkpoints.rounds)

    def write_adapter(self, front: Front, rounds: int, figures: Figures) -> None:
        """The whole adapter, for peft."""
        spec, cut = front.spec, front.spec.cut_layer
        halves: dict[Side, dict[str, torch.Tensor]] = {"front": {}, "back": {}}
        for name, tensor in front.adapter().items():
            halves["front" if layer_of(name) < cut else "back"][name] = tensor
        front_half, back_half = (
            AdapterHalf(HalfInfo.of(spec, side, rounds), halves[side]) for side in ("front", "back")
        )
        export_adapter(
            self._settings.state / ADAPTER_FOLDER,
            front_half,
            back_half,
            spec,
            self._settings.model,
            figures,
            split=False,
        )
