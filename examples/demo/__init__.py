"""`make demo`: pre-training distillation from text to result, on two CPU processes.

stages.py says what is run, runner.py runs it and goes on where it was stopped, progress.py shows
it, report.py makes the figures, the table and the plot of what was found.
"""
