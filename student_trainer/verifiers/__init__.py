"""What counts as a right answer: functions of a model's text and the example that it answers (see docs/data.md).

They know no model and no metric. A verifier of your own is `module:function`, imported from the current directory or an
installed package, and gets the whole text, think tags included.
"""

from student_trainer.verifiers.loading import Verifier, is_right, load_verifier
from student_trainer.verifiers.texts import after_thinking, final_answer

__all__ = ["Verifier", "after_thinking", "final_answer", "is_right", "load_verifier"]
