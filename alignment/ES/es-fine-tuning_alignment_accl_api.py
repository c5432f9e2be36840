"""Aligns a policy with Evolution Strategies through the scorer service.

    python alignment/ES/es-fine-tuning_alignment_accl_api.py --config alignment/ES/es_alignment.yaml \\
        --policy_model_path MODEL --scorer_url http://HOST:8000 --experiment_dir RUN

Several processes, each with a policy, share the members: --num_engines 4, or torchrun, accelerate launch or srun.

Stop it with Ctrl-C, SIGTERM or SIGUSR1, or let it be killed: the same command goes on where it was. What RUN holds:
config.yaml and manifest.json (of the first start), starts.jsonl (the later ones), metrics.jsonl, tensorboard/, journal.jsonl,
eval/ (held-out answers with scores), checkpoints/, best/ (by the held-out objective) and final/, the last three in Hugging
Face layout.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path

from alignment.config import as_yaml, load_config
from alignment.distributed import Processes, has_launcher, launch, launched
from alignment.errors import UserError, run_main
from alignment.ES.checkpoints import is_finished, left_by_a_run
from alignment.ES.journal import begun_with, check_settings
from alignment.ES.settings import ESSettings
from alignment.prompts import draw_rows, text_hash
from alignment.records import check_writable_folder, load_prompts
from alignment.run_lock import RunLock
from alignment.runs import StopSignal, record_start, write_run_files

EXIT_STOPPED = 128  # plus the signal's number, as shells do


def main() -> int:
    settings = load_config(ESSettings, prog="es-fine-tuning_alignment_accl_api.py", description=__doc__)
    if settings.cuda_devices and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ["CUDA_VISIBLE_DEVICES"] = settings.cuda_devices

    train = draw_rows(load_prompts(settings.train_jsonl, settings.prompt_key), settings.train_samples)
    held_out = draw_rows(load_prompts(settings.eval_jsonl, settings.prompt_key), settings.eval_samples)
    folder = Path(settings.experiment_dir)
    if not has_launcher():
        with suppress(UserError):  # told below, where no other run is at work
            if what_began(folder, settings, train)[2]:
                return tell_finished(folder)  # it may lie where nothing can be written
    for place in (folder, folder / "checkpoints"):
        check_writable_folder(place)
    if settings.engine == "vllm" and find_spec("vllm") is None:
        raise UserError("engine: vllm needs the environment of requirements-cluster.txt; this one has no vLLM")

    if settings.num_engines and settings.num_engines > 1 and not has_launcher():
        what_began(folder, settings, train)  # mistakes are told at once; the processes look again, with the lock
        return launch(settings.num_engines, sys.argv)

    # Before they meet: the others would miss one that left then.
    if settings.num_engines not in (None, launched()):
        raise UserError(f"num_engines is {settings.num_engines}, but {launched()} processes were launched")
    processes = Processes.from_environment(timeout=settings.scorer_max_wait + 1800)
    with RunLock(folder) as lock:

        def take_and_look() -> tuple[bool, dict, bool]:
            lock.take()
            return what_began(folder, settings, train)  # now nobody else writes there

        try:
            begun, known, finished = processes.on_main(take_and_look)
        except UserError as error:  # every process knows it; one says it
            if processes.is_main:
                raise
            return error.exit_code
        if finished:
            processes.close()
            return tell_finished(folder) if processes.is_main else 0
        return train_policy(settings, train, held_out, processes, begun, known)


def what_began(folder: Path, settings: ESSettings, train: list[dict]) -> tuple[bool, dict, bool]:
    """Whether a run was begun in `folder`, the settings in its journal, and whether it is finished.

    Raises UserError when this is not that run.
    """
    left = left_by_a_run(folder)  # before the journal, which a run that begins just now writes first
    begun = os.path.exists(folder / "journal.jsonl")  # no error where one may not look: the folder's check says it
    if begun and not settings.resume:
        raise UserError(f"{folder} holds a run already: give another --experiment_dir, or leave out --resume false")
    known = begun_with(folder / "journal.jsonl") or {}
    if left and not known:
        raise UserError(
            f"{folder} holds {', '.join(left)} but no journal of their run: give another --experiment_dir, or put journal.jsonl "
            "back"
        )
    if known:  # what a glance at the journal tells; the trainer compares the rest, base weights and device
        prompts = [row[settings.prompt_key] for row in train]
        check_settings(known, settings, prompts, folder / "journal.jsonl", "--experiment_dir")
    return begun, known, is_finished(folder, settings.num_iterations)


def tell_finished(folder: Path) -> int:
    print(f"{folder} is finished; a larger --num_iterations would go on with it")
    return 0


def train_policy(
    settings: ESSettings, train: list[dict], held_out: list[dict], processes: Processes, begun: bool, known: dict
) -> int:
    """The run, as one of its processes; returns the exit code."""
    folder = Path(settings.experiment_dir)
    train_prompts = [row[settings.prompt_key] for row in train]
    held_out_prompts = [row[settings.prompt_key] for row in held_out]

    # torch and the models only now, so that a mistake in the settings is told at once.
    from alignment.ES.policy_engine import open_engine
    from alignment.ES.trainer import ESTrainer
    from alignment.scoring.client import ScorerClient

    if len(train) < settings.batch_size and processes.is_main:
        print(
            f"note: batch_size is {settings.batch_size}, but there are {len(train)} training prompts: a step uses them all"
        )
    scorer = ScorerClient(
        settings.scorer_url,
        batch_size=settings.scorer_batch_size,
        max_wait=settings.scorer_max_wait,
        expected_identity=known.get("scorer"),  # of several, "auto" then takes the one that the run began with
    )
    scorer.wait_until_ready()
    with closing(open_engine(settings, train_prompts + held_out_prompts, processes)) as engine:
        engine.check_room(train_prompts, settings.max_new_tokens, settings.train_jsonl)
        engine.check_room(held_out_prompts, settings.max_new_tokens, settings.eval_jsonl)
        trainer = ESTrainer(settings, engine, scorer, train, held_out, folder, processes)
        if not begun and processes.is_main:
            made_of = {"base_weights": trainer.base_hash, "scorer": scorer.identity()}
            prompts = {"train_jsonl": text_hash(train_prompts), "eval_jsonl": text_hash(held_out_prompts)}
            write_run_files(folder, as_yaml(settings), made_of | {"prompts": prompts})
        with StopSignal() as stop:
            try:
                if begun:
                    finished = trainer.run(stop, lambda: record_start(folder, as_yaml(settings)))
                else:
                    finished = trainer.run(stop)
            except UserError as error:  # every process knows it; one says it
                if processes.is_main:
                    raise
                return error.exit_code
    processes.close()
    if finished:
        if processes.is_main:
            print(
                f"finished: the aligned policy is in {folder / 'final'}, the best by held-out objective in {folder / 'best'}"
            )
        return 0
    if processes.is_main:
        print(f"stopped after step {len(trainer.steps)}; go on with: {shlex.join([sys.executable, *sys.argv])}")
    return EXIT_STOPPED + (stop.received or signal.SIGTERM)


if __name__ == "__main__":
    run_main(main)
