"""Each side is killed at each phase of a step, a checkpoint and an aggregation, not at random.

Six rounds of two micro-batches and an aggregation after every second; two clients. The victim is
started again as it was, and everything must come out as in the undisturbed run.
"""

from pathlib import Path

import pytest

from tests.recovery.harness import Disturbance, Outcome, Zygote, new_run

CLIENT: dict[str, Disturbance] = {
    # The step. Seven micro-batches: in the second window, in mid-round.
    "before a micro-batch is sent": ("lesft_client.link:ServerLink.send", "before", 7),
    "after it is sent": ("lesft_client.link:ServerLink.send", "after", 7),
    "before the answer is read": ("lesft_client.link:ServerLink.receive", "before", 7),
    "in the midst of the answer": ("lesft_client.stream:BundleReader.add", "before", 7),
    "after the answer is read": ("lesft_client.link:ServerLink.receive", "after", 7),
    "before the optimizer's step": ("lesft_client.front:Front.step", "before", 3),
    "after the optimizer's step": ("lesft_client.front:Front.step", "after", 3),
    # The aggregation: the second of three.
    "before submitting": ("lesft_client.aggregation:Aggregator.submit", "before", 2),
    "in the midst of submitting": ("lesft_client.aggregation:Watchdog.feed", "before", 2),
    "after submitting": ("lesft_client.aggregation:Aggregator.submit", "after", 2),
    "while it waits for the average": ("lesft_client.aggregation:Aggregator._read", "before", 2),
    "after it has the average": ("lesft_client.aggregation:Aggregator.fetch", "after", 2),
    # The checkpoint: the first is that of round 0, so the third is the one of round 4.
    "before a checkpoint": ("lesft.checkpoints:CheckpointStore.save", "before", 3),
    "between a checkpoint's tensors and its facts": (
        "lesft.checkpoints:write_and_sync",
        "after",
        5,
    ),
    "before a checkpoint is renamed": ("lesft.checkpoints:write_and_sync", "after", 6),
    "after a checkpoint is renamed": ("lesft.checkpoints:Path.rename", "after", 3),
    "before old checkpoints are dropped": (
        "lesft.checkpoints:CheckpointStore._drop",
        "before",
        1,
    ),
    "in the midst of dropping one": ("lesft.checkpoints:shutil.rmtree", "before", 5),
    "after a checkpoint": ("lesft.checkpoints:CheckpointStore.save", "after", 3),
    # The ends.
    "before its first checkpoint": ("lesft.checkpoints:CheckpointStore.save", "before", 1),
    "after the last round": ("lesft_client.link:ServerLink.score", "before", 2),
    "before it writes its result": ("lesft_client.train:TrainCommand._result", "before", 1),
}

SERVER: dict[str, Disturbance] = {
    # The step. Parts come in pairs, so the thirteenth is the first one of the seventh key.
    "when a part has come": ("lesft_server.cohort:Cohort.take", "before", 13),
    "when all parts have come": ("lesft_server.cohort:Cohort._take_step", "before", 7),
    "before the step": ("lesft.back:Back.train_step", "before", 7),
    "after the step": ("lesft.back:Back.train_step", "after", 7),
    "before the ledger is written": ("lesft_server.ledger:Ledger.append", "before", 7),
    "in the midst of an entry": ("lesft_server.ledger:_write", "after", 25),
    "after the ledger is written": ("lesft_server.ledger:Ledger.append", "after", 7),
    "before an answer is sent": ("lesft_server.ledger:Ledger.read", "after", 13),
    "between the two clients' answers": ("lesft_server.ledger:Ledger.read", "after", 14),
    # The checkpoint: the second of three, that of round 4.
    "before the window is closed": ("lesft_server.ledger:Ledger.close_window", "before", 2),
    "before a checkpoint": ("lesft.checkpoints:CheckpointStore.save", "before", 2),
    "between a checkpoint's tensors and its facts": (
        "lesft.checkpoints:write_and_sync",
        "after",
        3,
    ),
    "before a checkpoint is renamed": ("lesft.checkpoints:write_and_sync", "after", 4),
    "after a checkpoint is renamed": ("lesft.checkpoints:Path.rename", "after", 2),
    "before the next window is opened": ("lesft_server.ledger:Ledger.open_window", "before", 2),
    "after the next window is opened": ("lesft_server.ledger:Ledger.open_window", "after", 2),
    "after the checkpoint, before its answers": (
        "lesft_server.journal:Journal.checkpoint",
        "after",
        2,
    ),
    # The ends.
    "when the first client opens": ("lesft_server.run:Run.join", "after", 1),
    "before the first step": ("lesft.back:Back.train_step", "before", 1),
    "before the last checkpoint": ("lesft.checkpoints:CheckpointStore.save", "before", 3),
    "after the last checkpoint": ("lesft.checkpoints:CheckpointStore.save", "after", 3),
    "when the run is finished": ("lesft_server.run:Run.finish", "after", 1),
}

AGGREGATOR: dict[str, Disturbance] = {
    "when a client joins": ("lesft_aggregator.store:Store.join", "after", 1),
    "before a submission is stored": ("lesft_aggregator.store:Store.add_submission", "before", 3),
    "between a submission's file and its row": (
        "lesft_aggregator.store:write_atomically",
        "after",
        4,
    ),
    "after a submission is stored": ("lesft_aggregator.store:Store.add_submission", "after", 3),
    "before averaging": ("lesft_aggregator.rounds:weighted_mean", "before", 2),
    "before publishing": ("lesft_aggregator.store:Store.publish", "before", 2),
    "after publishing": ("lesft_aggregator.store:Store.publish", "after", 2),
    "when a client fetches": ("lesft_aggregator.rounds:Rounds.wait_for_version", "after", 2),
}

PHASES = [
    *(("a", phase, at) for phase, at in CLIENT.items()),
    *(("server", phase, at) for phase, at in SERVER.items()),
    *(("aggregator", phase, at) for phase, at in AGGREGATOR.items()),
]


@pytest.mark.parametrize(
    ("victim", "disturbance"),
    [(victim, at) for victim, _, at in PHASES],
    ids=[f"{victim} {phase}" for victim, phase, _ in PHASES],
)
def test_a_kill_changes_nothing(
    victim: str,
    disturbance: Disturbance,
    zygote: Zygote,
    model: Path,
    tmp_path: Path,
    undisturbed: Outcome,
) -> None:
    with new_run(zygote, tmp_path, model) as run:
        run.start_all(**{victim: disturbance})
        assert run.wait(victim) == -9, run.logs()
        run.start(victim)
        assert run.finish() == undisturbed
    assert undisturbed.steps == 12
