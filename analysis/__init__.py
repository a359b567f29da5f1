"""What evaluate.py needs to turn scores into tables and figures.

figures     curves.png and comparison.png
report      what an evaluation writes and prints; a step of a run as text
statistics  means with intervals, paired differences, runs of one method put together
tables      Markdown
"""
