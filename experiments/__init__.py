"""The experiments, one claim a file.

`understudy lab` runs them; `docs/adding-an-experiment.md` is the recipe.
"""
