"""TA-VLAD and how it learns: a model, its training loop and its records. Knows neither tar files nor Ray."""
