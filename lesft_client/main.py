"""The command `lesft-client`."""

from lesft.commands import Command, Program
from lesft.logs import configure_logs
from lesft.openmp import sleep_soon
from lesft_client.log_settings import ClientLogSettings

EXIT_STOPPED_BY_OTHERS = 3
"""The run ended early because of another party; tells a cause from its consequences."""

_SETTINGS = "lesft_client.settings"

PROGRAM = Program(
    "lesft-client",
    "The edge client of LESFT: it keeps the text and runs the first layers of the model.",
    (
        Command(
            "train",
            "fine-tune together with other clients",
            "lesft_client.train_settings:TrainSettings",
            "lesft_client.train:train",
        ),
        Command(
            "plan",
            "measure this device and its link, and say where to cut the model",
            "lesft_client.planning.settings:PlanSettings",
            "lesft_client.planning.command:plan",
        ),
        Command(
            "enroll",
            "become a client of a server or an aggregator, with the token of its operator",
            "lesft_client.enrol:EnrollSettings",
            "lesft_client.enrol:enroll",
        ),
        Command(
            "generate",
            "write one text with the fine-tuned model",
            f"{_SETTINGS}:GenerateSettings",
            "lesft_client.generate_command:generate",
        ),
        Command(
            "chat",
            "talk with the fine-tuned model",
            f"{_SETTINGS}:ChatSettings",
            "lesft_client.chat_command:chat",
        ),
        Command(
            "serve",
            "offer it to programs as an OpenAI-compatible endpoint",
            f"{_SETTINGS}:ServeSettings",
            "lesft_client.endpoint.serve:serve",
        ),
        Command(
            "evaluate",
            "measure its accuracy on a benchmark",
            f"{_SETTINGS}:EvaluateSettings",
            "lesft_client.evaluation.command:evaluate",
        ),
        Command(
            "export",
            "take the adapter home, for PEFT or merged into the weights",
            f"{_SETTINGS}:ExportSettings",
            "lesft_client.export:export",
        ),
        Command(
            "distill",
            "make training data from questions and a teacher model",
            "lesft_client.distillation.settings:DistillSettings",
            "lesft_client.distillation.command:distill",
        ),
        Command(
            "data",
            "write the samples of a data source as JSONL, to look at them",
            f"{_SETTINGS}:ExportDataSettings",
            "lesft_client.data_command:export_data",
        ),
    ),
    exit_when_stopped=EXIT_STOPPED_BY_OTHERS,
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    configure_logs(ClientLogSettings(), PROGRAM.name, PROGRAM.log_format)
    sleep_soon()
    PROGRAM.run(argv)
