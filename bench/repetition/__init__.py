"""False alarms of the repetition detector on text that does not loop, and its delay on loops that
were planted: `python -m bench.repetition`. A study, not a timing: the texts are those of the
machine that it runs on, read when it runs."""
