"""A profile of some updates for TensorBoard."""

import tensorflow as tf

from pretraining import console
from pretraining.run_directory import writing


class Profile:
    """Records what the host and the devices do between two steps.

    Args:
      span: updates made when it begins and ends; None for no profile.
      folder: for TensorBoard.
    """

    def __init__(self, span: tuple[int, int] | None, folder: str):
        self._span = span
        self._folder = folder
        self._at_work = False

    def look(self, step: int) -> None:
        """Begins or ends the profile if its time has come.

        Raises:
          InputError: the folder cannot be written to.
        """
        if self._span is None:
            return
        begin, end = self._span
        if step == begin and not self._at_work:
            with writing(self._folder):
                tf.profiler.experimental.start(self._folder)
            self._at_work = True
        elif step == end:
            self.end()

    def end(self) -> None:
        """Ends the profile if it is being recorded, before its time where the run stops."""
        if self._at_work:
            with writing(self._folder):
                tf.profiler.experimental.stop()
            self._at_work = False
            console.say(f"Profile of updates {self._span[0] + 1} and on: {self._folder}")
