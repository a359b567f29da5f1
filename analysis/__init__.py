"""What evaluate.py needs to turn scores into tables and figures, and a run into a page.

commands    evaluate.py table, show and report
decisions   a logged question in words: who says what, who is right, which line is whose
figures     curves.png and comparison.png, and curves for a page
history     what a run's folder holds so far
mechanism   where a reference leaves the majority; pass@k; what was unsolvable before
page        report.html; its template is page.html.j2, with question and rubric in it
report      what a run or an evaluation writes and prints
statistics  means with intervals, paired differences, runs of one method put together
tables      scores as tables, and a step of a run as text
"""
