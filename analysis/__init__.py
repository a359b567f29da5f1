"""What evaluate.py needs to turn scores into tables and figures.

figures     curves.png and comparison.png
mechanism   where a reference leaves the majority; pass@k; what was unsolvable before
report      what an evaluation writes and prints
statistics  means with intervals, paired differences, runs of one method put together
tables      scores as Markdown, and a step of a run as text
"""
