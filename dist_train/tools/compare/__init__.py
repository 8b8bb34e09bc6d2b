"""`dist-train compare`: how runs differ, in what they were told and in what came of it. Imports no torch.

runs.py    what a run has recorded: of a folder, or of W&B
groups.py  runs that differ only in the seed; means, and a test of what is better
show.py    on a terminal
files.py   as a page, a picture or a table
"""
