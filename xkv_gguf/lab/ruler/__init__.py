"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654), made from a seed and scored on any KV cache.

Tasks are pure: `tasks` lists them, `task.fit` makes samples of a wished length, `score` judges answers. `prompt` and
`run` bring them to a model.
"""
