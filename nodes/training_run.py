"""One run of the Train node: learns its concepts and gives their results."""

from collections.abc import Sequence
from dataclasses import replace

import comfy.utils

from ..textual_inversion import UserError
from ..textual_inversion.adapters.comfyui import ComfyModel
from ..textual_inversion.errors import listed
from ..textual_inversion.library import Concept, learn_together, unknown_words
from ..textual_inversion.training import next_of, still_improving
from .concept_run import Notes, Request, Result, TrainingRun
from .files import embeddings_folder, output_folder, temporary_folder
from .live import LiveRun
from .state_file import StateFile, sweep


def run_training(
    model: ComfyModel,
    concepts: Sequence[Concept],
    request: Request,
    lives: Sequence[LiveRun],
    state_files: Sequence[StateFile],
) -> list[Result]:
    """Trains, or resumes unfinished runs of the same settings and pictures.

    One of several concepts that fails is left out of the results, and the panel says why. Raises its error where no
    concept is left.
    """
    with Notes(lives[0]).side_job("Old unfinished runs cannot be removed"):
        sweep(state_files, [temporary_folder(), embeddings_folder(), output_folder()])
    errors: list[Exception] = []
    progress = Progress()
    for concept, live, state_file in zip(concepts, lives, state_files, strict=True):
        own = replace(request, config=replace(request.config, trigger=concept.trigger))
        try:
            dataset = concept.dataset(model, own.config)
        except UserError as error:
            errors.append(error)
            live.end("failed", message=str(error))
            continue
        run = TrainingRun(concept, dataset, own, live, state_file, len(concepts) > 1, progress)
        run.supports_embedding_files = model.supports_embedding_files
        run.read_state()
        if unknown := unknown_words([one.trigger for one in concepts], concept.captions if len(concepts) > 1 else ()):
            run.notes.add(f"{listed(unknown)} in the captions is no concept of this run, so it is read as text.")
        progress.runs.append(run)
    learn_all(model, progress.runs, request.config.concepts_at_once)
    for run in progress.runs:
        if run.result:
            remove_state(run)
    results = [run.result for run in progress.runs if run.result]
    errors += [run.error for run in progress.runs if run.error]
    if not results:
        raise errors[0]
    return results


def learn_all(model: ComfyModel, runs: Sequence[TrainingRun], at_once: int) -> None:
    """Goes through training, step by step."""
    with model.training() as trainable:
        for run in runs:
            run.use(trainable)
        news, reply = learn_together(trainable, runs, at_once), None
        try:
            while (item := next_of(news, reply)) is not None:
                run, step = item
                reply = run.take(step)
        except BaseException:  # ComfyUI's interrupt is not an Exception
            for run in runs:
                run.rescue()
            raise


def remove_state(run: TrainingRun) -> None:
    """Removes the state of a run that is done, unless nobody stopped it and with more steps it goes on from there."""
    with run.notes.side_job("The saved state of this run cannot be removed"):
        run.state_file.remove()
    if run.last and not run.stopped and still_improving(run.last.progress, run.config):
        run.save(run.last, done=True)


class Progress:
    """ComfyUI's progress bar, over all concepts."""

    def __init__(self) -> None:
        self.runs: list[TrainingRun] = []
        self._bar: comfy.utils.ProgressBar | None = None

    def __call__(self) -> None:
        """Moves the bar. Raises ComfyUI's interrupt."""
        positions = [run.position for run in self.runs]
        known = [planned for _, planned in positions if planned]
        average = sum(known) / len(known) if known else 1
        total = sum(planned or average for _, planned in positions)
        self._bar = self._bar or comfy.utils.ProgressBar(int(total))
        self._bar.update_absolute(sum(step for step, _ in positions), int(total))
