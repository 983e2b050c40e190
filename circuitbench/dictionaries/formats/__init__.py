"""Dictionaries of other projects, and ours in the layout of one of them: a file each."""
